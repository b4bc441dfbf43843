"""Images to rows of patches and back. Inside a patch the order is (row, column, channel), channel fastest."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped


def patchify(
    images: Shaped[Array, "batch height width channels"], patch: int
) -> Shaped[Array, "batch tokens features"]:
    """[B, H, W, C] -> [B, (H/p)(W/p), p*p*C], row-major; what does not fill a patch is cut off."""
    batch, height, width, channels = images.shape
    rows, cols = height // patch, width // patch
    x = images[:, : rows * patch, : cols * patch].reshape(batch, rows, patch, cols, patch, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * cols, patch * patch * channels)


def unpatchify(
    patches: Shaped[Array, "batch tokens features"], grid: tuple[int, int], patch: int
) -> Shaped[Array, "batch height width channels"]:
    """The inverse of `patchify` for a grid of (rows, cols)."""
    rows, cols = grid
    x = patches.reshape(patches.shape[0], rows, cols, patch, patch, -1)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(x.shape[0], rows * patch, cols * patch, x.shape[-1])


def token_mask(grid: Int[Array, "batch 2"], tokens: int) -> Bool[Array, "batch tokens"]:
    """Which of `tokens` slots hold a patch: the first rows * cols."""
    return jnp.arange(tokens)[None, :] < (grid[:, 0] * grid[:, 1])[:, None]


def token_positions(
    grid: Int[Array, "batch 2"], tokens: int
) -> tuple[Int[Array, "batch tokens"], Int[Array, "batch tokens"]]:
    """Row and column of every slot; zero where the slot is empty."""
    index = jnp.broadcast_to(jnp.arange(tokens, dtype=grid.dtype)[None, :], (grid.shape[0], tokens))
    cols = jnp.maximum(grid[:, 1], 1)[:, None]
    valid = token_mask(grid, tokens)
    return jnp.where(valid, index // cols, 0), jnp.where(valid, index % cols, 0)
