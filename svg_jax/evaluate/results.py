"""A folder of results, `settings.json` and `parts/NUMBER.npz` with what each batch gave, and how a job fills one.

Parts appear whole or not at all, so that any number of processes may write into one folder and any of them may be
killed; what is there when evaluation starts again is not computed again, and scores are formed from the parts in their
order: the same, bit for bit, however the work was split.
"""

from __future__ import annotations

import argparse
import io
import json
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from tqdm import tqdm

from svg_jax import distributed
from svg_jax.flow.names import unknown
from svg_jax.output_folder import output_folder, write_whole

TOGETHER = 24 * 3600.0  # seconds that the processes of a job wait for the last one
Part = Mapping[str, np.ndarray]


class Results:
    """What one set of settings gave."""

    def __init__(self, folder: str, settings: Mapping[str, Any]) -> None:
        """Makes the folder, or takes up one of the same settings.

        Args:
            folder: Local or `gs://`.
            settings: Everything that the results depend on, as JSON can hold it.

        Raises:
            ValueError: The folder holds results of other settings.
            PermissionError: It cannot be made.
        """
        self.settings = json.loads(json.dumps(settings))
        self.folder = output_folder(folder, self.settings, inside="parts", results="results")

    def write(self, name: str, content: str | bytes) -> None:
        """A file of the folder."""
        write_whole(self.folder / name, content)

    def holds(self, number: int) -> bool:
        """Whether a part is there, and whole."""
        try:
            with self._part(number).open("rb") as file, zipfile.ZipFile(file) as archive:
                return archive.testzip() is None
        except (OSError, zipfile.BadZipFile):
            return False

    def save(self, number: int, part: Part) -> None:
        """Writes a part."""
        data = io.BytesIO()
        arrays: dict[str, Any] = {name: np.asarray(value) for name, value in part.items()}
        np.savez(data, **arrays)
        self.write(f"parts/{number:06d}.npz", data.getvalue())

    def load(self, number: int) -> dict[str, np.ndarray]:
        """A part.

        Raises:
            FileNotFoundError: It is not there.
        """
        with self._part(number).open("rb") as file, np.load(io.BytesIO(file.read())) as arrays:
            return {name: arrays[name] for name in arrays.files}

    def parts(self, count: int) -> Iterator[dict[str, np.ndarray]]:
        """All of them in their order, one in memory at a time."""
        return (self.load(number) for number in range(count))

    def missing(self, count: int) -> list[int]:
        """Which of the parts are not there."""
        return [number for number in range(count) if not self.holds(number)]

    def _part(self, number: int) -> epath.Path:
        return self.folder / "parts" / f"{number:06d}.npz"


def recorded_settings(out: str) -> dict[str, Any]:
    """What an earlier run wrote into its folder of results; {} where there is none.

    Raises:
        ValueError: It is damaged.
    """
    file = epath.Path(out) / "settings.json"
    if not file.exists():
        return {}
    try:
        settings = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} cannot be read ({error}): choose another --out, or remove it") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{file} holds no settings of results: choose another --out, or remove it")
    return settings


def parse_metrics(text: str, known: Sequence[str]) -> tuple[str, ...]:
    """The metrics of a list with commas, in the order of those that are known.

    Raises:
        ValueError: One has no such name, or there is none.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise unknown("metric", name, known)
    if not names:
        raise ValueError(f"--metrics names none: choose some of {', '.join(known)}")
    return tuple(name for name in known if name in names)


def at_least_one(options: argparse.Namespace, *names: str) -> None:
    """Checks options that are counts; None stands for a default.

    Raises:
        ValueError: One is below 1.
    """
    for name in names:
        if (value := getattr(options, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}: it must be at least 1")


def work_through(
    count: int,
    shard: tuple[int, int],
    todo: Iterable[int],
    do: Callable[[int], object],
    *,
    unit: str,
    size: Callable[[int], int] = lambda _: 1,
) -> None:
    """Does what is missing of this process's share of `count` parts, in order.

    Args:
        count: Of all parts.
        shard: (i, n): the share is every n-th part from the i-th.
        todo: Which are missing.
        do: Makes one and saves it.
        unit: Of the progress.
        size: How many of these a part is.

    Raises:
        SystemExit: Told to end; what is done is saved.
    """
    (first, shards), missing = shard, set(todo)
    with tqdm(total=sum(map(size, range(count)[first::shards])), unit=unit) as progress:
        for turn in range(-(-count // shards)):  # as many in every process, which ask together whether to end
            number = turn * shards + first
            if number in missing:
                do(number)
            progress.update(size(number) if number < count else 0)
            if distributed.preempted(turn):
                raise SystemExit(distributed.EXIT_PREEMPTED)


def conclude(results: Results, count: int, what: str, report: Callable[[], str]) -> None:
    """Waits for all processes of the job; the first prints what `report` gives, or how much of it is there yet.

    Args:
        results: Of all.
        count: Of all parts.
        what: These are, for the message.
        report: Writes it where all parts are there; returns what is to be printed.
    """
    distributed.barrier("evaluated", TOGETHER)
    if distributed.is_first():
        if missing := results.missing(count):
            print(f"{count - len(missing)} of {count} {what} are there: the last shard writes the report")
        else:
            print(report())
    distributed.barrier("reported", TOGETHER)
