"""Records that cannot be used: skipped with a cause, counted by it, named in the log, and too many of them stop a run.

In a batch each slot has a cause as a number: 0 where nothing is wrong, else 1 + the position in `records.Cause`.
"""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from typing import Any, TypeVar

import numpy as np
from absl import logging
from numpy.typing import NDArray

from data_pipelines.records import BadRecord, Cause

CAUSES = tuple(Cause)

_SECONDS_BETWEEN_WARNINGS = 10
_SHOWN = 16  # ids of one cause in a line of the log

Value = TypeVar("Value")


def read_all(
    read: Callable[[int], Value], records: Sequence[int], threads: Executor | None = None
) -> tuple[list[Value | None], NDArray[np.int32]]:
    """What `read` gives for the slots of a batch; a slot whose record is broken has None and a cause.

    Args:
      read: gets a slot, and raises BadRecord if its record cannot be used; what else it raises goes on.
      records: the record's index of each slot, for the log.
      threads: where to read; in the caller's thread if None.

    Returns:
      The values, and the cause of each slot as a number, int32 [slots].
    """

    def attempt(slot: int) -> Value | BadRecord:
        try:
            return read(slot)
        except BadRecord as error:
            return error

    slots = range(len(records))
    found = list(threads.map(attempt, slots) if threads else map(attempt, slots))
    causes = [CAUSES.index(value.cause) + 1 if isinstance(value, BadRecord) else 0 for value in found]
    _log.add({records[slot]: value for slot, value in enumerate(found) if isinstance(value, BadRecord)})
    return [None if isinstance(value, BadRecord) else value for value in found], np.array(causes, np.int32)


def by_cause(counts: Sequence[int] | NDArray[np.int32]) -> dict[str, int]:
    """Counts in the order of `records.Cause`, [causes], by their names; zeros are left out."""
    return {str(cause): int(count) for cause, count in zip(CAUSES, counts, strict=True) if count}


def summary(counts: Mapping[str, int]) -> str:
    """Causes with their counts, the most frequent first, as in "missing 12, damaged 3"; "none" if there are none."""
    by_count = sorted(counts.items(), key=lambda item: -item[1])
    return ", ".join(f"{cause} {count}" for cause, count in by_count) or "none"


class _Log:
    """Writes at most one line in a while, which names the records of all lines that it stands for."""

    def __init__(self) -> None:
        self._lock, self._written = threading.Lock(), -float("inf")
        self._waiting: dict[Cause, list[int]] = collections.defaultdict(list)

    def add(self, errors: Mapping[int, BadRecord]) -> None:
        """Takes broken records by their index."""
        if not errors:
            return
        with self._lock:
            for record, error in errors.items():
                self._waiting[error.cause].append(record)
            if time.monotonic() - self._written < _SECONDS_BETWEEN_WARNINGS:
                return
            waiting, self._waiting = self._waiting, collections.defaultdict(list)
            self._written = time.monotonic()
        ids_by_cause = ", ".join(f"{len(ids)} {cause} ({_shown(ids)})" for cause, ids in waiting.items())
        logging.warning("records skipped: %s; the last one: %s", ids_by_cause, error)


def _shown(ids: Sequence[int]) -> str:
    return ", ".join(map(str, ids[:_SHOWN])) + (", …" if len(ids) > _SHOWN else "")


_log = _Log()  # of this process


class TooManyBadRecords(RuntimeError):
    """The share of records that cannot be used is above the limit."""


class BadRecordCounter:
    """Counts broken records by cause, over a run with all its interruptions, and stops it when there are too many.

    The limit is for what this process has seen: data that were mended after a run stopped are judged anew.

    Args:
      max_bad_fraction: the largest share of bad records that a run may go on with.
      min_records: nothing is judged before this many records.
      saved: what `state` gave before an interruption.

    Attributes:
      counts: bad records by cause, those before an interruption too.
      num_records: records, bad or not, those before an interruption too.
    """

    def __init__(
        self, max_bad_fraction: float, min_records: int = 1000, saved: Mapping[str, Any] | None = None
    ) -> None:
        self.max_bad_fraction, self.min_records = max_bad_fraction, min_records
        saved = saved or {}
        self.counts = collections.Counter({str(cause): int(n) for cause, n in saved.get("bad", {}).items()})
        self.num_records = int(saved.get("records", 0))
        self._before = self.counts.copy(), self.num_records

    @property
    def num_bad(self) -> int:
        """Bad records so far."""
        return self.counts.total()

    @property
    def fraction(self) -> float:
        """Share of bad records so far."""
        return self.num_bad / max(self.num_records, 1)

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; causes by name, so that a later version may have others."""
        return {"records": self.num_records, "bad": dict(self.counts)}

    @property
    def metrics(self) -> dict[str, float]:
        """Scalars for the log: the share, and how many there are of each cause that was seen."""
        causes = {f"data/bad/{cause}": float(count) for cause, count in self.counts.items()}
        return {"data/bad_fraction": self.fraction, **causes}

    def update(self, counts: Mapping[str, int], num_records: int) -> None:
        """Adds the records of one batch: how many are bad by cause, and how many there are.

        Raises:
          TooManyBadRecords: the share of bad records is above the limit.
        """
        self.counts.update(counts)
        self.num_records += num_records
        if self.num_records - self._before[1] >= self.min_records:
            self.judge()

    def judge(self) -> None:
        """Raises TooManyBadRecords if the share in this process is above the limit, however few the records."""
        counts, num_records = self.counts - self._before[0], self.num_records - self._before[1]
        num_bad = counts.total()
        if num_bad > self.max_bad_fraction * num_records:
            raise TooManyBadRecords(
                f"{num_bad} of {num_records} records ({num_bad / num_records:.1%}) could not be used "
                f"({summary(counts)}), above max_bad_fraction={self.max_bad_fraction:g}; the warnings above name "
                "some of them: mend the data or raise the limit"
            )

    def __str__(self) -> str:
        return f"{self.num_bad} of {self.num_records} records skipped ({summary(self.counts)})"
