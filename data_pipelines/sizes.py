"""The sizes of all images of a source: from the headers of the files, once, and then from a file beside the source."""

from __future__ import annotations

import collections
import os
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from absl import logging
from numpy.typing import NDArray

from data_pipelines import images
from data_pipelines.broken import summary
from data_pipelines.records import BadRecord
from data_pipelines.sources import Source

_CHUNK = 1000  # records read by one thread at a time
_NAMED = 5  # broken records that are named in the log
_SECONDS_BETWEEN_REPORTS = 30


def image_sizes(source: Source, *, num_threads: int = 16) -> NDArray[np.int32]:
    """(width, height) of every upright image, int32 [records, 2]; (0, 0) where a record or a header cannot be read.

    Headers are read in threads (a list whose records say `width` and `height` spares that), and the sizes are kept in
    `source.beside("sizes.npz")`: 8 bytes a record before compression. They are measured anew when other records stand
    in the source. A record that could not be read then stays without a size for as long as that file is there, so that
    the order of the data does not change under a run. Where the file cannot be written, the sizes are measured each
    time.
    """
    file = source.beside("sizes.npz")
    sizes = _kept(file, source)
    if sizes is None:
        sizes = _measured(source, num_threads)
        _keep(file, source, sizes)
    elif num_bad := int((sizes[:, 0] == 0).sum()):
        logging.warning("%d of %d images of %s have no size, as listed in %s", num_bad, len(sizes), source.name, file)
    return sizes


def _measured(source: Source, num_threads: int) -> NDArray[np.int32]:
    sizes = np.zeros((len(source), 2), np.int32)

    def measure(start: int) -> list[BadRecord]:
        errors = []
        for index in range(start, min(start + _CHUNK, len(source))):
            try:
                sizes[index] = images.read_size(source[index])
            except BadRecord as error:
                errors.append(error)
        return errors

    causes: collections.Counter[str] = collections.Counter()
    with ThreadPoolExecutor(num_threads) as pool:
        for done, errors in enumerate(pool.map(measure, range(0, len(source), _CHUNK)), start=1):
            for error in errors[: max(_NAMED - causes.total(), 0)]:
                logging.warning("no size: %s", error)
            causes.update(str(error.cause) for error in errors)
            logging.log_every_n_seconds(
                logging.INFO, "sizes of %d of %d images read", _SECONDS_BETWEEN_REPORTS, done * _CHUNK, len(source)
            )
    if causes:
        message = "%d of %d images of %s have no size, and are not trained on: %s"
        logging.warning(message, causes.total(), len(source), source.name, summary(causes))
    return sizes


def _kept(file: Path, source: Source) -> NDArray[np.int32] | None:
    """The sizes as kept; None if there are none of these records."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            signature, sizes = str(arrays["signature"]), arrays["sizes"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        logging.warning("%s cannot be read (%s): the sizes of the images are read anew", file, error)
        return None
    if signature != source.signature or sizes.shape != (len(source), 2):
        logging.warning("%s is of other records than now stand in %s: it is made anew", file, source.name)
        return None
    return sizes


def _keep(file: Path, source: Source, sizes: NDArray[np.int32]) -> None:
    """Written whole or not at all, whichever processes do it at the same time."""
    beside = file.with_name(f"{file.name}.{os.getpid()}.partial.npz")
    try:
        np.savez_compressed(beside, signature=np.array(source.signature), sizes=sizes)
        os.replace(beside, file)
    except OSError as error:
        logging.warning("the sizes of the images cannot be kept in %s (%s): the next run reads them anew", file, error)
        beside.unlink(missing_ok=True)
