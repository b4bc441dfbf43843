"""Images to be judged as sources (`data_pipelines.records.Source`): in an array, or as this package generates them."""

from __future__ import annotations

import hashlib
import io
import math
import struct
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from data_pipelines import files
from data_pipelines.records import BadRecord, Cause, Record, Source
from svg_jax.evaluate.fid.statistics_file import DAMAGED
from svg_jax.evaluate.generated import open_generated

MEMBER = "arr_0"
LOCAL_HEADER = 30  # bytes of a zip member's header before its name and extra field


class ImageArray:
    """Images in an uncompressed `.npz`, as ADM's and other sampling scripts write them.

    `arr_0` is uint8 [images, height, width, 3]. It is mapped, not read: memory does not grow with it.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It holds no such array, or a compressed one.
    """

    has_captions = False

    def __init__(self, path: str) -> None:
        self.name = path
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no file of images {path} on this machine")
        self._images, self._checksum = mapped(path)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Record:
        """As a bitmap file: that costs a copy, and images come in one form wherever they are from."""
        where = f"{self.name} image {index}"
        return Record(index, where, where, image=bitmap(Image.fromarray(np.ascontiguousarray(self._images[index]))))

    @property
    def signature(self) -> str:
        """Changes with the images: the checksum that the archive holds of them."""
        return f"{self._images.shape} {self._checksum:08x}"


class GeneratedPictures:
    """The pictures that `python -m svg_jax.evaluate generate` drew, also those of DPG-Bench's grids one by one.

    Raises:
        ValueError: Some are missing; the message says which.
    """

    has_captions = False

    def __init__(self, folder: str) -> None:
        self.name = folder
        self._generated = open_generated(folder)

    def __len__(self) -> int:
        return len(self._generated.entries) * self._generated.num_images

    @property
    def settings(self) -> Mapping[str, Any]:
        """How they were drawn."""
        return self._generated.settings

    def file(self, index: int) -> str:
        """That holds a picture."""
        place, sample = divmod(index, self._generated.num_images)
        return str(self._generated.path(self._generated.entries[place], sample))

    def __getitem__(self, index: int) -> Record:
        path = self.file(index)
        if not self._generated.is_grid:
            return Record(index, path, path)
        place, sample = divmod(index, self._generated.num_images)
        try:
            image = bitmap(self._generated.picture(self._generated.entries[place], sample))
        except (OSError, ValueError) as error:
            raise BadRecord(Cause.DAMAGED, str(error)) from error
        where = f"{path}[{sample}]"
        return Record(index, where, where, image=image)

    @property
    def signature(self) -> str:
        """Changes with the settings of the pictures."""
        return self._generated.manifest


def stamp(source: Source, indices: Iterable[int]) -> str:
    """Changes when the file of one of these pictures is written anew, by sizes and times.

    Empty where they come out of an archive: then the signature of the source changes with them.
    """
    digest = hashlib.sha256()
    for index in indices:
        try:
            if isinstance(source, GeneratedPictures):
                file = source.file(index)
            else:
                record = source[index]
                if record.image is not None:
                    return ""
                file = record.path
            written = files.signature(file)
        except BadRecord as error:
            written = str(error)
        digest.update(f"{written}\n".encode(errors="replace"))
    return digest.hexdigest()[:16]


def bitmap(image: Image.Image) -> bytes:
    """An image file that is quickly written and read."""
    data = io.BytesIO()
    image.save(data, format="BMP")
    return data.getvalue()


def mapped(path: str) -> tuple[UInt8[np.ndarray, "images height width 3"], int]:
    """The array as a map of the file, and the checksum that the archive holds of it.

    Raises:
        ValueError: There is none, it holds something else, or it is compressed or cut off.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            info = archive.getinfo(f"{MEMBER}.npy")
            if info.compress_type != zipfile.ZIP_STORED:
                raise ValueError("it is compressed: write it with numpy.savez instead of savez_compressed")
            with archive.open(info) as stream:
                version = np.lib.format.read_magic(stream)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, by_columns, dtype = read(stream)
                start = stream.tell()
    except DAMAGED as error:
        raise ValueError(
            f"{path} holds no images as arr_0 ({error}): expected an .npz of them, or of mu and sigma"
        ) from error
    if dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or min(shape) < 1 or by_columns:
        raise ValueError(f"arr_0 in {path} is {dtype} {shape}: expected uint8 [images, height, width, 3], row by row")
    if start + math.prod(shape) != info.file_size:
        raise ValueError(f"arr_0 in {path} has {info.file_size - start} bytes and not those of {shape}: write it anew")
    with Path(path).open("rb") as file:
        file.seek(info.header_offset)
        name, extra = struct.unpack("<HH", file.read(LOCAL_HEADER)[-4:])
    offset = info.header_offset + LOCAL_HEADER + name + extra + start
    return np.memmap(path, dtype, mode="r", offset=offset, shape=shape), info.CRC
