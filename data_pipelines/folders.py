"""A folder of images as a source: ImageNet's layout, or any other depth."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from data_pipelines.records import Record

EXTENSIONS = frozenset(
    (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jp2", ".ppm", ".pgm")
)


class ImageFolder:
    """Every image file below a folder, in the order of their relative paths; a record has no caption.

    A file counts as an image by the end of its name, in small letters or capitals. Names that begin with a dot are left
    out. Links to folders are followed, each folder once. The folder is listed anew each time it is opened: that takes
    seconds for a million files.

    Raises:
      ValueError: there is no image.
      OSError: a folder inside cannot be listed.
    """

    has_captions = False

    def __init__(self, folder: Path) -> None:
        self.name, self._folder = str(folder), folder
        self._files = sorted(images_below(folder, _stop))
        if not self._files:
            raise ValueError(f"folder {folder} holds no images, at any depth; expected {', '.join(sorted(EXTENSIONS))}")

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Record:
        index = range(len(self))[index]
        path = str(self._folder / self._files[index])
        return Record(index, path, path)

    @property
    def signature(self) -> str:
        """Changes when a file is added, removed or renamed; not when its content changes."""
        digest = hashlib.sha256()
        for file in self._files:
            digest.update(os.fsencode(file) + b"\0")
        return digest.hexdigest()


def images_below(folder: Path, on_error: Callable[[OSError], None] | None = None) -> Iterator[str]:
    """Paths relative to the folder; folders that cannot be listed are left out, or are for `on_error`."""
    seen = set()
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=on_error):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in seen:  # a link to a folder that was listed, perhaps to one around it
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inside = os.path.relpath(parent, folder)
        for file in files:
            if not file.startswith(".") and os.path.splitext(file)[1].lower() in EXTENSIONS:
                yield os.path.normpath(os.path.join(inside, file))


def _stop(error: OSError) -> None:
    raise error
