"""What watches over a run, alone and inside the loop, on a linear map that trains in milliseconds."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from data_pipelines.broken import BadRecordCounter, TooManyBadRecords
from data_pipelines.records import Cause
from svg_jax.checkpoint import Checkpoints, newest_step, open_params
from svg_jax.distributed import EXIT_PREEMPTED
from svg_jax.guards import Guards, SpikeDetector, TooManySkippedSteps
from svg_jax.loop import fit
from svg_jax.metrics import MetricWriter
from svg_jax.parallel import make_mesh, param_shardings, shardings_of
from svg_jax.state import TrainState, adamw, state_shardings
from svg_jax.steps import Metrics, update

BATCH, FEATURES = 8, 16
SHAPES = {"map.kernel": jax.ShapeDtypeStruct((FEATURES, 8), jnp.float32)}
NAN = 0  # where a batch's tokens say so, its loss is not finite; otherwise they are a factor on it


def config(**overrides: Any) -> ConfigDict:
    values: dict[str, Any] = {
        "num_train_steps": 8,
        "batch_size": BATCH,
        "log_every": 2,
        "checkpoint": {"every": 0},
        "sample": {"every": 0},
        "data": {"max_bad_fraction": 0.5},
        "guard": {"max_skipped": 3, "spike_sigma": 6.0},
        "profile": {"start": 0, "steps": 2},
    }
    result = ConfigDict(values)
    result.update_from_flattened_dict(overrides)
    return result


def batches(start: int, factors: dict[int, int], empty: dict[int, int] | None = None) -> Iterator[dict[str, Any]]:
    """Random numbers; `factors` by step, and how many slots hold no image by step, one of them damaged."""
    step = start
    while True:
        draw = np.random.default_rng(step)
        grid, cause = np.ones((BATCH, 2), np.int32), np.zeros(BATCH, np.int32)
        cause[: (empty or {}).get(step, 0)] = 1 + list(Cause).index(Cause.MISSING)
        cause[: min((empty or {}).get(step, 0), 1)] = 1 + list(Cause).index(Cause.DAMAGED)
        grid[cause > 0] = 0
        yield {
            "patches": draw.integers(0, 256, (BATCH, 1, FEATURES), np.uint8),
            "grid": grid,
            "tokens": np.full((BATCH, 1), factors.get(step, 1), np.int32),
            "num_tokens": np.ones(BATCH, np.int32),
            "cause": cause,
            "record": records(step),
            "num_truncated": 0,
        }
        step += 1


def records(step: int) -> list[int]:
    return [100 * step + slot for slot in range(BATCH)]


def step_of(optimiser: optax.GradientTransformation) -> Callable[[TrainState, Any], tuple[TrainState, Metrics]]:
    """Least squares toward ones, through the same update as every network's."""

    def step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        x = batch["patches"][:, 0].astype(jnp.float32) / 255.0
        factor = jnp.where(batch["tokens"][0, 0] == NAN, jnp.nan, batch["tokens"][0, 0].astype(jnp.float32))

        def loss(params: Any) -> Any:
            return factor * jnp.mean(jnp.square(x @ params["map.kernel"] - 1.0))

        value, grads = jax.value_and_grad(loss)(state.params)
        return update(state, grads, value, batch["cause"], optimiser, 0.9)

    return step


def run(
    workdir: Path, factors: dict[int, int], *, empty: dict[int, int] | None = None, ema_memory_kind: str | None = None,
    settings: ConfigDict | None = None, **options: Any,
) -> TrainState:  # fmt: skip
    """Begins in `workdir`, or goes on there, on eight devices."""
    settings = settings or config()
    mesh = make_mesh({"fsdp": 8})
    optimiser = adamw(optax.constant_schedule(0.01), b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, clip=1.0)
    at = param_shardings(SHAPES, {"map.kernel": ("embed", "mlp")}, mesh)
    create = functools.partial(TrainState.create, optimiser=optimiser, key=jax.random.key(0))
    abstract = jax.eval_shape(create, SHAPES)
    places = state_shardings(abstract, at, mesh, ema_memory_kind=ema_memory_kind)
    abstract = jax.tree.map(lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), abstract, places)
    checkpoints = Checkpoints(str(workdir))
    restored = checkpoints.restore(abstract)
    if restored is None:
        kernel = np.random.default_rng(0).normal(size=SHAPES["map.kernel"].shape).astype(np.float32)
        state = jax.jit(create, out_shardings=places)({"map.kernel": jnp.asarray(kernel)})
    else:
        state = restored[0]
    start = int(state.step)
    writer = MetricWriter(
        workdir, total_steps=settings.num_train_steps, items_per_step=BATCH, start_step=start, tokens_per_step=5 * BATCH
    )
    with checkpoints, writer, jax.set_mesh(mesh):
        step = jax.jit(step_of(optimiser), out_shardings=(shardings_of(abstract), None), donate_argnums=0)
        return fit(
            step, state, batches(start, factors, empty), config=settings, mesh=mesh, writer=writer,
            checkpoints=checkpoints, records=records, data=restored and restored[1], **options,
        )  # fmt: skip


