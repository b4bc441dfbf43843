"""Images a second from JPEG files to the model's input, beside a PyTorch DataLoader: `python -m benchmarks.data`.

Photographs of scikit-image and scikit-learn, 512 to 2048 pixels on the longer side, at the aspect ratios they have. The
peer (`data_peer`) runs the release's steps: open, convert, halve, resize bicubically, cut the centre out, to a float
tensor, normalise. Ours ends in patches of bytes, which the device normalises, and captions as tokens. Both are first
shown to give the same pictures. Each side has a process of its own; they take turns.

The first table counts what whole loaders deliver, by the clock for one and two workers, and by the processor time of
all their processes for one; the second takes one thread's processor time for files of one size. Processor time means
the same on a busy machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import Image

from benchmarks.turns import QUIET, Side
from data_pipelines import images, text
from data_pipelines.batches import TextToImageBatches
from data_pipelines.loader import make_loader
from data_pipelines.photographs import load_photograph
from data_pipelines.sources import open_source

VERSIONS = {"Pillow": PIL.__version__, "numpy": np.__version__}
NAMES = ("astronaut", "chelsea", "china", "coffee", "flower", "hubble_deep_field", "retina", "rocket")
LONGER_SIDES = (512, 768, 1024, 1536, 2048)
PATCH_SIZE = 16
PREFETCH = 1  # batches a worker, as in the release
READ_AHEAD = 5  # batches a worker that may stand ready before a turn, at most: these are not timed
GOAL, SCALING_GOAL = 1.3, 1.8
PSNR = 40  # as `images.read_for` promises


@dataclasses.dataclass(frozen=True)
class Shape:
    """What both sides read, and how many at a time."""

    records: str
    resolution: int
    batch: int
    workers: int


def main() -> None:
    """Prints the two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resolutions", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7, help="turns of each side")
    parser.add_argument("--batches", type=int, default=12, help="timed batches a turn")
    args = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        records = write_photographs(Path(folder))
        print(loaders(args, records), single(args.resolutions, records), sep="\n\n")
    if load > QUIET:
        print(f"The machine was busy before the start (load {load:.1f}): do not quote what goes by the clock.")


def write_photographs(folder: Path) -> str:
    """Writes every photograph at every size, and the list of them, whose path it returns."""
    lines = []
    for name in NAMES:
        photograph = load_photograph(name).convert("RGB")
        for side in LONGER_SIDES:
            scale = side / max(photograph.size)
            size = round(photograph.width * scale), round(photograph.height * scale)
            file = f"{name}_{side}.jpg"
            photograph.resize(size, Image.Resampling.LANCZOS).save(folder / file, quality=90)
            lines.append(json.dumps({"path": file, "prompt": f"a photograph of {name}", "side": side}))
    path = folder / "records.jsonl"
    path.write_text("\n".join(lines))
    return str(path)


def make_batches(shape: Shape) -> TextToImageBatches:
    """Ours, as stage 1 or 3 trains on them."""
    return TextToImageBatches(
        open_source(shape.records),
        text.ByteTokenizer(),
        batch_size=shape.batch,
        resolution=shape.resolution,
        patch_size=PATCH_SIZE,
        max_text_tokens=256,
        seed=0,
    )


def threads(shape: Shape) -> tuple[Callable[[], Any], int]:
    """A function that takes the next batch, read by threads of this process."""
    loader = make_loader(make_batches(shape), num_threads=shape.workers, prefetch=PREFETCH * shape.workers)
    return lambda: next(loader), 0


def workers(shape: Shape) -> tuple[Callable[[], Any], int]:
    """The same, read by processes of one thread each."""
    loader = make_loader(
        make_batches(shape), num_threads=1, num_workers=shape.workers, prefetch=PREFETCH * shape.workers
    )
    return lambda: next(loader), 0


WAYS = {
    "ours, threads": ("benchmarks.data", "threads"),
    "ours, processes": ("benchmarks.data", "workers"),
    "PyTorch DataLoader, processes": ("benchmarks.data_peer", "workers"),
}


