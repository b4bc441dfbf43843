"""Batches of images of one grid, for networks that need real rectangles; each a pure function of (seed, step).

Of the n records, n_g are nearest to grid g. Each grid has a stream of draws without end: draw k belongs to epoch
floor(k / n_g) and takes the record at place k mod n_g of that epoch's permutation. Batch j of grid g holds draws
j * B to (j + 1) * B - 1 of that stream, B slots over all processes.

After e epochs floor(e * n_g / B) batches of grid g are full. Those full after e + 1 epochs and not before are what
epoch e consists of, the batches of all grids in an order of their own permutation. So grids come as often as their
records do, and what is left of a grid at the end of an epoch, less than a batch, begins that grid's first batch of the
next one: every record is drawn exactly once an epoch, and none is lost. A grid of fewer than B records waits some
epochs for its batch, which then holds a record several times.

Nothing but the step has to be saved to go on, on any number of processes and threads, and the grid of a step is the
same on all of them.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from typing import Any, NamedTuple, TypedDict

import numpy as np
from numpy.typing import NDArray

from data_pipelines import cache, images, mixture
from data_pipelines.broken import read_all
from data_pipelines.fingerprint import fingerprint
from data_pipelines.images import Size
from data_pipelines.order import CROP_KEY, STEPS_KEY, check_seed, random_word, share_of, shuffled_index
from data_pipelines.records import Source
from data_pipelines.sizes import image_sizes

_BLOCK = 1 << 16  # images whose grids are found at a time: what is reckoned with stays in a processor's cache


class GridBatch(TypedDict):
    """One process's slice of a global batch: b slots, all images of one size.

    A slot whose record turns out to be broken has a cause, is black and not valid. The last entry is for the host and
    never goes to a device.
    """

    images: NDArray[np.uint8]  # [b, height, width, 3]
    valid: NDArray[np.bool_]  # [b]
    cause: NDArray[np.int32]  # [b] 0, or why it is not valid: 1 + the position in `records.Cause`
    record: NDArray[np.int64]  # [b] index in the source


class Grid(NamedTuple):
    """One size, in pixels, and the records that are cropped to it, in the order of the source."""

    size: Size
    records: Sequence[int] | NDArray[np.int64]


class Draw(NamedTuple):
    """Where a record of a batch comes from."""

    epoch: int
    record: int


class GridBatches:
    """Random access to whole batches: element `step` is this process's slice of that global batch, for any step >= 0.

    Args:
      source: the records; captions are not read.
      batch_size: slots of the global batch, over all processes.
      resolution: side in pixels of the square image; no size has more pixels.
      patch_size: sides are multiples of it.
      seed: of order and crops, 0 <= seed < 2^32.
      max_ratio: largest ratio of the sides of a crop. With 1 every image is cropped to the square; else the sizes of
        all images are needed, see `sizes.image_sizes`.
      random_crop: cut a random window instead of the centre, drawn anew each epoch. (The release does so for ImageNet,
        and cuts the centre at native aspect ratios. It flips nothing.)
      max_bad_fraction: largest share of images that may be without a size.
      shuffle: if False, every epoch goes through the records as they stand, grid after grid.
      process_index: this process takes slots [process_index * b, (process_index + 1) * b).
      process_count: number of processes that share the batch; b = batch_size / process_count.

    Attributes:
      grids: sizes and their records.
      num_without_size: records that are in no grid as their header could not be read; 0 with `max_ratio` 1, where
        nobody looks before the image is read.

    Raises:
      ValueError: settings that cannot work, or too many images without a size.
    """

    def __init__(
        self,
        source: Source,
        *,
        batch_size: int,
        resolution: int,
        patch_size: int,
        seed: int,
        max_ratio: float = 1.0,
        random_crop: bool = False,
        max_bad_fraction: float = 1.0,
        shuffle: bool = True,
        process_index: int = 0,
        process_count: int = 1,
    ) -> None:
        self._slots = share_of(batch_size, process_index, process_count)
        check_seed(seed)
        images.token_budget(resolution, patch_size)
        self.source = source
        self.grids = [Grid((resolution, resolution), range(len(source)))]
        self.num_without_size = 0
        self._crop_sizes: list[Size] = []
        self._sizes_file: str | None = None  # of which the grids are mapped
        if max_ratio != 1:
            if isinstance(source, mixture.Mixture) and source.shares is not None:
                raise ValueError(
                    f"{source.name} gives weights, which batches by grid cannot keep: give its lists a ratio instead "
                    "of a weight, or train with config.data.max_ratio=1"
                )
            sizes = image_sizes(source)
            self.num_without_size = int((sizes[:, 0] == 0).sum())
            self._crop_sizes = images.crop_sizes(resolution, patch_size, max_ratio)
            if isinstance(sizes, np.memmap):
                self._sizes_file = str(sizes.filename)
                self.grids = mapped_by_grid(self._sizes_file, lambda: sizes, self._crop_sizes)
            else:
                self.grids = by_grid(sizes, self._crop_sizes)
        if self.num_without_size > max_bad_fraction * len(source) or not self.grids:
            raise ValueError(
                f"{self.num_without_size} of {len(source)} images of {source.name} cannot be opened, above "
                f"max_bad_fraction={max_bad_fraction:g}; the warnings above name some of them with the cause: mend the "
                f"data{f' and remove {self._sizes_file}' if self._sizes_file else ''}, or raise the limit"
            )
        self._counts = [len(grid.records) for grid in self.grids]
        self._batch_size, self._seed, self._shuffle, self._random_crop = batch_size, seed, shuffle, random_crop

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "grids": None} if self._sizes_file else self.__dict__  # mapped anew, not copied

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._sizes_file:
            self.grids = mapped_by_grid(self._sizes_file, lambda: image_sizes(self.source), self._crop_sizes)

    def __getitem__(self, step: int) -> GridBatch:
        return self.read(step)

    def read(self, step: int, threads: Executor | None = None) -> GridBatch:
        """The batch of a step >= 0, its records read in `threads`, or in the caller's thread."""
        (width, height), mine = self.draws(step, self._slots)
        record_ids = [draw.record for draw in mine]
        pixels = np.zeros((len(mine), height, width, 3), np.uint8)

        def fill(slot: int) -> None:
            record = self.source[mine[slot].record]
            pixels[slot] = np.asarray(images.read_for(record, [(width, height)], self._window(*mine[slot])))

        _, cause = read_all(fill, record_ids, threads)
        return GridBatch(images=pixels, valid=cause == 0, cause=cause, record=np.array(record_ids, np.int64))

    def draws(self, step: int, slots: range | None = None) -> tuple[Size, list[Draw]]:
        """The size of a global batch, and what some of its slots hold; by default all, those of other processes too."""
        grid, batch = self._batch_of(step)
        size, records = self.grids[grid]
        draws = []
        for slot in range(self._batch_size) if slots is None else slots:
            k = batch * self._batch_size + slot
            if isinstance(records, range):  # all there are
                draws.append(Draw(*mixture.draw(self.source, k, self._seed, self._shuffle)))
                continue
            epoch, place = divmod(k, len(records))
            index = shuffled_index(place, len(records), self._seed, epoch) if self._shuffle else place
            draws.append(Draw(epoch, int(records[index])))
        return size, draws

    def records(self, step: int) -> list[int]:
        """Record index of every slot of a global batch, those of other processes too."""
        return [draw.record for draw in self.draws(step)[1]]

    @property
    def fingerprint(self) -> list[str]:
        """What the data are known by, see `fingerprint`, and which records are in which grid."""
        digest = hashlib.sha256()
        for size, records in self.grids:
            digest.update(repr(size).encode())
            if not isinstance(records, range):
                digest.update(np.ascontiguousarray(records, np.int64).data)
        return [*fingerprint(self.source), f"{len(self.grids)} grids {digest.hexdigest()[:12]}"]

    def _batch_of(self, step: int) -> tuple[int, int]:
        """(grid, place in the stream of that grid's batches) of a global batch."""
        if len(self.grids) == 1:
            return 0, step
        latest = (step + len(self.grids) + 1) * self._batch_size // sum(self._counts) + 1
        epoch = bisect.bisect_right(range(latest + 1), step, key=lambda e: sum(self._full(e))) - 1
        before, after = self._full(epoch), self._full(epoch + 1)
        place = step - sum(before)
        if self._shuffle:
            place = shuffled_index(place, sum(after) - sum(before), self._seed, epoch, STEPS_KEY)
        for grid, (first, end) in enumerate(zip(before, after, strict=True)):
            if place < end - first:
                return grid, first + place
            place -= end - first
        raise AssertionError("a step lies in its epoch")

    def _full(self, epochs: int) -> list[int]:
        """Full batches of each grid after so many epochs."""
        return [epochs * count // self._batch_size for count in self._counts]

    def _window(self, epoch: int, record: int) -> tuple[int, int] | None:
        if not self._random_crop:
            return None
        key = (CROP_KEY, self._seed, epoch, record)
        return random_word(*key, 0), random_word(*key, 1)


def by_grid(sizes: NDArray[np.int32], crop_sizes: Sequence[Size]) -> list[Grid]:
    """The crop sizes that are nearest to some image, each with the records of those; records of size (0, 0) in none."""
    return _grids(np.concatenate(list(_grid_index(sizes, crop_sizes))), crop_sizes)


def mapped_by_grid(file: str, sizes: Callable[[], NDArray[np.int32]], crop_sizes: Sequence[Size]) -> list[Grid]:
    """`by_grid` of the sizes that a file keeps, from an index that is built once and mapped by all processes."""
    kind = f"grids-{hashlib.sha256(repr(crop_sizes).encode()).hexdigest()[:8]}"
    return _grids(np.asarray(cache.open_index(file, kind, lambda: _grid_index(sizes(), crop_sizes))), crop_sizes)


def _grids(index: NDArray[np.int64], crop_sizes: Sequence[Size]) -> list[Grid]:
    counts, records = np.split(index, [len(crop_sizes)])
    parts = np.split(records, np.cumsum(counts)[:-1])
    return [Grid(size, part) for size, part in zip(crop_sizes, parts, strict=True) if len(part)]


def _grid_index(sizes: NDArray[np.int32], crop_sizes: Sequence[Size]) -> Iterator[NDArray[np.int64]]:
    """How many images are nearest to each crop size, then their records, in the order of the crop sizes."""
    grid_of = np.full(len(sizes), -1, np.int16)
    for start in range(0, len(sizes), _BLOCK):
        block = sizes[start : start + _BLOCK]
        known = np.flatnonzero(block[:, 0])
        grid_of[start + known] = nearest_sizes(block[known], crop_sizes)
    yield np.bincount(grid_of + 1, minlength=len(crop_sizes) + 1)[1:]
    for place in range(len(crop_sizes)):
        yield np.flatnonzero(grid_of == place)


def nearest_sizes(sizes: NDArray[np.int32], crop_sizes: Sequence[Size]) -> NDArray[np.int16]:
    """`images.nearest_size` of many images at once: place in `crop_sizes`, [images], of sizes int [images, 2]."""
    width, height = np.ascontiguousarray(sizes.T, np.float64)
    nearest, best = np.zeros(len(sizes), np.int16), np.full(len(sizes), -1.0)
    for place in sorted(range(len(crop_sizes)), key=lambda place: crop_sizes[place], reverse=True):  # larger wins ties
        across, down = crop_sizes[place][0] / width, crop_sizes[place][1] / height
        kept = np.minimum(across, down) / np.maximum(across, down)
        nearest[kept > best] = place
        np.maximum(best, kept, out=best)
    return nearest
