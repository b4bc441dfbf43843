"""What `MetricWriter` leaves on disk, read back by other programs: json, Pillow and TensorBoard's own reader."""

from __future__ import annotations

import json
import sys
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from svg_jax import metrics
from svg_jax.metrics import MetricWriter, image_grid, peak_flops


def writer(workdir: Any, **options: Any) -> MetricWriter:
    return MetricWriter(workdir, **{"total_steps": 10, "items_per_step": 4, **options})


def read_jsonl(workdir: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def read_events(workdir: Path) -> EventAccumulator:
    events = EventAccumulator(str(workdir / "events"), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    return events


class Pending:
    """Stands for an array that a device is still computing: reading it waits for `computed`."""

    shape = ()

    def __init__(self, computed: Callable[[], object]) -> None:
        self.computed = computed

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        assert self.computed() is not False, "never computed"
        return np.asarray(1.0, np.float32)


@pytest.fixture
def pending_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "device_get", lambda values: {name: np.asarray(value) for name, value in values.items()})


class Clock:
    """A clock that stands still unless told otherwise."""

    now = 0.0

    def move_to(self, now: float) -> None:
        self.now = now


def test_jsonl_and_tensorboard_hold_the_same_scalars(tmp_path: Path) -> None:
    with writer(tmp_path) as run:
        for step in range(3):
            run.scalars(step, {"loss": jnp.float32(1) / (step + 3), "lr": 0.5})
    records = read_jsonl(tmp_path)
    assert [record["step"] for record in records] == [0, 1, 2]
    # Exact: the JSON number is the float32 value itself.
    assert [np.float32(record["loss"]) for record in records] == [np.float32(1) / np.float32(n) for n in (3, 4, 5)]
    events = read_events(tmp_path)
    for name in ("loss", "lr"):
        assert [(e.step, e.value) for e in events.Scalars(name)] == [(r["step"], r[name]) for r in records]


def test_values_sharded_over_devices_pass_a_transfer_guard(tmp_path: Path) -> None:
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    replicated = jax.device_put(np.float32(2.5), jax.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    with jax.transfer_guard("disallow"), writer(tmp_path) as run:
        run.scalars(0, {"loss": replicated})
    assert read_jsonl(tmp_path) == [{"step": 0, "loss": 2.5}]


def test_values_that_are_not_finite_are_strings_that_float_reads(tmp_path: Path) -> None:
    with writer(tmp_path) as run:
        run.scalars(0, {"a": float("nan"), "b": jnp.float32(jnp.inf), "c": -np.float32(np.inf)})
    (record,) = read_jsonl(tmp_path)
    assert record == {"step": 0, "a": "NaN", "b": "Infinity", "c": "-Infinity"}
    assert float(record["c"]) == -np.inf


def test_resumed_run_reads_as_one_never_interrupted(tmp_path: Path) -> None:
    with writer(tmp_path) as run:
        for step in range(5):
            run.scalars(step, {"loss": 10.0 + step})
    with (tmp_path / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 2, "lo')  # what a kill in the middle of a line leaves
    with writer(tmp_path, start_step=3) as run:
        for step in range(3, 6):
            run.scalars(step, {"loss": 20.0 + step})
    expected = [(0, 10.0), (1, 11.0), (2, 12.0), (3, 23.0), (4, 24.0), (5, 25.0)]
    assert [(record["step"], record["loss"]) for record in read_jsonl(tmp_path)] == expected
    assert [(event.step, event.value) for event in read_events(tmp_path).Scalars("loss")] == expected


def test_lines_are_on_disk_without_closing(tmp_path: Path) -> None:
    run = writer(tmp_path)
    run.scalars(0, {"loss": 1.0})
    run.flush()
    assert read_jsonl(tmp_path) == [{"step": 0, "loss": 1.0}]
    run.close()


@pytest.mark.usefixtures("pending_values")
def test_handing_over_scalars_waits_for_the_call_before_only(tmp_path: Path) -> None:
    first, second = threading.Event(), threading.Event()
    with writer(tmp_path) as run:
        run.scalars(0, {"loss": Pending(lambda: first.wait(timeout=60))})
        assert read_jsonl(tmp_path) == []
        threading.Timer(0.2, first.set).start()
        run.scalars(1, {"loss": Pending(lambda: second.wait(timeout=60))})
        assert [record["step"] for record in read_jsonl(tmp_path)] == [0]
        second.set()
    assert [record["step"] for record in read_jsonl(tmp_path)] == [0, 1]


@pytest.mark.usefixtures("pending_values")
def test_throughput_counts_what_the_device_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    still = types.SimpleNamespace(perf_counter=lambda: clock.now, time=time.time, time_ns=time.time_ns)
    monkeypatch.setattr(metrics, "time", still)
    monkeypatch.setattr(metrics.chips, "peak_flops", lambda device_kind: 100.0)
    with writer(tmp_path, flops_per_step=40.0, tokens_per_step=30) as run:
        run.scalars(0, {"loss": Pending(lambda: clock.move_to(30.0))})  # compilation: not counted
        run.scalars(2, {"loss": Pending(lambda: clock.move_to(30.5))})
        with run.untimed():
            clock.move_to(40.5)
        run.scalars(6, {"loss": Pending(lambda: clock.move_to(41.5))})
    first, *others = read_jsonl(tmp_path)
    assert set(first) == {"step", "loss"}
    for record in others:  # a step takes 0.25 s
        assert record["images_per_second"] == 4 / 0.25
        assert record["tokens_per_second"] == 30 / 0.25
        assert record["mfu"] == pytest.approx(40.0 / 0.25 / (100.0 * jax.device_count()))


def test_mfu_is_left_out_on_a_device_of_unknown_peak(tmp_path: Path) -> None:
    assert peak_flops(jax.devices("cpu")) is None
    with writer(tmp_path, flops_per_step=1e9) as run:
        run.scalars(0, {"loss": 1.0})
        run.scalars(1, {"loss": 1.0})
    assert "mfu" not in read_jsonl(tmp_path)[1]


def test_spikes_are_lines_of_their_own_file_and_a_resumed_run_keeps_those_before(tmp_path: Path) -> None:
    with writer(tmp_path) as run:
        run.spike(1, {"loss": float("nan"), "records": [3, 5]})
        run.spike(4, {"loss": 9.5, "records": [7]})
    with writer(tmp_path, start_step=3) as run:
        run.spike(5, {"loss": 8.5, "records": []})
    assert [json.loads(line) for line in (tmp_path / "spikes.jsonl").read_text().splitlines()] == [
        {"step": 1, "loss": "NaN", "records": [3, 5]},
        {"step": 5, "loss": 8.5, "records": []},
    ]


def test_plain_lines_off_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with writer(tmp_path) as run:
        run.scalars(0, {"loss": 0.12345})
        run.scalars(4, {"loss": 0.1})
    first, second = capsys.readouterr().err.splitlines()
    assert first == "step 1/10  loss 0.1235"
    assert second.startswith("step 5/10  loss 0.1000  ")
    assert " images/s  ETA 0:00:00" in second


def test_bar_on_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with writer(tmp_path, start_step=3) as run:
        run.scalars(3, {"loss": 0.5})
        run.scalars(9, {"loss": 0.25})
    bar = capsys.readouterr().err
    assert "4/10 |" in bar
    assert "10/10 |" in bar
    assert "loss 0.2500  " in bar


def test_pictures_are_written_as_png_and_to_tensorboard(tmp_path: Path) -> None:
    images = [np.full((2, 3, 3), 10, np.uint8), np.full((4, 2, 3), 20, np.uint8)]
    with writer(tmp_path) as run:
        run.pictures(7, "ema", images, columns=2)
    grid = image_grid(images, columns=2)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "samples" / "00000007_ema.png")), grid)
    (event,) = read_events(tmp_path).Images("ema")
    assert (event.step, event.height, event.width) == (7, *grid.shape[:2])


