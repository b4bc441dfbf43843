"""Several processes as one job: who is in it, what ends it, what saves it. Real processes over loopback."""

from __future__ import annotations

import http.server
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from svg_jax import distributed
from svg_jax.distributed import EXIT_LOST, EXIT_PREEMPTED, Place, initialise
from tests.cluster import PATIENCE, ROOT, job


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No cluster in the environment, and SIGTERM as it was."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "JAX_COORDINATOR", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")):
            monkeypatch.delenv(name)
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)
    distributed._terminated.clear()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"process_id": 1}, "names process_id and not coordinator and num_processes"),
        ({"coordinator": "host:1", "num_processes": 2}, "names coordinator, num_processes and not process_id"),
        ({"coordinator": "host", "num_processes": 2, "process_id": 0}, "coordinator is 'host': it must be host:port"),
        ({"coordinator": "host:1", "num_processes": 2, "process_id": 2}, "process_id is 2 of 2 processes"),
        ({"coordinator": "host:1", "num_processes": 2, "process_id": -1}, "process_id is -1"),
        ({"coordinator": "host:1", "num_processes": 0, "process_id": 0}, "num_processes is 0: it must be at least 1"),
        ({"timeout": 0.0}, "config.cluster.timeout 0.0 .* must be above zero"),
    ],
)
def test_settings_that_contradict_each_other_are_one_sentence(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        initialise(settings)
    assert "\n" not in str(error.value)
    assert not jax.distributed.is_initialized()


def test_one_process_is_left_alone_and_saves_on_the_first_sigterm() -> None:
    for settings in (None, {}, {"coordinator": None}, {"coordinator": "host:1", "num_processes": 1, "process_id": 0}):
        initialise(settings)
        assert not jax.distributed.is_initialized()
    assert distributed.is_first()
    assert distributed.everyone("here", "me", 1.0) == ["me"]
    distributed.barrier("here", 1.0)
    assert not distributed.preempted(1)
    os.kill(os.getpid(), signal.SIGTERM)
    assert distributed.preempted(2)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # the second one ends the process


SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NODELIST": "gpu[03-06]",
    "SLURM_NTASKS": "32",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}
VARIABLES = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        (SLURM, Place(9, 32, None)),
        (SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),  # an interactive shell on one node
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8"}, None),  # inside salloc, and not started by srun
        (OPEN_MPI, Place(3, 4, None)),
        (VARIABLES, Place(1, 2, "10.0.0.1:1234")),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),  # a pod that is no part of a job
        ({}, None),
    ],
)
def test_the_job_is_found_in_the_environment(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], place: Place | None
) -> None:
    joined: list[Place] = []
    monkeypatch.setattr(distributed, "_join", lambda place, *_: joined.append(place))
    monkeypatch.setattr(distributed, "_Watch", lambda *_: threading.Thread())
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    initialise({"timeout": 100.0})
    assert joined == ([place] if place else [])


def test_settings_come_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (SLURM | VARIABLES).items():
        monkeypatch.setenv(name, value)
    named = {"coordinator": "host:1", "num_processes": "3", "process_id": 2}
    assert distributed._named(named) == Place(2, 3, "host:1")


