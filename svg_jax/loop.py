"""The training loop, the same for every network: batches in, updates, and all that is written down on the way."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from data_pipelines.batches import BadRecordCounter
from svg_jax.checkpoint import Checkpoints
from svg_jax.metrics import MetricWriter
from svg_jax.parallel import to_devices
from svg_jax.state import TrainState

logger = logging.getLogger("svg_jax")

ARRAYS = ("patches", "grid", "tokens", "num_tokens")  # of a host's batch, what goes to the devices


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
) -> TrainState:
    """Runs `step` from `state.step` to `config.num_train_steps`, and saves at the end whatever the interval.

    The host never waits for the device: losses are read a log interval late, and nothing is copied implicitly
    (transfer guard).

    Args:
        step: (state, batch) -> (state, metrics), jitted, donating the state.
        state: Where to begin.
        batches: Host batches from `state.step` on.
        config: `num_train_steps`, `batch_size`, `log_every`, `checkpoint`, `sample.every`, `data.max_bad_fraction`.
        mesh: Where batches go.
        writer: Gets scalars and pictures.
        checkpoints: Gets states.
        draw: Pictures of the present state, every `config.sample.every` steps and at the end.
    """
    start, stop = int(jax.device_get(state.step)), config.num_train_steps
    bad = BadRecordCounter(config.data.max_bad_fraction, min_records=min(1000, 10 * config.batch_size))
    truncated = 0
    for done in range(start + 1, stop + 1):  # counts finished updates
        host = next(batches)
        bad.update(host["num_bad"], len(host["grid"]))
        truncated += host["num_truncated"]
        with jax.transfer_guard("disallow"):
            state, metrics = step(state, device_batch(host, mesh))

        if done % config.log_every == 0 or done == stop:
            writer.scalars(
                done - 1, {**metrics, "data/bad_fraction": bad.fraction, "data/truncated_captions": truncated}
            )
        if draw is not None and _due(done, stop, config.sample.every):
            with writer.untimed():
                writer.pictures(done - 1, "samples", draw(state))
        if done == stop:
            bad.judge()
        if done == stop or _due(done, stop, config.checkpoint.every):
            with writer.untimed():
                checkpoints.save(state, {"step": done}, config.to_dict())
    if start >= stop:
        logger.info("nothing to do: %d steps are done, and config.num_train_steps is %d", start, stop)
    else:
        logger.info("finished %d steps; broken records skipped: %d of %d", stop, bad.num_bad, bad.num_records)
    return state


def device_batch(host: Mapping[str, Any], mesh: Mesh) -> Any:
    """The arrays of a host's batch as global arrays on the mesh."""
    return to_devices({key: host[key] for key in ARRAYS}, mesh)


def _due(done: int, stop: int, every: int) -> bool:
    return every > 0 and (done % every == 0 or done == stop)
