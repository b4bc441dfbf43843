"""The same work in two frameworks, each in a process of its own, which take turns.

So peak memory is a framework's own, no threads compete, and whatever else the machine does falls on both. The work is a
function of a module a side, by default `benchmarks.ours` and `benchmarks.peer`, that takes the module's `Shape` and
returns what to time, and the number of parameters.
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

QUIET = 0.5  # load average of the last minute, at most
SIDES = {"ours": "svg_jax (JAX)", "peer": "PyTorch"}
MODULES = {"ours": "benchmarks.ours", "peer": "benchmarks.peer"}
Facts = dict[str, dict[str, Any]]  # of each side


def compare(
    work: str, shape: Any, args: argparse.Namespace, *, check: list[str], modules: dict[str, str] = MODULES
) -> Facts:
    """Runs the module `check`, which fails unless both are one network, then measures in turns.

    Args:
        work: Name of the function that makes the work.
        shape: A dataclass, the `Shape` of both modules.
        args: From `parser`.
        check: A module and its arguments.
        modules: Of each side.
    """
    # Sampled before we start: PyTorch's threads spin when they must share a core, which flatters us on a busy machine.
    load = os.getloadavg()[0]
    subprocess.run([sys.executable, "-m", *check], check=True)
    sides = {name: Side(modules[name], work, shape) for name in SIDES}
    for side in sides.values():
        side.run(args.warmup)
    for _ in range(args.rounds):
        for side in sides.values():
            side.seconds += side.run(args.runs)
    facts = {name: side.close() for name, side in sides.items()}
    if load > QUIET:
        print(f"The machine was busy before the start (load {load:.1f}): do not quote these numbers.")
    return facts


def parser(description: str | None, *, rounds: int, runs: int, warmup: int, batch: int = 4) -> argparse.ArgumentParser:
    """How long to measure."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=rounds, help="turns of each framework")
    parser.add_argument("--runs", type=int, default=runs, help="timed runs a turn")
    parser.add_argument("--warmup", type=int, default=warmup, help="untimed runs at the start")
    parser.add_argument("--batch", type=int, default=batch)
    return parser


def table(facts: Facts, shape: Any, *, run: str, unit: str, units: int, goal: float = 1.5) -> str:
    """In Markdown; a `run` makes so many `units`."""
    lines = [
        f"| | versions | parameters | median {run} | fastest | {unit}/s | peak memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for side, fact in facts.items():
        median, fastest = statistics.median(fact["seconds"]), min(fact["seconds"])
        versions = ", ".join(f"{name} {version}" for name, version in fact["versions"].items())
        lines.append(
            f"| {SIDES[side]} | {versions} | {fact['parameters'] / 1e6:.1f}M | {median:.3f} s | {fastest:.3f} s "
            f"| {units / median:.3f} | {fact['peak'] / 2**30:.2f} GiB |"
        )
    medians = [statistics.median(facts[side]["seconds"]) for side in SIDES]
    peaks = [facts[side]["peak"] for side in SIDES]
    lines += [
        "",
        f"{medians[1] / medians[0]:.2f} times the peer's {unit}/s (goal: {goal}), {peaks[0] / peaks[1]:.2f} times its "
        f"peak memory. Medians of {len(facts['ours']['seconds'])}.",
        f"Python {platform.python_version()}, {os.cpu_count()} CPU cores, float32, {dataclasses.asdict(shape)}.",
    ]
    return "\n".join(lines)


class Side:
    """A framework in a process of its own, which works when asked."""

    def __init__(self, module: str, work: str, shape: Any) -> None:
        command = [sys.executable, "-m", "benchmarks.turns", module, work, json.dumps(dataclasses.asdict(shape))]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.seconds: list[float] = []

    def run(self, runs: int) -> list[float]:
        """The seconds of each of `runs` runs."""
        return self._ask(str(runs))["seconds"]

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


def serve(name: str, work: str, shape: dict[str, Any]) -> None:
    """The child: each line of standard input asks for so many runs, the answer is one line of JSON."""
    module = importlib.import_module(name)
    run, parameters = getattr(module, work)(module.Shape(**shape))
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
        answer = {"seconds": seconds, "peak": peak, "parameters": parameters, "versions": module.VERSIONS}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