def lines(workdir: Path, name: str = "metrics") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (workdir / f"{name}.jsonl").read_text().splitlines()]


def losses(workdir: Path) -> dict[int, float]:
    return {line["step"]: float(line["loss"]) for line in lines(workdir)}


def test_a_loss_jumps_where_it_passes_the_mean_by_sigmas() -> None:
    draw = np.random.default_rng(0)
    series = 1.0 + 0.1 * draw.normal(size=50)
    is_spike = SpikeDetector(4.0, window=30, min_seen=10)
    assert not is_spike(100.0)  # the first losses are not known to be anything
    assert not any(is_spike(loss) for loss in series)
    limit = series[-30:].mean() + 4.0 * series[-30:].std()
    assert is_spike.limit == pytest.approx(limit)
    assert not is_spike(limit - 1e-6)
    assert is_spike(2.0)


def test_a_loss_that_is_not_finite_always_jumps_and_leaves_the_series_alone() -> None:
    is_spike = SpikeDetector(6.0, min_seen=2)
    for loss in (math.nan, math.inf):
        assert is_spike(loss)
    assert math.isnan(is_spike.limit)
    assert not any(is_spike(loss) for loss in (1.0, 1.1, math.nan, 1.05) if math.isfinite(loss))
    assert math.isfinite(is_spike.limit)
    never = SpikeDetector(0.0, min_seen=2)
    assert not any(never(loss) for loss in (1.0, 1.0, 1.0, 1e9))
    assert never(math.nan)


def test_a_loss_that_moves_for_good_is_reported_until_it_is_known() -> None:
    is_spike = SpikeDetector(6.0, window=20, min_seen=10)
    draw = np.random.default_rng(0)
    reported = [
        is_spike(loss) for loss in np.concatenate([np.ones(20), np.full(20, 9.0)]) + 0.01 * draw.normal(size=40)
    ]
    assert reported[20]
    assert not any(reported[:20] + reported[25:])


@pytest.mark.parametrize("process", [0, 1])
def test_a_spike_is_in_the_log_of_the_first_process_alone(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, process: int
) -> None:
    monkeypatch.setattr(jax, "process_index", lambda: process)
    guards = Guards(
        max_skipped=9, spike_sigma=6.0, bad=BadRecordCounter(1.0), batch_size=2, records=lambda step: [step],
        report=lambda step, values: None, newest=lambda: None,
    )  # fmt: skip
    spike = {"loss": jnp.nan, "grad_norm": 1.0, "skipped_in_a_row": 1, "bad_records": len(Cause) * [0]}
    guards.add(7, {name: jnp.asarray(value) for name, value in spike.items()})
    with caplog.at_level(logging.INFO, "svg_jax"):
        guards.judge(all_steps=True)
    assert ("spike at step 7" in caplog.text) == (process == 0)


def test_values_are_judged_an_interval_late() -> None:
    judged = []
    guards = Guards(
        max_skipped=9, spike_sigma=6.0, bad=BadRecordCounter(1.0), batch_size=2, records=lambda step: [step],
        report=lambda step, values: judged.append(step), newest=lambda: None,
    )  # fmt: skip
    spike = {"loss": jnp.nan, "grad_norm": 1.0, "skipped_in_a_row": 1, "bad_records": [1] + (len(Cause) - 1) * [0]}
    counts = []
    for step in range(6):
        guards.add(step, {name: jnp.asarray(value) for name, value in spike.items()})
        if step % 2:
            guards.judge()
            counts.append((len(judged), guards.bad.num_bad, guards.bad.num_records))
    assert counts == [(0, 0, 0), (2, 2, 4), (4, 4, 8)]
    guards.judge(all_steps=True)
    assert judged == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("ema_memory_kind", [None, "pinned_host"])
