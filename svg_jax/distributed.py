"""Several processes as one job: how they find each other, what ends them together, and what saves them in time.

`jax.distributed` connects the processes through a coordinator in process 0. What it lacks is said here in a sentence
each: who did not come to the start, who did not come to a barrier, who is gone. Without this, the survivors of a lost
process wait in a collective until native code aborts them with a stack trace.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import http.client
import logging
import os
import re
import signal
import socket
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import TracebackType
from typing import IO, Any, NamedTuple, NoReturn

import jax

# Public JAX shows neither the clusters that it knows nor the key-value store of a job.
from jax._src import cloud_tpu_init, clusters, distributed
from jax.experimental import multihost_utils
from jaxlib import _jax

logger = logging.getLogger("svg_jax")

EXIT_PREEMPTED = 75  # saved, start me again (EX_TEMPFAIL of sysexits.h)
EXIT_LOST = 69  # another process is gone (EX_UNAVAILABLE)

TIMEOUT = 100.0  # seconds without a sign of life after which a process is gone
START_TIMEOUT = 300.0  # seconds in which all processes must have started
AGAIN = "start the same command again, on as many processes as there are: it goes on from its newest checkpoint"
MAINTENANCE = "computeMetadata/v1/instance/maintenance-event"  # of Google's metadata server; "NONE" if all is well
BROKEN = re.compile("Gloo|NCCL|UNAVAILABLE|DEADLINE_EXCEEDED")  # how JAX speaks of a broken connection
SIGNS = "svg_jax/signs/"  # key-value folder: the last sign of life of each process


class Place(NamedTuple):
    """This process among those of the job."""

    number: int
    total: int
    coordinator: str | None  # host:port of process 0; None where JAX finds it

    def __str__(self) -> str:
        return f"process {self.number} of {self.total}"


def initialise(cluster: Mapping[str, Any] | None = None) -> None:
    """Joins the job, if there are several processes; the first thing a door does, before any device is touched.

    They are found by JAX on Cloud TPU, GKE, Slurm and Open MPI. Elsewhere the settings name them, or the environment
    variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, which `launch/local_cluster.sh` sets.
    One process alone is left alone: it only learns to save on SIGTERM.

    Args:
        cluster: `coordinator` ("host:port" of process 0), `num_processes`, `process_id`; `timeout`, the seconds without
            a sign of life after which a process is gone; `start_timeout`, the seconds in which all must have come.

    Raises:
        ValueError: The settings contradict each other. Processes that do not come end this one, in one sentence.
    """
    settings = {key: value for key, value in (cluster or {}).items() if value is not None}
    timeout, start_timeout = settings.get("timeout", TIMEOUT), settings.get("start_timeout", START_TIMEOUT)
    if timeout <= 0 or start_timeout <= 0:
        raise ValueError(f"config.cluster.timeout {timeout} and start_timeout {start_timeout} must be above zero")
    place = _named(settings) or _detected()
    if jax.distributed.is_initialized():
        return
    if place is None or place.total == 1:
        _save_on_sigterm()
    else:
        _join(place, timeout, start_timeout)
        _Watch(place, timeout).start()
        if place.number:
            logger.setLevel(logging.WARNING)  # what all have to say, the first one says
        logger.info("%s, coordinator %s", place, distributed.global_state.coordinator_address)
    if cloud_tpu_init.running_in_cloud_tpu_vm and "TPU_SKIP_MDS_QUERY" not in os.environ:
        threading.Thread(target=heed_maintenance, daemon=True).start()


def is_first() -> bool:
    """Whether this is the process that writes the logs."""
    return jax.process_index() == 0


def preempted(step: int) -> bool:
    """Whether this job must save and end now, after `step` updates; the same answer in every process.

    One process that gets SIGTERM is enough: all agree on the next step that none has passed. To be asked at every step.
    """
    if not jax.distributed.is_initialized():
        return _terminated.is_set()
    told = multihost_utils.reached_preemption_sync_point(step)
    if told and _watch is not None:
        _watch.code = EXIT_PREEMPTED
    return told


def barrier(name: str, timeout: float) -> None:
    """Returns when every process has come here.

    Raises:
        TimeoutError: Some did not within `timeout` seconds; the message says which.
    """
    everyone(name, "", timeout)


_visits: dict[str, int] = {}  # to each barrier


def everyone(name: str, says: str, timeout: float) -> list[str]:
    """What each process says here, in their order; a barrier.

    Raises:
        TimeoutError: Some did not come within `timeout` seconds; the message says which.
    """
    client, count = distributed.global_state.client, distributed.global_state.num_processes
    if client is None:
        return [says]
    _visits[name] = visit = _visits.get(name, 0) + 1
    folder = f"svg_jax/barrier/{name}/{visit}/"
    client.key_value_set(f"{folder}{distributed.global_state.process_id}", says)
    try:
        client.wait_at_barrier(folder, round(timeout * 1000))
    except jax.errors.JaxRuntimeError as error:
        missing = set(range(count)) - _by_process(client, folder).keys()
        raise TimeoutError(
            f"{_listed(missing)} of {count} did not come to the barrier '{name}' within {timeout:g} s: "
            "the log there says why"
        ) from error
    return [text for _, text in sorted(_by_process(client, folder).items())]


def failed(reason: str | BaseException) -> None:
    """Tells the other processes that this one is about to end for a reason of its own, so that they need not wait.

    To be called before anything that waits for them.
    """
    if _watch is not None:
        _watch.fail(reason)


def end_all(sentence: str) -> None:
    """Ends this process and the others, whatever they wait for; from any thread. Returns where this one is alone."""
    if _watch is not None and not _watch.failed:
        _watch.fail(sentence)
        os.write(2, f"error: {sentence}\n".encode())
        _watch.end_if_failed()


# Finding the others.


def _named(settings: Mapping[str, Any]) -> Place | None:
    """What the settings say, or else the environment; None if neither says anything."""
    environment = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    keys = ("coordinator", "num_processes", "process_id")
    if not any(key in settings for key in keys):
        if any(variable not in os.environ for variable in environment[1:]):
            return None  # the first alone only overrides what JAX finds
        settings = {key: os.environ[variable] for key, variable in zip(keys, environment, strict=True)}
    if missing := [key for key in keys if key not in settings]:
        given = ", ".join(key for key in keys if key in settings)
        raise ValueError(
            f"config.cluster names {given} and not {' and '.join(missing)}: name all three, or none where JAX finds "
            "the processes itself (Cloud TPU, GKE, Slurm, Open MPI)"
        )
    coordinator, count, index = (settings[key] for key in keys)
    if not re.fullmatch(r".+:\d+", coordinator):
        raise ValueError(f"config.cluster.coordinator is '{coordinator}': it must be host:port of process 0")
    try:
        count, index = int(count), int(index)
    except ValueError as error:
        raise ValueError(f"num_processes '{count}' and process_id '{index}' must be whole numbers") from error
    if count < 1:
        raise ValueError(f"config.cluster.num_processes is {count}: it must be at least 1")
    if not 0 <= index < count:
        raise ValueError(
            f"config.cluster.process_id is {index} of {count} processes: it must be from 0 to {count - 1}, another in "
            "each process"
        )
    return Place(index, count, coordinator)


def _detected() -> Place | None:
    """What JAX finds in the environment of a cluster; on a laptop this looks at a few environment variables."""
    for environment in clusters.ClusterEnv._cluster_types:
        if environment is clusters.K8sCluster and "JOB_COMPLETION_INDEX" not in os.environ:
            continue  # a pod that is no part of an indexed job
        if not environment.opt_in_only_method and environment.is_env_present():
            return Place(environment.get_process_id(), environment.get_process_count(), None)
    return None


def _join(place: Place, timeout: float, start_timeout: float) -> None:
    """Connects to the coordinator, which process 0 starts; ends this process in one sentence where that fails."""
    service = _jax.get_distributed_runtime_service
    with _native_log() as (log, stderr):
        _on_abort(lambda: _end(_why_not_joined(place, start_timeout, log), stderr=stderr))
        try:
            # JAX does not pass the time on to the coordinator, which alone knows who came.
            _jax.get_distributed_runtime_service = partial(service, cluster_register_timeout=round(start_timeout))
            jax.distributed.initialize(
                place.coordinator,
                place.total if place.coordinator else None,
                place.number if place.coordinator else None,
                cluster_detection_method="deactivate" if place.coordinator else None,
                initialization_timeout=round(start_timeout),
                heartbeat_timeout_seconds=round(3 * timeout),  # after `_Watch`, which needs no stack trace
                shutdown_timeout_seconds=round(1.5 * timeout),  # after those at work have noticed, see `_verdict`
            )
            _on_abort(partial(_end_without_coordinator, place, stderr))  # until `_Watch` has a handler of its own
        except jax.errors.JaxRuntimeError as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{place} could not join the job at {place.coordinator}: {reason}") from error
        finally:
            _jax.get_distributed_runtime_service = service


def _why_not_joined(place: Place, seconds: float, log: IO[bytes]) -> str:
    log.seek(0)
    text = log.read().decode(errors="replace")
    where = distributed.global_state.coordinator_address
    if names := re.search(r"timed out task names:\s*((?:\d+\s+)+)", text):
        missing = {int(name) for name in names[1].split()}
        return (
            f"{_listed(missing)} of {place.total} did not come to the coordinator {where} within {seconds:g} s: start "
            "every process, or give them longer with config.cluster.start_timeout"
        )
    if "Deadline Exceeded" in text:
        return f"{place} cannot reach process 0 at the coordinator {where}: is that process running, and its port open?"
    reason = re.search(r"absl::Status: (.*)", text)
    return f"{place} could not join the job at {where}: {reason[1] if reason else text}"


# Being together.

_watch: _Watch | None = None


class _Watch(threading.Thread):
    """Gives signs of life, and ends this process when those of another stop or when it says that it has failed.

    The heartbeats of `jax.distributed` come second: what they end, they end with SIGABRT and a stack trace.
    """

    def __init__(self, place: Place, timeout: float) -> None:
        super().__init__(name="watch", daemon=True)
        self._place, self._timeout, self._period = place, timeout, timeout / 10
        self._client: Any = distributed.global_state.client
        self._stopped = threading.Event()
        self.failed = False
        self.code = 0  # with which this process ends unless it fails

    def start(self) -> None:
        global _watch
        _watch = self
        sys.excepthook = partial(self._on_error, sys.excepthook)
        _on_abort(self._on_abort)
        atexit.register(self._leave)
        # Before the interpreter joins threads, of which a save may wait for a process that has left.
        threading._register_atexit(self.end_if_failed)  # type: ignore[attr-defined]
        super().start()

    def run(self) -> None:
        seen: dict[int, tuple[str, float]] = {}  # the last sign of each, and when it was new
        sign = 0
        while not self._stopped.wait(self._period):
            sign += 1
            try:
                self._give(str(sign))
                found = _by_process(self._client, SIGNS)
            except jax.errors.JaxRuntimeError:
                found = {}  # no answer from process 0: its last sign grows old
            now = time.monotonic()
            for index in range(self._place.total):
                text = found.get(index, seen.get(index, ("",))[0])
                if index not in seen or seen[index][0] != text:
                    seen[index] = text, now
                if index != self._place.number and (why := self._verdict(index, text, now - seen[index][1])):
                    # The others read the signs from process 0, which ends last.
                    _end(f"{why}: this job ends; {AGAIN}", linger=0 if self._place.number else 4 * self._period)

    def _verdict(self, index: int, text: str, age: float) -> str | None:
        other = f"process {index} of {self._place.total}"
        if text.startswith("failed: "):
            return f"{other} {text}"
        if text == "left":
            # It waits for this one to leave too, but one whose work is done needs less time than that.
            return f"{other} has ended while process {self._place.number} is at work" if age > self._timeout else None
        return f"{other} is gone (no sign of life for {age:.0f} s)" if age > self._timeout else None

    def fail(self, reason: str | BaseException) -> None:
        """Says why this process is about to end, unless another one is to blame."""
        if self.failed:
            return
        if isinstance(reason, BaseException):
            if _is_broken(reason):
                # The process at the other end is to blame, most likely, and this thread will say so.
                time.sleep(self._timeout + 3 * self._period)
            reason = f"{type(reason).__name__}: {str(reason).splitlines()[0] if str(reason) else ''}"
        self.failed = True
        self._last_words(f"failed: {reason}")

    def _last_words(self, text: str) -> None:
        """The last sign of this process."""
        self._stopped.set()
        self.join(self._period)
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._give(text)

    def _give(self, sign: str) -> None:
        self._client.key_value_set(f"{SIGNS}{self._place.number}", sign, allow_overwrite=True)

    def _on_error(
        self, show: Any, kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        self.fail(error)
        show(kind, error, trace)
        self.end_if_failed()

    def end_if_failed(self) -> None:
        if self.failed:
            sys.stdout.flush()
            sys.stderr.flush()
            time.sleep(3 * self._period)  # until the others have read why
            os._exit(1)

    def _leave(self) -> None:
        self._last_words("left")  # then JAX waits for all to leave

    def _on_abort(self) -> None:
        if self.failed or self._stopped.is_set():
            os._exit(1 if self.failed else self.code)  # all is done, and another one did not leave in time
        _end_without_coordinator(self._place)


def _is_broken(error: BaseException) -> bool:
    """Whether this is, or comes from, what JAX says when another process is gone."""
    while error.__cause__ is not None:
        error = error.__cause__
    return isinstance(error, jax.errors.JaxRuntimeError) and BROKEN.search(str(error)) is not None


def _end_without_coordinator(place: Place, stderr: int = 2) -> None:
    """Ends this process in one sentence if process 0 is no more."""
    for _ in range(10 if place.number else 0):
        time.sleep(1)  # a process that is killed closes its sockets one after the other, on a busy host slowly
        if not _answers(str(distributed.global_state.coordinator_address)):
            gone = f"process 0 of {place.total} is gone (it closed the connection)"
            _end(f"{gone}: this job ends; {AGAIN}", stderr=stderr)


def _answers(address: str) -> bool:
    host, port = address.rsplit(":", 1)
    try:
        socket.create_connection((host, int(port)), timeout=2).close()
    except OSError:
        return False
    return True


def _end(sentence: str, *, stderr: int = 2, linger: float = 0.0) -> NoReturn:
    """Ends this process at once: the interpreter's own way out would wait for the others."""
    sys.stdout.flush()
    os.write(stderr, f"error: {sentence}\n".encode())
    time.sleep(linger)
    os._exit(EXIT_LOST)


