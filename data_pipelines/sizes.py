"""The sizes of all images of a source: from the headers of the files, once, and then from a file that is mapped."""

from __future__ import annotations

import collections
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from absl import logging
from numpy.typing import NDArray

from data_pipelines import cache, images
from data_pipelines.broken import summary
from data_pipelines.records import BadRecord, Source

_CHUNK = 1000  # records read by one thread at a time
_NAMED = 5  # broken records that are named in the log
_SECONDS_BETWEEN_REPORTS = 30


def image_sizes(source: Source, *, num_threads: int = 16) -> NDArray[np.int32]:
    """(width, height) of every upright image, int32 [records, 2]; (0, 0) where a record or a header cannot be read.

    Headers are read in threads (a list whose records say `width` and `height` spares that), and the sizes are kept in a
    file of 8 bytes a record, see `cache.open_index`; what is returned is that file, mapped, and has its `filename`.
    They are measured anew when other records stand in the source. A record that could not be read then stays without
    a size for as long as that file is there, so that the order of the data does not change under a run.
    """
    version = f"{len(source)} {source.signature}"
    pairs = cache.open_index(source.name, "sizes", lambda: _measured(source, num_threads), version)
    sizes = pairs.view(np.int32).reshape(-1, 2)
    if num_bad := int((sizes[:, 0] == 0).sum()):
        logging.warning(
            "%d of %d images of %s have no size, and are not trained on; sizes are kept in %s",
            num_bad, len(sizes), source.name, getattr(sizes, "filename", "memory alone"),
        )  # fmt: skip
    return sizes


def _measured(source: Source, num_threads: int) -> Iterator[NDArray[np.int64]]:
    """The sizes in blocks, each two int32 in the place of one int64."""

    def measure(start: int) -> tuple[NDArray[np.int32], list[BadRecord]]:
        indices = range(start, min(start + _CHUNK, len(source)))
        sizes, errors = np.zeros((len(indices), 2), np.int32), []
        for place, index in enumerate(indices):
            try:
                sizes[place] = images.read_size(source[index])
            except BadRecord as error:
                errors.append(error)
        return sizes, errors

    causes: collections.Counter[str] = collections.Counter()
    with ThreadPoolExecutor(num_threads) as pool:
        for done, (sizes, errors) in enumerate(pool.map(measure, range(0, len(source), _CHUNK)), start=1):
            for error in errors[: max(_NAMED - causes.total(), 0)]:
                logging.warning("no size: %s", error)
            causes.update(str(error.cause) for error in errors)
            logging.log_every_n_seconds(
                logging.INFO, "sizes of %d of %d images read", _SECONDS_BETWEEN_REPORTS, done * _CHUNK, len(source)
            )
            yield sizes.reshape(-1).view(np.int64)
    if causes:
        logging.warning("images without a size, by cause: %s", summary(causes))
