"""A long list of captioned images: index, opening, random reads and memory: `python -m benchmarks.jsonl`.

Writes a JSON Lines file of random captions and opens it as training does. Each row is a process of its own. The last
does what the release does, holding every record in memory, on as many lines as `--held` says; its seconds and memory
are given for all lines, in proportion. 10M lines need 4 GB of disk at --folder while it runs; the file is read from the
page cache as far as that holds it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data_pipelines.sources import open_source

WORDS = (
    "a",
    "the",
    "red",
    "blaue",
    "grün",
    "small",
    "wide",
    "cat",
    "dog",
    "hen",
    "house",
    "under",
    "beside",
    "of",
    "in",
)
GIB = 2**30
HOST = 60_000_000  # lines of the largest list


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lines", type=int, default=10_000_000)
    parser.add_argument("--reads", type=int, default=100_000, help="random reads")
    parser.add_argument("--held", type=int, default=500_000, help="lines that are held in memory the release's way")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where there is room")
    parser.add_argument("--measure", nargs=2, metavar=("WHAT", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        what, file = args.measure
        print(json.dumps(measure(STAGES[what], Path(file), args)))
        return
    load = os.getloadavg()[0]
    folder = Path(tempfile.mkdtemp(prefix="jsonl_", dir=args.folder))
    try:
        file = folder / "list.jsonl"
        write_list(file, args.lines)
        facts = {what: run(what, file, args) for what in STAGES}
        index = sum(path.stat().st_size for path in folder.iterdir()) - file.stat().st_size
        print(f"{args.lines:,} lines, {file.stat().st_size / 1e9:.2f} GB; the index takes {index / 1e6:.0f} MB.")
    finally:
        shutil.rmtree(folder)
    share = args.lines / min(args.held, args.lines)
    print("| | seconds | a second | memory of its own | index mapped |\n|---|---|---|---|---|")
    print(
        row("index built at the first opening", facts["build"], f"{args.lines / facts['build']['seconds']:,.0f} lines")
    )
    print(row("opened again", facts["open"], "-"))
    reads = facts["read"]
    print(row(f"{args.reads:,} random records", reads, f"{args.reads / reads['seconds']:,.0f} records"))
    held = {key: value * share for key, value in facts["hold"].items()}
    print(row("all records in memory, as in the release", held, f"{args.lines / held['seconds']:,.0f} lines"))
    more = HOST / args.lines / GIB
    print(f"\nFor {HOST:,} lines in proportion: the index takes {index * more:.2f} GiB, shared by a host's processes;")
    print(f"held in memory, {held['own'] * more:.0f} GiB a process.")
    if load > 0.5:
        print(f"The machine was busy before the start (load {load:.1f}): do not quote these times.")


def write_list(path: Path, lines: int) -> None:
    """Records as in the release, captions of 40 to 1,200 characters, 250 in the median."""
    rng = np.random.default_rng(0)
    pool = " ".join(rng.choice(WORDS, 200_000))
    with path.open("w", encoding="utf-8") as file:
        for first in range(0, lines, 100_000):
            count = min(100_000, lines - first)
            lengths = np.clip(250 * np.exp(rng.normal(0, 0.6, count)), 40, 1200).astype(int).tolist()
            starts = rng.integers(0, len(pool) - 1200, count).tolist()
            file.writelines(
                f'{{"path": "{i // 10_000:05d}/{i:09d}.jpg", "prompt": "{pool[start : start + length]}"}}\n'
                for i, start, length in zip(itertools.count(first), starts, lengths, strict=False)
            )


def run(what: str, file: Path, args: argparse.Namespace) -> dict[str, float]:
    """What `measure` finds, in a process of its own."""
    settings = [f"--{name}={getattr(args, name)}" for name in ("lines", "reads", "held")]
    command = [sys.executable, "-m", "benchmarks.jsonl", "--measure", what, str(file), *settings]
    facts: dict[str, float] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return facts


def measure(
    stage: Callable[[Path, argparse.Namespace], tuple[object, float]], file: Path, args: argparse.Namespace
) -> dict[str, float]:
    """Seconds of one stage, and the bytes of memory that it adds: of the process's own, and mapped from files."""
    before = resident()
    kept, seconds = stage(file, args)
    own, mapped = (after - first for after, first in zip(resident(), before, strict=True))
    del kept
    return {"seconds": seconds, "own": own, "mapped": mapped}


def open_list(file: Path, args: argparse.Namespace) -> tuple[object, float]:
    """The first time it builds the index."""
    start = time.perf_counter()
    source = open_source(file)
    assert len(source) == args.lines
    return source, time.perf_counter() - start


def read_records(file: Path, args: argparse.Namespace) -> tuple[object, float]:
    """Records from all over the list, parsed."""
    source = open_source(file)
    places = np.random.default_rng(1).integers(0, args.lines, args.reads).tolist()
    start = time.perf_counter()
    for place in places:
        record = source[place]
        assert record.captions
    return source, time.perf_counter() - start


def hold_records(file: Path, args: argparse.Namespace) -> tuple[object, float]:
    """All of them parsed, in a list."""
    start = time.perf_counter()
    with file.open(encoding="utf-8") as lines:
        records = [json.loads(line) for line in itertools.islice(lines, args.held)]
    return records, time.perf_counter() - start


STAGES = {"build": open_list, "open": open_list, "read": read_records, "hold": hold_records}


def resident() -> tuple[int, int]:
    """Bytes of this process's own memory, and of files mapped into it, that are in RAM."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    own, mapped = (int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile"))
    return own, mapped


def row(name: str, facts: dict[str, float], rate: str) -> str:
    """Of the table."""
    return (
        f"| {name} | {facts['seconds']:.3g} | {rate} | {facts['own'] / 1e6:.0f} MB | {facts['mapped'] / 1e6:.0f} MB |"
    )


if __name__ == "__main__":
    main()