def test_a_new_maintenance_notice_is_a_sigterm(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that stands from the beginning is not, nor is an answer that is none."""
    asked: list[str] = []
    answers = [b"TERMINATE_ON_HOST_MAINTENANCE"] * 2 + [b"", b"NONE", b"TERMINATE_ON_HOST_MAINTENANCE"]

    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            assert self.headers["Metadata-Flavor"] == "Google"
            if answer := answers[len(asked) - 1]:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(answer)
            else:
                self.wfile.write(b"no HTTP\r\n")

        def log_message(self, *_: object) -> None: ...

    server = http.server.HTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{server.server_port}")
    initialise(None)
    distributed.heed_maintenance(every=0.01)
    server.shutdown()
    assert len(asked) == len(answers)
    assert asked[0] == "/computeMetadata/v1/instance/maintenance-event"
    assert distributed.preempted(1)


# Several processes.

PREAMBLE = """
import os, signal, sys, time
import jax
from svg_jax import distributed

distributed.initialise({"timeout": 4.0, "start_timeout": 60.0})
me, count = jax.process_index(), jax.process_count()

def work():
    while True:
        time.sleep(0.05)
"""


def cluster(tmp_path: Path, processes: int, script: str) -> tuple[int, list[str]]:
    """The exit code of a job, and what each process wrote."""
    (tmp_path / "job.py").write_text(PREAMBLE + script)
    with job(tmp_path, processes, [sys.executable, str(tmp_path / "job.py")]) as started:
        code = started.wait(PATIENCE)
    return code, [(tmp_path / f"{index}.log").read_text() for index in range(processes)]


def test_a_barrier_names_those_who_do_not_come(tmp_path: Path) -> None:
    code, logs = cluster(
        tmp_path,
        3,
        """
distributed.barrier("first", 60)
assert distributed.everyone("names", f"I am {me}", 60) == ["I am 0", "I am 1", "I am 2"]
distributed.barrier("first", 60)
try:
    if me != 1:
        distributed.barrier("second", 1)
except TimeoutError as error:
    print(error, flush=True)
distributed.barrier("last", 60)
""",
    )
    assert code == 0, logs
    sentence = "process 1 of 3 did not come to the barrier 'second' within 1 s: the log there says why"
    assert [sentence in log for log in logs] == [True, False, True]


@pytest.mark.parametrize("lost", [0, 1])
def test_the_others_say_who_is_gone_and_end(tmp_path: Path, lost: int) -> None:
    script = f"if me == {lost}: time.sleep(1); os.kill(os.getpid(), signal.SIGKILL)\nwork()"
    code, logs = cluster(tmp_path, 3, script)
    assert code == 128 + signal.SIGKILL
    assert f"process {lost} of 3 was killed by SIGKILL" in logs[0]
    for index in {0, 1, 2} - {lost}:
        assert re.search(
            rf"^error: process {lost} of 3 is gone \(.*\): this job ends; start the same", logs[index], re.M
        )


def test_an_error_of_one_ends_all_and_is_told_to_all(tmp_path: Path) -> None:
    code, logs = cluster(tmp_path, 2, "if me == 0: raise KeyError('no such thing')\nwork()")
    assert code in (1, EXIT_LOST)  # whichever the launcher saw first
    assert "KeyError: 'no such thing'" in logs[0]
    assert "error: process 0 of 2 failed: KeyError: 'no such thing': this job ends" in logs[1]
    assert "Traceback" not in logs[1]


def test_an_error_in_one_sentence_is_told_to_all(tmp_path: Path) -> None:
    code, logs = cluster(
        tmp_path, 2, "if me == 1: distributed.failed('bad records'); raise SystemExit('error: bad records')\nwork()"
    )
    assert code in (1, EXIT_LOST)
    assert "error: bad records" in logs[1]
    assert "error: process 1 of 2 failed: bad records: this job ends" in logs[0]


def test_only_the_first_process_writes_the_log(tmp_path: Path) -> None:
    script = """
import logging
logging.basicConfig()
logging.getLogger("svg_jax").info("told by %d", me)
logging.getLogger("svg_jax").warning("warned by %d", me)
"""
    level = "import logging\nlogging.getLogger('svg_jax').setLevel(logging.INFO)\n"
    (tmp_path / "job.py").write_text(level + PREAMBLE + script)
    with job(tmp_path, 2, [sys.executable, str(tmp_path / "job.py")]) as started:
        assert started.wait(PATIENCE) == 0
    logs = [(tmp_path / f"{index}.log").read_text() for index in (0, 1)]
    assert ["told by" in log for log in logs] == [True, False]
    assert ["warned by" in log for log in logs] == [True, True]


@pytest.mark.parametrize("code", [0, EXIT_PREEMPTED])
def test_a_process_that_is_done_keeps_its_exit_code_where_another_never_ends(code: int, free_port: int) -> None:
    script = f"""
from jax.experimental import multihost_utils
distributed.barrier("both", 60)
if me == 1:
    os.kill(os.getpid(), signal.SIGSTOP)
multihost_utils.reached_preemption_sync_point = lambda step: bool({code})
distributed.preempted(1)
raise SystemExit({code})
"""
    processes = [subprocess.Popen([sys.executable, "-c", PREAMBLE + script], env=of(i, 2, free_port), cwd=ROOT)
                 for i in (0, 1)]  # fmt: skip
    try:
        assert processes[0].wait(PATIENCE) == code
    finally:
        for process in processes:
            process.kill()
            process.wait()


def of(index: int, processes: int, port: int) -> dict[str, str]:
    """The environment of one process of a job."""
    address = f"127.0.0.1:{port}"
    return os.environ | {
        "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes), "JAX_PROCESS_ID": str(index),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("started", "message"),
    [
        ((0, 1), "process 2 of 3 did not come to the coordinator 127.0.0.1:{port} within 3 s"),
        ((1,), "process 1 of 3 cannot reach process 0 at the coordinator 127.0.0.1:{port}"),
    ],
)
def test_who_is_missing_at_the_start_is_one_sentence(started: tuple[int, ...], message: str, free_port: int) -> None:
    script = "from svg_jax import distributed; distributed.initialise({'start_timeout': 3.0})"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script], env=of(i, 3, free_port), stderr=subprocess.PIPE, text=True, cwd=ROOT
        )
        for i in started
    ]  # fmt: skip
    for process in processes:
        _, stderr = process.communicate(timeout=PATIENCE)
        assert process.returncode == EXIT_LOST
        assert stderr.count("\n") == 1
        assert stderr.startswith("error: " + message.format(port=free_port))


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


STATE = """
import dataclasses, functools, logging, resource
import jax.numpy as jnp
import numpy as np
import optax
from svg_jax import checkpoint, config
from svg_jax.parallel import make_mesh, param_shardings
from svg_jax.state import TrainState, adamw, state_shardings

logging.basicConfig()
mesh = make_mesh({{"fsdp": -1}})
shapes = {{"dense.kernel": jax.ShapeDtypeStruct(({size}, {size}), jnp.float32)}}
at = param_shardings(shapes, {{"dense.kernel": ("embed", "mlp")}}, mesh)
optimiser = adamw(optax.constant_schedule(1e-2), b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.0, clip=1.0)
create = functools.partial(TrainState.create, optimiser=optimiser, key=jax.random.key(5))
state_at = state_shardings(jax.eval_shape(create, shapes), at, mesh)
values = jnp.arange(float({size} ** 2)).reshape({size}, {size})
params = jax.device_put({{"dense.kernel": np.asarray(values)}}, at)
state = jax.jit(create, out_shardings=state_at)(params)
abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
"""


@pytest.mark.parametrize(("processes", "full"), [(1, 0), (2, 0), (2, 1)])
def test_a_disk_that_is_full_for_one_ends_all_with_one_sentence(tmp_path: Path, processes: int, full: int) -> None:
    """While the save runs in the background, and all are at work."""
    code, logs = cluster(
        tmp_path,
        processes,
        STATE.format(size=512)
        + f"""
with config.one_sentence(OSError), checkpoint.Checkpoints({str(tmp_path / "run")!r}) as checkpoints:
    if me == {full}:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    checkpoints.save(state, {{"step": 0}}, {{}})
    while True:
        checkpoints.check()
        time.sleep(0.05)
""",
    )
    assert code in (1, EXIT_LOST)
    sentence = f"a checkpoint cannot be written to {tmp_path / 'run' / 'checkpoints'} (File too large): make room"
    assert len(re.findall(f"^error: {re.escape(sentence)}", logs[full], re.M)) == 1
    for log in (log for index, log in enumerate(logs) if index != full):
        assert f"error: process {full} of 2 failed: {sentence}" in log


def test_who_fails_waits_for_no_save(tmp_path: Path) -> None:
    """That of the others: they have ended, told why, and will not finish it."""
    code, logs = cluster(
        tmp_path,
        2,
        STATE.format(size=16)
        + f"""
with config.one_sentence(KeyError), checkpoint.Checkpoints({str(tmp_path / "run")!r}) as checkpoints:
    if me == 1:
        checkpoints._manager.wait_until_finished = lambda: time.sleep(3600)
        raise KeyError("broken")
    work()
""",
    )
    assert code in (1, EXIT_LOST)
    assert "error: process 1 of 2 failed: KeyError: 'broken': this job ends" in logs[0]
    assert re.search("^error: 'broken'", logs[1], re.M)


def test_what_one_cannot_read_none_restores(tmp_path: Path) -> None:
    """Process 1 fails to read its share of the newest checkpoint: both take the one before, and set that one aside."""
    code, logs = cluster(
        tmp_path,
        2,
        STATE.format(size=16)
        + f"""
with checkpoint.Checkpoints({str(tmp_path / "run")!r}) as checkpoints:
    for step in (1, 2):
        at_step = jax.jit(lambda s: dataclasses.replace(s, step=s.step + step), out_shardings=state_at)(state)
        checkpoints.save(at_step, {{"step": step}}, {{"seed": 3}})
    checkpoints.wait()
    whole = checkpoint.ocp.StandardCheckpointHandler.restore
    def broken(self, folder, args):
        if me == 1 and folder.parent.name == "2":
            raise OSError("the disk of this host is full of holes")
        return whole(self, folder, args=args)
    checkpoint.ocp.StandardCheckpointHandler.restore = broken
    restored, data = checkpoints.restore(abstract)
    assert int(restored.step) == data["step"] == 1
    assert checkpoints._manager.all_steps() == [1]
assert os.path.isdir({str(tmp_path / "run")!r} + "/checkpoints/2.damaged")
params = checkpoint.load_params({str(tmp_path / "run")!r}, shapes, at, parts=("params",))
for shard in params["dense.kernel"].addressable_shards:
    assert shard.data.shape == (8, 16)
    np.testing.assert_array_equal(shard.data, np.arange(256.0).reshape(16, 16)[shard.index])
""",
    )
    assert code == 0, logs
    assert "cannot be read (the disk of this host is full of holes): trying the one before" in logs[1]
    assert "cannot be read (in another process: the disk of this host is full of holes)" in logs[0]
