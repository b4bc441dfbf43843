"""Image files to RGB, RGB to one of the crop sizes, a crop to patch tokens.

The crop list, the choice of a crop and the resampling are those of the SVG-T2I release, exact to the byte with one
version of Pillow. Sizes are (width, height) as in Pillow; grids are (rows, columns) as in arrays.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

from data_pipelines.records import BadRecord, Record

Size = tuple[int, int]

_SIXTEEN_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N")


def decode(file: str | os.PathLike[str] | BinaryIO, name: str | None = None) -> Image.Image:
    """Reads an image file as 8-bit RGB, upright by its EXIF orientation; of an animation, the first frame.

    Args:
      file: a path, or an open binary file.
      name: what to call the file in messages; its path if None.

    Raises:
      BadRecord: the file cannot be read as an image, or its mode cannot become RGB.
    """
    name = name or str(file)
    try:
        with Image.open(file) as image:
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return to_rgb(image)
    except FileNotFoundError as error:
        raise BadRecord(f"image {name} does not exist") from error
    except BadRecord as error:
        raise BadRecord(f"image {name} cannot be used: {error}") from error
    # Pillow's decoders answer broken bytes with OSError, SyntaxError, struct.error, IndexError and many others.
    except Exception as error:
        raise BadRecord(f"image {name} cannot be read ({type(error).__name__}: {error})") from error


def upright_size(file: str | os.PathLike[str] | BinaryIO, name: str | None = None) -> Size:
    """(width, height) that `decode` will give, from the header alone.

    Orientation that stands behind the pixels (a PNG may have it there) is not seen.

    Args:
      file: a path, or an open binary file.
      name: what to call the file in messages; its path if None.

    Raises:
      BadRecord: the header cannot be read.
    """
    name = name or str(file)
    try:
        with Image.open(file) as image:
            # Pillow turns TIFF files itself; its `getexif` of a PNG would decode the pixels in search of more.
            orientation = 1 if image.format == "TIFF" else Image.Image.getexif(image).get(ExifTags.Base.Orientation)
            return (image.height, image.width) if orientation in (5, 6, 7, 8) else image.size
    except FileNotFoundError as error:
        raise BadRecord(f"image {name} does not exist") from error
    except Exception as error:  # as in `decode`
        raise BadRecord(f"image {name} cannot be read ({type(error).__name__}: {error})") from error


def read(record: Record) -> Image.Image:
    """The image of a record, as `decode` gives it.

    Raises:
      BadRecord: it cannot be read; the message begins with where the record stands.
    """
    try:
        return decode(_file(record), record.path)
    except BadRecord as error:
        raise BadRecord(f"{record.where}: {error}") from error


def read_size(record: Record) -> Size:
    """(width, height) of a record's upright image: as the record says, or from the header of the file.

    Raises:
      BadRecord: the header cannot be read; the message begins with where the record stands.
    """
    try:
        return record.size or upright_size(_file(record), record.path)
    except BadRecord as error:
        raise BadRecord(f"{record.where}: {error}") from error


def _file(record: Record) -> str | BinaryIO:
    return record.path if record.image is None else io.BytesIO(record.image)


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts any mode with a defined meaning to RGB: transparency over white, 16-bit grey scaled to 8 bits.

    Raises:
      BadRecord: 32-bit integers beyond 16 bits, or floats, whose white is not defined.
    """
    if image.mode in _SIXTEEN_BIT_MODES or image.mode == "I":
        values = np.asarray(image)
        if image.mode == "I" and (values.min() < 0 or values.max() > 65535):
            raise BadRecord(f"its mode I (32-bit integers) holds {values.min()} to {values.max()}; expected 0 to 65535")
        # 65535 = 255 * 257, so this is the division rounded to nearest.
        return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(image, mask=image.getchannel("A"))
        return white
    if image.mode == "F":
        raise BadRecord("its mode F (floats) has no defined white; expected 8 or 16 bits a channel")
    return image if image.mode == "RGB" else image.convert("RGB")


