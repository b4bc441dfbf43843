"""What stands in a source: a deterministic sample of its records, read as training reads them."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from PIL import Image

from data_pipelines import images
from data_pipelines.captions import read_usable
from data_pipelines.duplicates import content_hash, perceptual_hash
from data_pipelines.images import Size
from data_pipelines.order import shuffled_index
from data_pipelines.records import BadRecord, Caption, Cause, Source
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


class Spent(NamedTuple):
    """Seconds on what training does with an image; hashes and tokens are not in them.

    Attributes:
      total: reading, decoding and cropping.
      waiting: of these, for the bytes of the image.
      computing: of a processor, in decoding and cropping.
    """

    total: float = 0.0
    waiting: float = 0.0
    computing: float = 0.0


@dataclasses.dataclass(frozen=True)
class Survey:
    """Of the records that were looked at.

    Attributes:
      seen: those that can be used, in the order of the source.
      broken: those that cannot.
      num_threads: that read at the same time.
      spent: by all threads on those that can be used.
    """

    seen: tuple[Seen, ...]
    broken: tuple[Broken, ...]
    num_threads: int
    spent: Spent


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
    with ThreadPoolExecutor(num_threads) as pool:
        looks = list(pool.map(lambda i: _look(source, i, sizes, tokenizer), sorted(sample(len(source), limit))))
    return Survey(
        seen=tuple(look for look, _ in looks if isinstance(look, Seen)),
        broken=tuple(look for look, _ in looks if isinstance(look, Broken)),
        num_threads=num_threads,
        spent=Spent(*(sum(seconds) for seconds in zip(*(spent for _, spent in looks), strict=True))),
    )


def cropped(source: Source, index: int, sizes: Sequence[Size]) -> Image.Image:
    """A record's image as training sees it.

    Raises:
      BadRecord: it cannot be read.
    """
    return images.read_for(source[index], sizes)


def _look(source: Source, index: int, sizes: Sequence[Size], tokenizer: Tokenizer) -> tuple[Seen | Broken, Spent]:
    try:
        start = time.perf_counter()
        record = images.with_content(read_usable(source, index))
        waiting, before = time.perf_counter() - start, time.thread_time()
        image = images.read_for(record, sizes)
        spent = Spent(time.perf_counter() - start, waiting, time.thread_time() - before)
        size = images.read_size(dataclasses.replace(record, size=None))  # what the file says
    except BadRecord as error:
        return Broken(index, error.cause, str(error)), Spent()
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
    return seen, spent
