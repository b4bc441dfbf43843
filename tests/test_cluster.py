"""Real processes over loopback: training is the same on any number of them, and survives losing them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from data_pipelines.scenes import write_scenes
from svg_jax.distributed import EXIT_PREEMPTED
from tests.cluster import PATIENCE, job
from tests.tiny import write_tiny_weights
from tests.tiny_autoencoders import write_pictures

STEPS = 12
FEW = 4  # of them, in the warm-up of the learning rate, which knows nothing of how many there are

# The smallest run there is. Frozen networks come from checkpoints that one process wrote.
CONFIG = """
from tests.tiny import tiny_config

def get_config():
    config = tiny_config()
    config.model.dtype = "float32"
    config.update_from_flattened_dict({{
        "num_train_steps": {steps}, "batch_size": 8, "log_every": 1, "checkpoint.every": 4, "sample.every": 0,
        "data.path": "{folder}/scenes/records.jsonl", "data.num_threads": 0, "cluster.timeout": 10.0,
        "data.max_bad_fraction": 0.5,
        "autoencoder.checkpoint": "{folder}/weights/autoencoder",
        "text.checkpoint": "{folder}/weights/text_encoder",
        "text.tokenizer": "{folder}/weights/text_encoder/tokenizer",
    }})
    return config
"""

# The same of an autoencoder with a residual branch and a discriminator, on pictures of two shapes.
AUTOENCODER_CONFIG = """
import dataclasses
from configs import tiny_autoencoder
from tests.tiny_autoencoders import RESIDUAL

