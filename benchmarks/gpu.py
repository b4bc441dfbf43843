"""The train step of the 2.6B model on one GPU: share of the card's own matmul rate, and speed beside PyTorch.

`bash benchmarks/gpu.sh` prepares the machine and runs this. The two frameworks bring their own CUDA libraries, so each
may have a Python of its own (`--peer-python`). Both sides tune themselves: each way to save memory is tried with
batches that double until the memory is full. The best of each then take turns.
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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.shape import Shape

MFU_GOAL = 0.55
RATIO_GOAL = 1.2
SIDES = {"ours": "svg_jax (JAX)", "peer": "diffusers (PyTorch)"}
PIXELS = 16  # an image token is so many pixels high and wide
LARGEST_BATCH = 256
FULL = ("RESOURCE_EXHAUSTED", "out of memory")  # what an error says when the memory is full

OURS: list[dict[str, Any]] = [
    *({"remat": remat} for remat in ("none", "dots", "attention", "full")),
    {"remat": "dots", "attention": "chunked"},
]
PEER = [
    {"attention": attention, "checkpointing": checkpointing, "compile": "blocks"}
    for attention in ("flash", "cudnn")
    for checkpointing in (False, True)
]


@dataclasses.dataclass(frozen=True)
class Trial:
    """What one process measures: one variant at these batches, until the memory is full."""

    side: str
    shape: Shape
    variant: dict[str, Any]
    batches: tuple[int, ...]
    runs: int

    @classmethod
    def parse(cls, text: str) -> Trial:
        fields = json.loads(text)
        return cls(**{**fields, "shape": Shape(**fields["shape"]), "batches": tuple(fields["batches"])})


Point = dict[str, Any]  # "batch", "seconds" of each run, "peak" bytes of memory; and "variant"


def measure(trial: Trial) -> Iterator[Point]:
    """In the child: one point a batch."""
    at_batch, peak = SETUPS[trial.side](trial)
    for batch in trial.batches:
        try:
            run = at_batch(dataclasses.replace(trial.shape, batch=batch))
            for _ in range(3):  # compile, settle
                run()
            seconds = [timed(run) for _ in range(trial.runs)]
        except Exception as error:
            if any(sign in str(error) for sign in FULL):
                return
            raise
        yield {"batch": batch, "seconds": seconds, "peak": peak()}


def timed(run: Callable[[], Any]) -> float:
    """Seconds."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def setup_ours(trial: Trial) -> tuple[Callable[[Shape], Callable[[], Any]], Callable[[], int]]:
    """The state once; from a shape to a function that makes one update."""
    import jax

    from benchmarks import ours

    step, create, _ = ours.jitted_step(trial.shape, **trial.variant)
    state = jax.jit(create)(jax.random.key(0))

    def at_batch(shape: Shape) -> Callable[[], Any]:
        inputs = ours.jitted_step(shape)[2]

        def run() -> None:
            nonlocal state
            state, metrics = step(state, *inputs)
            jax.block_until_ready((state, metrics))

        return run

    return at_batch, lambda: (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)


def setup_peer(trial: Trial) -> tuple[Callable[[Shape], Callable[[], Any]], Callable[[], int]]:
    """Likewise, with PyTorch's compiler and one of its fused attentions."""
    import torch

    from benchmarks import peer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")
    # The other kernels stay allowed for the few layers with a mask, which these two refuse.
    torch.backends.cuda.enable_flash_sdp(trial.variant["attention"] == "flash")
    torch.backends.cuda.enable_cudnn_sdp(trial.variant["attention"] == "cudnn")
    model = peer.network(trial.shape).to(device).train()
    if trial.variant["checkpointing"]:
        model.enable_gradient_checkpointing()
    at_shape = peer.update_of(model)
    blocks = [*model.context_refiner, *model.noise_refiner, *model.layers]
    for module in blocks if trial.variant["compile"] == "blocks" else [model]:
        module.compile(dynamic=False)

    def at_batch(shape: Shape) -> Callable[[], Any]:
        torch._dynamo.reset()  # each shape is compiled as if it were the only one
        return at_shape(shape)

    return at_batch, lambda: torch.cuda.max_memory_allocated() if device == "cuda" else 0


SETUPS = {"ours": setup_ours, "peer": setup_peer}


