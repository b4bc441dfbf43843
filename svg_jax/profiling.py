"""Where the time of a run goes: host seconds by phase, and traces for a profiler's viewer."""

from __future__ import annotations

import contextlib
import logging
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from etils import epath

logger = logging.getLogger("svg_jax")


class HostClock:
    """Host seconds between one line of the log and the next.

    `time/step`: seconds a step, what holds the run up left out; when the devices are the slower part, theirs.
    `time/data_wait`: of these, seconds a step in which the host waited for a batch.
    `time/data_wait_fraction`: their share of `time/step`; above 0.02, data is too slow: give it more
    `config.data.num_workers`, or pack it at the stage's size (`data_pipelines.pack`).
    `time/checkpoint`, `time/sample`: seconds, in all, for which saving and drawing held the run up; likewise any other.

    The first line of a process holds the compilation.
    """

    def __init__(self) -> None:
        self._restart()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts what happens inside: `data_wait`, which is a part of the steps, or what is none."""
        start = time.perf_counter()
        yield
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def line(self, steps: int) -> dict[str, float]:
        """The seconds since the last call, in which so many steps were begun."""
        seconds = {"time/step": time.perf_counter() - self._since}
        for name, value in self._seconds.items():
            seconds[f"time/{name}"] = value
            if name != "data_wait":
                seconds["time/step"] -= value
        self._restart()
        seconds |= {name: seconds[name] / steps for name in ("time/step", "time/data_wait")}
        return seconds | {"time/data_wait_fraction": seconds["time/data_wait"] / max(seconds["time/step"], 1e-9)}

    def _restart(self) -> None:
        self._since = time.perf_counter()
        self._seconds = {"data_wait": 0.0, "checkpoint": 0.0, "sample": 0.0}


class Trace:
    """Traces steps [start, start + steps) for a profiler's viewer; does nothing where `start` is 0.

    A run that goes on or ends inside that window, as a context manager by an error too, traces what is left of it; one
    outside of it says that nothing will be traced.

    Args:
        folder: Gets `plugins/profile/TIME/`; a bucket too.
        start: Index of the first step.
        steps: How many.
        first: The step at which this process begins.
        last: The step before which the run ends.
        enabled: False on every process but the first.
    """

    def __init__(
        self, folder: epath.PathLike, *, start: int, steps: int, first: int, last: int, enabled: bool = True
    ) -> None:
        self._folder, self._enabled = epath.Path(folder), enabled
        self._window = range(max(start, first), min(start + steps, last)) if start > 0 else range(0)
        self._local: str | None = None  # where the trace under way is written to
        if enabled and start > 0 and not self._window:
            logger.info(
                "no trace: config.profile.start is %d and this run takes steps %d to %d", start, first, last - 1
            )

    def __enter__(self) -> Trace:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def before(self, step: int) -> contextlib.AbstractContextManager[Any]:
        """Starts tracing if it is time; what is done for the step goes inside the context that this gives."""
        if self._enabled and self._window and step == self._window[0]:
            # Buckets are copied to: not every build of the profiler writes to them.
            self._local = tempfile.mkdtemp() if "://" in str(self._folder) else str(self._folder)
            jax.profiler.start_trace(self._local)
        return jax.profiler.StepTraceAnnotation("step", step_num=step)

    def ends(self, step: int) -> bool:
        """Whether this step is the last one to trace; the same on every process."""
        return bool(self._window) and step == self._window[-1]

    def stop(self) -> None:
        """Writes the trace under way, if there is one; to be called when the devices are done."""
        if self._local is None:
            return
        jax.profiler.stop_trace()
        local, self._local = Path(self._local), None
        if "://" in str(self._folder):
            for file in (path for path in local.rglob("*") if path.is_file()):
                target = self._folder / file.relative_to(local).as_posix()
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read_bytes())
            shutil.rmtree(local)
        logger.info(
            "the trace is in %s: open it with `xprof --logdir %s` (pip install xprof), or a *.trace.json.gz of it at "
            "ui.perfetto.dev",
            *(self._folder, self._folder),
        )
