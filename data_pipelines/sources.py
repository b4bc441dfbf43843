"""Where records come from: captioned images in JSON Lines or JSON files, folders, and prepared data sets.

Lists have records of the two forms of the SVG-T2I release; `width` and `height` of the upright image may stand beside.

    {"path": "a.jpg", "prompt": "…"}                                     trained with the system prompt "base"
    {"image_path": "a.jpg", "super_high_quality_caption": "…"}           trained with the system prompt "align"

A source has a length and gives the record at an index, or raises `BadRecord` for that one index. What is wrong with it
as a whole (missing, empty, unknown kind, a .json file that does not parse) is an error when the source is opened.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from data_pipelines.folders import ImageFolder
from data_pipelines.prepared import PREFIX, PreparedDataset
from data_pipelines.records import BadRecord, Record

# (key of the image, key of the caption, system prompt), the most specific first.
RECORD_FORMS = (
    ("image_path", "super_high_quality_caption", "align"),
    ("path", "prompt", "base"),
)

_SCAN_BYTES = 1 << 24


class Source(Protocol):
    """Random access to records; the index is the record's stable id.

    Attributes:
      name: what to call it in messages.
      has_captions: whether records come with captions.
    """

    name: str
    has_captions: bool

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record:
        """Raises BadRecord if this record cannot be used."""
        ...

    @property
    def signature(self) -> str:
        """Changes when other records stand in it."""
        ...

    def beside(self, name: str) -> Path:
        """Where a file about this source is kept."""
        ...


def open_source(path: str | Path, root: str | Path | None = None) -> Source:
    """Opens a list of records, a folder of images, or a data set of TensorFlow Datasets.

    Args:
      path: a .jsonl or .json file; a folder, whose images at any depth are the records; or `tfds:NAME/SPLIT`.
      root: folder that relative image paths of a list start from, the list's own folder if None; for `tfds:`, the
        folder of prepared data sets.

    Raises:
      FileNotFoundError: there is no such file, folder or data set.
      ValueError: another kind of file, no records, or a .json file that is not a list.
      ImportError: `tfds:` without TensorFlow Datasets.
    """
    if str(path).startswith(PREFIX):
        return PreparedDataset(str(path), root)
    path = Path(path)
    if path.is_dir():
        return ImageFolder(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"data {path} does not exist; expected a .jsonl or .json file of records, a folder of images, or "
            "tfds:NAME/SPLIT"
        )
    root = path.parent if root is None else Path(root)
    if path.suffix == ".jsonl":
        return JsonLines(path, root)
    if path.suffix == ".json":
        return JsonList(path, root)
    raise ValueError(
        f"data list {path} ends in '{path.suffix}'; expected .jsonl (one record a line) or .json (one list)"
    )


class _List:
    """What both kinds of list share."""

    has_captions = True

    def __init__(self, path: Path, root: Path) -> None:
        self.name, self._path, self._root = str(path), path, root

    @property
    def signature(self) -> str:
        """Changes when the file is written anew, or its paths start elsewhere."""
        status = self._path.stat()
        return f"{status.st_size} {status.st_mtime_ns} {self._root.absolute()}"

    def beside(self, name: str) -> Path:
        """Where a file about this list is kept."""
        return self._path.with_name(f"{self._path.name}.{name}")


class JsonLines(_List):
    """One record a line, found by byte offset: 8 bytes of memory a line, and no record held."""

    def __init__(self, path: Path, root: Path) -> None:
        super().__init__(path, root)
        self._offsets = line_offsets(path)
        if len(self) == 0:
            raise ValueError(f"data list {path} is empty; expected one record a line")

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> Record:
        index = range(len(self))[index]
        # Opened for each read, so that threads share no position and the source can be sent to another process.
        with self._path.open("rb") as file:
            file.seek(self._offsets[index])
            line = file.read(self._offsets[index + 1] - self._offsets[index]).strip()
        where = f"{self._path}:{index + 1}"
        if not line:
            raise BadRecord(f"{where} is an empty line; expected a record such as {_example()}")
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadRecord(f"{where} is not JSON ({error}); found {_shorten(line)}") from error
        return parse_record(value, index, where, self._root)


class JsonList(_List):
    """A JSON list of records, held in memory: for up to some 100,000 records; write JSON Lines beyond."""

    def __init__(self, path: Path, root: Path) -> None:
        super().__init__(path, root)
        try:
            values = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"data list {path} is not JSON ({error}); a file with one record a line must end in .jsonl"
            ) from error
        if not isinstance(values, list) or not values:
            found = "an empty list" if values == [] else f"a {type(values).__name__}"
            raise ValueError(f"data list {path} holds {found}; expected a list of records such as [{_example()}]")
        self._values = values

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, index: int) -> Record:
        index = range(len(self))[index]
        return parse_record(self._values[index], index, f"{self._path} record {index + 1}", self._root)


def parse_record(value: Any, index: int, where: str, root: Path) -> Record:
    """A parsed JSON value to a record; its keys decide the form.

    Raises:
      BadRecord: not an object, a missing key, or a value that is not text.
    """
    if not isinstance(value, dict):
        raise BadRecord(f"{where} is a {type(value).__name__}; expected an object such as {_example()}")
    forms = (form for form in RECORD_FORMS if form[0] in value or form[1] in value)
    path_key, caption_key, system_prompt = next(forms, RECORD_FORMS[-1])
    missing = [key for key in (path_key, caption_key) if key not in value]
    if missing:
        expected = " or ".join(f"'{path}' and '{caption}'" for path, caption, _ in RECORD_FORMS)
        raise BadRecord(f"{where} lacks {missing}; found the keys {sorted(value)}, expected {expected}")
    for key in (path_key, caption_key):
        if not isinstance(value[key], str):
            raise BadRecord(f"{where} has a {type(value[key]).__name__} under '{key}'; expected a string")
    if not value[path_key]:
        raise BadRecord(f"{where} has an empty string under '{path_key}'; expected the path of an image")
    width, height = value.get("width"), value.get("height")
    size = None
    if isinstance(width, int) and isinstance(height, int) and width > 0 and height > 0:
        size = width, height
    # An absolute path stays as it is.
    return Record(index, str(root / value[path_key]), value[caption_key], system_prompt, where, size=size)


def line_offsets(path: Path) -> NDArray[np.int64]:
    """Where each line of a file starts, and last where the file ends: int64 [lines + 1].

    Lines end at a newline byte (never inside a UTF-8 character); the last line may lack it.
    """
    starts = [np.zeros(1, np.int64)]
    end = 0
    with path.open("rb") as file:
        while block := file.read(_SCAN_BYTES):
            newlines = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n"))
            starts.append(newlines.astype(np.int64) + (end + 1))
            end += len(block)
    offsets = np.concatenate(starts)
    if offsets[-1] != end:
        offsets = np.append(offsets, end)
    return offsets


def _example() -> str:
    path_key, caption_key, _ = RECORD_FORMS[-1]
    return f'{{"{path_key}": "a.jpg", "{caption_key}": "a red square"}}'


def _shorten(line: bytes, limit: int = 60) -> str:
    text = line.decode("utf-8", "replace")
    return repr(text if len(text) <= limit else text[:limit] + "…")
