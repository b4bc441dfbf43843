"""Reads batches ahead of the training loop: in threads, or in processes that have threads each.

A batch is a function of its step alone, so that it does not matter who reads it: worker i of n reads the steps
start + i, start + i + n, ..., and they are taken in turn. The order is that of the steps for any number of workers.

A worker is an interpreter of its own, which imports this package and nothing of the training program. (JAX comes with
Grain, but nobody asks it for a device.) It is joined to this process by one socket, and ends when that is closed:
however this process dies, no worker stays behind. Signals for the job (Ctrl-C, a notice of preemption) are left to this
process.
"""

from __future__ import annotations

import collections
import contextlib
import faulthandler
import itertools
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
from absl import logging

from data_pipelines import files

Batch = TypeVar("Batch")
Batch_co = TypeVar("Batch_co", covariant=True)
Item = TypeVar("Item")
Result = TypeVar("Result")

MOST_THREADS, MOST_WORKERS, MOST_PREFETCHED = 1024, 1024, 4096  # more is a slip of the keys


class Batches(Protocol[Batch_co]):
    """Random access to batches by their step."""

    def read(self, step: int, threads: Executor | None = None) -> Batch_co:
        """The batch of a step, its records read in `threads`."""
        ...


class WorkerDied(RuntimeError):
    """A process that reads batches has ended before it should: it was killed, or the code failed in it."""


class Reading(NamedTuple):
    """What one process reads, and how."""

    batches: Batches[Any]
    first: int  # step
    stride: int  # from one step to the next
    num_threads: int
    prefetch: int
    remote: files.Remote


def make_loader(
    batches: Batches[Batch], *, start_step: int = 0, num_threads: int = 4, prefetch: int = 4, num_workers: int = 0
) -> Generator[Batch, None, None]:
    """Iterates over the batches from `start_step` on, without end, reading ahead; `close()` ends threads and workers.

    Remote reads in workers are as patient as `files.set_default` says when the first batch is asked for.

    Args:
      batches: what to read; with workers, something that can be pickled.
      start_step: the first step; to resume, the number of steps done.
      num_threads: records read at the same time, in each worker; 0 reads in the caller's thread.
      prefetch: batches held ready in all, at least one in each worker.
      num_workers: processes that read; 0 reads in this one.

    Raises:
      ValueError: one of the numbers is below zero or beyond all sense.
      WorkerDied: as the next batch is asked for; the message has the worker's traceback, where it has one.
    """
    limits = {
        "start_step": (start_step, sys.maxsize),
        "num_threads": (num_threads, MOST_THREADS),
        "prefetch": (prefetch, MOST_PREFETCHED),
        "num_workers": (num_workers, MOST_WORKERS),
    }
    for name, (value, most) in limits.items():
        if not 0 <= value <= most:
            raise ValueError(f"{name}={value} is not in 0 to {most}")
    if num_workers:
        share = -(-prefetch // num_workers)
        readings = [
            Reading(batches, start_step + i, num_workers, num_threads, share, files.default())
            for i in range(num_workers)
        ]
        return _from_workers(readings)
    return _from_threads(Reading(batches, start_step, 1, num_threads, prefetch, files.default()))


def _from_threads(reading: Reading) -> Generator[Any, None, None]:
    steps = itertools.count(reading.first, reading.stride)
    if not reading.num_threads:
        yield from map(reading.batches.read, steps)
        return
    records = ThreadPoolExecutor(reading.num_threads, "records")
    whole = ThreadPoolExecutor(2, "batches")  # so that the next one begins while the last records of one are read
    try:
        yield from _ahead(whole, lambda step: reading.batches.read(step, records), steps, max(reading.prefetch, 1))
    finally:
        # Without waiting: a read under way may take as long as its time-out.
        for pool in (whole, records):
            pool.shutdown(wait=False, cancel_futures=True)


def _from_workers(readings: list[Reading]) -> Generator[Any, None, None]:
    workers: list[_Worker] = []
    receiver = ThreadPoolExecutor(1, "receive")
    try:
        for number, reading in enumerate(readings, start=1):
            workers.append(_Worker(f"{number} of {len(readings)}", reading.first, reading.stride))
        for worker, reading in zip(workers, readings, strict=True):
            worker.begin(reading)
        yield from _ahead(receiver, _Worker.next, itertools.cycle(workers), 2)
    finally:
        for worker in workers:
            worker.kill()
        receiver.shutdown(cancel_futures=True)  # what it waited for is gone
        for worker in workers:
            worker.close()


def _ahead(pool: Executor, function: Callable[[Item], Result], items: Iterable[Item], count: int) -> Iterator[Result]:
    """`function` of each item in turn, begun for `count` of them before they are asked for."""
    items = iter(items)
    futures = collections.deque(pool.submit(function, item) for item in itertools.islice(items, count))
    while futures:
        result = futures.popleft().result()
        futures.extend(pool.submit(function, item) for item in itertools.islice(items, 1))
        yield result


class _Worker:
    """A process that reads every so many-th batch, as this process sees it."""

    def __init__(self, name: str, first: int, stride: int) -> None:
        self._name, self._step, self._stride = name, first, stride
        self._socket, theirs = socket.socketpair()
        # It finds modules where this process does.
        code = (
            f"import sys; sys.path[:] = {sys.path!r}; from data_pipelines import loader; loader.work({theirs.fileno()})"
        )
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code], stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()]
            )

    def begin(self, reading: Reading) -> None:
        """Tells it what to read."""
        with self._expected():
            _send(self._socket, reading)

    def next(self) -> Any:
        """The next of its batches.

        Raises:
          WorkerDied: it failed, or is gone.
        """
        with self._expected():
            message = _receive(self._socket)
        if isinstance(message, str):
            raise WorkerDied(f"data worker {self._name} failed at step {self._step}:\n{message}")
        self._step += self._stride
        return message

    @contextlib.contextmanager
    def _expected(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, OSError) as error:
            self.kill()
            code = self._process.wait()
            ended = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
            raise WorkerDied(
                f"data worker {self._name} (process {self._process.pid}) {ended} before it gave step {self._step}: the "
                "log above has what it said, if anything; where memory is short, lower config.data.num_workers or "
                "config.data.prefetch; the same command goes on from the last checkpoint"
            ) from error

    def kill(self) -> None:
        """Ends it, whatever it does; nothing if it has ended."""
        self._process.kill()

    def close(self) -> None:
        """Lets go of it, once it has ended."""
        self._process.wait()
        self._socket.close()


