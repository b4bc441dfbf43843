"""What counts as the same picture."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from data_pipelines.duplicates import content_hash, equal_groups, near_groups, perceptual_hash


def scene(seed: int) -> Image.Image:
    """Smooth, as photographs are."""
    coarse = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((480, 360), Image.Resampling.BICUBIC)


def as_jpeg(image: Image.Image, quality: int) -> Image.Image:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality)
    return Image.open(stream)


def distance(one: Image.Image, other: Image.Image) -> int:
    a, b = perceptual_hash(one), perceptual_hash(other)
    assert a is not None
    assert b is not None
    return (a ^ b).bit_count()


@pytest.mark.parametrize("seed", range(4))
def test_encoded_anew_or_resized_a_picture_stays_near_and_others_are_far(seed: int) -> None:
    image = scene(seed)
    assert distance(image, as_jpeg(image, 50)) <= 6
    assert distance(image, image.resize((201, 150))) <= 6
    assert distance(image, image.point(lambda value: value * 7 // 8)) <= 6
    assert min(distance(image, scene(other)) for other in range(4, 8)) >= 16


def test_an_image_of_one_colour_looks_like_nothing() -> None:
    assert perceptual_hash(Image.new("RGB", (64, 64), "red")) is None
    assert near_groups([None, None, 5], 64) == []


def test_equal_groups_are_of_equal_keys() -> None:
    hashes = [content_hash(data) for data in (b"a", b"b", b"a", b"c", b"b", b"a")]
    assert equal_groups(hashes) == [[0, 2, 5], [1, 4]]
    assert equal_groups([None, None]) == []


def test_near_groups_join_through_others_and_across_blocks() -> None:
    random = np.random.default_rng(0)
    hashes = [int(value) for value in random.integers(0, 2**63, 1300)]
    hashes[700], hashes[1299] = hashes[3] ^ 0b111, hashes[3] ^ 0b111111  # 6 bits from 3, but 3 from 700
    assert near_groups(hashes, 2) == []
    assert near_groups(hashes, 3) == [[3, 700, 1299]]
