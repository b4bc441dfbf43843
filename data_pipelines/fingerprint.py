"""What a data set is known by: enough to notice that a run would go on with other data, and cheap for any size."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence

import numpy as np

from data_pipelines.mixture import Mixture
from data_pipelines.records import BadRecord, Source

_PLACES = 16  # records that are looked at, the first and the last among them


def fingerprint(source: Source) -> list[str]:
    """Lines that stay when the data are copied, moved or mounted elsewhere, and change when the order of records does.

    They name the number of records, what a mixture takes of each list, and a hash of some records: the name of the
    image without its folders, the captions, and the image where it lies in a shard. So a list with lines added, removed
    or in another order is noticed; one record among many that is edited, or an image file with another content, is not.
    The line of a record that cannot be read is empty.
    """
    lines = [f"{len(source)} records"]
    places = set(np.linspace(0, len(source) - 1, _PLACES, dtype=np.int64).tolist())
    if isinstance(source, Mixture):
        lines.append(f"lists of {source.counts} records, drawn {source.shares or source.counts} times an epoch")
        places |= {end - 1 for end in itertools.accumulate(source.counts)}
    return lines + [_line(source, place) for place in sorted(places)]


def difference(first: Sequence[str], second: Sequence[str]) -> tuple[str, str] | None:
    """The first two lines that differ; None if none do, where an empty line is like any other."""
    for pair in itertools.zip_longest(first, second, fillvalue="nothing"):
        if all(pair) and pair[0] != pair[1]:
            return pair
    return None


def _line(source: Source, place: int) -> str:
    try:
        record = source[place]
    except BadRecord:
        return ""
    name = record.path.partition("?")[0].rpartition("/")[2]  # an address may be signed anew each time
    digest = hashlib.sha256(json.dumps([name, record.captions]).encode())
    digest.update(record.image or b"")
    return f"record {place} {digest.hexdigest()[:12]}"