def test_a_step_that_is_not_finite_is_skipped_counted_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, ema_memory_kind: str | None
) -> None:
    """And the run goes on as if it had never been: with the batch before it, then the one after."""
    with caplog.at_level(logging.WARNING, "svg_jax"):
        state = run(tmp_path, {3: NAN}, ema_memory_kind=ema_memory_kind)
    assert state.skipped.tolist() == [1, 0]
    assert int(state.step) == 8
    assert {int(count) for _, count in optax.tree_utils.tree_get_all_with_path(state.opt_state, "count")} == {7}
    assert [line["skipped_steps"] for line in lines(tmp_path)] == [0, 1, 1, 1]  # of steps 1, 3, 5, 7
    (spike,) = lines(tmp_path, "spikes")
    assert spike == {"step": 3, "loss": "NaN", "grad_norm": "NaN", "records": records(3)}
    (warning,) = [record.getMessage() for record in caplog.records if "spike" in record.getMessage()]
    assert warning.startswith("spike at step 3: loss nan")
    assert "step skipped; its batch holds the records 300, 301, 302, 303, 304, 305, 306, 307" in warning

    def by_hand() -> Any:
        optimiser = adamw(optax.constant_schedule(0.01), b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, clip=1.0)
        kernel = np.random.default_rng(0).normal(size=SHAPES["map.kernel"].shape).astype(np.float32)
        without = TrainState.create({"map.kernel": jnp.asarray(kernel)}, optimiser, jax.random.key(0))
        for i, batch in zip(range(8), batches(0, {}), strict=False):
            if i != 3:
                arrays = {name: jnp.asarray(batch[name]) for name in ("patches", "grid", "tokens", "cause")}
                without, _ = step_of(optimiser)(without, arrays)
        return without

    expected = by_hand()
    np.testing.assert_allclose(state.params["map.kernel"], expected.params["map.kernel"], rtol=1e-5)
    np.testing.assert_allclose(state.ema["map.kernel"], expected.ema["map.kernel"], rtol=1e-5)


def test_a_loss_that_jumps_is_named_with_its_batch(tmp_path: Path) -> None:
    run(tmp_path, {25: 50}, settings=config(num_train_steps=30))
    (spike,) = lines(tmp_path, "spikes")
    assert (spike["step"], spike["records"]) == (25, records(25))
    assert spike["loss"] > 10 * losses(tmp_path)[23]
    assert lines(tmp_path)[-1]["skipped_steps"] == 0


def test_too_many_in_a_row_stop_the_run_and_the_last_checkpoint_is_good(tmp_path: Path) -> None:
    """The save that is due meanwhile waits for the verdict, and is not made."""
    broken = dict.fromkeys(range(3, 99), NAN)
    settings = config(**{"checkpoint.every": 2, "log_every": 50, "num_train_steps": 60})
    with pytest.raises(TooManySkippedSteps, match=r"^up to step 5 .* not finite 3 times in a row, and the last good "
                       r"checkpoint is of step 4: start the same command again with a lower") as error:  # fmt: skip
        run(tmp_path, broken, settings=settings)
    assert "\n" not in str(error.value)
    assert newest_step(str(tmp_path)) == 4

    # What is restored has skipped one already; with sound batches it goes on.
    state = run(tmp_path, {}, settings=config())
    assert state.skipped.tolist() == [1, 0]
    assert int(state.step) == 8
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((state.params, state.ema)))


def test_the_count_goes_on_after_a_restart(tmp_path: Path) -> None:
    broken = dict.fromkeys(range(2, 99), NAN)
    settings = config(**{"guard.max_skipped": 4, "num_train_steps": 4})
    assert run(tmp_path, broken, settings=settings).skipped.tolist() == [2, 2]
    settings.num_train_steps = 60
    with pytest.raises(TooManySkippedSteps, match=r"^up to step 5 .* 4 times in a row"):
        run(tmp_path, broken, settings=settings)


def test_without_a_checkpoint_the_sentence_says_so(tmp_path: Path) -> None:
    with pytest.raises(TooManySkippedSteps, match="there is no checkpoint yet: start the same command"):
        run(tmp_path, dict.fromkeys(range(99), NAN))


