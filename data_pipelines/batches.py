"""Fixed-shape batches of images and captions, each a pure function of (seed, step).

Slot j of global step s holds draw k = s * batch_size + j. Draw k belongs to epoch e = floor(k / n) of the n records and
takes the record at place k mod n of that epoch's permutation, which is evaluated at one place without being built. So
nothing but the step has to be saved to go on, on any number of processes and threads, and each record comes exactly
once an epoch.
"""

from __future__ import annotations

import sys
from typing import TypedDict, TypeVar

import grain
import numpy as np
from absl import logging
from grain.sources import RandomAccessDataSource
from numpy.typing import NDArray

from data_pipelines import images
from data_pipelines.order import DROPOUT_KEY, check_seed, random_word, share_of, shuffled_index
from data_pipelines.records import BadRecord, Record
from data_pipelines.sources import Source
from data_pipelines.text import Tokenizer, full_prompt, pad_tokens

_SECONDS_BETWEEN_WARNINGS = 10

AnyBatch = TypeVar("AnyBatch")


class Batch(TypedDict):
    """One process's slice of a global batch: b slots, N patches of size p, L text tokens.

    A slot without an image (its record is broken) has grid (0, 0), so no valid patch, and the start token alone. The
    last three entries are for the host and never go to a device.
    """

    patches: NDArray[np.uint8]  # [b, N, p * p * 3]
    grid: NDArray[np.int32]  # [b, 2] rows, columns
    tokens: NDArray[np.int32]  # [b, L]
    num_tokens: NDArray[np.int32]  # [b] valid tokens, at least 1
    record: NDArray[np.int64]  # [b] index in the source
    num_bad: int  # slots without an image
    num_truncated: int  # captions cut at L tokens