def matmul_rate(side: str, size: int) -> float:
    """In the child: FLOP/s of a chain of square bfloat16 products, the best of five."""
    links = 16
    if side == "ours":
        import jax
        import jax.numpy as jnp

        x = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
        w = jax.random.normal(jax.random.key(1), (size, size), jnp.bfloat16) * size**-0.5
        chain = jax.jit(lambda x, w: jax.lax.fori_loop(0, links, lambda _, x: x @ w, x))

        def run() -> None:
            chain(x, w).block_until_ready()
    else:
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
        b = torch.randn(size, size, device=device, dtype=torch.bfloat16) * size**-0.5

        def run() -> None:
            c = a
            for _ in range(links):
                c = c @ b
            c[0, 0].item()  # waits

    run()
    return links * 2 * size**3 / min(timed(run) for _ in range(5))


def step_flops(shape: Shape) -> float:
    """In the child of our side: of one sample's training step, without recomputation."""
    from benchmarks import ours
    from svg_jax.models import flops

    return 3 * flops.next_dit(ours.config_of(shape), shape.image_tokens, shape.text_tokens)


class Bench:
    """Runs children with the interpreters of the two sides, one at a time, and keeps their logs."""

    def __init__(self, peer_python: str, out: Path) -> None:
        self.pythons = {"ours": sys.executable, "peer": peer_python}
        self.out = out
        self.logs = 0

    def ask(self, side: str, *arguments: str) -> list[Any]:
        """What a child printed, a line of JSON each. One that fails half-way still counts for what it has measured."""
        self.logs += 1
        log = self.out / f"{self.logs:02}-{side}.log"
        # A JAX that takes what it needs, instead of three quarters, is the one whose peak can be compared.
        environment = os.environ | {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}
        with log.open("w") as errors:
            command = [self.pythons[side], "-m", "benchmarks.gpu", *arguments]
            child = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
        lines = [json.loads(line) for line in child.stdout.splitlines() if line.startswith(("{", "["))]
        if child.returncode and not any(sign in log.read_text() for sign in FULL):
            print(f"A child of {SIDES[side]} failed ({' '.join(arguments)}): see {log}", file=sys.stderr)
        return lines

    def trial(self, trial: Trial) -> list[Point]:
        """The points of one variant."""
        points = self.ask(trial.side, "--trial", json.dumps(dataclasses.asdict(trial)))
        for point in points:
            point["variant"] = trial.variant
            print(f"  {describe(trial.side, point)}", file=sys.stderr, flush=True)
        return points

    def tune(self, side: str, shape: Shape, variants: list[dict[str, Any]], batches: tuple[int, ...]) -> Point:
        """The fastest of all variants and batches."""
        points = [p for v in variants for p in self.trial(Trial(side, shape, v, batches, runs=3))]
        if not points:
            raise SystemExit(f"{SIDES[side]} could not make a single step: see the logs in {self.out}")
        best = max(points, key=speed)
        if side == "peer":  # its best variant once more, compiled whole
            whole = {**best["variant"], "compile": "model"}
            points = self.trial(Trial(side, shape, whole, (best["batch"],), runs=3))
            best = max([best, *points], key=speed)
        return best

    def compare(self, shape: Shape, args: argparse.Namespace, batches: tuple[int, ...]) -> dict[str, Point]:
        """Tunes both sides, then lets the best of each take turns."""
        variants = {"ours": OURS[: args.variants], "peer": PEER[: args.variants]}
        best = {side: self.tune(side, shape, variants[side], batches) for side in SIDES}
        turns: dict[str, list[Point]] = {side: [] for side in SIDES}
        for _ in range(args.rounds):
            for side, point in best.items():
                turns[side] += self.trial(Trial(side, shape, point["variant"], (point["batch"],), args.runs))
        return {
            side: {
                **best[side],
                "seconds": [s for p in (points or [best[side]]) for s in p["seconds"]],
                "peak": max(p["peak"] for p in (points or [best[side]])),
            }
            for side, points in turns.items()
        }


def speed(point: Point) -> float:
    """Images a second."""
    return point["batch"] / statistics.median(point["seconds"])


