"""WebDataset shards: tar files in which the members of a record stand one after another, under one key.

    000017.jpg  000017.txt  000017.json  000018.webp  000018.cls  …

The key is the path up to the first dot of its last part, as WebDataset reads it. A record needs an image; its caption
is the text of `.txt` or `.caption`, or what stands under one of `captions.CAPTION_KEYS` in `.json`; `.cls` names a
class and is no caption. Members of other kinds are let be.

Each shard is scanned once, for where the records start and end; that index is kept (see `cache.open_index`), so that
any record costs one seek, or one request where the shard is remote.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipelines import cache, files
from data_pipelines.captions import captions_under, parse_captions
from data_pipelines.folders import EXTENSIONS
from data_pipelines.records import BadRecord, Caption, Cause, Record, size_under
from data_pipelines.stores import Shards, for_each

_TEXTS = (".txt", ".caption")
_USEFUL = EXTENSIONS | {*_TEXTS, ".json"}
_NUMBERS = 2  # a record in the index: where it starts and where it ends, in bytes


class TarShards(Shards):
    """The records of tar files, at random.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a file is damaged or no tar file, a key stands in two places of it, or there are no records.
    """

    _UNSENT = ("_counts", "_places")

    def __init__(self, name: str, shards: Sequence[str]) -> None:
        super().__init__(name, shards)
        self._open()
        self._set_counts(self._counts.tolist())

    def _open(self) -> None:
        # One index for all: as many mapped files as shards would be more than a process may have open.
        index = cache.open_index(self.name, "records", self._scan, version=self.signature)
        self._counts, self._places = index[: len(self._shards)], index[len(self._shards) :].reshape(-1, _NUMBERS)

    def __getitem__(self, index: int) -> Record:
        shard, row = self._locate(index)
        index = range(len(self))[index]
        start, end = (int(place) for place in self._places[index])
        try:
            part = files.read_bytes(shard, start=start, end=end)
        except BadRecord as error:
            raise BadRecord(error.cause, f"{shard} record {row + 1}: {error}") from error
        try:
            with tarfile.open(fileobj=io.BytesIO(part), mode="r:") as tar:
                members = {member.name: _content(tar, member) for member in tar if member.isfile()}
        except (tarfile.TarError, EOFError, ValueError) as error:
            raise BadRecord(
                Cause.STORE, f"{shard} record {row + 1}, at byte {start}, is damaged ({error}); copy the file again"
            ) from error
        return _record(members, index, shard)

    def _scan(self) -> Iterator[NDArray[np.int64]]:
        versions = dict(zip(self._shards, self._versions, strict=True))

        def scanned(shard: str) -> NDArray[np.int64]:
            places = (np.array(place, np.int64) for place in _scan(shard))
            return cache.open_index(shard, "members", lambda: places, versions[shard])

        # All shards at once, then one after another from their own indices: not all of them fit into memory.
        yield np.array(for_each(lambda shard: len(scanned(shard)) // _NUMBERS, self._shards), np.int64)
        for shard in self._shards:
            yield scanned(shard)


def split_name(name: str) -> tuple[str, str]:
    """Key and kind of a member: ("a/b", ".seg.png") of "a/b.seg.PNG"; the kind is empty where there is none."""
    match = re.fullmatch(r"((?:.*/)?[^./][^./]*)(\.[^/]*)", name, re.DOTALL)
    return (match[1], match[2].lower()) if match else (name, "")


def _scan(shard: str) -> Iterator[tuple[int, int]]:
    """First byte, and last byte + 1, of each run of members with one key that have a use."""
    seen: set[str] = set()
    current, start, end, useful = "", 0, 0, False
    try:
        with files.open_file(shard) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # it would keep them all
                key, kind = split_name(member.name)
                if not member.isfile() or not kind:
                    continue
                if key != current:
                    if useful:
                        yield start, end
                    if key in seen:
                        raise ValueError(
                            f"shard {shard} has members of '{key}' in two places; expected each record's members one "
                            "after another, as `tar --sort=name` puts them"
                        )
                    seen.add(key)
                    current, start, useful = key, member.offset, False
                end = tar.offset  # where the next header stands
                useful = useful or kind in _USEFUL
            # tarfile takes a damaged header for the end, and a file may stop in the middle of its last member.
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE).strip(b"\0") or file.seek(0, io.SEEK_END) < tar.offset:
                raise tarfile.ReadError(f"no member and no end at byte {tar.offset}")
            if useful:
                yield start, end
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(
            f"shard {shard} is damaged, compressed, or no tar file ({error}); expected an uncompressed .tar"
        ) from error
    except BadRecord as error:
        raise ValueError(f"shard {error}") from error


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    data = file.read() if file is not None else b""
    if len(data) != member.size:
        raise EOFError(f"{member.name} is cut short")
    return data


def _record(members: dict[str, bytes], index: int, shard: str) -> Record:
    kinds = {split_name(name)[1]: name for name in members}
    image = next((name for kind, name in kinds.items() if kind in EXTENSIONS), None)
    if image is None:
        raise BadRecord(Cause.KEYS, f"{shard}:{next(iter(members), '')} has no image; found the kinds {sorted(kinds)}")
    where = f"{shard}:{image}"
    captions: tuple[Caption, ...] = ()
    size = None
    for kind in _TEXTS:
        if kind in kinds:
            captions = parse_captions(_text(members[kinds[kind]], where, kind), "base", f"{where} {kind}")
            break
    if ".json" in kinds:
        value = _json(members[kinds[".json"]], where)
        captions = captions or captions_under(value, where)
        size = size_under(value)
    return Record(index, image, where, captions, members[image], size)


def _text(data: bytes, where: str, kind: str) -> str:
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise BadRecord(Cause.ENCODING, f"{where} {kind} is not UTF-8 text ({error})") from error


def _json(data: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(_text(data, where, ".json"))
    except BadRecord:
        raise
    except (ValueError, RecursionError) as error:
        raise BadRecord(Cause.NOT_JSON, f"{where} .json is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise BadRecord(Cause.KEYS, f"{where} .json is a {type(value).__name__}; expected an object")
    return value