def get_config():
    config = tiny_autoencoder.get_config()
    config.autoencoder = {{**dataclasses.asdict(RESIDUAL), "checkpoint": None}}
    config.update_from_flattened_dict({{
        "num_train_steps": {steps}, "batch_size": 8, "log_every": 1, "checkpoint.every": 99, "sample.every": 0,
        "data.path": "{folder}/pictures", "data.resolution": 32, "data.max_ratio": 4.0, "data.num_threads": 0,
        "loss.disc_weight": 0.5, "loss.disc_channels": 4, "loss.disc_num_layers": 1, "loss.disc_start": 1,
        "loss.convention": "list", "statistics.num_images": 8,
    }})
    return config
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes, one of which is missing, weights and the config."""
    folder = tmp_path_factory.mktemp("cluster")
    write_scenes(folder / "scenes", 32, seed=0)
    (folder / "scenes" / "images" / "000003.png").unlink()
    write_tiny_weights(folder / "weights")
    for name, size in (("wide", (64, 16)), ("tall", (16, 64))):
        write_pictures(folder / "pictures" / name, 8, size=size)
    (folder / "config.py").write_text(CONFIG.format(folder=folder, steps=STEPS))
    (folder / "autoencoder.py").write_text(AUTOENCODER_CONFIG.format(folder=folder, steps=FEW))
    return folder


def cluster(
    folder: Path, name: str, processes: int, *flags: str, door: str = "train", config: str = "config.py"
) -> AbstractContextManager[subprocess.Popen[bytes]]:
    """A training run of so many processes with two devices each; its output goes to `folder`/`name`.logs."""
    train = [sys.executable, "-m", f"svg_jax.{door}", f"--config={folder / config}", f"--workdir={folder / name}"]
    settings = {
        # Compiled in half the time, and kept for the next run; all runs compute with the same flags.
        "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
    }
    return job(folder / f"{name}.logs", processes, [*train, *flags], devices=2, env=settings)


def finish(folder: Path, name: str, processes: int, *flags: str, **door: str) -> None:
    with cluster(folder, name, processes, *flags, **door) as run:
        assert run.wait(PATIENCE) == 0, log(folder, name, 0)


def log(folder: Path, name: str, process: int) -> str:
    return (folder / f"{name}.logs" / f"{process}.log").read_text()


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    """What is written of each step, as far as it is."""
    path = folder / name / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def losses(folder: Path, name: str) -> dict[int, float]:
    """Loss by step."""
    return {line["step"]: line["loss"] for line in lines(folder, name)}


def saved(folder: Path, name: str) -> set[int]:
    """Steps of the checkpoints."""
    return {int(path.name) for path in (folder / name / "checkpoints").glob("*") if path.name.isdigit()}


def wait_until(ready: Callable[[], bool], run: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not ready():
        assert run.poll() is None, "ended before anything was done to it"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def send(folder: Path, name: str, process: int, number: signal.Signals) -> None:
    os.kill(int((folder / f"{name}.logs" / f"{process}.pid").read_text()), number)


@pytest.fixture(scope="module")
def whole(folder: Path) -> dict[int, float]:
    """The losses of one process that nothing interrupts."""
    finish(folder, "whole", 1)
    curve = losses(folder, "whole")
    assert list(curve) == list(range(STEPS))
    assert len(set(curve.values())) == STEPS
    return curve


def assert_same(curve: dict[int, float], whole: dict[int, float]) -> None:
    np.testing.assert_allclose(list(curve.values()), [whole[step] for step in curve], rtol=1e-5)


@pytest.mark.slow
def test_one_two_and_four_processes_have_the_same_losses(folder: Path, whole: dict[int, float]) -> None:
    for processes in (2, 4):
        finish(folder, f"whole{processes}", processes, f"--config.num_train_steps={FEW}")
        curve = losses(folder, f"whole{processes}")
        assert list(curve) == list(range(FEW))
        assert_same(curve, whole)


@pytest.mark.slow
def test_an_autoencoder_has_the_same_losses_and_one_grid_a_step_on_both_of_two_processes(folder: Path) -> None:
    """With a residual branch, whose latents are matched over the global batch, and a discriminator.

    The first step differs by rounding alone. Adam divides small gradients by themselves, so later ones part further.
    """
    door = {"door": "train_autoencoder", "config": "autoencoder.py"}
    values = []
    for processes in (1, 2):
        name = f"autoencoder{processes}"
        finish(folder, name, processes, **door)
        lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        values.append([[line[key] for key in ("loss", "grad_norm", "loss/adaptive_weight")] for line in lines])
    assert len(values[0]) == FEW
    np.testing.assert_allclose(values[1][0], values[0][0], rtol=1e-5)
    one, two = (np.array(steps)[:, 0] for steps in values)
    np.testing.assert_allclose(two, one, rtol=1e-4)


@pytest.mark.slow
def test_four_processes_lose_one_and_two_go_on_as_if_nothing_had_happened(
    folder: Path, whole: dict[int, float]
) -> None:
    with cluster(folder, "killed", 4) as run:
        wait_until(lambda: 4 in saved(folder, "killed"), run)
        send(folder, "killed", 2, signal.SIGKILL)
        assert run.wait(PATIENCE) == 128 + signal.SIGKILL
    assert "process 2 of 4 was killed by SIGKILL" in log(folder, "killed", 0)
    for survivor in (0, 1, 3):
        assert re.search(r"error: process 2 of 4 is gone .*: this job ends; start", log(folder, "killed", survivor))
    before = losses(folder, "killed")
    assert 4 <= len(before) < STEPS
    assert_same(before, whole)

    # Four processes saved 1 x 8; two restore 2 x 1 x 2.
    finish(folder, "killed", 2, "--config.mesh.data=1", "--config.mesh.fsdp=2", "--config.mesh.tensor=2")
    assert "resuming after step" in log(folder, "killed", 0)
    after = losses(folder, "killed")
    assert list(after) == list(range(STEPS))
    assert_same(after, whole)
    for name in ("whole", "killed"):  # the missing picture, once in each of three epochs
        assert (lines(folder, name)[-1]["data/bad/missing"], lines(folder, name)[-1]["data/bad_fraction"]) == (
            3,
            3 / 96,
        )


@pytest.mark.slow
def test_sigterm_to_one_of_two_saves_both_and_one_goes_on(folder: Path, whole: dict[int, float]) -> None:
    with cluster(folder, "preempted", 2) as run:
        wait_until(lambda: len(losses(folder, "preempted")) > 1, run)
        send(folder, "preempted", 1, signal.SIGTERM)
        assert run.wait(PATIENCE) == EXIT_PREEMPTED
    steps = {int(re.search(r"saved after step (\d+)", log(folder, "preempted", i))[1]) for i in (0, 1)}
    assert len(steps) == 1
    assert steps <= saved(folder, "preempted")
    assert max(steps) < STEPS
    assert_same(losses(folder, "preempted"), whole)

    finish(folder, "preempted", 1, "--config.mesh.data=2", "--config.mesh.fsdp=1")
    assert f"resuming after step {max(steps)}" in log(folder, "preempted", 0)
    after = losses(folder, "preempted")
    assert list(after) == list(range(STEPS))
    assert_same(after, whole)

    # Only process 0 writes: one file of events for each of the two runs, and no progress from the other process.
    assert len(list((folder / "preempted" / "events").glob("*tfevents*"))) == 2
    assert "loss" not in log(folder, "preempted", 1)
