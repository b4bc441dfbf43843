"""What sources of files that hold many images each have in common."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar, TypeVar

from data_pipelines import files
from data_pipelines.captions import any_captions
from data_pipelines.records import BadRecord, Cause, Record

_THREADS = 32  # shards that are asked for their size, or scanned, at the same time: most of it is waiting

T = TypeVar("T")


class Shards:
    """A list of files with some records each, one after another.

    Another process that it is sent to asks no file again: it gets what was found here, and makes by `_open` what cannot
    be sent.

    Args:
      name: what the user called them, for messages.
      shards: their paths or addresses, in order.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a file cannot be asked for its size.
    """

    has_captions: bool
    _UNSENT: ClassVar[tuple[str, ...]] = ()  # attributes that `_open` makes: locks, open files, mapped memory
    _ends: Sequence[int]  # number of records up to the end of each shard

    def __init__(self, name: str, shards: Sequence[str]) -> None:
        self.name, self._shards = name, list(shards)
        self._versions = for_each(_version, self._shards)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in self._UNSENT}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open()

    def _open(self) -> None:
        """Makes the attributes that are not sent to another process."""

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Record:
        raise NotImplementedError

    @property
    def signature(self) -> str:
        """Changes when a shard is added, removed or written anew; not when all are moved together."""
        names = (os.path.basename(shard) for shard in self._shards)
        versions = zip(names, self._versions, strict=True)
        text = "\n".join(itertools.chain.from_iterable(versions))
        return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()

    def _locate(self, index: int) -> tuple[str, int]:
        """Shard, and row in it."""
        index = range(len(self))[index]
        number = bisect.bisect_right(self._ends, index)
        return self._shards[number], index - (self._ends[number - 1] if number else 0)

    def _set_counts(self, counts: Sequence[int]) -> None:
        self._ends = list(itertools.accumulate(counts))
        if not len(self):
            raise ValueError(f"data {self.name} holds no records in {len(self._shards)} files; expected one an image")
        self.has_captions = any_captions(self)


def for_each(function: Callable[[str], T], shards: Sequence[str]) -> list[T]:
    """What a function says of each shard, asked in threads; the first exception is raised, and ends the asking."""
    with ThreadPoolExecutor(min(_THREADS, len(shards) or 1)) as pool:
        try:
            return list(pool.map(function, shards))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _version(shard: str) -> str:
    try:
        return files.signature(shard)
    except BadRecord as error:
        if error.cause is Cause.MISSING:
            raise FileNotFoundError(f"data {error}") from error
        raise ValueError(f"data {error}") from error
