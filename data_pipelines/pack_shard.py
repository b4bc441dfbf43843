"""One shard of a packed source: which records it holds, how their images are encoded, what is reported.

Shard i holds the records [i * shard_size, (i + 1) * shard_size) of the source that can be used, in order. It is a
function of the settings and of those records alone, so it does not matter who makes it, nor when, nor how often.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from absl import logging
from etils import epath
from PIL import Image

from data_pipelines import arrayrecords, cache, files, images
from data_pipelines.arrayrecords import printable
from data_pipelines.captions import read_usable
from data_pipelines.records import BadRecord, Record, Source
from data_pipelines.sources import open_source

LOSSLESS = "lossless"
REPORTS = "reports"  # folder of one report a shard

_THREADS = 8  # that read for one shard: a store answers slowly, and decoders run side by side
_AHEAD = 256  # records whose encoded images wait in memory


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides the content of all shards.

    Attributes:
      source: path or address, as `open_source` takes it on any machine: a path is absolute.
      root: where its relative paths start from; likewise.
      signature: of the records that stand in it.
      num_records: in it.
      resolution: side in pixels of the square crop.
      patch_size: side of a patch in pixels.
      max_ratio: longest crop.
      quality: of JPEG, 1 to 100, without chroma subsampling; or "lossless", for WebP.
      shard_size: records of the source that go to one shard, the broken ones among them.
    """

    source: str
    root: str | None
    signature: str
    num_records: int
    resolution: int
    patch_size: int
    max_ratio: float
    quality: int | str
    shard_size: int

    @property
    def num_shards(self) -> int:
        """The last one may be smaller."""
        return -(-self.num_records // self.shard_size)

    def records_of(self, shard: int) -> range:
        """Indices in the source."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.num_records))

    def name_of(self, shard: int) -> str:
        """The file's."""
        return f"pack-{shard:05d}-of-{self.num_shards:05d}{arrayrecords.SUFFIX}"


def pack_shard(shard: int, out: str, settings: Settings) -> None:
    """Writes one shard, unless none of its records can be used, and then its report, which says that it is done.

    The report is a JSON object: `records` of the source, `written` of them, `bytes` of the shard's file, and `broken`,
    a list of {"index", "cause", "message"}.
    """
    broken: list[dict[str, Any]] = []
    records = _packed(_opened(settings.source, settings.root), settings, shard, broken)
    target, size = epath.Path(out) / settings.name_of(shard), 0
    with writing(target) as file:
        written = arrayrecords.write_shard(file, records)
        size = file.stat().st_size
    if not written:  # readers want at least one record
        target.unlink()
        size = 0
    report = {"records": len(settings.records_of(shard)), "written": written, "bytes": size, "broken": broken}
    with writing(report_of(shard, out)) as file:
        file.write_text(json.dumps(report, ensure_ascii=False), encoding="utf-8")
    logging.info("shard %d of %d: %d records, %d broken", shard + 1, settings.num_shards, written, len(broken))


def report_of(shard: int, out: str) -> epath.Path:
    """Where the report of a shard is kept."""
    return epath.Path(out) / REPORTS / f"{shard:05d}.json"


def finished(shard: int, out: str, settings: Settings) -> dict[str, Any] | None:
    """The report of a shard that is there; None if the shard is to be made."""
    try:
        report: dict[str, Any] = json.loads(report_of(shard, out).read_text())
        file = epath.Path(out) / settings.name_of(shard)
        is_whole = not report["written"] or file.stat().length == report["bytes"]
    except (OSError, ValueError, KeyError):
        return None
    return report if is_whole else None


def encode(image: Image.Image, quality: int | str) -> bytes:
    """An RGB image as the content of a JPEG file, or of a lossless WebP file.

    Of 72 views of photographs at 256 px, JPEG of quality 95 has a PSNR of 44 dB (the worst: 40), a mean difference of
    1.1 of 255 (2.0), and 27 kB; quality 85 has 38 dB (33), 1.9 (4.5), 16 kB; lossless WebP has 46 kB.
    """
    stream = io.BytesIO()
    if quality == LOSSLESS:
        image.save(stream, "WEBP", lossless=True)
    else:
        image.save(stream, "JPEG", quality=quality, subsampling=0)
    return stream.getvalue()


@contextlib.contextmanager
def writing(path: epath.Path) -> Iterator[Path]:
    """A local file to write; at the end it becomes `path`, whole or not at all."""
    if not files.is_remote(path):
        with cache.writing(Path(path)) as file:
            yield file
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / path.name
        yield file
        with file.open("rb") as source, path.open("wb") as target:  # an object appears once it is complete
            shutil.copyfileobj(source, target, 1 << 23)


def _packed(source: Source, settings: Settings, shard: int, broken: list[dict[str, Any]]) -> Iterator[Record]:
    """The records of a shard with their new images, in order; those that cannot be used go to `broken`."""
    sizes = images.crop_sizes(settings.resolution, settings.patch_size, settings.max_ratio)

    def pack(index: int) -> Record | dict[str, Any]:
        try:
            record = read_usable(source, index)
            image = images.read_for(record, sizes)
            return dataclasses.replace(record, image=encode(image, settings.quality), size=image.size)
        except BadRecord as error:
            return {"index": index, "cause": error.cause, "message": printable(str(error))}

    indices = settings.records_of(shard)
    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(indices), _AHEAD):
            for packed in pool.map(pack, indices[start : start + _AHEAD]):
                if isinstance(packed, Record):
                    yield packed
                else:
                    broken.append(packed)


@functools.lru_cache(maxsize=1)
def _opened(source: str, root: str | None) -> Source:
    """Once a process, for all of its shards."""
    return open_source(source, root)
