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
from svg_jax.distributed import EXIT_LOST, Place, initialise
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


def test_a_maintenance_notice_is_a_sigterm(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            assert self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"NONE" if len(asked) < 3 else b"TERMINATE_ON_HOST_MAINTENANCE")

        def log_message(self, *_: object) -> None: ...

    server = http.server.HTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{server.server_port}")
    initialise(None)
    distributed.heed_maintenance(every=0.01)
    server.shutdown()
    assert len(asked) == 3
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
    code, logs = cluster(tmp_path, 3, f"if me == {lost}: os.kill(os.getpid(), signal.SIGKILL)\nwork()")
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
            [sys.executable, "-c", script],
            env=os.environ
            | {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port}", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": str(i)},
            stderr=subprocess.PIPE, text=True, cwd=ROOT,
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


def test_what_one_cannot_read_none_restores(tmp_path: Path) -> None:
    """Process 1 fails to read its share of the newest checkpoint: both take the one before, and set that one aside."""
    code, logs = cluster(
        tmp_path,
        2,
        f"""
import dataclasses, functools, logging
import jax.numpy as jnp
import numpy as np
import optax
from svg_jax import checkpoint
from svg_jax.parallel import make_mesh, param_shardings
from svg_jax.state import TrainState, adamw, state_shardings

logging.basicConfig()
mesh = make_mesh({{"fsdp": -1}})
shapes = {{"dense.kernel": jax.ShapeDtypeStruct((16, 8), jnp.float32)}}
at = param_shardings(shapes, {{"dense.kernel": ("embed", "mlp")}}, mesh)
optimiser = adamw(optax.constant_schedule(1e-2), b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.0, clip=1.0)
create = functools.partial(TrainState.create, optimiser=optimiser, key=jax.random.key(5))
state_at = state_shardings(jax.eval_shape(create, shapes), at, mesh)
params = jax.jit(lambda: {{"dense.kernel": jnp.arange(128.0).reshape(16, 8)}}, out_shardings=at)()
state = jax.jit(create, out_shardings=state_at)(params)
abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
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
    assert shard.data.shape == (8, 8)
    np.testing.assert_array_equal(shard.data, np.arange(128.0).reshape(16, 8)[shard.index])
""",
    )
    assert code == 0, logs
    assert "cannot be read (the disk of this host is full of holes): trying the one before" in logs[1]
    assert "cannot be read (in another process: the disk of this host is full of holes)" in logs[0]
