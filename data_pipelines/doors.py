"""What the commands of this package share on their outside."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator

from absl import logging


@contextlib.contextmanager
def one_sentence() -> Iterator[None]:
    """Ends the program with the message alone where what the user gave is wrong; other errors keep their traceback."""
    try:
        yield
    except (ValueError, OSError, ImportError, MemoryError) as error:
        logging.debug("what led to the error below", exc_info=True)
        raise SystemExit(f"error: {error}") from error


def add_source_flags(flags: argparse.ArgumentParser) -> None:
    """SOURCE and --root."""
    flags.add_argument(
        "source", metavar="SOURCE", help="whatever config.data.path may name: a list, a folder, shards, …"
    )
    flags.add_argument("--root", help="folder that relative image paths of a list start from (default: the list's own)")


def add_crop_flags(flags: argparse.ArgumentParser) -> None:
    """--patch-size and --max-ratio, as in the configs."""
    flags.add_argument(
        "--patch-size", type=positive, default=16, help="side of a patch in pixels (default: %(default)s)"
    )
    flags.add_argument("--max-ratio", type=float, default=4.0, help="longest crop (default: %(default)g)")


def positive(text: str, most: int = 10**9) -> int:
    """A flag's whole number from 1 to `most`."""
    if not text.isdecimal() or len(text) > 18 or not 1 <= int(text) <= most:
        raise argparse.ArgumentTypeError(f"'{text:.20}' is no whole number from 1 to {most}")
    return int(text)