def test_preempted_means_saved_and_ended_with_the_code_that_launchers_restart_on(tmp_path: Path) -> None:
    asked = []

    def preempted(step: int) -> bool:
        asked.append(step)
        return step == 5

    settings = config(**{"log_every": 1, "checkpoint.every": 2})
    run(tmp_path / "whole", {}, settings=settings)
    with pytest.raises(SystemExit) as error:
        run(tmp_path / "run", {}, settings=settings, preempted=preempted)
    assert error.value.code == EXIT_PREEMPTED
    assert asked == [1, 2, 3, 4, 5]  # at the steps that are saved, too
    assert newest_step(str(tmp_path / "run")) == 5
    run(tmp_path / "run", {}, settings=settings, preempted=lambda step: False)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "whole")) == 8


def test_broken_records_are_counted_by_cause_over_the_global_batch(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "svg_jax"):
        state = run(tmp_path / "some", {}, empty={2: 3, 7: 1})
    first, *_, last = lines(tmp_path / "some")
    assert {name: value for name, value in last.items() if "bad" in name} == {
        "data/bad_fraction": pytest.approx(4 / 64), "data/bad/damaged": 2, "data/bad/missing": 2
    }  # fmt: skip
    assert [name for name in first if "bad" in name] == ["data/bad_fraction"]
    assert "finished 8 steps; 4 of 64 records skipped (missing 2, damaged 2)" in caplog.text
    assert state.skipped.tolist() == [0, 0]
    many = dict.fromkeys(range(99), 5)
    with pytest.raises(TooManyBadRecords, match=r"max_bad_fraction=0\.5"):
        run(tmp_path / "many", {}, empty=many, settings=config(num_train_steps=60))


def test_the_counts_go_on_after_a_restart_and_the_limit_is_for_what_comes_then(tmp_path: Path) -> None:
    """A run whose data were mended is not stopped for what they were before."""
    empty = {0: 4, 1: 4, 2: 5, 3: 1}
    run(tmp_path, {}, empty=empty, settings=config(num_train_steps=4))
    settings = config(**{"num_train_steps": 12, "data.max_bad_fraction": 0.1})
    run(tmp_path, {}, empty={9: 2}, settings=settings)
    last = lines(tmp_path)[-1]
    assert (last["data/bad/damaged"], last["data/bad/missing"]) == (5, 11)
    assert last["data/bad_fraction"] == pytest.approx(16 / 96)
    data = json.loads((tmp_path / "checkpoints" / "12" / "data" / "metadata").read_text())
    assert data == {"step": 12, "records": 96, "bad": {"damaged": 5, "missing": 11}, "fingerprint": []}
    settings.num_train_steps = 20
    with pytest.raises(
        TooManyBadRecords, match=r"40 of 64 records \(62\.5%\) could not be used \(missing 32, damaged 8\)"
    ):
        run(tmp_path, {}, empty=dict.fromkeys(range(99), 5), settings=settings)


def test_an_average_on_the_hosts_is_saved_restored_and_drawn_from(tmp_path: Path) -> None:
    """With the same numbers as on the devices, and pictures from a copy there."""
    drawn = []

    def draw(state: TrainState) -> list[np.ndarray]:
        ema = state.ema["map.kernel"]
        assert ema.sharding.memory_kind == "device"
        drawn.append(float(jnp.sum(ema)))
        return [np.zeros((2, 2, 3), np.uint8)]

    settings = config(**{"sample.every": 4, "num_train_steps": 4})
    first = run(tmp_path / "host", {}, settings=settings, ema_memory_kind="pinned_host", draw=draw)
    assert first.ema["map.kernel"].sharding.memory_kind == "pinned_host"
    settings.num_train_steps = 8
    host = run(tmp_path / "host", {}, settings=settings, ema_memory_kind="pinned_host", draw=draw)
    device = run(tmp_path / "device", {}, settings=settings)
    assert host.ema["map.kernel"].sharding.memory_kind == "pinned_host"
    np.testing.assert_array_equal(host.ema["map.kernel"], device.ema["map.kernel"])
    assert len(drawn) == 2
    assert drawn[1] == pytest.approx(float(jnp.sum(device.ema["map.kernel"])))
    # And a checkpoint made so goes on with the average on the devices.
    settings.num_train_steps = 9
    assert run(tmp_path / "host", {}, settings=settings).ema["map.kernel"].sharding.memory_kind == "device"


