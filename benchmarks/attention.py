"""Attention on a CPU beside PyTorch's `scaled_dot_product_attention`, and the memory of `chunked` as sequences grow.

Run it with the extra `bench` installed: `python -m benchmarks.attention`. Prints Markdown, and draws the figure.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import torch
from jaxtyping import Array
from torch.nn.functional import scaled_dot_product_attention

from svg_jax.nn.attention import attention

HEADS, KV_HEADS, DIM = 24, 8, 96  # of the 2.6B model
GOAL = 0.8  # of PyTorch's speed, at least
REST = 0.2  # seconds between runs: PyTorch's threads keep spinning for a while after theirs
LENGTHS = tuple(1024 * 2**i for i in range(5))
FIGURE = Path(__file__).parent / "figures" / "attention_memory.png"
Runs = dict[str, tuple[Callable[[], Any], Callable[[], Any]]]  # forward; forward and backward


def ours(batch: int, tokens: int) -> Runs:
    """The default, the default with a padding mask, and the logits all at once."""
    keys = jax.random.split(jax.random.key(0), 3)
    qkv = [
        jax.random.normal(key, (batch, tokens, heads, DIM))
        for key, heads in zip(keys, (HEADS, KV_HEADS, KV_HEADS), strict=True)
    ]
    valid = jnp.broadcast_to(jnp.arange(tokens)[None] % 10 < 9, (batch, tokens))

    def runs(**settings: Any) -> tuple[Callable[[], Any], Callable[[], Any]]:
        forward = functools.partial(attention, **settings)
        both = jax.grad(lambda *qkv: jnp.sum(jnp.square(forward(*qkv))), argnums=(0, 1, 2))
        return tuple(functools.partial(lambda f: jax.block_until_ready(f(*qkv)), jax.jit(f)) for f in (forward, both))

    return {
        "svg_jax": runs(),
        "svg_jax, a tenth of the keys masked": runs(valid=valid),
        "svg_jax, `xla` (all logits at once)": runs(backend="xla"),
    }


def theirs(batch: int, tokens: int) -> Runs:
    """PyTorch, heads before tokens in memory, as it likes them best; with and without a mask."""
    q, k, v = (torch.randn(batch, heads, tokens, DIM, requires_grad=True) for heads in (HEADS, KV_HEADS, KV_HEADS))
    valid = (torch.arange(tokens) % 10 < 9)[None, None, None]

    def runs(**settings: Any) -> tuple[Callable[[], Any], Callable[[], Any]]:
        attend = functools.partial(scaled_dot_product_attention, q, k, v, enable_gqa=True, **settings)
        return torch.inference_mode()(attend), lambda: torch.autograd.grad(attend().square().sum(), (q, k, v))

    return {"PyTorch": runs(), "PyTorch, a tenth of the keys masked": runs(attn_mask=valid)}


def speed(batch: int, tokens: int, rounds: int) -> str:
    """All in turns, so that whatever else the machine does falls on each."""
    runs = {f"{name}|{part}": run for name, both in (ours(batch, tokens) | theirs(batch, tokens)).items()
            for part, run in zip(("forward", "both"), both, strict=True)}  # fmt: skip
    wall: dict[str, list[float]] = {name: [] for name in runs}
    cpu: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            time.sleep(REST)
            start = time.perf_counter(), time.process_time()
            run()
            if turn:  # the first one compiles
                wall[name].append(time.perf_counter() - start[0])
                cpu[name].append(time.process_time() - start[1])
    lines = [
        f"{batch} x {tokens} tokens, {HEADS} heads on {KV_HEADS}, {DIM} channels, float32; medians of {rounds} turns.",
        "",
        "| | forward | PyTorch's time / its | forward and backward | PyTorch's time / its | CPU seconds of both |",
        "|---|---|---|---|---|---|",
    ]
    median = {name: statistics.median(seconds) for name, seconds in wall.items()}
    for name in dict.fromkeys(name.split("|")[0] for name in runs):
        peer = "PyTorch" + (", a tenth of the keys masked" if "masked" in name else "")
        cells = [f"{median[f'{name}|{part}'] * 1e3:.0f} ms | {median[f'{peer}|{part}'] / median[f'{name}|{part}']:.2f}"
                 for part in ("forward", "both")]  # fmt: skip
        lines.append(f"| {name} | {' | '.join(cells)} | {statistics.median(cpu[f'{name}|both']):.2f} |")
    ratio = median["PyTorch|forward"] / median["svg_jax|forward"]
    return "\n".join([*lines, "", f"Forward, the default is {ratio:.2f} times as fast as PyTorch (goal: {GOAL:g})."])


def temporary_bytes(backend: str, tokens: int) -> int:
    """What the compiler sets aside for forward and backward of one sample, beside arguments and results."""
    shapes = [jax.ShapeDtypeStruct((1, tokens, heads, DIM), jnp.float32) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    valid = jax.ShapeDtypeStruct((1, tokens), bool)

    def loss(q: Array, k: Array, v: Array, valid: Array) -> Array:
        return jnp.sum(jnp.square(attention(q, k, v, valid=valid, backend=backend)))

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*shapes, valid).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def memory() -> str:
    """The table; draws the figure."""
    plain, chunked = ([temporary_bytes(name, tokens) / 2**20 for tokens in LENGTHS] for name in ("xla", "chunked"))
    arrays = [4 * (HEADS + KV_HEADS) * DIM * 4 * tokens / 2**20 for tokens in LENGTHS]
    draw(plain, chunked, arrays)
    lines = [
        f"One sample, forward and backward, {HEADS} heads on {KV_HEADS}, {DIM} channels, float32; beside arguments and "
        "results. The arrays are q, k, v, the result, and their gradients.",
        "",
        "| tokens | `xla` | `chunked` | the arrays themselves | `chunked` / arrays |",
        "|---|---|---|---|---|",
    ]
    for tokens, *sizes in zip(LENGTHS, plain, chunked, arrays, strict=True):
        cells = " | ".join(f"{size:,.0f} MiB" for size in sizes)
        lines.append(f"| {tokens:,} | {cells} | {sizes[1] / sizes[2]:.2f} |")
    return "\n".join(lines)


def draw(plain: list[float], chunked: list[float], arrays: list[float]) -> None:
    """Memory against length, both logarithmic."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4.6), layout="constrained")
    axes.loglog(LENGTHS, plain, "o-", base=2, label="xla: all logits at once")
    axes.loglog(LENGTHS, chunked, "o-", base=2, label="chunked")
    axes.loglog(LENGTHS, arrays, "k--", base=2, label="q, k, v, the result and their gradients themselves")
    axes.set(
        xlabel="tokens", ylabel="MiB beside arguments and results", title="Attention, forward and backward, one sample"
    )
    axes.set_xticks(LENGTHS, [f"{tokens // 1024}k" for tokens in LENGTHS])
    ticks = [2**i for i in range(5, 18, 2)]
    axes.set_yticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", frameon=False)
    FIGURE.parent.mkdir(exist_ok=True)
    figure.savefig(FIGURE, dpi=120)


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=1280)
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    load = os.getloadavg()[0]
    print(speed(args.batch, args.tokens, args.rounds))
    if load > 0.5:
        print(f"The machine was busy before the start (load {load:.1f}): do not quote these times.")
    print("\n" + memory())


if __name__ == "__main__":
    main()