def test_image_grid_centres_pictures_of_mixed_sizes() -> None:
    images = [np.zeros((2, 4, 3), np.uint8), np.zeros((6, 2, 3), np.uint8), np.zeros((6, 4, 3), np.uint8)]
    grid = image_grid(images, columns=2, padding=1)
    expected = np.full((15, 11, 3), 255, np.uint8)
    expected[3:5, 1:5] = expected[1:7, 7:9] = expected[8:14, 1:5] = 0
    np.testing.assert_array_equal(grid, expected)


@pytest.mark.parametrize(
    ("images", "message"),
    [([], "at least one picture"), ([np.zeros((2, 2, 3), np.float32)], r"picture 0 is float32 \(2, 2, 3\)")],
)
def test_image_grid_refuses_what_is_no_picture(images: list[np.ndarray], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        image_grid(images, columns=2)


def test_value_that_is_neither_scalar_nor_vector_is_named(tmp_path: Path) -> None:
    message = r"metric 'loss' at step 3 has shape \(2, 1\), expected a scalar or vector"
    with writer(tmp_path) as run, pytest.raises(ValueError, match=message):
        run.scalars(3, {"loss": jnp.zeros((2, 1))})


def test_a_vector_is_written_by_place_without_what_stands_for_nothing(tmp_path: Path) -> None:
    with writer(tmp_path) as run:
        run.scalars(0, {"by_time": jnp.array([1.5, jnp.nan, 2.5])})
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line == {"step": 0, "by_time/0": 1.5, "by_time/2": 2.5}


def test_workdir_that_cannot_be_written_is_one_clear_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match=r"^workdir '.*/file/run' cannot be written \(Not a directory\); choose"):
        writer(tmp_path / "file" / "run")


def test_nothing_is_written_where_not_enabled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with writer(tmp_path / "run", enabled=False) as run, run.untimed():
        run.scalars(0, {"loss": 1.0})
        run.spike(0, {"loss": 1.0})
        run.pictures(0, "ema", [np.zeros((2, 2, 3), np.uint8)])
        run.flush()
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().err == ""


def test_failure_while_writing_is_raised_by_the_next_call(tmp_path: Path) -> None:
    run = writer(tmp_path)
    run.scalars(0, {"loss": "not a number"})
    with pytest.raises(ValueError, match="not a number"):
        run.scalars(1, {"loss": 1.0})
    with pytest.raises(ValueError, match="not a number"):
        run.close()


def test_remote_workdir_gets_every_file_and_resumes(monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = fsspec.filesystem("memory")  # stands for a bucket
    monkeypatch.setattr(epath.backend.fsspec_backend, "_get_filesystem", lambda name: bucket)
    workdir = "gs://bucket/run"
    with writer(workdir) as run:
        for step in range(3):
            run.scalars(step, {"loss": float(step)})
        run.pictures(2, "ema", [np.zeros((2, 2, 3), np.uint8)])
    with writer(workdir, start_step=2) as run:
        run.scalars(2, {"loss": 20.0})
    lines = (epath.Path(workdir) / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == [0.0, 1.0, 20.0]
    assert (epath.Path(workdir) / "samples" / "00000002_ema.png").exists()
    assert len(list((epath.Path(workdir) / "events").iterdir())) == 2
