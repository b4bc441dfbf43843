"""Images that come more than once: equal bytes, or pictures that look alike."""

from __future__ import annotations

import collections
import functools
import hashlib
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_SIDE = 32  # pixels of the thumbnail that is transformed
_KEPT = 8  # lowest frequencies a side: 8 x 8 = 64 bits
_FLAT = 2.0  # a thumbnail with a standard deviation (of 255) below this is of one colour: noise would decide its bits
_ROWS = 512  # hashes that are compared with all others at a time


def content_hash(data: bytes) -> bytes:
    """16 bytes that differ where the files differ."""
    return hashlib.blake2b(data, digest_size=16).digest()


def perceptual_hash(image: Image.Image) -> int | None:
    """64 bits that stay nearly the same when a picture is encoded anew, resized or slightly retouched.

    The signs, relative to their median, of the lowest frequencies of a discrete cosine transform of the grey thumbnail
    ("pHash": Zauner, Implementation and benchmarking of perceptual image hash functions, 2010, section 3.2.1). None for
    an image of one colour, which has no such signs.
    """
    grey = np.asarray(image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.BOX), np.float64)
    if grey.std() < _FLAT:
        return None
    basis = _cosines()
    low = (basis @ grey @ basis.T).ravel()
    bits = low > np.median(low[1:])  # the first is the mean brightness
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def equal_groups(keys: Sequence[Hashable]) -> list[list[int]]:
    """Positions that hold the same key, where there are several; None is no key."""
    places: dict[Hashable, list[int]] = collections.defaultdict(list)
    for place, key in enumerate(keys):
        if key is not None:
            places[key].append(place)
    return [group for group in places.values() if len(group) > 1]


def near_groups(hashes: Sequence[int | None], max_distance: int) -> list[list[int]]:
    """Positions whose hashes differ in at most `max_distance` bits, directly or through others; in order.

    Every pair is compared: 10,000 hashes take half a second.
    """
    places = [place for place, value in enumerate(hashes) if value is not None]
    values: NDArray[np.uint64] = np.array([hashes[place] for place in places], np.uint64)
    leader = list(range(len(places)))

    def first_of(i: int) -> int:
        while leader[i] != i:
            leader[i] = leader[leader[i]]
            i = leader[i]
        return i

    for start in range(0, len(values), _ROWS):
        distances = np.bitwise_count(values[start : start + _ROWS, None] ^ values[None, :])
        for row, column in np.argwhere(distances <= max_distance):
            one, other = sorted((first_of(start + int(row)), first_of(int(column))))
            leader[other] = one
    return [[places[i] for i in group] for group in equal_groups([first_of(i) for i in range(len(places))])]


@functools.cache
def _cosines() -> NDArray[np.float64]:
    """The lowest rows of the transform's matrix (DCT-II): [_KEPT, _SIDE]."""
    frequency, place = np.arange(_KEPT)[:, None], np.arange(_SIDE)[None, :]
    return np.cos(np.pi * frequency * (2 * place + 1) / (2 * _SIDE))
