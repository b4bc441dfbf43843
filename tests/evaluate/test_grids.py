from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from svg_jax.evaluate.grids import cell, check_padding, grid_of, grid_shape
from tests.evaluate.test_generated import HEIGHT, WIDTH, picture, same


@pytest.mark.parametrize(("count", "size"), [(1, (WIDTH, HEIGHT)), (2, (64, 16)), (3, (64, 32)), (4, (64, 32))])
def test_grids(count: int, size: tuple[int, int]) -> None:
    grid = grid_of([picture(number) for number in range(count)])
    assert grid.size == size
    assert all(same(grid.crop(cell(size, number, grid_shape(count))), picture(number)) for number in range(count))


def padded(grid: Image.Image) -> Image.Image:
    """With 2 black pixels around each of 2 x 2 pictures."""
    pixels = np.array(grid)
    for start in (0, grid.width // 2 - 1, grid.width - 2):
        pixels[:, start : start + 2] = 0
    for start in (0, grid.height // 2 - 1, grid.height - 2):
        pixels[start : start + 2] = 0
    return Image.fromarray(pixels)


def test_padding_is_seen_in_the_pixels_and_not_in_the_size() -> None:
    for side in (102, 134, 1006):
        check_padding(picture(0, (side, side)), (2, 2))
        with pytest.raises(ValueError, match="make it without padding"):
            check_padding(padded(picture(0, (side, side))), (2, 2))
    check_padding(Image.new("RGB", (128, 128)), (2, 2))  # the night
    check_padding(Image.new("RGB", (134, 134)), (1, 1))
