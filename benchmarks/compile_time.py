"""Compile time against depth: `python -m benchmarks.compile_time`.

The train step of Next-DiT with 26 scanned layers and with 4, each compiled in a fresh process without a cache. The
width is small, because it changes the arithmetic and not the program.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time

from benchmarks.shape import Shape

SHAPE = Shape(dim=192, axes_dims=(16, 8, 8), text_dim=256, batch=1)
DEPTHS = (4, 26)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="fresh processes for each depth")
    parser.add_argument("--depth", type=int, help=argparse.SUPPRESS)  # a child process
    args = parser.parse_args()
    if args.depth:
        print(json.dumps(compile_once(args.depth)))
        return

    found: dict[int, list[dict[str, float]]] = {depth: [] for depth in DEPTHS}
    for _ in range(args.rounds):
        for depth, measured in found.items():
            command = [sys.executable, "-m", "benchmarks.compile_time", "--depth", str(depth)]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=without_cache()).stdout
            measured.append(json.loads(output.splitlines()[-1]))
    medians = {d: {key: statistics.median(m[key] for m in found[d]) for key in found[d][0]} for d in DEPTHS}

    print("| layers | trace and lower | compile | both | CPU time of both |\n|---|---|---|---|---|")
    for depth, median in medians.items():
        columns = " | ".join(f"{median[key]:.2f} s" for key in ("trace", "compile", "both", "cpu"))
        print(f"| {depth} | {columns} |")
    shallow, deep = (medians[depth] for depth in DEPTHS)
    print(
        f"\n{DEPTHS[1]} layers take {deep['both'] / shallow['both']:.2f} times as long as {DEPTHS[0]} "
        f"({deep['cpu'] / shallow['cpu']:.2f} in CPU time; goal: at most 1.3). Medians of {args.rounds} fresh "
        f"processes, width {SHAPE.dim}, {os.cpu_count()} CPU cores."
    )


def compile_once(depth: int) -> dict[str, float]:
    """Seconds to trace and to compile the step at one depth, from shapes alone."""
    import jax

    from benchmarks.ours import jitted_step

    step, create, inputs = jitted_step(dataclasses.replace(SHAPE, num_layers=depth))
    state = jax.eval_shape(create, jax.random.key(0))
    wall, cpu = time.perf_counter(), time.process_time()
    lowered = step.lower(state, *inputs)
    traced = time.perf_counter()
    lowered.compile()
    done = time.perf_counter()
    return {
        "trace": traced - wall,
        "compile": done - traced,
        "both": done - wall,
        "cpu": time.process_time() - cpu,
    }


def without_cache() -> dict[str, str]:
    """The environment, without JAX's persistent compilation cache."""
    return {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false", "JAX_PLATFORMS": "cpu"}


if __name__ == "__main__":
    main()
