"""Host times by phase, and traces of a few steps."""

from __future__ import annotations

import logging
import types
from pathlib import Path
from typing import Any

import fsspec
import jax
import jax.numpy as jnp
import pytest
from etils import epath

from svg_jax import profiling
from svg_jax.profiling import HostClock, Trace


def test_host_times_by_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    now = types.SimpleNamespace(seconds=5.0)
    monkeypatch.setattr(profiling, "time", types.SimpleNamespace(perf_counter=lambda: now.seconds))
    clock = HostClock()
    for _ in range(4):  # a step of two seconds, half a second of which waits for data
        with clock.phase("data_wait"):
            now.seconds += 0.5
        now.seconds += 1.5
    with clock.phase("checkpoint"):
        now.seconds += 10.0
    with clock.phase("trace"):
        now.seconds += 7.0
    times = {"time/step": 2.0, "time/data_wait": 0.5, "time/checkpoint": 10.0, "time/sample": 0.0, "time/trace": 7.0}
    assert clock.line(4) == times | {"time/data_wait_fraction": 0.25}
    now.seconds += 3.0
    times = {"time/step": 3.0, "time/data_wait": 0.0, "time/checkpoint": 0.0, "time/sample": 0.0}
    assert clock.line(1) == times | {"time/data_wait_fraction": 0.0}


def traced(folder: Path | epath.Path, first: int, last: int, **options: Any) -> None:
    """Steps as `loop.fit` takes them."""
    trace = Trace(folder, first=first, last=last, **options)
    for step in range(first, last):
        with trace.before(step):
            jnp.sum(jnp.ones((8, 8)) * step).block_until_ready()
        if trace.ends(step):
            trace.stop()


def files(folder: Path | epath.Path) -> list[str]:
    """Of the traces there, without the name of the machine."""
    return sorted(path.name.split(".", 1)[1] for path in folder.glob("plugins/profile/*/*"))


@pytest.mark.parametrize("first", [0, 3], ids=["from the start", "resumed inside the window"])
def test_a_trace_is_written_and_the_log_says_where(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, first: int
) -> None:
    with caplog.at_level(logging.INFO, "svg_jax"):
        traced(tmp_path, first, 6, start=2, steps=2)
    assert "xplane.pb" in files(tmp_path)
    assert [record.getMessage() for record in caplog.records if f"xprof --logdir {tmp_path}" in record.getMessage()]
    assert len(list((tmp_path / "plugins" / "profile").iterdir())) == 1
    jax.profiler.start_trace(tmp_path / "another")  # which the profiler refuses while one is under way
    jax.profiler.stop_trace()


def test_the_trace_names_the_steps(tmp_path: Path) -> None:
    traced(tmp_path, 0, 6, start=2, steps=2)
    (file,) = tmp_path.rglob("*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(file)).planes
    steps = {
        dict(event.stats).get("step_num")
        for plane in planes
        for line in plane.lines
        for event in line.events
        if event.name == "step"
    }
    assert steps == {2, 3}


def test_a_run_that_ends_inside_the_window_still_writes_its_trace(tmp_path: Path) -> None:
    traced(tmp_path, 0, 4, start=2, steps=50)
    assert "xplane.pb" in files(tmp_path)


def test_a_run_that_goes_on_behind_the_window_says_that_there_is_no_trace(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "svg_jax"):
        traced(tmp_path, 4, 6, start=2, steps=2)
    assert "no trace: config.profile.start is 2 and this run takes steps 4 to 5" in caplog.text
    assert files(tmp_path) == []


@pytest.mark.parametrize(("start", "enabled"), [(0, True), (2, False)])
def test_nothing_is_traced_unless_asked_for_and_on_the_first_process(tmp_path: Path, start: int, enabled: bool) -> None:
    traced(tmp_path, 0, 6, start=start, steps=2, enabled=enabled)
    assert files(tmp_path) == []


def test_a_bucket_gets_the_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = fsspec.filesystem("memory")  # stands for a bucket
    monkeypatch.setattr(epath.backend.fsspec_backend, "_get_filesystem", lambda name: bucket)
    folder = epath.Path("gs://bucket/traced/profile")
    traced(folder, 0, 3, start=1, steps=1)
    assert "xplane.pb" in files(folder)
