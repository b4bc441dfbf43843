"""A stand-in for the frozen vision model where its weights are not at hand: random blocks on a cosine patch embedding.

DINOv3 needs a download that asks for consent. Demos and tests use a ViT of the same architecture whose patch embedding
takes the lowest 2-D cosine frequencies of three opponent colours. Each channel is then nearly a principal axis of
images, so the statistics a channel (mean, std) whiten the features: what the flow learns is well conditioned. The
random blocks change little (small layer scale), so that a convolutional decoder can undo them.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from svg_jax.models.vit import ViTConfig
from svg_jax.nn.functional import Params

# Rows: luminance, red against blue, green against both.
OPPONENT_COLOURS = np.array([[1, 1, 1], [1, 0, -1], [1, -2, 1]]) / np.sqrt([[3], [2], [6]])
BIAS = 100.0  # of the balance channels, far above any signal


def cosine_patch_embedding(config: ViTConfig) -> tuple[np.ndarray, np.ndarray]:
    """Kernel [p * p * 3, dim] and bias [dim] of the patch embedding.

    The first dim - 2 channels are cos((2y + 1) u pi / 2p) cos((2x + 1) v pi / 2p) (the DCT-II, normalised) times a
    colour, from low to high frequencies. The last two hold +-`BIAS` and minus half the sum of the others: mean and
    variance of a token are then nearly constant, and the final LayerNorm nearly linear.

    Raises:
        ValueError: More channels than the patch has pixels.
    """
    patch, signals = config.patch_size, config.dim - 2
    if not 0 < signals <= 3 * patch**2:
        raise ValueError(
            f"a cosine embedding of {patch} x {patch} patches has 3 to {3 * patch**2 + 2} channels, not {config.dim}"
        )
    cosines = np.cos(np.pi * np.outer(np.arange(patch), 2 * np.arange(patch) + 1) / (2 * patch))
    cosines *= np.sqrt(np.where(np.arange(patch) == 0, 1, 2) / patch)[:, None]
    frequencies = sorted(((u, v) for u in range(patch) for v in range(patch)), key=lambda f: (max(f), sum(f), f))
    waves = [
        np.einsum("y,x,c->yxc", cosines[u], cosines[v], colour) / patch
        for u, v in frequencies
        for colour in OPPONENT_COLOURS
    ]
    kernel = np.stack([wave.reshape(-1) for wave in waves[:signals]], axis=1)
    balance = -kernel.sum(axis=1, keepdims=True) / 2
    bias = np.zeros(config.dim)
    bias[-2:] = BIAS, -BIAS
    return np.concatenate([kernel, balance, balance], axis=1).astype(np.float32), bias.astype(np.float32)


def with_cosine_patches(params: Params, config: ViTConfig, prefix: str = "") -> Params:
    """Fresh ViT parameters with their patch embedding replaced; `prefix` is what their names begin with.

    The final LayerNorm divides by about BIAS sqrt(2 / dim): its scale and bias undo that and the balance channels'
    bias, so that features have the size of the signals.
    """
    kernel, bias = cosine_patch_embedding(config)
    replaced = {
        "patch_embed.proj.kernel": kernel,
        "patch_embed.proj.bias": bias,
        "norm.scale": np.full(config.dim, BIAS * np.sqrt(2 / config.dim), np.float32),
        "norm.bias": -bias,
    }
    return {**params, **{prefix + name: jnp.asarray(value) for name, value in replaced.items()}}
