"""The order of the data, counted by id: the same for any number of processes and workers, resumed on any other."""

from __future__ import annotations

import contextlib
import itertools
import json
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipelines.batches import TextToImageBatches
from data_pipelines.grids import GridBatches
from data_pipelines.loader import make_loader
from data_pipelines.sources import open_source
from data_pipelines.text import ByteTokenizer

RECORDS, BATCH = 61, 12  # an epoch ends inside a batch
EPOCH = 6  # steps that an epoch has a part in
BROKEN = {7, 20, 44}
PATIENCE = 120.0  # seconds for what takes a few where nothing is broken
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("order")
    lines = []
    for i in range(RECORDS):
        if i not in BROKEN:
            Image.new("RGB", (8 + 8 * (i % 3), 16), (i, 0, 0)).save(folder / f"{i}.png")
        lines.append(json.dumps({"path": f"{i}.png", "prompt": str(i)}))
    (folder / "list.jsonl").write_text("\n".join(lines))
    return folder / "list.jsonl"


def batches_of(path: Path, kind: str, index: int = 0, count: int = 1) -> Any:
    source, settings = open_source(path), {"batch_size": BATCH, "resolution": 16, "patch_size": 8, "seed": 3}
    if kind == "grids":
        return GridBatches(source, max_ratio=4.0, process_index=index, process_count=count, **settings)
    return TextToImageBatches(
        source, ByteTokenizer(), max_text_tokens=8, process_index=index, process_count=count, **settings
    )


def read(path: Path, kind: str, steps: range, processes: int, workers: int) -> list[list[int]]:
    """The ids of each global batch, as the loaders of so many processes give them; broken ones as the others."""
    ids: list[list[int]] = [[] for _ in steps]
    for index in range(processes):
        batches = batches_of(path, kind, index, processes)
        loader = make_loader(batches, start_step=steps.start, num_threads=1, num_workers=workers, prefetch=2)
        with contextlib.closing(loader):
            for of_step, batch in zip(ids, loader, strict=False):
                assert len(batch["record"]) == BATCH // processes
                assert [record in BROKEN for record in batch["record"]] == (batch["cause"] > 0).tolist()
                of_step.extend(batch["record"].tolist())
    return ids


def slow(processes: int, workers: int) -> Any:
    return pytest.param(processes, workers, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("processes", "workers"),
    [(1, 0), (2, 0), (3, 0), (4, 0), (1, 1), slow(2, 1), (3, 1), (4, 1), (1, 2), (2, 2), slow(3, 2), slow(4, 2)],
)
def test_an_epoch_has_every_record_once_whoever_reads_it(data: Path, processes: int, workers: int) -> None:
    ids = read(data, "fixed", range(EPOCH), processes, workers)
    assert ids == [batches_of(data, "fixed").records(step) for step in range(EPOCH)]
    drawn = list(itertools.chain(*ids))
    assert sorted(drawn[:RECORDS]) == list(range(RECORDS))
    assert drawn[RECORDS:] != drawn[: len(drawn) - RECORDS]  # of the next epoch, in another order


@pytest.mark.parametrize(("processes", "workers"), [(1, 1), (2, 0), (3, 0), (4, 0), slow(2, 2)])
def test_batches_by_grid_have_one_order_too(data: Path, processes: int, workers: int) -> None:
    whole = batches_of(data, "grids")
    steps = range(4)
    listed = [[record for record in whole.records(step) if record not in BROKEN] for step in steps]
    assert read(data, "grids", steps, processes, workers) == listed  # broken ones have no size, and are in no grid


def test_other_processes_and_workers_go_on_where_the_others_stopped(data: Path) -> None:
    drawn = []
    for first, last, processes, workers in ((0, 1, 4, 0), (1, 3, 2, 1), (3, 4, 3, 0), (4, EPOCH, 1, 2)):
        drawn += itertools.chain(*read(data, "fixed", range(first, last), processes, workers))
    assert sorted(drawn[:RECORDS]) == list(range(RECORDS))
    assert len(drawn) == EPOCH * BATCH


READER = """
import sys, time
from pathlib import Path
from data_pipelines.loader import make_loader
from tests.data_pipelines.test_order import batches_of

data, log, first, index, count, workers = sys.argv[1:]
batches = batches_of(Path(data), "fixed", int(index), int(count))
loader = make_loader(batches, start_step=int(first), num_threads=2, num_workers=int(workers), prefetch=2)
with open(log, "a") as file:
    for batch in loader:
        print(*batch["record"], file=file, flush=True)
        time.sleep(0.05)
"""


@contextlib.contextmanager
def job(data: Path, folder: Path, first: int, count: int, workers: int) -> Any:
    """Real processes that read from a step on; each logs its share of the batches that it got."""
    logs = [folder / f"{first}.{index}_of_{count}" for index in range(count)]
    commands = [
        [sys.executable, "-c", READER, *map(str, (data, log, first, index, count, workers))]
        for index, log in enumerate(logs)
    ]
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(subprocess.Popen(command, cwd=ROOT)) for command in commands]
        for process in processes:
            stack.callback(process.kill)
        yield processes, logs


def steps_in(log: Path) -> list[list[int]]:
    """Ids by step, of the lines that are whole."""
    lines = log.read_text().split("\n")[:-1] if log.exists() else []
    return [[int(word) for word in line.split()] for line in lines]


def wait_for(logs: list[Path], steps: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while min(len(steps_in(log)) for log in logs) < steps:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_killed_in_the_middle_of_an_epoch_no_record_is_lost_or_repeated(data: Path, tmp_path: Path) -> None:
    """Three processes with a worker each; one is killed, and two with two workers go on from the last saved step."""
    with job(data, tmp_path, 0, 3, 1) as (processes, logs):
        wait_for(logs, 3)
        processes[1].send_signal(signal.SIGKILL)
        assert processes[1].wait() == -signal.SIGKILL
    saved = 2  # all have seen more: what came after is done again
    before = [list(itertools.chain(*shares)) for shares in zip(*map(steps_in, logs), strict=False)][:saved]
    with job(data, tmp_path, saved, 2, 2) as (_, logs):
        wait_for(logs, EPOCH - saved)
    after = [list(itertools.chain(*shares)) for shares in zip(*map(steps_in, logs), strict=False)]
    drawn = list(itertools.chain(*before, *after[: EPOCH - saved]))
    assert Counter(drawn[:RECORDS]) == Counter(range(RECORDS))
    assert drawn == list(itertools.chain(*(batches_of(data, "fixed").records(step) for step in range(EPOCH))))


def test_the_data_is_the_same_too(data: Path) -> None:
    """Not only the ids: pixels and tokens of a batch that two processes with a worker each read."""
    whole = batches_of(data, "fixed")[4]
    parts = []
    for index in range(2):
        loader = make_loader(batches_of(data, "fixed", index, 2), start_step=4, num_threads=2, num_workers=1)
        parts.append(next(loader))
        loader.close()
    for key in ("patches", "grid", "tokens", "num_tokens", "cause", "record"):
        np.testing.assert_array_equal(np.concatenate([part[key] for part in parts]), whole[key], err_msg=key)