def test_the_log_says_where_the_time_goes(tmp_path: Path) -> None:
    run(tmp_path, {}, settings=config(**{"checkpoint.every": 3}))
    first, second, third, last = lines(tmp_path)  # steps 1, 3, 5, 7; saved after step 2 and 5
    for line in (first, second, third, last):
        assert 0 < line["time/data_wait"] < line["time/step"]
        assert line["time/data_wait_fraction"] == pytest.approx(line["time/data_wait"] / line["time/step"])
    assert [line["time/checkpoint"] > 0 for line in (first, second, third, last)] == [False, True, False, True]
    assert last["tokens_per_second"] == pytest.approx(5 * last["images_per_second"])


def test_a_trace_of_the_asked_steps_is_written_and_changes_nothing(tmp_path: Path) -> None:
    run(tmp_path / "plain", {})
    run(tmp_path / "traced", {}, settings=config(**{"profile.start": 3}))
    assert losses(tmp_path / "traced") == losses(tmp_path / "plain")
    assert list((tmp_path / "traced" / "profile").rglob("*.xplane.pb"))
    assert [line["step"] for line in lines(tmp_path / "traced") if line.get("time/trace", 0.0) > 0.0] == [5]
    assert not (tmp_path / "plain" / "profile").exists()


def test_a_save_that_fails_meanwhile_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checks = []

    def check(self: Checkpoints) -> None:
        checks.append(self)
        if len(checks) == 3:
            raise OSError("a checkpoint cannot be written")

    monkeypatch.setattr(Checkpoints, "check", check)
    with pytest.raises(OSError, match="cannot be written"):
        run(tmp_path, {}, settings=config(log_every=1))
    assert list(losses(tmp_path)) == [0, 1]


def test_a_state_is_made_ready_before_it_is_saved(tmp_path: Path) -> None:
    stamps = []

    def stamped(state: TrainState) -> TrainState:
        stamps.append(int(state.step))
        kernel = state.params["map.kernel"]
        stamp = jax.device_put(np.full(kernel.shape, stamps[-1], np.float32), kernel.sharding)
        return dataclasses.replace(state, params={"map.kernel": stamp})

    state = run(tmp_path, {}, settings=config(num_train_steps=5, **{"checkpoint.every": 2}), before_save=stamped)
    assert stamps == [2, 4, 5]
    saved = open_params(str(tmp_path))["params"]["map.kernel"]
    for kernel in (state.params["map.kernel"], saved):
        np.testing.assert_array_equal(kernel, np.full(kernel.shape, 5, np.float32))


@pytest.mark.parametrize("told", [True, False], ids=["preempted", "stopped"])
def test_a_run_that_ends_early_still_writes_its_trace(tmp_path: Path, told: bool) -> None:
    factors = {} if told else dict.fromkeys(range(99), NAN)
    with pytest.raises(SystemExit if told else TooManySkippedSteps):
        run(
            tmp_path, factors, settings=config(**{"profile.start": 1, "profile.steps": 50, "num_train_steps": 60}),
            preempted=lambda step: told and step == 4,
        )  # fmt: skip
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    jax.profiler.start_trace(tmp_path / "another")  # which the profiler refuses while one is under way
    jax.profiler.stop_trace()


def test_a_skipped_step_changes_no_bit() -> None:
    """Of parameters, average, moments and their count; the step and the counters alone go on."""
    optimiser = adamw(
        optax.constant_schedule(0.01), b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, clip=1.0, mu_dtype="bfloat16"
    )
    create = functools.partial(TrainState.create, optimiser=optimiser, key=jax.random.key(0))
    state = create({"map.kernel": jnp.asarray(np.random.default_rng(0).normal(size=(FEATURES, 8)), jnp.float32)})
    step = jax.jit(step_of(optimiser))
    names, source = ("patches", "grid", "tokens", "cause"), batches(0, {1: NAN, 2: NAN})
    arrays = [{name: jnp.asarray(batch[name]) for name in names} for batch in itertools.islice(source, 4)]
    state, _ = step(state, arrays[0])
    for i, counts in ((1, [1, 1]), (2, [2, 2])):
        after, metrics = step(state, arrays[i])
        assert math.isnan(float(metrics["loss"]))
        assert after.skipped.tolist() == counts == [metrics["skipped_steps"], metrics["skipped_in_a_row"]]
        assert int(after.step) == int(state.step) + 1
        for field in ("params", "ema", "opt_state"):
            jax.tree.map(np.testing.assert_array_equal, getattr(after, field), getattr(state, field))
        state = after
    after, _ = step(state, arrays[3])
    assert after.skipped.tolist() == [2, 0]
    assert (np.asarray(after.params["map.kernel"]) != np.asarray(state.params["map.kernel"])).any()
