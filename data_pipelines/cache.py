"""Files that are made once and kept: local copies of remote lists, and indices that are mapped into memory."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from absl import logging
from numpy.typing import NDArray

from data_pipelines import files
from data_pipelines.records import BadRecord, Cause

_BLOCK_BYTES = 1 << 23
_ABANDONED_SECONDS = 24 * 3600
_HEADER_BYTES = 64  # SHA-256 in hexadecimal digits, of what the index was built from


def cache_folder() -> Path:
    """Where copies and indices are kept: $SVG_CACHE, or ~/.cache/svg_jax; made if it is not there."""
    folder = Path(os.environ.get("SVG_CACHE") or "~/.cache/svg_jax").expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def fetch(address: str) -> Path:
    """A local copy of a remote file in the cache folder, made once for each version of it; of a local path, itself.

    Read in blocks, each with time-out and retries, so that a list may be larger than memory; a server that gives no
    parts of files must give the whole within one time-out.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it cannot be read.
      ImportError: an address that needs a library which is not installed.
    """
    if not files.is_remote(address):
        return Path(address.removeprefix("file://"))
    try:
        version = _digest(f"{address}\n{files.signature(address)}")[:16]
        copy = cache_folder() / f"{version}-{Path(address.partition('?')[0]).name}"
        if not copy.exists():
            try:
                with files.open_file(address) as source, writing(copy) as partial, partial.open("xb") as file:
                    shutil.copyfileobj(source, file, _BLOCK_BYTES)
            except files.WholeOnly:
                content = files.read_bytes(address, limit=1 << 32)
                with writing(copy) as partial:
                    partial.write_bytes(content)
        return copy
    except BadRecord as error:
        if error.cause is Cause.MISSING:
            raise FileNotFoundError(str(error)) from error
        raise


def open_index(
    source: str | os.PathLike[str],
    kind: str,
    build: Callable[[], Iterable[NDArray[np.int64]]],
    version: str | None = None,
) -> NDArray[np.int64]:
    """A list of numbers about a file, built once, kept in a file and mapped into memory.

    It is kept as `.NAME.KIND` beside a local file, or as `.svg_jax.KIND` in a local folder; else (an address, or a
    place that cannot be written) in the cache folder; where that cannot be written either, it is built in memory, with
    a warning. Built anew when the version differs from the one that it was built from.

    Args:
      source: the file; or a folder, a pattern or an address (`tfds:` too), where a version is given.
      kind: what the numbers are; part of the file's name.
      build: yields the numbers in blocks; what it raises passes through.
      version: changes with the content; the file's size and time if None.

    Returns:
      int64 [numbers], read only.

    Raises:
      BadRecord: no version is given and there is no such file.
    """
    name = os.fspath(source).removeprefix("file://")
    mark = _digest(f"{kind} 1\n{version or files.signature(name)}").encode()
    is_address = re.match(r"[a-z][a-z0-9+.-]*:", name)
    local = Path(os.path.abspath(name))
    beside = local / f".svg_jax.{kind}" if local.is_dir() else local.parent / f".{local.name}.{kind}"
    in_cache = f"{_digest(name if is_address else str(local))[:16]}.{kind}"
    places: list[Callable[[], Path]] = [lambda: cache_folder() / in_cache]
    if not is_address:
        places.insert(0, lambda: beside)
    for place in places:
        if (index := _map(place, mark)) is not None:
            return index
    for place in places:
        try:
            with writing(path := place()) as partial, partial.open("xb") as file:
                _write_index(file, mark, build())
        except OSError as error:
            logging.warning("the index of %s cannot be kept there (%s)", name, error)
            continue
        if (index := _map(lambda: path, mark)) is not None:
            return index
    return np.concatenate([np.zeros(0, np.int64), *build()])


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Another name to write a local file under; at the end it becomes `path`, so that no reader ever finds half of it.

    The name says who writes, NAME.HOST.PID-RANDOM.partial, so that `remove_abandoned` knows what a kill left behind.
    """
    writer = f"{socket.gethostname()}.{os.getpid()}-{random.getrandbits(32):08x}"
    partial = path.with_name(f"{path.name}.{writer}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        with contextlib.suppress(OSError):  # of a file system that is read only, which was said
            partial.unlink(missing_ok=True)


def remove_abandoned(folder: Path) -> None:
    """Removes what `writing` left in a local folder because its process was killed.

    What another living process of this host writes stays, and so does what came from other hosts within a day. This
    process itself must not be writing there.
    """
    of_this_host = re.compile(rf"\.{re.escape(socket.gethostname())}\.(\d+)-[0-9a-f]{{8}}\.partial")
    for partial in folder.glob("*.partial"):
        with contextlib.suppress(FileNotFoundError):  # it was just finished
            age = time.time() - partial.stat().st_mtime
            writer = of_this_host.search(partial.name)
            if age > _ABANDONED_SECONDS or (writer and not _is_another(int(writer[1]))):
                partial.unlink()


def _is_another(process: int) -> bool:
    """Whether this is the number of a living process, other than this one."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is somebody else's
        pass
    return process != os.getpid()


def _write_index(file: BinaryIO, mark: bytes, blocks: Iterable[NDArray[np.int64]]) -> None:
    file.write(mark)
    for block in blocks:
        file.write(block.astype("<i8").tobytes())


def _map(place: Callable[[], Path], mark: bytes) -> NDArray[np.int64] | None:
    """The index in a file; None if there is none for this version."""
    try:
        path = place()
        with path.open("rb") as file:
            if file.read(_HEADER_BYTES) != mark or (length := os.fstat(file.fileno()).st_size - _HEADER_BYTES) % 8:
                return None
            if length == 0:  # what cannot be mapped
                return np.zeros(0, np.int64)
            return np.memmap(file, "<i8", "r", offset=_HEADER_BYTES)
    except OSError:
        return None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
