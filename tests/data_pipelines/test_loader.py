"""Reading ahead in threads and worker processes: the order, what goes wrong in a worker, and that nothing stays."""

from __future__ import annotations

import collections
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Executor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from data_pipelines import files
from data_pipelines.loader import WorkerDied, make_loader

PATIENCE = 60.0  # seconds for what takes one where nothing is broken
KINDS = [(0, 0), (3, 0), (0, 1), (2, 2)]  # threads, workers


class Counting(NamedTuple):
    """Batches that say who read them; slow from a step on, failing or crashing at one."""

    seconds: float = 0.0
    slow_from: int = 0
    fails_at: int = -1
    ends_at: int = -1
    notes: str = ""

    def read(self, step: int, threads: Executor | None = None) -> dict[str, Any]:
        if self.notes:
            (Path(self.notes) / str(step)).touch()
        if step == self.fails_at:
            raise KeyError(f"no batch {step}")
        if step == self.ends_at:
            os._exit(7)
        if step >= self.slow_from:
            time.sleep(self.seconds)
        squares = list((threads.map if threads else map)(lambda slot: slot**2, range(5)))
        return {
            "squares": np.array(squares) + step,
            "strided": np.arange(12).reshape(3, 4).T[::2],
            "empty": np.zeros((0, 3), np.uint8),
            "step": step,
            "process": os.getpid(),
            "remote": files.default(),
        }


