"""Fixed-shape batches of images and captions, each a pure function of (seed, step).

Slot j of global step s holds draw k = s * batch_size + j. Draw k belongs to epoch e = floor(k / n) of the n records and
takes the record at place k mod n of that epoch's permutation, which is evaluated at one place without being built. So
nothing but the step has to be saved to go on, on any number of processes, workers and threads, and each record comes
exactly once an epoch. (Of a mixture with weights, once a pass over its list: see `mixture`.)
"""

from __future__ import annotations

from concurrent.futures import Executor
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from data_pipelines import captions, images, mixture
from data_pipelines.broken import read_all
from data_pipelines.fingerprint import fingerprint
from data_pipelines.order import DROPOUT_KEY, check_seed, random_word, share_of
from data_pipelines.packing import pack_tokens
from data_pipelines.records import Record, Source
from data_pipelines.text import Tokenizer, full_prompt


class Batch(TypedDict):
    """One process's slice of a global batch: b slots, N patches of size p, L text tokens.

    A slot without an image (its record is broken) has a cause and grid (0, 0), so no valid patch, and the start token
    alone. Where images share a sequence, so do their captions a row of `tokens`. The last two entries are for the host
    and never go to a device.
    """

    patches: NDArray[np.uint8]  # [b, N, p * p * 3]
    grid: NDArray[np.int32]  # [b, 2] rows, columns
    tokens: NDArray[np.int32]  # [b, L], or [b / pack, L of a pack]
    num_tokens: NDArray[np.int32]  # [b] valid tokens, at least 1
    cause: NDArray[np.int32]  # [b] 0, or why there is no image: 1 + the position in `records.Cause`
    record: NDArray[np.int64]  # [b] index in the source
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
      pack: images that share a sequence.
      max_packed_tokens: tokens that the captions of a pack share; needed where `pack` is above 1.
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
        pack: int = 1,
        max_packed_tokens: int | None = None,
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
        self._pack, self._row_tokens = pack, max_text_tokens if pack == 1 else (max_packed_tokens or 0)
        pack_tokens([[0]] * len(slots), pack, self._row_tokens, 0)  # what cannot be packed is said here

    def __getitem__(self, step: int) -> Batch:
        return self.read(step)

    def read(self, step: int, threads: Executor | None = None) -> Batch:
        """The batch of a step >= 0, its records read in `threads`, or in the caller's thread."""
        b = len(self._slots)
        patches = np.zeros((b, self._budget, self._patch_size**2 * 3), np.uint8)
        grid = np.zeros((b, 2), np.int32)
        draws = [self.draw(step * self._batch_size + slot) for slot in self._slots]
        record_ids = [index for _, index in draws]

        def fill(slot: int) -> str:
            epoch, index = draws[slot]
            record = self.source[index]
            caption = self._read_caption(record, epoch)
            patches[slot], grid[slot] = self._read_image(record)
            return caption

        prompts, cause = read_all(fill, record_ids, threads)
        ids, truncated = self._tokenizer.encode([prompt or "" for prompt in prompts], self._max_text_tokens)
        tokens, num_tokens, cut = pack_tokens(ids, self._pack, self._row_tokens, self._tokenizer.pad_id)
        return Batch(
            patches=patches,
            grid=grid,
            tokens=tokens,
            num_tokens=num_tokens,
            cause=cause,
            record=np.array(record_ids, np.int64),
            num_truncated=sum(long or short for long, short in zip(truncated, cut, strict=True)),
        )

    def draw(self, k: int) -> tuple[int, int]:
        """Epoch and record index of global draw k."""
        return mixture.draw(self.source, k, self._seed, self._shuffle)

    def records(self, step: int) -> list[int]:
        """Record index of every slot of a global batch, those of other processes too."""
        return [self.draw(step * self._batch_size + slot)[1] for slot in range(self._batch_size)]

    @property
    def fingerprint(self) -> list[str]:
        """What the data are known by, see `fingerprint`."""
        return fingerprint(self.source)

    def _read_image(self, record: Record) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
        return images.patchify(images.read_for(record, self._sizes), self._patch_size, self._budget)

    def _read_caption(self, record: Record, epoch: int) -> str:
        if random_word(DROPOUT_KEY, self._seed, epoch, record.index) < self._caption_dropout * 2**32:
            return ""
        caption = captions.choose(record, self._seed, epoch)
        return full_prompt(caption.text, self._system_prompt or caption.system_prompt)
