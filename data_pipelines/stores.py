"""What sources of files that hold many images each have in common."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from data_pipelines import cache, files
from data_pipelines.captions import parse_captions
from data_pipelines.records import BadRecord, Caption, Cause, Record

# Where an object or a row may keep its captions, and the system prompt that goes before; the first that is there
# counts.
CAPTION_KEYS = (
    ("super_high_quality_caption", "align"),
    ("caption", "base"),
    ("captions", "base"),
    ("prompt", "base"),
    ("text", "base"),
    ("TEXT", "base"),
)

_THREADS = 32  # shards that are asked for their size, or scanned, at the same time: most of it is waiting
_PEEKED = 16  # records that tell whether a source has captions

T = TypeVar("T")


class Shards:
    """A list of files with some records each, one after another.

    Args:
      name: what the user called them, for messages.
      shards: their paths or addresses, in order.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a file cannot be asked for its size.
    """

    has_captions: bool
    _ends: Sequence[int]  # number of records up to the end of each shard

    def __init__(self, name: str, shards: Sequence[str]) -> None:
        self.name, self._shards = name, list(shards)
        self._versions = for_each(_version, self._shards)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.name, self._shards)  # open files are opened anew in another process

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Record:
        raise NotImplementedError

    @property
    def signature(self) -> str:
        """Changes when a shard is added, removed or written anew; not when all are moved together."""
        names = (os.path.basename(shard) for shard in self._shards)
        versions = zip(names, self._versions, strict=True)
        return hashlib.sha256("\n".join(itertools.chain.from_iterable(versions)).encode()).hexdigest()

    def beside(self, name: str) -> Path:
        """Where a file about these shards is kept: beside the first one, or in the cache folder if it is remote."""
        if files.is_remote(self._shards[0]):
            return cache.cache_folder() / f"{self._digest}.{name}"
        first = Path(self._shards[0])
        return first.with_name(f"{first.name}.{name}" if len(self._shards) == 1 else f".svg_jax-{self._digest}.{name}")

    @property
    def _digest(self) -> str:
        return hashlib.sha256("\n".join(self._shards).encode()).hexdigest()[:16]

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


def any_captions(source: Any) -> bool:
    """Whether any of the first records of a source has a caption; True also if none of them can be read."""
    read = 0
    for index in range(min(_PEEKED, len(source))):
        try:
            if source[index].captions:
                return True
            read += 1
        except BadRecord:
            continue
    return read == 0


def captions_under(value: dict[str, Any], where: str) -> tuple[Caption, ...]:
    """The captions of an object or a row, under the first of `CAPTION_KEYS` that it has.

    Raises:
      BadRecord: something else than captions stands there.
    """
    for key, system_prompt in CAPTION_KEYS:
        if key in value:
            return parse_captions(value[key], system_prompt, f"{where} '{key}'")
    return ()


def size_under(value: dict[str, Any]) -> tuple[int, int] | None:
    """(width, height), where an object or a row says them."""
    width, height = value.get("width"), value.get("height")
    if type(width) is int and type(height) is int and 0 < width < 2**31 and 0 < height < 2**31:
        return width, height
    return None


def _version(shard: str) -> str:
    try:
        return files.signature(shard)
    except BadRecord as error:
        if error.cause is Cause.MISSING:
            raise FileNotFoundError(f"data {error}") from error
        raise ValueError(f"data {error}") from error
