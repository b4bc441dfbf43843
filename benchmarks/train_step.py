"""Our train step against PyTorch's at the same shape: `python -m benchmarks.train_step`.

One update = times and noise, forward, backward, clipping, AdamW, EMA; float32, all cores. Each framework lives in a
process of its own, so that peak memory is its own and no threads compete; they take turns, so that whatever else the
machine does falls on both.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

from benchmarks.shape import Shape

QUIET = 0.5  # load average of the last minute, at most
SIDES = {"ours": "svg_jax (JAX)", "peer": "diffusers (PyTorch)"}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each framework")
    parser.add_argument("--steps", type=int, default=4, help="timed steps a turn")
    parser.add_argument("--warmup", type=int, default=2, help="untimed steps at the start")
    parser.add_argument("--batch", type=int, default=Shape.batch)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)  # a child process
    args = parser.parse_args()
    shape = Shape(batch=args.batch)
    if args.side:
        serve(args.side, shape)
        return

    # Sampled before we start: PyTorch's threads spin when they must share a core, which flatters us on a busy machine.
    load = os.getloadavg()[0]
    subprocess.run([sys.executable, "-m", "benchmarks.same_network"], check=True)
    sides = {side: Side(side, shape) for side in SIDES}
    for side in sides.values():
        side.run(args.warmup)
    for _ in range(args.rounds):
        for side in sides.values():
            side.seconds += side.run(args.steps)
    print(report(shape, {name: side.close() for name, side in sides.items()}))
    if load > QUIET:
        print(f"The machine was busy before the start (load {load:.1f}): do not quote these numbers.")


class Side:
    """A framework in a process of its own, which trains when asked."""

    def __init__(self, name: str, shape: Shape) -> None:
        command = [sys.executable, "-m", "benchmarks.train_step", "--side", name, "--batch", str(shape.batch)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.seconds: list[float] = []

    def run(self, steps: int) -> list[float]:
        """The seconds of each of `steps` updates."""
        return self._ask(str(steps))["seconds"]

    def close(self) -> dict[str, Any]:
        """Ends the process and returns what was measured."""
        facts = self._ask("0")
        self.process.communicate()
        return facts | {"seconds": self.seconds}

    def _ask(self, question: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(question + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit("a framework's process ended early: its error stands above")
        return json.loads(answer)


def serve(side: str, shape: Shape) -> None:
    """The child: each line of standard input asks for so many updates, the answer is one line of JSON."""
    module = importlib.import_module(f"benchmarks.{side}")
    update, parameters = module.train_step(shape)
    for line in sys.stdin:
        seconds, loss = [], float("nan")
        for _ in range(int(line)):
            start = time.perf_counter()
            loss = update()
            seconds.append(time.perf_counter() - start)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
        answer = {"seconds": seconds, "loss": loss, "peak": peak, "parameters": parameters, "versions": module.VERSIONS}
        print(json.dumps(answer), flush=True)


def report(shape: Shape, facts: dict[str, dict[str, Any]]) -> str:
    """The table, in Markdown."""
    lines = [
        "| | versions | parameters | median step | fastest | steps/s | peak memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for side, title in SIDES.items():
        fact = facts[side]
        median, fastest = statistics.median(fact["seconds"]), min(fact["seconds"])
        versions = ", ".join(f"{name} {version}" for name, version in fact["versions"].items())
        lines.append(
            f"| {title} | {versions} | {fact['parameters'] / 1e6:.1f}M | {median:.3f} s | {fastest:.3f} s "
            f"| {1 / median:.3f} | {fact['peak'] / 2**30:.2f} GiB |"
        )
    medians = [statistics.median(facts[side]["seconds"]) for side in SIDES]
    peaks = [facts[side]["peak"] for side in SIDES]
    lines += [
        "",
        f"{medians[1] / medians[0]:.2f} times the peer's steps/s (goal: 1.5), {peaks[0] / peaks[1]:.2f} times its peak "
        f"memory (goal: at most 1). Medians of {len(facts['ours']['seconds'])} steps.",
        f"Python {platform.python_version()}, {os.cpu_count()} CPU cores, float32, {dataclasses.asdict(shape)}.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
