"""Lists of images with captions: JSON Lines, for any number of records, and JSON.

A record is an object of one of the forms of the SVG-T2I release; `width` and `height` of the upright image may stand
beside.

    {"path": "a.jpg", "prompt": "…"}                                     trained with the system prompt "base"
    {"image_path": "a.jpg", "prompt": "…"}                               the same
    {"image_path": "a.jpg", "super_high_quality_caption": "…"}           trained with the system prompt "align"
    {"path": "a.jpg"}                                                    for the autoencoder, which needs no caption

A caption may also be a list to choose from, see `captions.parse_captions`. Where a record has both kinds of caption,
the detailed one counts, as in the release.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipelines import cache, files
from data_pipelines.captions import any_captions, parse_captions
from data_pipelines.records import BadRecord, Caption, Cause, Record, size_under

_DETAILED, _PLAIN = "super_high_quality_caption", "prompt"
_EXAMPLE = '{"path": "a.jpg", "prompt": "a red square"}'
_SCAN_BYTES = 1 << 24
_MAX_LINE_BYTES = 1 << 26  # a file without line ends is no list: it is not read into memory whole


class _List:
    """What both kinds of list share.

    Args:
      name: path or address, for messages.
      file: the local file.
      root: folder or address that relative paths start from.
    """

    has_captions: bool

    def __init__(self, name: str, file: Path, root: str) -> None:
        self.name, self._file, self._root = name, file, root

    @property
    def signature(self) -> str:
        """Changes when the file is written anew, or its paths start elsewhere."""
        status = self._file.stat()
        root = self._root if files.is_remote(self._root) else os.path.abspath(self._root)
        return f"{status.st_size} {status.st_mtime_ns} {root}"


class JsonLines(_List):
    """One record a line, found through an index of byte offsets that is kept in a file and mapped into memory.

    The index is built when a list is opened for the first time (one pass over the file) and takes 8 bytes a line; all
    processes of a host share its pages. No record is held.

    Raises:
      ValueError: the file is empty.
    """

    def __init__(self, name: str, file: Path, root: str) -> None:
        super().__init__(name, file, root)
        self._ends = cache.open_index(file, "lines", lambda: line_ends(file))
        if not len(self):
            raise ValueError(f"data list {name} is empty; expected one record a line")
        self.has_captions = any_captions(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return JsonLines, (self.name, self._file, self._root)  # a mapped index is opened anew, not copied

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> Record:
        index = range(len(self))[index]
        start, end = int(self._ends[index - 1]) if index else 0, int(self._ends[index])
        where = f"{self.name}:{index + 1}"
        if end - start > _MAX_LINE_BYTES:
            raise BadRecord(
                Cause.TOO_LARGE, f"{where} is a line of {end - start} bytes; expected at most {_MAX_LINE_BYTES}"
            )
        # Opened for each read, so that threads share no position.
        try:
            with self._file.open("rb") as file:
                file.seek(start)
                line = file.read(end - start).strip()
        except OSError as error:
            raise BadRecord(Cause.STORE, f"{where} cannot be read ({error})") from error
        if not line:
            raise BadRecord(Cause.NOT_JSON, f"{where} is an empty line; expected a record such as {_EXAMPLE}")
        try:
            value = json.loads(line)
        except UnicodeDecodeError as error:
            raise BadRecord(Cause.ENCODING, f"{where} is not UTF-8 text ({error}): save the list as UTF-8") from error
        except (ValueError, RecursionError) as error:
            raise BadRecord(Cause.NOT_JSON, f"{where} is not JSON ({error}); found {_shorten(line)}") from error
        return parse_record(value, index, where, self._root)


class JsonList(_List):
    """A JSON list of records, held in memory: for up to some 100,000 records; write JSON Lines beyond.

    Raises:
      ValueError: the file is not JSON, or not a list of something.
    """

    def __init__(self, name: str, file: Path, root: str) -> None:
        super().__init__(name, file, root)
        try:
            values = json.loads(file.read_bytes())
        except UnicodeDecodeError as error:
            raise ValueError(f"data list {name} is not UTF-8 text ({error}): save it as UTF-8") from error
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"data list {name} is not JSON ({error}); a file with one record a line must end in .jsonl"
            ) from error
        if not isinstance(values, list) or not values:
            found = "an empty list" if values == [] else f"a {type(values).__name__}"
            raise ValueError(f"data list {name} holds {found}; expected a list of records such as [{_EXAMPLE}]")
        self._values = values
        self.has_captions = any_captions(self)

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, index: int) -> Record:
        index = range(len(self))[index]
        return parse_record(self._values[index], index, f"{self.name} record {index + 1}", self._root)


def parse_record(value: Any, index: int, where: str, root: str) -> Record:
    """A parsed JSON value to a record; its keys decide the form.

    Args:
      value: what stands in the list.
      index: position in the list.
      where: list and place, for messages.
      root: folder or address that a relative path starts from.

    Raises:
      BadRecord: not an object, no path, or a value of the wrong type.
    """
    if not isinstance(value, dict):
        raise BadRecord(Cause.KEYS, f"{where} is a {type(value).__name__}; expected an object such as {_EXAMPLE}")
    path_keys = ("image_path", "path") if _DETAILED in value else ("path", "image_path")
    key = next((key for key in path_keys if key in value), None)
    if key is None:
        raise BadRecord(
            Cause.KEYS, f"{where} names no image; found the keys {_keys(value)}, expected 'path' or 'image_path'"
        )
    path = value[key]
    if not isinstance(path, str):
        raise BadRecord(Cause.VALUE, f"{where} has a {type(path).__name__} under '{key}'; expected a string")
    if not path.strip() or "\0" in path:
        found = "a path with a zero byte" if path.strip() else "an empty string"
        raise BadRecord(Cause.VALUE, f"{where} has {found} under '{key}'; expected the path of an image")
    try:
        path.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can hold
        raise BadRecord(Cause.ENCODING, f"{where} has a path under '{key}' that is no UTF-8 text ({error})") from error
    captions: tuple[Caption, ...] = ()
    if _DETAILED in value:
        captions = parse_captions(value[_DETAILED], "align", f"{where} '{_DETAILED}'")
    elif _PLAIN in value:
        captions = parse_captions(value[_PLAIN], "base", f"{where} '{_PLAIN}'")
    return Record(index, join(root, path), where, captions, size=size_under(value))


def join(root: str, path: str) -> str:
    """A path as it stands below a folder or an address; an absolute path or an address stays as it is."""
    path = path.removeprefix("file://")
    if files.is_remote(path) or path.startswith("/"):
        return path
    return f"{root.rstrip('/')}/{path}" if files.is_remote(root) else os.path.join(root, path)


def folder_of(path: str) -> str:
    """The folder that a path or an address names something in."""
    folder, slash, _ = path.partition("?")[0].rpartition("/") if files.is_remote(path) else path.rpartition("/")
    return (folder or "/") if slash else "."


def line_ends(path: Path) -> Iterator[NDArray[np.int64]]:
    """The byte offsets where the lines of a file end, in blocks of int64.

    Lines end after a newline byte (never inside a UTF-8 character); the last line may lack it.
    """
    end = last = 0
    with path.open("rb") as file:
        while block := file.read(_SCAN_BYTES):
            ends = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")).astype(np.int64) + (end + 1)
            end += len(block)
            if len(ends):
                last = int(ends[-1])
                yield ends
    if last != end:
        yield np.array([end], np.int64)


def _keys(value: dict[str, Any]) -> str:
    return repr(sorted(value))[:200]


def _shorten(line: bytes, limit: int = 60) -> str:
    text = line[: 4 * limit].decode("utf-8", "replace")
    return repr(text if len(text) <= limit else text[:limit] + "…")
