"""A network that stands for Inception, which takes half a second an image on a CPU, and its weights in a workdir."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from svg_jax.checkpoint import save_params
from svg_jax.models.inception import resized
from svg_jax.nn.functional import Network
from tests.tiny import random_params

CHANNELS, CLASSES = 12, 7


class SmallInception(nnx.Module):
    """Twelve pixels through a matrix."""

    traced = 0  # how often a program of it was made

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.mix = nnx.Linear(12, CHANNELS, rngs=rngs)
        self.fc = nnx.Linear(CHANNELS, CLASSES, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        return self.pooled(resized(images))

    def pooled(self, x: jax.Array) -> jax.Array:
        SmallInception.traced += 1
        return jnp.tanh(self.mix(x[:, 40::150, 40::150].reshape(len(x), 12)))

    def logits(self, features: jax.Array) -> jax.Array:
        return 3.0 * features @ self.fc.kernel[...]


NETWORK = Network(lambda rngs: SmallInception(rngs=rngs))


def write_inception(folder: Path, seed: int = 0) -> dict[str, jax.Array]:
    """Random weights, as `svg_jax.convert import` writes them."""
    params = random_params(NETWORK.shapes, seed)
    save_params(str(folder), {"frozen": params}, {"kind": "inception"})
    return {name: jnp.asarray(value) for name, value in params.items()}