def loaders(args: argparse.Namespace, records: str) -> str:
    """The first table, in Markdown."""
    lines = [
        "| resolution | loader | images/s, 1 worker | 2 workers | scaling | images/s a core | beside the peer |",
        "|---|---|---|---|---|---|---|",
    ]
    for resolution in args.resolutions:
        sides = {
            (way, count): Side(*WAYS[way], Shape(records, resolution, args.batch, count))
            for way in WAYS
            for count in (1, 2)
        }
        elapsed: dict[tuple[str, int], list[float]] = {key: [] for key in sides}
        processor: dict[tuple[str, int], list[float]] = {key: [] for key in sides}
        for _ in range(args.rounds):
            for key, side in sides.items():
                side.run(READ_AHEAD * key[1])
                start = processor_seconds(side.process.pid)
                elapsed[key].append(sum(side.run(args.batches)))
                processor[key].append(processor_seconds(side.process.pid) - start)
        for side in sides.values():
            side.close()
        speed = {key: args.batches * args.batch / statistics.median(times) for key, times in elapsed.items()}
        a_core = {key: args.batches * args.batch / statistics.median(times) for key, times in processor.items()}
        *_, peer = WAYS
        for way in WAYS:
            one, two, ratio = speed[way, 1], speed[way, 2], a_core[way, 1] / a_core[peer, 1]
            by_clock = f"{one:.0f} | {two:.0f} | {two / one:.2f}"
            lines.append(f"| {resolution} | {way} | {by_clock} | {a_core[way, 1]:.0f} | {ratio:.2f} |")
    lines += [
        "",
        f"Goals: {GOAL} times the peer, scaling {SCALING_GOAL}. Medians of {args.rounds} turns, {args.batches} batches "
        f"of {args.batch} each. Python {platform.python_version()}, Pillow {PIL.__version__}, {os.cpu_count()} cores.",
    ]
    return "\n".join(lines)


def processor_seconds(pid: int | str) -> float:
    """Of a process and its children, so far (Linux)."""
    times = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return sum(map(int, times)) / os.sysconf("SC_CLK_TCK") + sum(map(processor_seconds, children))


def single(resolutions: list[int], records: str) -> str:
    """The second table, in Markdown; raises SystemExit where both sides do not give the same pictures."""
    lines = [
        "| resolution | longer side | ours, ms of a core an image | the peer's steps | ratio |",
        "|---|---|---|---|---|",
    ]
    for resolution in resolutions:
        times = {side: seconds_of_both(resolution, records, side) for side in LONGER_SIDES}
        lines += [row(resolution, str(side), ours, peers) for side, (ours, peers) in times.items()]
        lines.append(
            row(resolution, "all", *(statistics.mean(of_side) for of_side in zip(*times.values(), strict=True)))
        )
    return "\n".join([*lines, "", f"Both sides give the same pictures: PSNR above {PSNR} dB for each file."])


def seconds_of_both(resolution: int, records: str, side: int) -> tuple[float, float]:
    """Processor time an image, ours and the peer's, over the files of one size."""
    from benchmarks import data_peer

    sizes, budget = images.crop_sizes(resolution, PATCH_SIZE), images.token_budget(resolution, PATCH_SIZE)
    source = open_source(records)

    def ours(index: int) -> tuple[np.ndarray, np.ndarray]:
        return images.patchify(images.read_for(source[index], sizes), PATCH_SIZE, budget)

    def peers(index: int) -> Any:
        return data_peer.to_tensor(source[index].path, sizes)

    seconds: list[tuple[float, float]] = []
    for index in range(len(source)):
        path = source[index].path
        if path.endswith(f"_{side}.jpg"):
            check(ours(index), data_peer.to_pixels(peers(index)), path)
            seconds.append((timed(ours, index), timed(peers, index)))
    return statistics.mean(a for a, _ in seconds), statistics.mean(b for _, b in seconds)


def row(resolution: int, side: str, ours: float, peers: float) -> str:
    """Of the second table."""
    return f"| {resolution} | {side} | {1e3 * ours:.2f} | {1e3 * peers:.2f} | {peers / ours:.2f} |"


def timed(work: Callable[[int], Any], index: int, runs: int = 5) -> float:
    """The least processor time of this thread that it takes."""
    seconds = []
    for _ in range(runs):
        start = time.thread_time()
        work(index)
        seconds.append(time.thread_time() - start)
    return min(seconds)


def check(ours: tuple[np.ndarray, np.ndarray], peers: np.ndarray, path: str) -> None:
    """Ends the run unless the patches show the peer's picture."""
    difference = images.unpatchify(*ours).astype(float) - peers
    psnr = 10 * np.log10(255**2 / max(float(np.square(difference).mean()), 1e-9))
    if psnr < PSNR:
        raise SystemExit(f"error: the two sides show different pictures of {path}: PSNR {psnr:.1f} dB, below {PSNR}")


if __name__ == "__main__":
    main()