class TextToImageBatches:
    """Random access to whole batches: element `step` is this process's slice of that global batch, for any step >= 0.

    The autoencoder trains on the same batches with `max_ratio=1.0` (every image has one grid), `caption_dropout=1.0`
    and `max_text_tokens=1` (every caption is the start token).

    Args:
      source: the records.
      tokenizer: turns captions into ids.
      batch_size: slots of the global batch, over all processes.
      resolution: side in pixels of the square image whose patches are the token budget N.
      patch_size: side of a patch in pixels.
      max_text_tokens: the text budget L.
      seed: of order and caption dropout, 0 <= seed < 2^32.
      max_ratio: largest ratio of the sides of a crop.
      system_prompt: a name in `text.SYSTEM_PROMPTS` that goes before every caption; None: as the record's kind says.
      caption_dropout: share of draws whose caption is left empty, for classifier-free guidance.
      shuffle: if False, every epoch goes through the records as they stand.
      process_index: this process takes slots [process_index * b, (process_index + 1) * b).
      process_count: number of processes that share the batch; b = batch_size / process_count.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer,
        *,
        batch_size: int,
        resolution: int,
        patch_size: int,
        max_text_tokens: int,
        seed: int,
        max_ratio: float = 4.0,
        caption_dropout: float = 0.0,
        system_prompt: str | None = None,
        shuffle: bool = True,
        process_index: int = 0,
        process_count: int = 1,
    ) -> None:
        slots = share_of(batch_size, process_index, process_count)
        if max_text_tokens < 1:
            raise ValueError(f"max_text_tokens={max_text_tokens} leaves no room for the start token; it is at least 1")
        if not 0 <= caption_dropout <= 1:
            raise ValueError(f"caption_dropout={caption_dropout} is not a share between 0 and 1")
        check_seed(seed)
        if caption_dropout < 1 and not source.has_captions:
            raise ValueError(
                f"{source.name} has no captions to train on; expected a .jsonl or .json list with a caption a record"
            )
        self.source, self._tokenizer = source, tokenizer
        self._batch_size, self._slots = batch_size, slots
        self._patch_size, self._max_text_tokens = patch_size, max_text_tokens
        self._budget = images.token_budget(resolution, patch_size)
        self._sizes = images.crop_sizes(resolution, patch_size, max_ratio)
        self._seed, self._caption_dropout, self._shuffle = seed, caption_dropout, shuffle
        self._system_prompt = system_prompt

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, step: int) -> Batch:
        b = len(self._slots)
        patches = np.zeros((b, self._budget, self._patch_size**2 * 3), np.uint8)
        grid = np.zeros((b, 2), np.int32)
        record_ids = np.zeros(b, np.int64)
        captions = []
        num_bad = 0
        for slot in range(b):
            epoch, index = self.draw(step * self._batch_size + self._slots[slot])
            record_ids[slot] = index
            try:
                record = self.source[index]
                patches[slot], grid[slot] = self._read_image(record)
                captions.append(self._read_caption(record, epoch))
            except BadRecord as error:
                captions.append("")
                num_bad += 1
                logging.log_every_n_seconds(
                    logging.WARNING, "record %d skipped: %s", _SECONDS_BETWEEN_WARNINGS, index, error
                )
        ids, truncated = self._tokenizer.encode(captions, self._max_text_tokens)
        tokens, num_tokens = pad_tokens(ids, self._max_text_tokens, self._tokenizer.pad_id)
        return Batch(
            patches=patches,
            grid=grid,
            tokens=tokens,
            num_tokens=num_tokens,
            record=record_ids,
            num_bad=num_bad,
            num_truncated=sum(truncated),
        )

    def draw(self, k: int) -> tuple[int, int]:
        """Epoch and record index of global draw k."""
        num_records = len(self.source)
        epoch, place = divmod(k, num_records)
        if not self._shuffle:
            return epoch, place
        return epoch, shuffled_index(place, num_records, self._seed, epoch)

    def records(self, step: int) -> list[int]:
        """Record index of every slot of a global batch, those of other processes too."""
        return [self.draw(step * self._batch_size + slot)[1] for slot in range(self._batch_size)]

    def _read_image(self, record: Record) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
        image = images.read(record)
        image = images.crop(image, images.nearest_size(image.size, self._sizes))
        return images.patchify(image, self._patch_size, self._budget)

    def _read_caption(self, record: Record, epoch: int) -> str:
        if random_word(DROPOUT_KEY, self._seed, epoch, record.index) < self._caption_dropout * 2**32:
            return ""
        if record.caption is None:
            raise BadRecord(f"{record.where} has no caption")
        return full_prompt(record.caption, self._system_prompt or record.system_prompt)


def make_loader(
    batches: RandomAccessDataSource[AnyBatch], *, start_step: int = 0, num_threads: int = 4, prefetch: int = 4
) -> grain.DatasetIterator[AnyBatch]:
    """Iterates over the batches from `start_step` on, without end, reading ahead in threads; `close()` ends them.

    Args:
      batches: what to read.
      start_step: the first step; to resume, the number of steps done.
      num_threads: batches read at the same time; 0 reads in the caller's thread.
      prefetch: batches held ready, at least `num_threads`.
    """
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
    return iter(grain.MapDataset.source(batches)[start_step:].to_iter_dataset(options))


class TooManyBadRecords(RuntimeError):
    """The share of records that cannot be used is above the limit."""


class BadRecordCounter:
    """Counts broken records over a run and stops it when their share passes a limit.

    Args:
      max_bad_fraction: the largest share of bad records that a run may go on with.
      min_records: nothing is judged before this many records.
    """

    def __init__(self, max_bad_fraction: float, min_records: int = 1000) -> None:
        self.max_bad_fraction, self.min_records = max_bad_fraction, min_records
        self.num_bad = self.num_records = 0

    @property
    def fraction(self) -> float:
        """Share of bad records so far."""
        return self.num_bad / max(self.num_records, 1)

    def update(self, num_bad: int, num_records: int) -> None:
        """Adds the records of one batch.

        Raises:
          TooManyBadRecords: the share of bad records is above the limit.
        """
        self.num_bad += num_bad
        self.num_records += num_records
        if self.num_records >= self.min_records:
            self.judge()

    def judge(self) -> None:
        """Raises TooManyBadRecords if the share so far is above the limit, however few the records."""
        if self.fraction > self.max_bad_fraction:
            raise TooManyBadRecords(
                f"{self.num_bad} of {self.num_records} records ({self.fraction:.1%}) could not be used, above "
                f"max_bad_fraction={self.max_bad_fraction:g}; the warnings above name some of them with the cause: "
                "mend the data or raise the limit"
            )
