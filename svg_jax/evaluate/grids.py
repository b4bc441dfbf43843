"""Grids of pictures as DPG-Bench wants them: number c in row c // 2 and column c % 2, with nothing between them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

Box = tuple[int, int, int, int]  # left, top, right, bottom
Grid = tuple[int, int]  # columns, rows

OFFICIAL = "2x2"
GRIDS: dict[str, Grid] = {OFFICIAL: (2, 2), "1x1": (1, 1)}  # of other programs
MOST_CELLS = 4
COLUMNS = 2
PADDING = 2  # pixels around the pictures in a grid of the SVG-T2I release, which DPG-Bench does not know of
MULTIPLE = 8  # of the sides of pictures, as diffusion models draw them
BLACK = 16  # at most, where a JPEG has rounded it


def grid_of(images: Sequence[Image.Image]) -> Image.Image:
    """Up to 4 pictures of one size as one; of 3, the last place stays black."""
    width, height = images[0].size
    columns, rows = grid_shape(len(images))
    grid = Image.new("RGB", (columns * width, rows * height))
    for number, image in enumerate(images):
        grid.paste(image, cell(grid.size, number, (columns, rows))[:2])
    return grid


def cell(size: tuple[int, int], number: int, grid: Grid) -> Box:
    """Where a picture lies in a grid of this width and height.

    Raises:
        ValueError: The grid cannot be cut into equal pictures; the message goes on after the grid's name.
    """
    (columns, rows), (width, height) = grid, size
    if width % columns or height % rows:
        raise ValueError(f"has {width} x {height} pixels: a grid of {columns} x {rows} equal pictures was expected")
    width, height = width // columns, height // rows
    left, top = number % columns * width, number // columns * height
    return left, top, left + width, top + height


def check_padding(image: Image.Image, grid: Grid) -> None:
    """Whether there is nothing between the pictures of a grid.

    Where the sides of the pictures are multiples of 8, as in almost all, no pixel is decoded.

    Raises:
        ValueError: Black lines surround each, as in grids of the SVG-T2I release; the message goes on after the name.
    """
    sides = list(zip(image.size, grid, strict=True))
    if grid == (1, 1) or all(side % (MULTIPLE * count) == 0 for side, count in sides):
        return
    # Lines that padding would cover, from left to right and from top to bottom.
    across, down = (
        [round(start) + i for start in np.linspace(0, side - PADDING, count + 1) for i in range(PADDING)]
        for side, count in sides
    )
    pixels = np.asarray(image.convert("RGB"))
    if max(pixels[:, across].max(), pixels[down].max()) <= BLACK:
        width, height = image.size
        raise ValueError(
            f"has {width} x {height} pixels, {PADDING} of them around each picture: make it without padding"
        )


def grid_shape(count: int) -> Grid:
    """Columns and rows of a grid of so many pictures."""
    return min(count, COLUMNS), -(-count // COLUMNS)
