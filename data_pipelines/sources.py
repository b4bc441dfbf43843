"""Where records come from: one way to open lists, mixtures, folders, shards and prepared data sets.

A source has a length and gives the record at an index, or raises `BadRecord` for that one index. What is wrong with it
as a whole (missing, empty, unknown kind, a .json file that does not parse) is an error when the source is opened.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from data_pipelines import cache, files
from data_pipelines.arrayrecords import ArrayRecords, check_finished
from data_pipelines.folders import ImageFolder, images_below
from data_pipelines.lists import JsonLines, JsonList, folder_of
from data_pipelines.mixture import Mixture, read_entries
from data_pipelines.parquet import ParquetTables
from data_pipelines.prepared import PREFIX, PreparedDataset
from data_pipelines.records import Source
from data_pipelines.tars import TarShards

# Files that hold many images each, by the end of their names: (name for messages, their addresses) -> source.
SHARDS: dict[str, Callable[[str, list[str]], Source]] = {
    ".array_record": ArrayRecords,
    ".tar": TarShards,
    ".parquet": ParquetTables,
}

_LISTS: dict[str, Callable[[str, Path, str], Source]] = {".jsonl": JsonLines, ".json": JsonList}
_MIXTURES = (".yaml", ".yml")
_KINDS = (
    "a list (.jsonl, .json), a mixture of lists (.yaml), a folder of images, a folder or pattern of "
    f"{', '.join(SHARDS)} files, or tfds:NAME/SPLIT"
)


def open_source(path: str | Path, root: str | Path | None = None) -> Source:
    """Opens records of any kind, by how their path ends.

    | path | records |
    |---|---|
    | `a.jsonl`, `a.json` | a list, see `lists` |
    | `a.yaml`, `a.yml` | a mixture of other sources, see `mixture` |
    | a folder | of the shards that stand in it, or of all images below it |
    | a shard, or a pattern such as `shards/*.tar` | see `arrayrecords`, `tars`, `parquet` |
    | `tfds:NAME/SPLIT` | a prepared data set, see `prepared` |

    Lists, mixtures and shards may also be addresses (`gs://`, `s3://`, `https://`): lists, mixtures and ArrayRecord
    shards are copied to the cache folder (`cache.cache_folder`), once for each version of them.

    Args:
      path: what to open.
      root: folder or address that relative image paths of lists start from, the list's own folder if None (the lists of
        a mixture may have their own); for `tfds:`, the folder of prepared data sets.

    Raises:
      FileNotFoundError: there is no such file, folder or data set.
      ValueError: another kind of file, no records, shards among images, or a list or mixture that does not parse.
      ImportError: a kind whose library is not installed; the message names the extra that brings it.
    """
    name = os.fspath(path).removeprefix("file://")
    root = None if root is None else os.fspath(root).removeprefix("file://")
    if name.startswith(PREFIX):
        return PreparedDataset(name, root)
    remote = files.is_remote(name)
    if not remote and os.path.isdir(name):
        return _open_folder(Path(name))
    kind = _kind(name)
    if kind in _LISTS or kind in _MIXTURES:
        return _open_list(name, kind, root)
    is_pattern = any(character in name for character in ("*[{" if remote else "*?[{"))  # addresses may have a query
    if kind in SHARDS and (not is_pattern if remote else os.path.isfile(name)):
        return SHARDS[kind](name, [name])
    source = _open_shards(name, files.expand(name if is_pattern else f"{name.rstrip('/')}/*"))
    if source is not None:
        return source
    if os.path.exists(name):
        raise ValueError(f"data {name} ends in '{kind}'; expected {_KINDS}")
    raise FileNotFoundError(f"data {name} does not exist; expected {_KINDS}")


def _kind(name: str) -> str:
    """The end of a file's name; an address may have a query behind it."""
    return os.path.splitext(name.partition("?")[0] if files.is_remote(name) else name)[1]


def _open_folder(folder: Path) -> Source:
    found = sorted(map(str, folder.iterdir()))
    has_shards = any(file.endswith(tuple(SHARDS)) for file in found)
    if has_shards and (image := next(images_below(folder), None)):
        raise ValueError(
            f"folder {folder} holds images, such as {image}, and shards: move one kind elsewhere, or name the shards "
            "by a pattern"
        )
    return _open_shards(str(folder), found) or ImageFolder(folder)


def _open_list(name: str, kind: str, root: str | None) -> Source:
    file = cache.fetch(name)
    if not file.is_file():
        raise FileNotFoundError(f"data {name} does not exist, or is no file; expected {_KINDS}")
    if kind in _LISTS:
        return _LISTS[kind](name, file, folder_of(name) if root is None else root)
    entries = read_entries(file, name)
    for number, entry in enumerate(entries, start=1):
        if _kind(entry.path) in _MIXTURES:
            raise ValueError(f"mixture {name} entry {number} is a mixture itself, {entry.path}; name its lists instead")
    return Mixture(name, entries, [open_source(entry.path, entry.root or root) for entry in entries])


def _open_shards(name: str, found: Sequence[str]) -> Source | None:
    """The shards among some files; None if there are none."""
    kinds = {kind: [file for file in found if file.endswith(kind)] for kind in SHARDS}
    kinds = {kind: shards for kind, shards in kinds.items() if shards}
    if len(kinds) > 1:
        raise ValueError(f"data {name} has files that end in {' and '.join(kinds)}; expected one kind, or a pattern")
    check_finished(name, found)
    return next((SHARDS[kind](name, shards) for kind, shards in kinds.items()), None)
