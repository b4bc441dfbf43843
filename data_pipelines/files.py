"""Bytes of files, on disk or at an address that fsspec knows: `gs://`, `s3://`, `http(s)://`, `memory://` and others.

A read ends: only regular files are opened (a pipe without a writer would wait for ever), only so many bytes are taken,
and a remote read has a time-out, after which it is tried again. What goes wrong has a `Cause`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import glob
import io
import math
import os
import random
import re
import stat
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, BinaryIO, TypeVar

from absl import logging

from data_pipelines.records import BadRecord, Cause, first_line

MAX_BYTES = 1 << 28  # 256 MiB: the largest image, member or part that is read at once

MAX_FILES = 1_000_000  # that the numbers in a pattern name

_BLOCK_BYTES = 1 << 23
_COUNTED = re.compile(r"\{(\d{1,18})\.\.(\d{1,18})\}")
_SECONDS_BETWEEN_WARNINGS = 10
# What stores call the version of a file.
_MARKS = ("ETag", "etag", "md5Hash", "generation", "Last-Modified", "LastModified", "updated", "mtime", "created")

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Remote:
    """How patient remote reads are: (retries + 1) * timeout + 1.5 * backoff * (2^retries - 1) seconds at the most.

    Attributes:
      timeout: seconds that one attempt may take.
      retries: further attempts after the first.
      backoff: seconds before the second attempt, twice as many before each one after it; each wait is drawn between
        half and one and a half times that, so that hosts that failed together do not come back together.
    """

    timeout: float = 30.0
    retries: int = 4
    backoff: float = 1.0

    def __post_init__(self) -> None:
        if not (self.timeout > 0 and 0 <= self.retries <= 20 and self.backoff >= 0):
            raise ValueError(f"{self} is no way to read: expected timeout > 0, retries of 0 to 20 and backoff >= 0")


_default = Remote()


def set_default(policy: Remote) -> None:
    """How this process reads remote files from now on."""
    global _default
    _default = policy


def default() -> Remote:
    """How this process reads remote files, to be handed to other processes."""
    return _default


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether it is an address for fsspec, rather than a path."""
    name = os.fspath(path)
    return "://" in name and not name.startswith("file://")


def read_bytes(
    path: str | os.PathLike[str],
    *,
    start: int = 0,
    end: int | None = None,
    limit: int = MAX_BYTES,
) -> bytes:
    """The content of a regular file, or a part of it.

    Args:
      path: a local path, or an address.
      start: first byte.
      end: one past the last byte; None: to the end of the file.
      limit: the most bytes to take.

    Raises:
      BadRecord: the file cannot be read, is empty, has more bytes than the limit, or ends before `end`. The message
        begins with the path.
      ImportError: an address that needs a library which is not installed.
    """
    name = os.fspath(path)
    if end is not None and end - start > limit:
        raise BadRecord(Cause.TOO_LARGE, f"{name} holds a part of {end - start} bytes; the limit is {limit}")
    if is_remote(name):
        data = _ask(name, _part, start, end, limit)
    else:
        with open_file(name) as file, _local_errors(name):
            if end is None and (size := os.fstat(file.fileno()).st_size) - start > limit:
                raise _too_large(name, limit)
            file.seek(start)
            data = file.read((size if end is None else end) - start)
    if len(data) > limit:
        raise _too_large(name, limit)
    if end is not None and len(data) != end - start:
        raise BadRecord(Cause.STORE, f"{name} ends at byte {start + len(data)}; expected {end} bytes or more")
    if not data:
        raise BadRecord(Cause.EMPTY, f"{name} is empty")
    return data


