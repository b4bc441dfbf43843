"""Our autoencoder's train step against PyTorch's: `python -m benchmarks.autoencoder`.

One update = frozen features, decoder, L1 + LPIPS, discriminator, adaptive weight, Adam on both sides, EMA; the
released sizes of Autoencoder-P at 128 px, batch 4, float32, all cores.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks.autoencoder_shape import Shape
from benchmarks.turns import compare, parser, table
from svg_jax.adversarial import AutoencoderLoss
from svg_jax.autoencoder_steps import AutoencoderNetworks, autoencoder_step, is_trained_in_run
from svg_jax.convert.rules import Table, to_release
from svg_jax.convert.tables import DECODER, DINOV3, DISCRIMINATOR, LPIPS
from svg_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from svg_jax.nn.functional import Network, Params
from svg_jax.state import TrainState, adamw, learning_rate

VERSIONS = {"jax": jax.__version__}
TABLES: dict[str, Table] = {
    "encoder.": DINOV3,
    "decoder.": DECODER,
    "loss.perceptual_loss.": LPIPS,
    "loss.discriminator.": DISCRIMINATOR,
}
TOLERANCE = 1e-4


def networks(shape: Shape) -> AutoencoderNetworks:
    """The released Autoencoder-P and its loss."""
    sizes = AutoencoderConfig.svg_p()
    return AutoencoderNetworks(
        Network(lambda rngs: Autoencoder(sizes, rngs=rngs)),
        Network(lambda rngs: AutoencoderLoss(shape.loss, rngs=rngs)),
    )


def jitted_step(shape: Shape) -> tuple[Any, Callable[[jax.Array], TrainState]]:
    """The step, compiled on its first call, and what makes its state from a key."""
    schedule = learning_rate(lr=shape.lr, schedule="constant", warmup_steps=0, num_train_steps=1)
    optimiser = adamw(schedule, b1=0.5, b2=0.9, eps=1e-8, weight_decay=0.0, clip=1e9)
    both, sizes = networks(shape), AutoencoderConfig.svg_p()

    def create(key: jax.Array) -> TrainState:
        params = both.init(key)
        trained = {name: value for name, value in params.items() if is_trained_in_run(name, sizes, shape.loss)}
        frozen = {name: value for name, value in params.items() if name not in trained}
        return TrainState.create(trained, optimiser, key, frozen)

    return jax.jit(autoencoder_step(both, shape.loss, optimiser, ema_decay=shape.ema), donate_argnums=0), create


def images(shape: Shape) -> np.ndarray:
    """Random ones."""
    size = (shape.batch, shape.resolution, shape.resolution, 3)
    return np.random.default_rng(0).integers(0, 256, size).astype(np.uint8)


def device_batch(shape: Shape) -> dict[str, jax.Array]:
    """All slots hold an image."""
    slots = (shape.batch,)
    pixels = jax.numpy.asarray(images(shape))
    return {"images": pixels, "valid": jax.numpy.ones(slots, bool), "cause": jax.numpy.zeros(slots, "int32")}


def train_step(shape: Shape) -> tuple[Callable[[], Any], int]:
    """A function that makes one update, and the number of trained parameters."""
    step, create = jitted_step(shape)
    state = jax.jit(create)(jax.random.key(0))
    batch = device_batch(shape)
    parameters = sum(p.size for p in state.params.values())
    start = time.perf_counter()
    lowered = step.lower(state, batch)
    traced = time.perf_counter()
    compiled = lowered.compile()
    print_seconds = (traced - start, time.perf_counter() - traced)
    VERSIONS["traced and compiled in"] = " + ".join(f"{seconds:.1f} s" for seconds in print_seconds)

    def update() -> None:
        nonlocal state
        state, metrics = compiled(state, batch)
        jax.block_until_ready((state, metrics))

    return update, parameters


def check(shape: Shape) -> None:
    """Moves our weights over, and compares the terms of the loss.

    Raises:
        SystemExit: They are not the same.
    """
    import torch

    from benchmarks import autoencoder_peer

    step, create = jitted_step(shape)
    state = jax.jit(create)(jax.random.key(0))
    params: Params = {**state.frozen, **state.params}
    batch = device_batch(shape)
    model = autoencoder_peer.Networks(shape)
    with torch.no_grad():
        for prefix, rules in TABLES.items():
            ours = {k.removeprefix(prefix): np.asarray(v) for k, v in params.items() if k.startswith(prefix)}
            theirs = {k: torch.tensor(np.array(v)) for k, v in to_release(ours, rules).items()}
            found = getattr(model, prefix.removeprefix("loss.").removesuffix(".")).load_state_dict(theirs, strict=False)
            assert all("num_batches" in name for name in found.missing_keys), found.missing_keys
    x = torch.tensor(images(shape)).permute(0, 3, 1, 2) / 127.5 - 1
    expected, _ = autoencoder_peer.gradients(model, x, shape)
    _, metrics = step(state, batch)
    size = 3 * shape.resolution**2
    found = {
        "nll": size * (float(metrics["loss/l1"]) + float(metrics["loss/lpips"])),
        "generator": float(metrics["loss/generator"]),
        "discriminator": float(metrics["loss/discriminator"]),
        "weight": float(metrics["loss/adaptive_weight"]),
    }
    errors = {name: abs(found[name] / value - 1) for name, value in expected.items()}
    print("same parameters; relative differences:", ", ".join(f"{name} {error:.1e}" for name, error in errors.items()))
    if max(errors.values()) > TOLERANCE:
        raise SystemExit(f"the two steps are not the same: {found} and {expected}")


def main() -> None:
    """Prints the table."""
    arguments = parser(__doc__, rounds=5, runs=2, warmup=1)
    arguments.add_argument("--check", action="store_true", help="only compare the two steps")
    args: argparse.Namespace = arguments.parse_args()
    shape = Shape(batch=args.batch)
    if args.check:
        check(shape)
        return
    facts = compare("train_step", shape, args, check=["benchmarks.autoencoder", "--check"], modules=MODULES)
    print(table(facts, shape, run="step", unit="steps", units=1, goal=0.8))


MODULES = {"ours": "benchmarks.autoencoder", "peer": "benchmarks.autoencoder_peer"}


if __name__ == "__main__":
    main()
