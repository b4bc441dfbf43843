"""Several images in one sequence against one in each: `python -m benchmarks.packing`.

Two figures. The throughput of a train step (frozen networks, transformer, optimiser) on this machine, both forms taking
turns, with lengths and widths a quarter of those of stage 1, so that attention is about the part of the work that it is
there. And, at the true sizes of stage 1, the FLOPs of both forms, for captions whose lengths are assumed: the release
publishes none.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from numpy.typing import NDArray

from benchmarks.turns import QUIET
from configs import base, stage1, stage1_packed
from data_pipelines.images import token_budget
from data_pipelines.packing import pack_tokens
from svg_jax import assemble, loading
from svg_jax.models import flops
from svg_jax.models.gemma2 import Gemma2Config
from svg_jax.models.vit import ViTConfig
from svg_jax.parallel import make_mesh
from svg_jax.programs import sizes_of, train_program

# Tokens of a caption: log-normal, beside a system prompt of 16 and the start token; a tenth are left out in training.
MEDIAN, SIGMA, PROMPT, DROPPED = 100, 0.6, 17, 0.1
IMAGES = 16  # of the small step
BUDGETS = ((2, 384), (2, 512), (4, 640), (4, 768), (4, 1024), (8, 1280), (8, 1536))


def caption_lengths(count: int, longest: int) -> NDArray[np.int64]:
    """Tokens of so many captions, cut at the budget of one."""
    draw = np.random.default_rng(0)
    lengths = PROMPT + np.round(draw.lognormal(np.log(MEDIAN), SIGMA, count)).astype(np.int64)
    return np.where(draw.uniform(size=count) < DROPPED, 1, np.minimum(lengths, longest))


def small(config: ConfigDict) -> ConfigDict:
    """A stage at a quarter of its lengths and of its width."""
    config.batch_size = IMAGES
    config.data.resolution //= 2
    config.text.max_tokens //= 4
    if config.data.pack > 1:
        config.text.max_tokens_packed //= 4
    config.model.update(dim=576, num_layers=4, num_heads=6, num_kv_heads=2, text_dim=576)
    config.model.update(in_channels=96, dtype="float32", remat="dots")
    vit = ViTConfig(dim=96, num_layers=3, num_heads=2, hidden_dim=384)
    config.autoencoder.encoder = base.section(vit)
    config.autoencoder.decoder.update(z_channels=96, dtype="float32")
    encoder = Gemma2Config.tiny(dim=576, num_layers=5, num_heads=4, num_kv_heads=2, head_dim=144, hidden_dim=2304)
    config.text.encoder = base.section(encoder)
    return config


def updater(config: ConfigDict) -> tuple[Callable[[], tuple[float, float]], float]:
    """What makes one update and returns its seconds, on the clock and of all cores; and its model FLOPs."""
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    program = train_program(config, mesh)
    key = jax.random.key(0)
    with jax.set_mesh(mesh):
        state = jax.jit(program.create)(loading.fresh(program.networks.dit, mesh, key))
        frozen = loading.frozen(config, program.networks, mesh)
        batch = {name: jnp.zeros(shape.shape, shape.dtype) for name, shape in program.arguments[2].items()}
        side = config.data.resolution // assemble.patch_size(config)
        batch["grid"] = jnp.full_like(batch["grid"], side)
        batch["num_tokens"] = jnp.full_like(batch["num_tokens"], batch["tokens"].size // len(batch["num_tokens"]))
        step = program.jit()

    def update() -> tuple[float, float]:
        nonlocal state
        start = np.array([time.perf_counter(), time.process_time()])
        with jax.set_mesh(mesh):
            state, metrics = step(state, frozen, batch)
        jax.block_until_ready((state, metrics))
        seconds, of_cores = np.array([time.perf_counter(), time.process_time()]) - start
        return seconds, of_cores

    return update, program.flops


def measure(rounds: int) -> None:
    """The small step, both forms in turns."""
    load = os.getloadavg()[0]
    names = ("one a sequence", "four a sequence")
    steps, work = zip(*(updater(small(stage.get_config())) for stage in (stage1, stage1_packed)), strict=True)
    for step in steps:  # compiles
        step()
    seconds = np.median([[step() for step in steps] for _ in range(rounds)], axis=0)
    print(f"| {IMAGES} images a step | median | images/s | CPU seconds | model FLOPs |\n|---|---|---|---|---|")
    for name, (median, of_cores), flop in zip(names, seconds, work, strict=True):
        print(f"| {name} | {median:.3f} s | {IMAGES / median:.2f} | {of_cores:.2f} | {flop:.3e} |")
    (clock, cores), less = seconds[0] / seconds[1], work[0] / work[1]
    print(f"| **ratio** | | **{clock:.2f}** | {cores:.2f} | {less:.2f} |")
    if load > QUIET:
        print(f"The machine was busy before the start (load {load:.1f}).")


def count() -> None:
    """FLOPs at the true sizes, and what the captions lose."""
    config = stage1.get_config()
    sizes, longest = sizes_of(config), config.text.max_tokens
    image_tokens = token_budget(config.data.resolution, assemble.patch_size(config))
    lengths = caption_lengths(32768, longest)
    alone = flops.text_to_image_step(*sizes, image_tokens, longest)
    middle, most = np.percentile(lengths, (50, 90))
    print(f"\nCaptions: mean {lengths.mean():.0f} tokens, median {middle:.0f}, 90% below {most:.0f}\n")
    print("| images a sequence | text slots | used | images for the FLOPs of one | captions cut | tokens cut |")
    print("|---|---|---|---|---|---|")
    ids = [range(length) for length in lengths]
    for pack, budget in ((1, longest), (1, longest // 2), *BUDGETS):
        times = alone * pack / flops.text_to_image_step(*sizes, image_tokens, budget, pack)
        tokens, kept, cut = pack_tokens(ids, pack, budget, 0)
        used, lost = kept.sum() / tokens.size, 1 - kept.sum() / lengths.sum()
        print(f"| {pack} | {budget} | {used:.0%} | {times:.2f} | {cut.mean():.1%} | {lost:.1%} |")


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.packing", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="turns of each form; 0 for the count alone")
    rounds = parser.parse_args().rounds
    if rounds:
        measure(rounds)
    count()


if __name__ == "__main__":
    main()