def work(descriptor: int) -> None:
    """What a worker does: gets a `Reading`, and sends its batches, or the traceback of what went wrong."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    faulthandler.enable()  # says where, if a decoder crashes
    logging.use_absl_handler()  # lines look as those of the doors
    parent = socket.socket(fileno=descriptor)
    try:
        reading: Reading = _receive(parent)
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
        files.set_default(reading.remote)
        for batch in _from_threads(reading):
            _send(parent, batch)
    except BaseException:
        with contextlib.suppress(OSError):
            _send(parent, traceback.format_exc())
    finally:
        os._exit(1)  # without waiting for reads under way


def _end_with(parent: socket.socket) -> None:
    """Ends this process when the other end is closed; it sends nothing more."""
    with contextlib.suppress(OSError):
        parent.recv(1)
    os._exit(0)


def _send(to: socket.socket, message: Any) -> None:
    """Pickled; arrays go as they lie in memory."""
    buffers: list[pickle.PickleBuffer] = []
    head = pickle.dumps(message, protocol=5, buffer_callback=buffers.append)
    parts = [memoryview(head), *(buffer.raw() for buffer in buffers)]
    to.sendall(struct.pack(f"<{len(parts) + 1}Q", len(parts), *(part.nbytes for part in parts)))
    for part in parts:
        to.sendall(part)


def _receive(sender: socket.socket) -> Any:
    """What `_send` sent. Raises EOFError when the other end is closed."""
    (count,) = struct.unpack("<Q", _exactly(sender, 8))
    sizes = struct.unpack(f"<{count}Q", _exactly(sender, 8 * count))
    head, *buffers = [_exactly(sender, size) for size in sizes]
    return pickle.loads(head, buffers=buffers)


def _exactly(sender: socket.socket, size: int) -> memoryview:
    data = np.empty(size, np.uint8).data
    done = 0
    while done < size:
        received = sender.recv_into(data[done:])
        if not received:
            raise EOFError
        done += received
    return data
