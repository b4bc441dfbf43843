"""The training loop, the same for every network: batches in, updates, and all that is written down on the way."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from data_pipelines.broken import BadRecordCounter
from svg_jax.checkpoint import Checkpoints, newest_step
from svg_jax.distributed import EXIT_PREEMPTED
from svg_jax.guards import Guards
from svg_jax.metrics import MetricWriter
from svg_jax.parallel import to_devices
from svg_jax.profiling import HostClock, Trace
from svg_jax.state import TrainState, on_device

logger = logging.getLogger("svg_jax")

# Of a host's batch, what goes to the devices: padded patches and captions, or images of one size.
ARRAYS = ("patches", "grid", "tokens", "num_tokens", "images", "valid", "cause")


class Preempted(SystemExit):
    """The machines are about to be taken away, and the state is saved; the launchers start the same command again."""

    def __init__(self) -> None:
        super().__init__(EXIT_PREEMPTED)


def fit(
    step: Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]],
    state: TrainState,
    batches: Iterator[Any],
    *,
    config: ConfigDict,
    mesh: Mesh,
    writer: MetricWriter,
    checkpoints: Checkpoints,
    draw: Callable[[TrainState], list[np.ndarray]] | None = None,
    evaluate: Callable[[TrainState], Mapping[str, float]] | None = None,
    before_save: Callable[[TrainState], TrainState] = lambda state: state,
    preempted: Callable[[int], bool] | None = None,
    records: Callable[[int], Sequence[int]] = lambda step: (),
    data: Mapping[str, Any] | None = None,
    fingerprint: Sequence[str] = (),
) -> TrainState:
    """Runs `step` from `state.step` to `config.num_train_steps`, and saves at the end whatever the interval.

    The host never waits for the device: what a step says of itself is read a log interval late, and nothing is copied
    implicitly (transfer guard). Before a save the host waits anyway, and judges all that ran: so a checkpoint is
    never made of a run that should have stopped.

    Args:
        step: (state, batch) -> (state, metrics), jitted, donating the state.
        state: Where to begin.
        batches: Host batches from `state.step` on.
        config: `num_train_steps`, `batch_size`, `log_every`, `checkpoint`, `sample.every`, `data.max_bad_fraction`,
            `guard`, `profile`; `eval.fid_every` where there is something to evaluate.
        mesh: Where batches go.
        writer: Gets scalars and pictures.
        checkpoints: Gets states.
        draw: Pictures of the present state, its average on the devices, every `config.sample.every` steps and at the
            end.
        evaluate: Scores of the present state, likewise every `config.eval.fid_every` steps and at the end, once what is
            due is saved.
        before_save: What becomes of a state before it is saved, unless the machines are about to be taken away.
        preempted: Whether the machines are about to be taken away, after so many updates; the same answer everywhere.
        records: Which records the global batch of a step holds.
        data: What the checkpoint that `state` is of says about the data; None at the beginning.
        fingerprint: What the data are known by, kept in checkpoints.

    Raises:
        Preempted: The machines are about to be taken away, and the state is saved.
        TooManySkippedSteps: Nothing was finite for `config.guard.max_skipped` steps in a row.
        TooManyBadRecords: More records than `config.data.max_bad_fraction` cannot be read.
        OSError: A checkpoint cannot be written.
    """
    start, stop = int(jax.device_get(state.step)), config.num_train_steps
    guards = Guards(
        max_skipped=config.guard.max_skipped,
        spike_sigma=config.guard.spike_sigma,
        bad=BadRecordCounter(config.data.max_bad_fraction, min(1000, 10 * config.batch_size), data),
        batch_size=config.batch_size,
        records=records,
        report=writer.spike,
        newest=lambda: _newest(checkpoints),
    )
    folder = checkpoints.folder.parent / "profile"
    trace = Trace(folder, **config.profile, first=start, last=stop, enabled=writer.enabled)
    clock = HostClock()

    @contextlib.contextmanager
    def held_up(phase: str) -> Iterator[None]:
        """Around what the run waits for: first the devices finish, and it is no part of the throughput."""
        guards.judge(all_steps=True)
        with writer.untimed(), clock.phase(phase):
            yield

    logged, captions, truncated = start, 0, 0
    with trace:
        for done in range(start + 1, stop + 1):  # counts finished steps
            with clock.phase("data_wait"):
                host = next(batches)
            captions += len(host.get("num_tokens", ()))
            truncated += host.get("num_truncated", 0)
            with trace.before(done - 1), jax.transfer_guard("disallow"):
                state, metrics = step(state, device_batch(host, mesh))
            guards.add(done - 1, metrics)
            checkpoints.check()
            if trace.ends(done - 1):
                with held_up("trace"):
                    trace.stop()

            if done % config.log_every == 0 or done == stop:
                guards.judge(all_steps=done == stop)
                # As of the line before, but for the last one; of the captions, those that this process read.
                of_data = guards.bad.metrics
                if captions:
                    of_data["data/truncated_fraction"] = truncated / captions
                of_step = {name: value for name, value in metrics.items() if name != "bad_records"}
                writer.scalars(done - 1, {**of_step, **of_data, **clock.line(done - logged)})
                logged = done
            if draw is not None and _due(done, stop, config.sample.every):
                with held_up("sample"):
                    writer.pictures(done - 1, "samples", draw(dataclasses.replace(state, ema=on_device(state.ema))))
            if done == stop:
                guards.bad.judge()
            told = preempted is not None and preempted(done)  # asked at every step: it is true at one of them only
            if told or done == stop or _due(done, stop, config.checkpoint.every):
                with held_up("checkpoint"):
                    state = state if told and done < stop else before_save(state)
                    of_run = {"step": done, **guards.bad.state, "fingerprint": list(fingerprint)}
                    checkpoints.save(state, of_run, config.to_dict())
            if told and done < stop:
                checkpoints.wait()
                logger.warning("preempted: saved after step %d; the same command goes on from there", done)
                raise Preempted
            if evaluate is not None and _due(done, stop, config.eval.fid_every):  # what is due is saved before
                with held_up("eval"):
                    scores = evaluate(dataclasses.replace(state, ema=on_device(state.ema)))
                writer.scalars(done - 1, scores)
    if start >= stop:
        logger.info("nothing to do: %d steps are done, and config.num_train_steps is %d", start, stop)
    else:
        logger.info("finished %d steps; %s", stop, guards.bad)
    return state


def _newest(checkpoints: Checkpoints) -> int | None:
    checkpoints.wait()
    try:
        return newest_step(str(checkpoints.folder.parent))
    except FileNotFoundError:
        return None


def device_batch(host: Mapping[str, Any], mesh: Mesh) -> Any:
    """The arrays of a host's batch as global arrays on the mesh."""
    return to_devices({key: host[key] for key in ARRAYS if key in host}, mesh)


def _due(done: int, stop: int, every: int) -> bool:
    return every > 0 and (done % every == 0 or done == stop)
