"""Training on data that are broken in every way, and losing processes that read."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs import tiny_autoencoder
from data_pipelines.scenes import write_scenes
from svg_jax import train, train_autoencoder
from tests.data_pipelines import torture
from tests.test_train import OF_AUTOENCODER, command, environment, scalars, small_config

PATIENCE = 300.0  # seconds for what takes a few where nothing is broken
STEPS = 18  # of 8 records: each of the set at least once
BROKEN = {"data.max_bad_fraction": 1.0, "num_train_steps": STEPS, "log_every": 6, "checkpoint.every": 0}


def counted(line: dict[str, Any]) -> dict[str, int]:
    """Broken records by cause, as a line of the log has them."""
    return {name.removeprefix("data/bad/"): int(line[name]) for name in line if name.startswith("data/bad/")}


def expected(records: Iterable[int], captions: bool) -> dict[str, int]:
    kinds = (torture.KINDS[record] for record in records)
    return dict(Counter(str(kind.cause) for kind in kinds if kind.cause and (captions or not kind.needs_caption)))


def test_the_transformer_trains_on_what_is_left_of_the_torture_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[train.TextToImageBatches] = []

    class Noting(train.TextToImageBatches):
        def __init__(self, *arguments: Any, **settings: Any) -> None:
            super().__init__(*arguments, **settings)
            made.append(self)

    monkeypatch.setattr(train, "TextToImageBatches", Noting)
    data = torture.write(tmp_path)
    settings = BROKEN | {"data.caption_dropout": 0.0, "data.num_threads": 2, "data.resolution": 32}
    settings |= {"optim.schedule": "constant", "model.num_layers": 1}
    # Interrupted in the middle of the set: the counts go on.
    train.main(small_config(data, **(settings | {"num_train_steps": STEPS // 2})), str(tmp_path / "run"))
    train.main(small_config(data, **settings), str(tmp_path / "run"))
    lines = scalars(tmp_path / "run")
    records = [record for step in range(STEPS) for record in made[0].records(step)]
    assert set(records) == set(range(len(torture.KINDS)))
    causes = expected(records, captions=True)
    assert len(causes) > 12
    assert counted(lines[-1]) == causes
    assert lines[-1]["data/bad_fraction"] == pytest.approx(sum(causes.values()) / len(records))
    assert lines[-1]["data/truncated_fraction"] > 0
    assert all(np.isfinite(line["loss"]) for line in lines)
    saved = json.loads((tmp_path / "run" / "checkpoints" / str(STEPS) / "data" / "metadata").read_text())
    assert saved == {
        "step": STEPS, "records": len(records), "bad": causes, "fingerprint": made[0].fingerprint
    }  # fmt: skip


@pytest.mark.slow
def test_the_autoencoder_trains_on_what_is_left_of_the_torture_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[train_autoencoder.GridBatches] = []

    class Noting(train_autoencoder.GridBatches):
        def __init__(self, *arguments: Any, **settings: Any) -> None:
            super().__init__(*arguments, **settings)
            made.append(self)

    monkeypatch.setattr(train_autoencoder, "GridBatches", Noting)
    data = torture.write(tmp_path)
    config = tiny_autoencoder.get_config()
    settings = BROKEN | {"data.path": str(data), "data.resolution": 32, "data.num_threads": 2}
    config.update_from_flattened_dict(OF_AUTOENCODER | settings)
    train_autoencoder.main(config, str(tmp_path / "run"))
    records = [record for step in range(STEPS) for record in made[0].records(step)]
    (*_, last) = scalars(tmp_path / "run")
    assert counted(last) == expected(records, captions=False)
    assert np.isfinite(last["loss"])


def children(process: int) -> list[int]:
    """Workers of a process."""
    listed = subprocess.run(["pgrep", "-f", "-P", str(process), "loader.work"], capture_output=True, check=False)
    return [int(line) for line in listed.stdout.split()]


def wait_until(ready: Callable[[], bool], process: subprocess.Popen[Any]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not ready():
        assert process.poll() is None, "ended before anything was done to it"
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
def test_a_killed_worker_ends_the_run_and_a_killed_run_its_workers(tmp_path: Path) -> None:
    """Started again, by itself and then with another number of workers, the run goes on as if nothing had been."""
    data = write_scenes(tmp_path / "scenes", 32, seed=0)
    (tmp_path / "scenes" / "images" / "000003.png").unlink()
    settings = {"data.max_bad_fraction": 0.5, "data.num_threads": 2, "num_train_steps": 300, "checkpoint.every": 50}
    subprocess.run(command("train", tmp_path / "whole", data, **settings), env=environment(), check=True, timeout=300)

    def start(workers: int) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command("train", tmp_path / "run", data, **settings, **{"data.num_workers": workers}),
            env=environment(), stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def saved(step: int) -> bool:
        return (tmp_path / "run" / "checkpoints" / str(step)).is_dir()

    run = start(2)
    wait_until(lambda: saved(50), run)
    first, second = children(run.pid)
    os.kill(second, signal.SIGKILL)
    _, log = run.communicate(timeout=PATIENCE)
    assert run.returncode == 1
    assert re.search(rf"error: data worker \d of 2 \(process {second}\) was killed by SIGKILL before it gave step", log)
    assert not Path(f"/proc/{first}").exists()

    run = start(1)
    wait_until(lambda: saved(150), run)
    (worker,) = children(run.pid)
    run.kill()
    run.communicate(timeout=PATIENCE)
    deadline = time.monotonic() + PATIENCE
    while Path(f"/proc/{worker}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)

    run = start(3)
    _, log = run.communicate(timeout=PATIENCE)
    assert run.returncode == 0, log
    assert "finished 300 steps; 75 of 2400 records skipped (missing 75)" in log
    keys = ("step", "loss", "grad_norm", "data/bad_fraction")
    whole, resumed = scalars(tmp_path / "whole"), scalars(tmp_path / "run")
    assert [[line[key] for key in keys[:3]] for line in resumed] == [[line[key] for key in keys[:3]] for line in whole]
    assert resumed[-1]["data/bad_fraction"] == whole[-1]["data/bad_fraction"] == 75 / 2400