def describe(side: str, point: Point) -> str:
    """One line of the progress."""
    settings = ", ".join(f"{key} {value}" for key, value in point["variant"].items())
    return f"{SIDES[side]}, {settings}, batch {point['batch']}: {speed(point):.2f} images/s, {gib(point['peak'])}"


def gib(count: float) -> str:
    """Bytes, in words."""
    return f"{count / 2**30:.1f} GiB"


def table(found: dict[str, dict[str, Any]], rate: float) -> str:
    """In Markdown."""
    lines = [
        "| | settings found | batch | median step | images/s | TFLOP/s | of the matmul rate | peak memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for size, entry in found.items():
        for side, point in entry["sides"].items():
            settings = ", ".join(f"{key} {value}" for key, value in point["variant"].items())
            done, seconds = speed(point) * entry["flops"], statistics.median(point["seconds"])
            lines.append(
                f"| {size}, {SIDES[side]} | {settings} | {point['batch']} | {seconds:.3f} s "
                f"| {speed(point):.2f} | {done / 1e12:.1f} | {done / rate:.0%} | {gib(point['peak'])} |"
            )
        ratio = speed(entry["sides"]["ours"]) / speed(entry["sides"]["peer"])
        lines.append(f"| **{size}, ratio** (goal: {RATIO_GOAL:g}) | | | | **{ratio:.2f}** | | goal: {MFU_GOAL:.0%} | |")
    return "\n".join(lines)


def card() -> str:
    """Name, memory and driver of the GPU."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "no GPU"


def main() -> None:
    """Measures everything and prints the tables; as a child, one thing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer-python", default=sys.executable, help="an interpreter that has PyTorch and diffusers")
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="folder for results and logs")
    parser.add_argument("--rounds", type=int, default=2, help="turns of the best of each side")
    parser.add_argument("--runs", type=int, default=10, help="timed steps a turn")
    parser.add_argument("--variants", type=int, default=len(OURS), help="ways to save memory that are tried, a side")
    parser.add_argument(
        "--smoke", action="store_true", help="the same at a tiny size, to see that it works; on a CPU too"
    )
    parser.add_argument("--trial", type=Trial.parse, help=argparse.SUPPRESS)
    parser.add_argument("--matmul", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--flops", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.trial:
        for point in measure(args.trial):
            print(json.dumps(point), flush=True)
    elif args.matmul:
        print(json.dumps([matmul_rate(args.matmul[0], int(args.matmul[1]))]))
    elif args.flops:
        print(json.dumps([step_flops(Shape(**args.flops))]))
    else:
        report(args)


def report(args: argparse.Namespace) -> None:
    """The parent."""
    shapes = [Shape.next_dit_2p6b(side) for side in (32, 64)]
    batches, sizes = tuple(2**i for i in range(LARGEST_BATCH.bit_length())), (8192, 16384)
    if args.smoke:
        tiny = {"dim": 192, "num_heads": 2, "num_kv_heads": 1, "num_layers": 1, "num_refiner_layers": 1}
        shapes = [dataclasses.replace(Shape.next_dit_2p6b(4), **tiny, text_tokens=8)]
        batches, sizes = (1, 2), (256,)
        args.rounds, args.runs, args.variants = 1, 3, 1
    args.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(args.peer_python, args.out)
    rates = {side: max(bench.ask(side, "--matmul", side, str(size))[0][0] for size in sizes) for side in SIDES}
    rate = max(rates.values())
    heading = f"{card()}. Square bfloat16 matmuls: " + ", ".join(
        f"{SIDES[side]} {value / 1e12:.1f} TFLOP/s" for side, value in rates.items()
    )
    print(heading + "; the share below is of the larger.\n", flush=True)
    found = {}
    for shape in shapes:
        name = f"{PIXELS * shape.rows} px ({shape.image_tokens} + {shape.text_tokens} tokens)"
        print(f"Tuning at {name}", file=sys.stderr)
        flops = bench.ask("ours", "--flops", json.dumps(dataclasses.asdict(shape)))[0][0]
        found[name] = {"flops": flops, "shape": dataclasses.asdict(shape), "sides": bench.compare(shape, args, batches)}
        (args.out / "gpu.json").write_text(
            json.dumps({"card": card(), "matmul_flops": rates, "sizes": found}, indent=1) + "\n"
        )
    print(table(found, rate))


if __name__ == "__main__":
    main()
