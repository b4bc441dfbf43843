"""Parquet tables with an image a row, as the Hugging Face hub keeps them.

The image is a struct {"bytes", "path"} or a binary column, or its path or address stands in one of `PATH_COLUMNS`;
relative paths start at the table's folder. Captions stand under one of `captions.CAPTION_KEYS`, as a text or a list of
texts; `width` and `height` may stand beside.

A row is read with the whole of its row group, and the last groups are kept in memory. The hub's groups have 100 rows;
larger ones read at random are slow: `pack` them first.
"""

from __future__ import annotations

import collections
import contextlib
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from data_pipelines import cache, files
from data_pipelines.captions import CAPTION_KEYS, captions_under
from data_pipelines.lists import folder_of, join
from data_pipelines.records import BadRecord, Cause, Record, first_line, size_under
from data_pipelines.stores import Shards, for_each

if TYPE_CHECKING:
    import pyarrow as pa

IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img", "image_bytes", "bytes")
PATH_COLUMNS = ("image_path", "path", "file_name", "image", "image_url", "url", "URL")

_CACHE_BYTES = 1 << 29  # of row groups in memory, in each process; the one that was read last is always kept


class ParquetTables(Shards):
    """The rows of Parquet files.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a file is damaged or no Parquet file, lacks the columns of the first one, or there are no rows.
      ImportError: pyarrow is not installed.
    """

    _UNSENT = ("_lock", "_groups")

    def __init__(self, name: str, shards: Sequence[str]) -> None:
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError as error:
            raise ImportError(
                f'{name} needs pyarrow: pip install "svg_jax[parquet]" ({error.name} is missing)'
            ) from error
        super().__init__(name, shards)
        self._image, self._columns = _choose_columns(_footer(shards[0])[0], shards[0])
        ends = cache.open_index(self.name, "groups", self._scan, f"{self.signature} {self._columns}")
        counts, ends = ends[: len(shards)], np.asarray(ends[len(shards) :])
        self._group_ends = dict(zip(self._shards, np.split(ends, np.cumsum(counts)[:-1]), strict=True))
        self._open()
        self._set_counts([int(ends[-1]) if len(ends) else 0 for ends in self._group_ends.values()])

    def _open(self) -> None:
        self._lock = threading.Lock()
        self._groups: collections.OrderedDict[tuple[str, int], Future[pa.Table]] = collections.OrderedDict()

    def __getitem__(self, index: int) -> Record:
        shard, row = self._locate(index)
        where = f"{shard}:{row}"
        ends = self._group_ends[shard]
        group = int(np.searchsorted(ends, row, side="right"))
        first = int(ends[group - 1]) if group else 0
        try:
            value = self._read(shard, group).slice(row - first, 1).to_pylist()[0]
        except BadRecord as error:
            raise BadRecord(error.cause, f"{where}: {error}") from error
        except UnicodeDecodeError as error:
            raise BadRecord(Cause.ENCODING, f"{where} holds text that is not UTF-8 ({error})") from error
        except Exception as error:  # pyarrow has many kinds; or the table has become shorter
            raise BadRecord(Cause.STORE, f"{where} cannot be read ({first_line(error)})") from error
        return self._record(value, range(len(self))[index], where, shard)

    def _record(self, value: dict[str, Any], index: int, where: str, shard: str) -> Record:
        image = value.pop(self._image)
        path = image
        if isinstance(image, dict):
            image, path = image["bytes"], image.get("path")
        if not isinstance(image, bytes):
            image = None
            if not path:
                raise BadRecord(Cause.VALUE, f"{where} has nothing under '{self._image}'; expected an image")
            path = join(folder_of(shard), path)
        name = path if isinstance(path, str) and path else where
        return Record(index, name, where, captions_under(value, where), image, size_under(value))

    def _read(self, shard: str, group: int) -> pa.Table:
        """A row group, from memory if it was read before; threads that want the same one wait for one another."""
        key = shard, group
        with self._lock:
            future = self._groups.get(key)
            if not (there := future is not None):
                future = self._groups[key] = Future()
            self._groups.move_to_end(key)
        assert future is not None
        if not there:
            try:
                with _open(shard) as table:
                    future.set_result(table.read_row_group(group, columns=self._columns, use_threads=False))
            except BaseException as error:
                future.set_exception(error)
            with self._lock:
                self._let_go(key if future.exception() else None)
        return future.result()

    def _let_go(self, failed: tuple[str, int] | None) -> None:
        """Forgets a group that could not be read, and the oldest beyond the bytes that may be kept."""
        if failed:
            self._groups.pop(failed, None)
        read = [(key, future.result().nbytes) for key, future in self._groups.items() if _is_read(future)]
        surplus = sum(size for _, size in read) - _CACHE_BYTES
        for key, size in read[:-1]:
            if surplus <= 0:
                break
            del self._groups[key]
            surplus -= size

    def _scan(self) -> Iterator[NDArray[np.int64]]:
        def ends_of(shard: str) -> NDArray[np.int64]:
            schema, rows = _footer(shard)
            missing = sorted(set(self._columns) - set(schema.names))
            if missing:
                raise ValueError(f"table {shard} lacks the columns {missing}, which {self._shards[0]} has")
            return np.cumsum(rows, dtype=np.int64)

        ends = for_each(ends_of, self._shards)
        yield np.array([len(end) for end in ends], np.int64)
        yield from ends


def _choose_columns(schema: pa.Schema, shard: str) -> tuple[str, list[str]]:
    """The column of the image, and all columns to read.

    Raises:
      ValueError: there is none that is known to hold images.
    """
    import pyarrow as pa

    def is_text(kind: pa.DataType) -> bool:
        return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))

    def is_binary(kind: pa.DataType) -> bool:
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))

    kinds = {field.name: field.type for field in schema}
    structs = [n for n, kind in kinds.items() if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0]
    binaries = [n for n in IMAGE_COLUMNS if n in kinds and is_binary(kinds[n])]
    paths = [n for n in PATH_COLUMNS if n in kinds and is_text(kinds[n])]
    found = [*structs, *binaries, *paths]
    if not found:
        raise ValueError(
            f"table {shard} has no column of images; found {', '.join(kinds) or 'none'}, expected a struct with "
            f"'bytes', bytes under {', '.join(IMAGE_COLUMNS)}, or text under {', '.join(PATH_COLUMNS)}"
        )
    others = [name for name in (*(key for key, _ in CAPTION_KEYS), "width", "height") if name in kinds]
    return found[0], [found[0], *others]


def _footer(shard: str) -> tuple[pa.Schema, list[int]]:
    """The columns of a table, and the number of rows of each group.

    Raises:
      ValueError: it is damaged, or no table.
    """
    try:
        with _open(shard) as table:
            groups = range(table.metadata.num_row_groups)
            return table.schema_arrow, [table.metadata.row_group(group).num_rows for group in groups]
    except Exception as error:  # pyarrow has many kinds
        raise ValueError(f"table {shard} is damaged, or no Parquet file ({first_line(error)})") from error


@contextlib.contextmanager
def _open(shard: str) -> Iterator[Any]:
    import pyarrow.parquet as pq

    with (
        files.open_file(shard) as file,
        pq.ParquetFile(file, pre_buffer=True, page_checksum_verification=True) as table,
    ):
        yield table


def _is_read(future: Future[Any]) -> bool:
    return future.done() and future.exception() is None
