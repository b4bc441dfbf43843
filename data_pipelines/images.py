"""Image files to RGB, RGB to one of the crop sizes, a crop to patch tokens.

The crop list, the choice of a crop and the resampling are those of the SVG-T2I release, exact to the byte with one
version of Pillow. `read_for` takes two short cuts where the release halves an image, and says how close it stays.
Sizes are (width, height) as in Pillow; grids are (rows, columns) as in arrays.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import os
from collections.abc import Iterator, Sequence
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from data_pipelines import files
from data_pipelines.records import BadRecord, Cause, Record

Size = tuple[int, int]

# The largest image that is decoded, half a gigabyte in Pillow: a few hundred bytes can claim to be more. Pillow itself
# warns from 2^30 / 12 pixels on and refuses twice that.
MAX_PIXELS = 1 << 27

MAX_RESOLUTION = 1 << 13  # side of a square crop: half of MAX_PIXELS, and a list of crop sizes that is soon made

# Nothing else is tried, whatever Pillow knows: its EPS reader, for one, would run Ghostscript on a stranger's program.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")

_SIXTEEN_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N")

# How an image of each EXIF orientation is put upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_MOST_TO_RESIZE = 16  # a resized image may have so many times the pixels of the crop


def decode(file: str | os.PathLike[str] | BinaryIO, name: str | None = None) -> Image.Image:
    """Reads an image file as 8-bit RGB, upright by its EXIF orientation; of an animation, the first frame.

    Args:
      file: a path or an address, see `files`; or an open binary file, which is read from its beginning.
      name: what to call the file in messages; its path if None.

    Raises:
      BadRecord: the file cannot be read as an image, has more than MAX_PIXELS, or its mode cannot become RGB.
    """
    name = name or str(file)
    if isinstance(file, (str, os.PathLike)):
        file = _content(file)
    with _opened(file, name) as image:
        return _upright_rgb(image)


def upright_size(file: str | os.PathLike[str] | BinaryIO, name: str | None = None) -> Size:
    """(width, height) that `decode` will give, from the header alone.

    Orientation that stands behind the pixels (a PNG may have it there) is not seen.

    Args:
      file: a path or an address, or an open binary file.
      name: what to call the file in messages; its path if None.

    Raises:
      BadRecord: the header cannot be read, or says more than MAX_PIXELS.
    """
    name = name or str(file)
    if isinstance(file, (str, os.PathLike)):
        with _about("image"):
            opened = files.open_file(file)
        with opened:
            return upright_size(opened, name)
    with _opened(file, name) as image:
        return _upright_size(image)


def read(record: Record) -> Image.Image:
    """The image of a record, as `decode` gives it.

    Raises:
      BadRecord: it cannot be read; the message begins with where the record stands.
    """
    with _about(f"{record.where}:"):
        return decode(_file(record), record.path)


@contextlib.contextmanager
def opened(record: Record) -> Iterator[Image.Image]:
    """The image of a record as Pillow opens it, not yet decoded: neither turned nor converted.

    Raises:
      BadRecord: it cannot be read, here or while it is decoded; the message begins with where the record stands.
    """
    with _about(f"{record.where}:"), _opened(_file(record), record.path) as image:
        yield image


def read_for(record: Record, sizes: Sequence[Size], words: tuple[int, int] | None = None) -> Image.Image:
    """The image of a record at its nearest size: `nearest_size` and `crop` of what `read` gives.

    It is that to the byte where the crop does not halve the image. Where it does, two short cuts are
    taken, each only for a side that is even at that point, so that no pixel moves:

    * a JPEG file is decoded at a half, a quarter or an eighth of its size (the decoder leaves high frequencies out);
    * pairs of pixels are averaged in whole numbers, rounded once and not once for each direction.

    On photographs of up to 16 times the crop's sides (four halvings), the PSNR to the exact crop is above 40 dB and the
    mean difference below 2 of 255. Most of that is rounding: the exact way brightens an image by 0.4 with each halving.

    Args:
      record: what to read.
      sizes: to choose from.
      words: as in `crop`.

    Raises:
      BadRecord: it cannot be read; the message begins with where the record stands.
    """
    with opened(record) as image:
        size = _draft(image, sizes)
        rgb = _upright_rgb(image)
    return crop(rgb, size or nearest_size(rgb.size, sizes), words, exact=False)


def with_content(record: Record) -> Record:
    """The record with the content of its image file, for those who use it more than once.

    Raises:
      BadRecord: it cannot be read; the message begins with where the record stands.
    """
    if record.image is not None:
        return record
    with _about(f"{record.where}:"):
        return dataclasses.replace(record, image=_content(record.path).read())


def read_size(record: Record) -> Size:
    """(width, height) of a record's upright image: as the record says, or from the header of the file.

    Raises:
      BadRecord: the header cannot be read; the message begins with where the record stands.
    """
    with _about(f"{record.where}:"):
        return record.size or upright_size(record.path if record.image is None else _file(record), record.path)


def _file(record: Record) -> BinaryIO:
    return _content(record.path) if record.image is None else io.BytesIO(record.image)


def _content(path: str | os.PathLike[str]) -> BinaryIO:
    with _about("image"):
        return io.BytesIO(files.read_bytes(path))


@contextlib.contextmanager
def _about(subject: str) -> Iterator[None]:
    """Puts some words before the message of a BadRecord."""
    try:
        yield
    except BadRecord as error:
        raise BadRecord(error.cause, f"{subject} {error}") from error


@contextlib.contextmanager
def _opened(file: BinaryIO, name: str) -> Iterator[Image.Image]:
    """An image whose header is read; whatever goes wrong with it then is a BadRecord too."""
    try:
        with Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BadRecord(Cause.TOO_LARGE, f"it has {image.width} x {image.height} pixels, above {MAX_PIXELS}")
            yield image
    except BadRecord as error:
        raise BadRecord(error.cause, f"image {name} cannot be used: {error}") from error
    except UnidentifiedImageError as error:
        raise _unknown(file, name) from error
    # Pillow's decoders answer broken bytes with OSError, SyntaxError, struct.error, IndexError and many others.
    except Exception as error:
        cause = _cause(error, file)
        raise BadRecord(cause, f"image {name} cannot be read ({type(error).__name__}: {error})") from error


def _unknown(file: BinaryIO, name: str) -> BadRecord:
    """For bytes that no format of ours accepts."""
    file.seek(0)
    start = file.read(16)
    if not start:
        return BadRecord(Cause.EMPTY, f"image {name} is empty")
    for image_format in FORMATS:
        accepts = Image.OPEN[image_format][1]
        if accepts is not None and accepts(start) is True:
            return BadRecord(Cause.DAMAGED, f"image {name} begins as {image_format} does, but cannot be read as such")
    return BadRecord(Cause.NOT_AN_IMAGE, f"image {name} is none: it begins {start!r}; expected {', '.join(FORMATS)}")


def _cause(error: Exception, file: BinaryIO) -> Cause:
    """What Pillow's error is about."""
    message = str(error).lower()
    # The warning is raised where warnings are errors; "too large" is said of compressed text in a PNG.
    bombs = Image.DecompressionBombError, Image.DecompressionBombWarning, MemoryError
    if isinstance(error, bombs) or "too large" in message:
        return Cause.TOO_LARGE
    if isinstance(error, EOFError) or "truncated" in message:
        return Cause.TRUNCATED
    file.seek(0)
    start = file.read(12)
    if start[:4] == b"RIFF" and start[8:] == b"WEBP":  # whose decoder only says that it fails
        num_bytes = file.seek(0, os.SEEK_END)
        if num_bytes < 8 + int.from_bytes(start[4:8], "little"):
            return Cause.TRUNCATED
    return Cause.DAMAGED