def open_file(path: str | os.PathLike[str]) -> BinaryIO:
    """A regular file to be scanned, seekable; of a remote one, 8 MiB are read at once, with time-out and retries.

    Raises:
      BadRecord: it cannot be opened; later, a remote part cannot be read.
      ImportError: an address that needs a library which is not installed.
    """
    name = os.fspath(path)
    if is_remote(name):
        return io.BufferedReader(_RemoteFile(name), _BLOCK_BYTES)
    with _local_errors(name):
        local = name.removeprefix("file://")
        # Asked first, because opening a device can do things; then opened so that a pipe, put there since, cannot wait.
        mode = os.stat(local).st_mode
        if not stat.S_ISREG(mode):
            raise BadRecord(Cause.NOT_A_FILE, f"{name} is a {_kind(mode)}; expected a file")
        return open(os.open(local, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")


def signature(path: str | os.PathLike[str]) -> str:
    """Changes when the file is written anew: its bytes (0 if nobody says), a space, and its time or tag.

    Raises:
      BadRecord: there is no such file, or its store does not answer.
      ImportError: an address that needs a library which is not installed.
    """
    name = os.fspath(path)
    if is_remote(name):
        info = _ask(name, _info)
        return " ".join([str(info["size"] or 0), *(f"{mark}={info[mark]}" for mark in _MARKS if info.get(mark))])
    with _local_errors(name):
        status = os.stat(name.removeprefix("file://"))
        return f"{status.st_size} {status.st_mtime_ns}"


def expand(pattern: str) -> list[str]:
    """The files that a pattern names: `{000..099}` counts, and `*`, `?`, `[…]` match what there is, sorted.

    Raises:
      BadRecord: a store does not answer.
      ValueError: it counts more than MAX_FILES.
      ImportError: an address that needs a library which is not installed.
    """
    count = math.prod(max(int(last) - int(first) + 1, 0) for first, last in _COUNTED.findall(pattern))
    if count > MAX_FILES:
        raise ValueError(f"the pattern {pattern} counts {count} files; expected at most {MAX_FILES}")
    if numbers := _COUNTED.search(pattern):
        first, last = numbers.groups()
        names = (f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1))
        parts = (f"{pattern[: numbers.start()]}{name}{pattern[numbers.end() :]}" for name in names)
        return [file for part in parts for file in expand(part)]
    if not any(character in pattern for character in "*?["):
        return [pattern]
    if not is_remote(pattern):
        return sorted(glob.glob(pattern.removeprefix("file://")))
    found: list[str] = _ask(pattern, lambda fs, path: fs._glob(path))
    protocol = pattern.partition("://")[0]
    return sorted(name if "://" in name else f"{protocol}://{name.lstrip('/')}" for name in found)


@contextlib.contextmanager
def _local_errors(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if isinstance(error, FileNotFoundError | NotADirectoryError) or error.errno == errno.ENAMETOOLONG:
            raise BadRecord(Cause.MISSING, f"{name} does not exist") from error
        if isinstance(error, PermissionError):
            raise BadRecord(Cause.PERMISSION, f"{name} may not be read ({error.strerror})") from error
        if error.errno == errno.ELOOP:
            raise BadRecord(Cause.NOT_A_FILE, f"{name} is a link that leads in a circle; expected a file") from error
        # A disk that fails, or more often a file system over a network.
        raise BadRecord(Cause.REMOTE, f"{name} cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        if isinstance(error, BadRecord):
            raise
        raise BadRecord(Cause.VALUE, f"{name!r} is no path ({error})") from error  # a zero byte, half a character


def _too_large(name: str, limit: int) -> BadRecord:
    return BadRecord(Cause.TOO_LARGE, f"{name} has more than {limit} bytes, the limit; is it one image?")


def _kind(mode: int) -> str:
    kinds = (("folder", stat.S_ISDIR), ("pipe", stat.S_ISFIFO), ("socket", stat.S_ISSOCK))
    return next((kind for kind, check in kinds if check(mode)), "device")


class WholeOnly(BadRecord):
    """A server that gives files as a whole and no parts of them."""


class _RemoteFile(io.RawIOBase):
    def __init__(self, address: str) -> None:
        super().__init__()
        self._address, self._place = address, 0
        size = _ask(address, _info)["size"]
        if size is None:
            raise WholeOnly(Cause.REMOTE, f"{address} comes from a server that does not say its size; copy it first")
        self._size = int(size)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        self._place = base + offset
        return self._place

    def readinto(self, buffer: Any) -> int:
        end = min(self._place + len(buffer), self._size)
        if end <= self._place:
            return 0
        data = read_bytes(self._address, start=self._place, end=end, limit=end - self._place)
        buffer[: len(data)] = data
        self._place = end
        return len(data)


def _ask(address: str, question: Callable[..., Coroutine[Any, Any, T]], *args: Any) -> T:
    """What `question(fs, path, *args)` answers, tried as often as `set_default` said."""
    policy = _default
    for attempt in range(policy.retries + 1):
        try:
            fs, path = _file_system(address)
            from fsspec.asyn import get_loop, sync

            # Past the time-out the coroutine is cancelled: nothing hangs on behind.
            answer: T = sync(get_loop(), question, fs, path, *args, timeout=policy.timeout)
            return answer
        except (BadRecord, ImportError):
            raise
        except Exception as error:  # each store has its own
            cause, passing = _judge(error)
            kind, reason = type(error).__name__, first_line(error)
            if kind == "FSTimeoutError":
                reason = f"no answer in {policy.timeout:g} s"
            elif reason != kind:
                reason = f"{kind}: {reason}"
            if cause is Cause.MISSING:
                raise BadRecord(cause, f"{address} does not exist") from error
            if not passing:
                raise BadRecord(cause, f"{address} cannot be read ({reason})") from error
            if attempt == policy.retries:
                tries = f"{attempt + 1} attempts" if attempt else "one attempt"
                raise BadRecord(cause, f"{address} cannot be read after {tries}, the last one: {reason}") from error
            logging.log_every_n_seconds(
                logging.WARNING, "%s: attempt %d failed (%s); trying again", _SECONDS_BETWEEN_WARNINGS,
                address, attempt + 1, reason,
            )  # fmt: skip
            time.sleep(policy.backoff * 2**attempt * random.uniform(0.5, 1.5))
    raise AssertionError("a loop of one attempt or more")


def _judge(error: Exception) -> tuple[Cause, bool]:
    """Why a remote read failed, and whether it may work next time."""
    status = getattr(error, "status", None) or getattr(error, "code", None)  # of aiohttp, of gcsfs
    if isinstance(error, TimeoutError) or status == 408:
        return Cause.TIMEOUT, True
    if isinstance(error, FileNotFoundError | NotADirectoryError) or status in (404, 410):
        return Cause.MISSING, False
    if isinstance(error, IsADirectoryError):
        return Cause.NOT_A_FILE, False
    # gcsfs says it in words.
    if isinstance(error, PermissionError) or status in (401, 403) or str(error).startswith("Forbidden"):
        return Cause.PERMISSION, False
    if isinstance(error, ValueError | TypeError):
        return Cause.VALUE, False  # no address that its store understands
    passing = not isinstance(status, int) or status >= 500 or status in (425, 429)
    return Cause.REMOTE, passing


def _file_system(address: str) -> tuple[Any, str]:
    try:
        from fsspec.core import url_to_fs
        from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper

        fs, path = url_to_fs(address)
    except ImportError as error:
        raise ImportError(f'{address} is remote: pip install "svg_jax[remote]" ({error})') from error
    return (fs if fs.async_impl else AsyncFileSystemWrapper(fs, asynchronous=False)), path


async def _part(fs: Any, path: str, start: int, end: int | None, limit: int) -> bytes:
    """At most limit + 1 bytes where there is no end."""
    if path.startswith(("http://", "https://")):
        return await _http_part(fs, path, start, end, limit)
    try:
        data: bytes = await fs._cat_file(path, start=start, end=start + limit + 1 if end is None else end)
    except Exception as error:
        if "not satisfiable" in str(error):  # so stores answer where the file ends before `start`, or is empty
            return b""
        raise
    return data


async def _http_part(fs: Any, address: str, start: int, end: int | None, limit: int) -> bytes:
    headers = {"Accept-Encoding": "identity"}
    if start or end is not None:
        headers["Range"] = f"bytes={start}-{'' if end is None else end - 1}"
    session = await fs.set_session()
    async with session.get(fs.encode_url(address), headers=headers) as response:
        if response.status == 416:  # it ends before that
            return b""
        response.raise_for_status()
        if "Range" in headers and response.status != 206:
            raise WholeOnly(
                Cause.REMOTE,
                f"{address} comes from a server that gives no parts of files; copy it to a disk or a bucket",
            )
        data = bytearray()
        async for block in response.content.iter_chunked(1 << 20):
            data += block
            if len(data) > limit:
                break
        return bytes(data)


async def _info(fs: Any, path: str) -> dict[str, Any]:
    """With `size`, in bytes or None, and the marks of its version."""
    if not path.startswith(("http://", "https://")):
        info: dict[str, Any] = await fs._info(path)
        if info.get("type") == "directory":
            raise IsADirectoryError("a folder")
        return info
    session = await fs.set_session()
    for ask in (session.head, session.get):
        async with ask(fs.encode_url(path), allow_redirects=True, headers={"Accept-Encoding": "identity"}) as response:
            if ask == session.head and response.status in (403, 405, 501):
                continue  # an address signed for reading alone, or a server that knows no HEAD
            response.raise_for_status()
            size = response.headers.get("Content-Length")
            return {**response.headers, "size": None if size is None else int(size)}
    raise AssertionError("GET raises or answers")