def _by_process(client: Any, folder: str) -> dict[int, str]:
    """The values under `folder`, whose keys are numbers of processes."""
    return {int(key.rsplit("/", 1)[1]): value for key, value in client.key_value_dir_get(folder)}


def _listed(processes: set[int]) -> str:
    names = ", ".join(str(index) for index in sorted(processes))
    return f"process {names}" if len(processes) == 1 else f"processes {names}"


# Native code.

_abort_handler: Any = None  # held, as C keeps only its address


def _on_abort(end: Callable[[], object]) -> None:
    """Calls `end` when native code aborts; where it returns, the process aborts as it would have.

    JAX's coordination service ends a process in no other way, and its callback does not work from Python.
    """
    global _abort_handler
    _abort_handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: end() and None)
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
    libc.signal(signal.SIGABRT, ctypes.cast(_abort_handler, ctypes.c_void_p))


@contextlib.contextmanager
def _native_log() -> Iterator[tuple[IO[bytes], int]]:
    """Keeps what is written to stderr, by native code too, until the end: the file, and where stderr is meanwhile.

    The latter stays open: a handler may write there whenever native code aborts.
    """
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as log:
        os.dup2(log.fileno(), 2)
        try:
            yield log, stderr
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            log.seek(0)
            os.write(2, log.read())


# Being told to end.

_terminated = threading.Event()


def _save_on_sigterm() -> None:
    """The first SIGTERM is answered by `preempted`, and the second ends the process."""

    def note(signum: int, frame: object) -> None:
        _terminated.set()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, note)


def heed_maintenance(every: float = 10.0) -> None:
    """Makes a notice that this Google Cloud host is about to be shut down a SIGTERM to this process; returns then.

    A notice that stands already when this begins is not one: a job that was started again would end at once.

    Args:
        every: Seconds between two looks at the metadata server.
    """
    host = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    request = urllib.request.Request(f"http://{host}/{MAINTENANCE}", headers={"Metadata-Flavor": "Google"})
    known = None
    while True:
        with (
            contextlib.suppress(OSError, http.client.HTTPException),
            urllib.request.urlopen(request, timeout=every) as answer,
        ):
            event = answer.read().decode().strip()
            if known is not None and event not in (known, "NONE", ""):
                logger.warning("this host is about to be maintained (%s): saving, then ending", event)
                os.kill(os.getpid(), signal.SIGTERM)
                return
            known = event
        time.sleep(every)