def token_budget(resolution: int, patch_size: int) -> int:
    """Number of patches of the square image, (resolution / patch_size)^2: the most that any crop size has.

    Raises:
      ValueError: the resolution is not a positive multiple of the patch size.
    """
    if resolution <= 0 or resolution % patch_size:
        below = max(resolution // patch_size, 1) * patch_size
        raise ValueError(
            f"resolution={resolution} is not a multiple of the patch size {patch_size}; "
            f"choose {below} or {below + patch_size}"
        )
    return (resolution // patch_size) ** 2


def crop_sizes(resolution: int, patch_size: int, max_ratio: float = 4.0) -> list[Size]:
    """The (width, height) sizes that an image may be cropped to, from wide to tall.

    With n = (resolution / patch_size)^2 patches to spend, the candidates (w, h), in patches, lie on the staircase under
    w * h = n: from (n, 1), h grows while (h + 1) * w <= n, else w shrinks. So every size has at most n patches. Kept
    are those with max(w, h) / min(w, h) <= max_ratio and both sides even when counted in whole pairs of patches,
    floor(side / 2) even; with the release's patch of 16 that is floor(pixels / 32) even, which keeps 336 and drops 352.

    So the square is among them where resolution / patch_size is 0 or 1 modulo 4, as at all released resolutions. Where
    the rule keeps nothing (6 patches a side and max_ratio 1) the square alone is the list.
    """
    if not max_ratio >= 1:  # nor NaN
        raise ValueError(f"max_ratio={max_ratio} is not at least 1; it is the longer side over the shorter one")
    budget = token_budget(resolution, patch_size)
    sizes = []
    width, height = budget, 1
    while width > 0:
        ratio = max(width, height) / min(width, height)
        if ratio <= max_ratio and (width // 2) % 2 == 0 and (height // 2) % 2 == 0:
            sizes.append((width * patch_size, height * patch_size))
        if (height + 1) * width <= budget:
            height += 1
        else:
            width -= 1
    return sizes or [(resolution, resolution)]


def nearest_size(image_size: Size, sizes: Sequence[Size]) -> Size:
    """The size of nearest aspect ratio: it keeps the largest share of the image, min(W/w, H/h) / max(W/w, H/h).

    Ties go to the larger (width, height), compared as pairs.
    """
    w, h = image_size
    return max(sizes, key=lambda size: (min(size[0] / w, size[1] / h) / max(size[0] / w, size[1] / h), size))


def crop(image: Image.Image, size: Size, words: tuple[int, int] | None = None) -> Image.Image:
    """Resizes an image to cover `size` (width, height) and cuts the centre out.

    Large images are first halved with a box filter while both sides are at least twice the target, then resized
    bicubically. For a square target this is the centre crop of ADM (Dhariwal and Nichol, arXiv:2105.05233), the one
    that evaluation uses.

    Args:
      image: any size.
      size: of the result.
      words: two random numbers that choose another window than the centre, each uniform over a range much larger than
        the image.
    """
    while image.width >= 2 * size[0] and image.height >= 2 * size[1]:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(size[0] / image.width, size[1] / image.height)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    spare = image.width - size[0], image.height - size[1]
    left, top = (s // 2 if words is None else words[i] % (s + 1) for i, s in enumerate(spare))
    return image.crop((left, top, left + size[0], top + size[1]))


def patchify(
    image: Image.Image | NDArray[np.uint8], patch_size: int, budget: int
) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """Cuts an RGB image [H, W, 3] into patch tokens, padded with zeros to a fixed budget.

    Returns:
      patches: uint8 [budget, patch_size * patch_size * 3], in row-major order, inside a patch (row, column, channel)
        with the channel fastest.
      grid: int32 [2], (rows, columns); the first rows * columns patches are the image.
    """
    pixels = np.asarray(image)
    height, width, channels = pixels.shape
    if height % patch_size or width % patch_size:
        raise ValueError(f"an image of {width} x {height} pixels does not divide into patches of {patch_size}")
    rows, columns = height // patch_size, width // patch_size
    if rows * columns > budget:
        raise ValueError(f"{rows} x {columns} patches exceed the token budget {budget}")
    tokens = pixels.reshape(rows, patch_size, columns, patch_size, channels).swapaxes(1, 2)
    patches = np.zeros((budget, patch_size * patch_size * channels), np.uint8)
    patches[: rows * columns] = tokens.reshape(rows * columns, -1)
    return patches, np.array([rows, columns], np.int32)


def unpatchify(patches: NDArray[np.uint8], grid: Sequence[int] | NDArray[np.int32]) -> NDArray[np.uint8]:
    """Puts the patches [budget, p * p * 3] of one image together again: uint8 [rows * p, columns * p, 3]."""
    rows, columns = int(grid[0]), int(grid[1])
    patch_size = math.isqrt(patches.shape[-1] // 3)
    tokens = patches[: rows * columns].reshape(rows, columns, patch_size, patch_size, 3)
    return tokens.swapaxes(1, 2).reshape(rows * patch_size, columns * patch_size, 3)