def _orientation(image: Image.Image) -> int:
    """As the EXIF data say; 1 is upright, also where they are broken: the pixels need not be."""
    try:
        # Of a header, the `getexif` of a PNG would decode the pixels in search of more.
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except Exception:  # as from the decoders
        return 1
    return orientation if orientation in _TURNS else 1


def _upright_size(image: Image.Image) -> Size:
    """From the header. Pillow turns TIFF files itself."""
    turned = image.format != "TIFF" and _orientation(image) >= 5
    return (image.height, image.width) if turned else image.size


def _upright_rgb(image: Image.Image) -> Image.Image:
    image.load()
    orientation = _orientation(image)
    rgb = to_rgb(image)
    return rgb if orientation == 1 else rgb.transpose(_TURNS[orientation])


def _draft(image: Image.Image, sizes: Sequence[Size]) -> Size | None:
    """Has a JPEG file decoded at a fraction of its size, where `crop` would halve it as often; the size for that crop.

    None for other formats: only their pixels may say how they stand.
    """
    if image.format not in ("JPEG", "MPO"):
        return None
    full = _upright_size(image)
    size = nearest_size(full, sizes)
    for factor in (8, 4, 2):
        if all(side % factor == 0 and side >= factor * least for side, least in zip(full, size, strict=True)):
            image.draft(None, (image.width // factor, image.height // factor))
            break
    return size


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts any mode with a defined meaning to RGB: transparency over white, 16-bit grey scaled to 8 bits.

    Raises:
      BadRecord: 32-bit integers beyond 16 bits, or floats, whose white is not defined.
    """
    if image.mode in _SIXTEEN_BIT_MODES or image.mode == "I":
        values = np.asarray(image)
        if image.mode == "I" and (values.min() < 0 or values.max() > 65535):
            found = f"{values.min()} to {values.max()}"
            raise BadRecord(Cause.MODE, f"its mode I (32-bit integers) holds {found}; expected 0 to 65535")
        # 65535 = 255 * 257, so this is the division rounded to nearest.
        return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(image, mask=image.getchannel("A"))
        return white
    if image.mode == "F":
        raise BadRecord(Cause.MODE, "its mode F (floats) has no defined white; expected 8 or 16 bits a channel")
    return image if image.mode == "RGB" else image.convert("RGB")


def token_budget(resolution: int, patch_size: int) -> int:
    """Number of patches of the square image, (resolution / patch_size)^2: the most that any crop size has.

    Raises:
      ValueError: the resolution is not a positive multiple of the patch size, or above MAX_RESOLUTION.
    """
    if patch_size < 1:
        raise ValueError(f"patch_size={patch_size} is not above zero; it is the side of a patch in pixels")
    if resolution > MAX_RESOLUTION:
        raise ValueError(f"resolution={resolution} is above {MAX_RESOLUTION}; it is the side of a square in pixels")
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


def crop(image: Image.Image, size: Size, words: tuple[int, int] | None = None, *, exact: bool = True) -> Image.Image:
    """Resizes an image to cover `size` (width, height) and cuts the centre out.

    Large images are first halved with a box filter while both sides are at least twice the target, then resized
    bicubically. For a square target this is the centre crop of ADM (Dhariwal and Nichol, arXiv:2105.05233), the one
    that evaluation uses.

    Of an image much longer than the target, only the window is resized, which may round a value the other way: one
    pixel by 60,000 would become 3 GB first.

    Args:
      image: any size.
      size: of the result.
      words: two random numbers that choose another window than the centre, each uniform over a range much larger than
        the image.
      exact: halve as the release does; else even sides faster, see `read_for`.
    """
    while image.width >= 2 * size[0] and image.height >= 2 * size[1]:
        half = (image.width // 2, image.height // 2)
        if not exact:
            image = image.reduce((2 - image.width % 2, 2 - image.height % 2))
        image = image.resize(half, Image.Resampling.BOX)
    scale = max(size[0] / image.width, size[1] / image.height)
    width, height = round(image.width * scale), round(image.height * scale)
    spare = width - size[0], height - size[1]
    left, top = (s // 2 if words is None else words[i] % (s + 1) for i, s in enumerate(spare))
    window = (left, top, left + size[0], top + size[1])
    if width * height > _MOST_TO_RESIZE * size[0] * size[1]:
        across, down = image.width / width, image.height / height
        box = (left * across, top * down, min(window[2] * across, image.width), min(window[3] * down, image.height))
        return image.resize(size, Image.Resampling.BICUBIC, box)
    return image.resize((width, height), Image.Resampling.BICUBIC).crop(window)


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
    patches[: rows * columns].reshape(tokens.shape)[...] = tokens  # one copy
    return patches, np.array([rows, columns], np.int32)


def unpatchify(patches: NDArray[np.uint8], grid: Sequence[int] | NDArray[np.int32]) -> NDArray[np.uint8]:
    """Puts the patches [budget, p * p * 3] of one image together again: uint8 [rows * p, columns * p, 3]."""
    rows, columns = int(grid[0]), int(grid[1])
    patch_size = math.isqrt(patches.shape[-1] // 3)
    tokens = patches[: rows * columns].reshape(rows, columns, patch_size, patch_size, 3)
    return tokens.swapaxes(1, 2).reshape(rows * patch_size, columns * patch_size, 3)
