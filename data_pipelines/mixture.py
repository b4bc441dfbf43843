"""Mixtures of several sources, as the release's YAML files name them, and the order in which weights draw from them.

    META:
      - path: photographs.jsonl      # any source; a relative path starts at this file's folder, or else where one works
        type: image_text             # a label; nothing depends on it
        root: gs://bucket/images     # what relative image paths start from; the list's own folder if absent
        ratio: 0.5                   # only this share of its records is used, chosen once and for all; 1 if absent
        weight: 3                    # share of the draws; given to all lists or to none

Without weights every record that is used comes once an epoch. With weights an epoch is as many draws as there are
records, and each list has exactly its share of them, rounded by the largest remainder; a list is gone through in a new
order each time all its records have been drawn.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import difflib
import hashlib
import itertools
import math
import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from data_pipelines import files
from data_pipelines.lists import folder_of, join
from data_pipelines.order import MIXTURE_KEY, RATIO_KEY, shuffled_index
from data_pipelines.records import Record, Source


@dataclasses.dataclass(frozen=True)
class Entry:
    """One list of a mixture, as its file names it.

    Attributes:
      path: of the list, or an address.
      type: a label.
      root: what relative image paths start from; None for the list's own folder.
      ratio: share of its records that is used, above 0 and at most 1.
      weight: share of the draws, relative to the others, above 0; None where the mixture has no weights.
    """

    path: str
    type: str = "image_text"
    root: str | None = None
    ratio: float = 1.0
    weight: float | None = None


def read_entries(file: Path, name: str) -> list[Entry]:
    """The lists that a YAML file names.

    Args:
      file: the file.
      name: its path or address, for messages and for what relative paths start from.

    Raises:
      ValueError: it is not YAML, has no list `META`, or an entry is wrong; the message gives its number.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """YAML of which the last of several equal keys does not win."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            keys = collections.Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
            for key, count in keys.most_common(1):
                if count > 1:
                    raise yaml.MarkedYAMLError(problem=f"the key '{key}' stands twice", problem_mark=node.start_mark)
            mapping: dict[Any, Any] = super().construct_mapping(node, deep)
            return mapping

    try:
        content = yaml.load(file.read_bytes(), Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"mixture {name} is not YAML ({' '.join(str(error).split())})") from error
    entries = content.get("META") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"mixture {name} has no list under META; expected entries such as '- path: a.jsonl'")
    folder = folder_of(name)
    read = [_entry(value, folder, f"mixture {name} entry {number}") for number, value in enumerate(entries, start=1)]
    unweighted = [number for number, entry in enumerate(read, start=1) if entry.weight is None]
    if unweighted and len(unweighted) < len(read):
        raise ValueError(f"mixture {name} gives no weight to the entries {unweighted}; give one to all or to none")
    return read


class Mixture:
    """The records of several sources one after another, those of each that its ratio leaves.

    Args:
      name: path or address of the mixture, for messages.
      entries: what its file names.
      sources: the opened source of each entry.

    Attributes:
      counts: records used of each source.
      shares: draws that each source has in an epoch of `len(self)` draws; None without weights.

    Raises:
      ValueError: no record of a source is left, or its weight is too small for a single draw in an epoch.
    """

    def __init__(self, name: str, entries: Sequence[Entry], sources: Sequence[Source]) -> None:
        self.name = name
        self._sources = list(sources)
        self._ratios = [entry.ratio for entry in entries]
        self.counts = [round(len(source) * entry.ratio) for entry, source in zip(entries, sources, strict=True)]
        self._starts = [0, *itertools.accumulate(self.counts)]
        for entry, source, count in zip(entries, sources, self.counts, strict=True):
            if not count:
                raise ValueError(
                    f"mixture {name}: the ratio {entry.ratio:g} leaves none of the {len(source)} records of "
                    f"{entry.path}"
                )
        weights = [entry.weight for entry in entries if entry.weight is not None]
        self.shares = apportion(len(self), weights) if weights else None
        for entry, share in zip(entries, self.shares or [], strict=bool(self.shares)):
            if not share:
                raise ValueError(
                    f"mixture {name}: the weight {entry.weight:g} of {entry.path} is too small for one draw in an "
                    f"epoch of {len(self)}; raise it or remove the entry"
                )
        self._draw_ends = list(itertools.accumulate(self.shares or []))
        self.has_captions = all(source.has_captions for source in sources)

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Record:
        index = range(len(self))[index]
        part = bisect.bisect_right(self._starts, index) - 1
        place, source = index - self._starts[part], self._sources[part]
        if self.counts[part] < len(source):
            place = shuffled_index(place, len(source), seed=0, epoch=0, key=RATIO_KEY)
        return dataclasses.replace(source[place], index=index)

    @property
    def signature(self) -> str:
        """Changes when other records stand in one of the sources, others of them are used, or at other shares."""
        parts = [f"{ratio!r} {source.signature}" for ratio, source in zip(self._ratios, self._sources, strict=True)]
        parts += [f"shares {self.shares}"] * (self.shares is not None)
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def weighted(self, epoch: int, place: int, seed: int, shuffle: bool) -> tuple[int, int]:
        """(pass over the source that the draw falls to, index) of one of the `len(self)` draws of an epoch."""
        assert self.shares is not None
        part = bisect.bisect_right(self._draw_ends, place)
        share, count = self.shares[part], self.counts[part]
        passes, within = divmod(epoch * share + place - (self._draw_ends[part] - share), count)
        if shuffle:  # an order of its own for each source and pass
            within = shuffled_index(within, count, seed, passes * len(self.counts) + part, MIXTURE_KEY)
        return passes, self._starts[part] + within


def draw(source: Source, k: int, seed: int, shuffle: bool) -> tuple[int, int]:
    """What global draw k of a run takes: how often all of the record's source was drawn before, and the record's index.

    Without weights the first is the epoch k // n of the n records, and the second stands at place k mod n of that
    epoch's permutation. Both depend on the arguments alone.

    Args:
      source: the records.
      k: number of the draw, counted from the start of the run over all processes.
      seed: of the order.
      shuffle: if False, records come as they stand, and with weights source after source.
    """
    epoch, place = divmod(k, len(source))
    if shuffle:
        place = shuffled_index(place, len(source), seed, epoch)
    if isinstance(source, Mixture) and source.shares is not None:
        return source.weighted(epoch, place, seed, shuffle)
    return epoch, place


def apportion(total: int, weights: Sequence[float]) -> list[int]:
    """Whole numbers in proportion to the weights that add up to `total`: largest remainders, the first of equals."""
    exact = [Fraction(weight) for weight in weights]
    quotas = [total * weight / sum(exact) for weight in exact]
    shares = [math.floor(quota) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda i: shares[i] - quotas[i])
    for i in by_remainder[: total - sum(shares)]:
        shares[i] += 1
    return shares


def _entry(value: Any, folder: str, where: str) -> Entry:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is a {type(value).__name__}; expected '- path: a.jsonl'")
    known = [field.name for field in dataclasses.fields(Entry)]
    for key in value:
        if key not in known:
            nearest = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)[0]
            raise ValueError(f"{where} has the key '{key}'; did you mean '{nearest}'? Known: {', '.join(known)}")
    value = {key: found for key, found in value.items() if found is not None}
    for key in ("path", "type", "root"):
        if key in value and not (isinstance(value[key], str) and value[key]):
            raise ValueError(f"{where} has {value[key]!r} under '{key}'; expected a text")
    for key, limit in (("ratio", 1.0), ("weight", 1e9)):
        if key not in value:
            continue
        number = value[key]
        if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < number <= limit:
            raise ValueError(f"{where} has the {key} {number!r:.60}; expected a number above 0 and at most {limit:g}")
    if "path" not in value:
        raise ValueError(f"{where} names no path; expected '- path: a.jsonl'")
    for key in ("path", "root"):
        if key in value:
            value[key] = _located(value[key], folder)
    return Entry(**value)


def _located(path: str, folder: str) -> str:
    """A path below the mixture's folder, or below the working folder if there is nothing (the release's way)."""
    if path.startswith("tfds:"):
        return path
    path = path.removeprefix("file://")
    below = join(folder, path)
    return path if not files.is_remote(below) and not os.path.exists(below) and os.path.exists(path) else below
