"""Shards that `pack` writes: ArrayRecord files, read at random at the cost of one seek, images and captions together.

A record is a MessagePack map, and the file is written with one record a group and no compression (pictures are
compressed already), so that the same records make the same bytes.

    {"image": bytes of a picture file, "captions": [[text, weight, system prompt], …], "where": text, "size": [w, h]}

The library reads local files alone, so remote shards are copied to the cache folder of every host, whole. Where they
take more disk than that, mount the bucket and name its path (gcsfuse, mountpoint-s3), or keep the data as WebDataset
tars, of which a record is read with one request.
"""

from __future__ import annotations

import collections
import os
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgpack
from absl import logging
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from data_pipelines import cache, files
from data_pipelines.records import BadRecord, Caption, Cause, Record, first_line
from data_pipelines.stores import Shards, for_each

SUFFIX = ".array_record"

# Files that `pack` puts beside its shards, when it begins and when all of them are there.
BEGUN, FINISHED = "pack.json", "report.json"

_WRITER_OPTIONS = "group_size:1,uncompressed"
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"  # for random access, as array_record advises
_READER_BYTES = 1 << 15
_OPEN_READERS = 512  # a process may have 1024 files open, where nobody has raised that
_MANY_BYTES = 10 << 30  # remote shards of more are announced before they are copied


class ArrayRecords(Shards):
    """The records of ArrayRecord files; remote ones are copied to the cache folder, whole, when they are opened.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a file is damaged or no ArrayRecord file, or there are no records.
    """

    _UNSENT = ("_readers", "_lock")

    def __init__(self, name: str, shards: Sequence[str]) -> None:
        super().__init__(name, shards)
        self._open()
        self._announce_copies()
        self._files = dict(zip(self._shards, for_each(_local, self._shards), strict=True))
        self._set_counts(for_each(lambda shard: _count(shard, self._files[shard]), self._shards))

    def _open(self) -> None:
        self._readers: collections.OrderedDict[str, ArrayRecordReader] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __getitem__(self, index: int) -> Record:
        shard, row = self._locate(index)
        where = f"{shard}:{row}"
        try:
            data = self._reader(shard).read([row])[0]
        except RuntimeError as error:  # array_record's only kind
            raise BadRecord(Cause.STORE, f"{where} cannot be read ({first_line(error)})") from error
        return decode_record(data, range(len(self))[index], where)

    def _announce_copies(self) -> None:
        remote = [
            version for shard, version in zip(self._shards, self._versions, strict=True) if files.is_remote(shard)
        ]
        sizes = (version.split()[0] for version in remote)  # a web server need not say them
        num_bytes = sum(int(size) for size in sizes if size.isdecimal())
        if num_bytes > _MANY_BYTES:
            logging.warning(
                "%s: shards of %.1f GiB are copied to %s, those that are not there yet; a mounted bucket or WebDataset "
                "tars need no copy",
                self.name, num_bytes / 2**30, cache.cache_folder(),
            )  # fmt: skip

    def _reader(self, shard: str) -> ArrayRecordReader:
        """Safe in threads, as the reader itself is; the one that was used longest ago is closed when it is let go."""
        with self._lock:
            if shard not in self._readers:
                self._readers[shard] = _open(self._files[shard])
                if len(self._readers) > _OPEN_READERS:
                    self._readers.popitem(last=False)
            self._readers.move_to_end(shard)
            return self._readers[shard]


def encode_record(record: Record) -> bytes:
    """The bytes of a record that holds its image; `where` is kept as the name of the image in messages.

    Raises:
      ValueError: the record holds no image.
    """
    if record.image is None:
        raise ValueError(f"{record.where} holds no image to be written; read the file first")
    value = {
        "image": record.image,
        "captions": [list(caption) for caption in record.captions],
        "where": printable(record.where),
        "size": record.size and list(record.size),
    }
    return bytes(msgpack.packb(value))


def printable(text: str) -> str:
    """Text that UTF-8 can hold: of a file name that is no UTF-8, the bytes that are not are spelled out."""
    return text.encode("utf-8", "backslashreplace").decode()


def check_finished(name: str, found: Iterable[str]) -> None:
    """Raises ValueError if shards are those of a pack that has not ended: some would pass for all.

    Args:
      name: what the user called them.
      found: files, shards among them; of a folder all that stand in it. A local folder of shards is asked anyway.
    """
    there = set(found)
    for folder in {os.path.dirname(file) for file in there if file.endswith(SUFFIX)}:
        begun, finished = (os.path.join(folder, file) for file in (BEGUN, FINISHED))
        if (begun in there or os.path.exists(begun)) and not (finished in there or os.path.exists(finished)):
            raise ValueError(f"the packing of {name} is not finished: run the same command again")


def decode_record(data: bytes, index: int, where: str) -> Record:
    """A record from its bytes.

    Raises:
      BadRecord: they are not those of a record.
    """
    try:
        value = msgpack.unpackb(data)
    except Exception as error:  # of many kinds
        raise BadRecord(
            Cause.KEYS, f"{where} is no record that `python -m data_pipelines.pack` wrote ({first_line(error)})"
        ) from error
    try:
        captions = tuple(Caption(str(text), float(weight), str(prompt)) for text, weight, prompt in value["captions"])
        size = None if value["size"] is None else (int(value["size"][0]), int(value["size"][1]))
        image, path = value["image"], value["where"]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        found = sorted(map(str, value)) if isinstance(value, dict) else f"a {type(value).__name__}"
        raise BadRecord(
            Cause.KEYS, f"{where} holds {found}; expected 'image', 'captions', 'where' and 'size', as pack writes them"
        ) from error
    if not isinstance(image, bytes) or not isinstance(path, str):
        raise BadRecord(Cause.VALUE, f"{where} has a {type(image).__name__} under 'image'; expected bytes")
    return Record(index, path, where, captions, image, size)


def write_shard(path: str | os.PathLike[str], records: Iterable[Record]) -> int:
    """Writes a file of records that hold their images; the same records give the same bytes.

    Args:
      path: a local path. What stands there is no whole shard until this returns: write under another name first.
      records: what to write, in order.

    Returns:
      The number of records.
    """
    writer = ArrayRecordWriter(os.fspath(path), _WRITER_OPTIONS)
    count = 0
    try:
        for record in records:
            writer.write(encode_record(record))
            count += 1
    finally:
        writer.close()
    return count


def _open(file: Path) -> ArrayRecordReader:
    return ArrayRecordReader(str(file), _READER_OPTIONS, file_reader_buffer_size=_READER_BYTES)


def _count(shard: str, file: Path) -> int:
    reader = _open(file)
    count = reader.num_records()  # 0 if the footer is damaged, or this is no such file
    try:
        reader.close()  # and then this says so
    except RuntimeError as error:
        raise ValueError(
            f"shard {shard} is damaged, cut short, or no ArrayRecord file ({first_line(error)}); write or copy it "
            "again, or move it away"
        ) from error
    return int(count)


def _local(shard: str) -> Path:
    file = cache.fetch(shard)
    files.open_file(file).close()  # says what is wrong with it
    return file
