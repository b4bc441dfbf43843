"""Paths on the local disk, and files that take the place of others."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path


def check_local(path: Path) -> None:
    """Refuses an address such as gs://bucket, which would be taken for a folder's name."""
    if re.match(r"\w\w+:/", str(path)):  # a `Path` makes one slash of two
        raise ValueError(
            f"{str(path).replace(':/', '://', 1)} must be a local path here: copy it with the store's tool"
        )


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A path beside `target`, which takes its place at the end; on an error nothing is left and nothing lost."""
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.{os.getpid()}.partial")
    before = target.with_name(f".{target.name}.before")
    if before.is_dir():
        if target.exists():
            _remove(before)
        else:  # stopped between the two renames below
            before.rename(target)
    try:
        yield beside
        if beside.is_dir() and target.exists():  # a file is replaced in one step, a folder is not
            target.rename(before)
        os.replace(beside, target)
        _remove(before)
    finally:
        _remove(beside)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
