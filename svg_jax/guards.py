"""What watches over a run: steps that were skipped, losses that jump, records that cannot be read.

A step that is not healthy changes nothing (`svg_jax.state`); here too many of them in a row end the run. The values of
a step stay on the devices for a log interval before they are read, so that nobody waits for them. They are of the
global batch: every process sees the same ones and comes to the same decision.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from data_pipelines.broken import BadRecordCounter, TooManyBadRecords, by_cause
from data_pipelines.loader import WorkerDied

logger = logging.getLogger("svg_jax")

VALUES = ("loss", "grad_norm", "skipped_in_a_row", "bad_records")  # of a step's metrics, what is judged
SHOWN = 16  # record ids in a line of the log; `spikes.jsonl` has them all


class TooManySkippedSteps(RuntimeError):
    """Losses or gradients were not finite, one step after the other."""


STOPPED = (TooManyBadRecords, TooManySkippedSteps, WorkerDied)  # what ends a run that no error in the code has ended


class SpikeDetector:
    """Says which losses jump out of a series: loss > mean + sigma * std of the `window` finite ones before it.

    A loss that is not finite always does. Nothing else does before `min_seen` losses are known, or with sigma = 0. A
    spike joins the series: a loss that has moved for good is reported only until the window knows it.
    """

    def __init__(self, sigma: float, *, window: int = 100, min_seen: int = 20) -> None:
        self._sigma, self._min_seen = sigma, min_seen
        self._seen: deque[float] = deque(maxlen=window)

    def __call__(self, loss: float) -> bool:
        """Whether this one does."""
        if not math.isfinite(loss):
            return True
        known, limit = self._sigma > 0 and len(self._seen) >= self._min_seen, self.limit
        self._seen.append(loss)
        return known and loss > limit

    @property
    def limit(self) -> float:
        """mean + sigma * std of the losses seen; NaN before there are any."""
        return float(np.mean(self._seen) + self._sigma * np.std(self._seen)) if self._seen else math.nan


class Guards:
    """Judges the values of every step, a log interval after it ran.

    Args:
        max_skipped: Skipped steps in a row that end the run.
        spike_sigma: Of the `SpikeDetector`.
        bad: Counts broken records, and ends the run when there are too many.
        batch_size: Records in a global batch.
        records: Which records a step's global batch held.
        report: Writes a spike down: gets the index of the step, its values and the records.
        newest: Updates of the newest checkpoint, or None.
    """

    def __init__(
        self,
        *,
        max_skipped: int,
        spike_sigma: float,
        bad: BadRecordCounter,
        batch_size: int,
        records: Callable[[int], Sequence[int]],
        report: Callable[[int, dict[str, Any]], None],
        newest: Callable[[], int | None],
    ) -> None:
        self.max_skipped, self.batch_size = max_skipped, batch_size
        self.bad, self._records, self._report, self._newest = bad, records, report, newest
        self._is_spike = SpikeDetector(spike_sigma)
        self._steps: list[tuple[int, dict[str, jax.Array]]] = []  # not judged yet
        self._old = 0  # how many of these are of the log interval before

    def add(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Takes the metrics of a step, computed or not."""
        self._steps.append((step, {name: metrics[name] for name in VALUES}))

    def judge(self, *, all_steps: bool = False) -> None:
        """Judges the steps added before the last call, or `all_steps`: then it waits until the devices are done.

        Raises:
            TooManySkippedSteps: Too many in a row.
            TooManyBadRecords: Their share is above the limit.
        """
        count = len(self._steps) if all_steps else self._old
        ready, self._steps = self._steps[:count], self._steps[count:]
        self._old = len(self._steps)
        for step, values in jax.device_get(ready):
            bad = values.pop("bad_records")
            self._judge_step(step, {name: value.item() for name, value in values.items()})
            self.bad.update(by_cause(bad), self.batch_size)

    def _judge_step(self, step: int, values: dict[str, float]) -> None:
        limit = self._is_spike.limit
        if self._is_spike(values["loss"]) or not math.isfinite(values["grad_norm"]):
            records = list(self._records(step))
            shown = ", ".join(map(str, records[:SHOWN])) + (", ..." if len(records) > SHOWN else "")
            log = logger.warning if jax.process_index() == 0 else logger.debug  # all come to the same
            log(
                "spike at step %d: loss %g (limit %.4g), gradient norm %g, %s; its batch holds the records %s",
                *(step, values["loss"], limit, values["grad_norm"]),
                "step skipped" if values["skipped_in_a_row"] else "step taken",
                shown,
            )
            self._report(step, {"loss": values["loss"], "grad_norm": values["grad_norm"], "records": records})
        if values["skipped_in_a_row"] >= self.max_skipped:
            # Nothing is saved: the parameters are finite, but they are those that no step could go on from.
            newest, times = self._newest(), values["skipped_in_a_row"]
            good = "there is no checkpoint yet" if newest is None else f"the last good checkpoint is of step {newest}"
            raise TooManySkippedSteps(
                f"up to step {step} the loss or its gradient was not finite {times} times in a row, and {good}: start "
                "the same command again with a lower --config.optim.lr or --config.optim.clip, as it would come to the "
                "same otherwise (spikes.jsonl names the records, --config.guard.max_skipped is the limit)"
            )