def wait_until(ready: Any) -> None:
    deadline = time.monotonic() + PATIENCE
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def runs(process: int) -> bool:
    """Whether there is such a process, and it is no zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(("num_threads", "num_workers"), KINDS)
def test_batches_come_whole_and_in_order(num_threads: int, num_workers: int) -> None:
    loader = make_loader(Counting(), start_step=3, num_threads=num_threads, num_workers=num_workers, prefetch=3)
    batches = [next(loader) for _ in range(9)]
    loader.close()
    assert [batch["step"] for batch in batches] == list(range(3, 12))
    for batch in batches:
        assert batch["squares"].tolist() == [batch["step"] + n for n in (0, 1, 4, 9, 16)]
        assert batch["strided"].tolist() == [[0, 4, 8], [2, 6, 10]]
        assert batch["empty"].shape == (0, 3)
        batch["squares"] += 1  # as any other array
    processes = [batch["process"] for batch in batches]
    if num_workers == 0:
        assert set(processes) == {os.getpid()}
    else:
        assert os.getpid() not in processes
        assert len(set(processes)) == num_workers
        assert processes[num_workers:] == processes[:-num_workers]  # in turn
        assert not any(map(runs, processes))
    assert next(loader, None) is None


@pytest.mark.parametrize("name", ["start_step", "num_threads", "prefetch", "num_workers"])
@pytest.mark.parametrize("number", [-1, 10**30])
def test_numbers_beyond_sense_are_refused_at_once(name: str, number: int) -> None:
    with pytest.raises(ValueError, match=rf"{name}={number} is not in 0 to \d+"):
        make_loader(Counting(), **{name: number})


def test_no_more_is_read_ahead_than_asked_for(tmp_path: Path) -> None:
    loader = make_loader(Counting(notes=str(tmp_path)), num_threads=1, prefetch=3)
    next(loader)
    wait_until(lambda: len(list(tmp_path.iterdir())) == 4)
    time.sleep(0.1)
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1", "2", "3"}
    loader.close()


@pytest.mark.parametrize("num_threads", [0, 2])
def test_an_error_in_this_process_is_raised_in_its_turn(num_threads: int) -> None:
    loader = make_loader(Counting(fails_at=2), num_threads=num_threads)
    assert [next(loader)["step"] for _ in range(2)] == [0, 1]
    with pytest.raises(KeyError, match="no batch 2"):
        next(loader)


def test_an_error_in_a_worker_is_raised_in_its_turn_with_its_traceback() -> None:
    loader = make_loader(Counting(fails_at=3), num_threads=1, num_workers=2)
    processes = {next(loader)["process"] for _ in range(3)}
    with pytest.raises(WorkerDied, match=r"^data worker 2 of 2 failed at step 3:\nTraceback") as error:
        next(loader)
    assert "in read" in str(error.value)
    assert str(error.value).endswith("KeyError: 'no batch 3'\n")
    assert not any(map(runs, processes))


def test_a_worker_that_ends_is_named_with_how_it_ended() -> None:
    loader = make_loader(Counting(ends_at=2), num_threads=1, num_workers=2)
    with pytest.raises(
        WorkerDied, match=r"data worker 1 of 2 \(process \d+\) ended with code 7 before it gave step \d"
    ):
        collections.deque(loader, maxlen=0)


def test_a_worker_that_is_killed_ends_the_loader_at_once() -> None:
    loader = make_loader(Counting(), num_threads=1, num_workers=2, prefetch=2)
    first, second = (next(loader)["process"] for _ in range(2))
    os.kill(second, signal.SIGKILL)
    with pytest.raises(WorkerDied, match=rf"data worker 2 of 2 \(process {second}\) was killed by SIGKILL before it"):
        collections.deque(loader, maxlen=0)
    assert not runs(first)


def test_what_cannot_be_sent_to_a_worker_is_an_error_and_leaves_none() -> None:
    before = subprocess.run(["pgrep", "-P", str(os.getpid())], capture_output=True, check=False).stdout.split()
    with pytest.raises(TypeError, match="pickle"):
        next(make_loader(Counting(notes=threading.Lock()), num_workers=2))  # type: ignore[arg-type]
    after = subprocess.run(["pgrep", "-P", str(os.getpid())], capture_output=True, check=False).stdout.split()
    assert len(after) <= len(before)


def test_closing_ends_workers_in_the_middle_of_a_read(tmp_path: Path) -> None:
    loader = make_loader(Counting(1000.0, slow_from=2, notes=str(tmp_path)), num_threads=1, num_workers=2)
    processes = [next(loader)["process"] for _ in range(2)]
    wait_until(lambda: {"2", "3"} <= {path.name for path in tmp_path.iterdir()})
    assert all(map(runs, processes))
    loader.close()
    assert not any(map(runs, processes))


def test_workers_end_with_a_process_that_is_killed(tmp_path: Path) -> None:
    """Whatever they do at that moment: one sleeps in a read, one waits until its batch is taken."""
    code = (
        "import sys, time; from tests.data_pipelines.test_loader import Counting; "
        "from data_pipelines.loader import make_loader\n"
        "loader = make_loader(Counting(float(sys.argv[1])), num_threads=1, num_workers=2)\n"
        "print(*sorted({next(loader)['process'] for _ in range(2)}), flush=True)\n"
        "time.sleep(1000)"
    )
    for seconds in ("0", "1"):
        command = [sys.executable, "-c", code, seconds]
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]) as process:
            assert process.stdout is not None
            workers = [int(word) for word in process.stdout.readline().split()]
            assert len(workers) == 2
            assert all(map(runs, workers))
            process.kill()
        wait_until(lambda workers=workers: not any(map(runs, workers)))


def test_signals_for_the_job_leave_workers_alone() -> None:
    loader = make_loader(Counting(), num_threads=1, num_workers=1)
    process = next(loader)["process"]
    os.kill(process, signal.SIGTERM)
    os.kill(process, signal.SIGINT)
    assert [next(loader)["step"] for _ in range(5)] == [1, 2, 3, 4, 5]
    loader.close()


def test_workers_are_as_patient_with_stores_as_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = files.Remote(timeout=3.0, retries=1, backoff=0.5)
    monkeypatch.setattr(files, "_default", policy)
    loader = make_loader(Counting(), num_threads=1, num_workers=1)
    assert next(loader)["remote"] == policy
    loader.close()
