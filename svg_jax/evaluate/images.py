"""Image files as the release's evaluation reads them: as floats, resized, centre crop; batches of them, read ahead."""

from __future__ import annotations

import collections
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from jaxtyping import Float
from PIL import Image

from data_pipelines import images
from data_pipelines.records import BadRecord, Record

Key = TypeVar("Key")
Value = TypeVar("Value")


def read(record: Record, side: int) -> Float[np.ndarray, "side side 3"]:
    """The centre square of an image file, in [-1, 1].

    Raises:
        BadRecord: It cannot be read as an image.
    """
    return centre_square(open_rgb(record), side)


def open_rgb(record: Record) -> Image.Image:
    """An image file, converted to RGB by Pillow as torchvision's `ImageFolder` does it.

    It is not turned by its EXIF orientation, and loses its transparency.

    Raises:
        BadRecord: It cannot be read as an image.
    """
    with images.opened(record) as image:
        return image.convert("RGB")


def centre_square(image: Image.Image, side: int) -> Float[np.ndarray, "side side 3"]:
    """The shorter side resized to `side`, the longer one cut on both ends; values in [-1, 1], not cut to 8 bits.

    The image is resized as floats by a triangle filter that widens where the image shrinks: torchvision's
    `Resize(side)` of a tensor followed by `CenterCrop(side)`, whose PyTorch kernel computes what Pillow computes for
    images of floats.
    """
    width, height = image.size
    short, long = min(width, height), max(width, height)
    resized = (side, int(side * long / short)) if width <= height else (int(side * long / short), side)
    left, top = (round((resized[0] - side) / 2), round((resized[1] - side) / 2))
    pixels = np.asarray(image, np.float32) / 255
    channels = [
        Image.fromarray(np.ascontiguousarray(pixels[..., i])).resize(resized, Image.Resampling.BILINEAR)
        for i in range(3)
    ]
    square = [np.asarray(channel)[top : top + side, left : left + side] for channel in channels]
    return np.stack(square, axis=-1) * 2 - 1


def read_ahead(
    read: Callable[[Key], Value], groups: Sequence[Sequence[Key]], num_threads: int
) -> Generator[list[Value | BadRecord], None, None]:
    """What `read` gives for each index or other key, a group at a time, or the `BadRecord` that it raises.

    One group is read while the caller works on the one before; no more is held.
    """

    def attempt(key: Key) -> Value | BadRecord:
        try:
            return read(key)
        except BadRecord as error:
            return error

    with ThreadPoolExecutor(num_threads) as pool:
        pending: collections.deque[list[Future[Value | BadRecord]]] = collections.deque()
        for group in groups:
            pending.append([pool.submit(attempt, key) for key in group])
            if len(pending) > 1:
                yield [future.result() for future in pending.popleft()]
        while pending:
            yield [future.result() for future in pending.popleft()]
