"""What stands in a source: a deterministic sample of its records, read as training reads them."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from PIL import Image

from data_pipelines import files, images
from data_pipelines.captions import choose
from data_pipelines.duplicates import content_hash, perceptual_hash
from data_pipelines.images import Size
from data_pipelines.order import shuffled_index
from data_pipelines.records import BadRecord, Caption, Cause, Record
from data_pipelines.sources import Source
from data_pipelines.text import Tokenizer, full_prompt

_NO_LIMIT = 1 << 30  # tokens: captions are counted whole


@dataclasses.dataclass(frozen=True)
class Seen:
    """A record that can be used.

    Attributes:
      index: position in the source.
      size: (width, height) of the upright image.
      crop: (width, height) that it is cropped to.
      captions: as the record has them.
      tokens: of each caption with its system prompt, start token included.
      content: differs where the image files differ.
      likeness: 64 bits that are nearly equal for pictures that look alike; None for an image of one colour.
    """

    index: int
    size: Size
    crop: Size
    captions: tuple[Caption, ...]
    tokens: tuple[int, ...]
    content: bytes
    likeness: int | None

    @property
    def scale(self) -> float:
        """By how much the image is resized before the crop; above 1 it is enlarged."""
        return max(self.crop[0] / self.size[0], self.crop[1] / self.size[1])

    @property
    def share_cut(self) -> float:
        """Share of the image that lies outside the crop."""
        return 1 - self.crop[0] * self.crop[1] / (self.size[0] * self.size[1] * self.scale**2)


@dataclasses.dataclass(frozen=True)
class Broken:
    """A record that cannot be used."""

    index: int
    cause: Cause
    message: str


@dataclasses.dataclass(frozen=True)
class Survey:
    """Of the records that were looked at.

    Attributes:
      seen: those that can be used, in the order of the source.
      broken: those that cannot.
      num_threads: that read at the same time.
      seconds: from the first read to the last.
      read_seconds: spent in all threads waiting for the bytes of images.
      cpu_seconds: spent by processors in decoding and cropping.
    """

    seen: tuple[Seen, ...]
    broken: tuple[Broken, ...]
    num_threads: int
    seconds: float
    read_seconds: float
    cpu_seconds: float


def sample(length: int, count: int) -> list[int]:
    """`count` different indices below `length`, or all of them: always the same ones, and as if drawn at random."""
    return [shuffled_index(place, length, seed=0, epoch=0) for place in range(min(count, length))]


def survey(source: Source, sizes: Sequence[Size], tokenizer: Tokenizer, limit: int) -> Survey:
    """Reads, decodes and crops up to `limit` records of a source.

    Args:
      source: the records.
      sizes: what images may be cropped to.
      tokenizer: counts the tokens of captions.
      limit: the most records to look at.
    """
    num_threads = os.cpu_count() or 1
    start = time.perf_counter()
    with ThreadPoolExecutor(num_threads) as pool:
        looks = list(pool.map(lambda i: _look(source, i, sizes, tokenizer), sorted(sample(len(source), limit))))
    seconds = time.perf_counter() - start
    return Survey(
        seen=tuple(look for look, *_ in looks if isinstance(look, Seen)),
        broken=tuple(look for look, *_ in looks if isinstance(look, Broken)),
        num_threads=num_threads,
        seconds=seconds,
        read_seconds=sum(read for _, read, _ in looks),
        cpu_seconds=sum(cpu for *_, cpu in looks),
    )


def cropped(source: Source, index: int, sizes: Sequence[Size]) -> Image.Image:
    """A record's image as training sees it.

    Raises:
      BadRecord: it cannot be read.
    """
    return images.read_for(source[index], sizes)


def _look(
    source: Source, index: int, sizes: Sequence[Size], tokenizer: Tokenizer
) -> tuple[Seen | Broken, float, float]:
    """What is found, seconds of reading, seconds of processor time."""
    read, cpu = 0.0, 0.0
    try:
        start = time.perf_counter()
        record = _with_bytes(source[index])
        read, before = time.perf_counter() - start, time.thread_time()
        size = images.read_size(dataclasses.replace(record, size=None))  # what the file says
        image = images.read_for(record, sizes)
        cpu = time.thread_time() - before
        if source.has_captions:
            choose(record, seed=0, epoch=0)  # as training would say that there is none
    except BadRecord as error:
        return Broken(index, error.cause, str(error)), read, cpu
    assert record.image is not None
    texts = [full_prompt(caption.text, caption.system_prompt) for caption in record.captions]
    ids, _ = tokenizer.encode(texts, _NO_LIMIT) if texts else ([], [])
    seen = Seen(
        index=index,
        size=size,
        crop=image.size,
        captions=record.captions,
        tokens=tuple(map(len, ids)),
        content=content_hash(record.image),
        likeness=perceptual_hash(image),
    )
    return seen, read, cpu


def _with_bytes(record: Record) -> Record:
    """The record with the content of its image file: read once, for the hash and the picture."""
    if record.image is not None:
        return record
    try:
        return dataclasses.replace(record, image=files.read_bytes(record.path))
    except BadRecord as error:
        raise BadRecord(error.cause, f"{record.where}: image {error}") from error
