"""Interpolation as PyTorch does it, with half-pixel centres: of images, and of position tables for any grid.

Along one axis a new value at place i of n is a weighted sum of the m stored ones,

    y_i = sum_j w(j, c_i) x_j,   c_i = (i + 1/2) m / n - 1/2.

Without antialiasing w(j, c) = k(j - c), and what lies beyond the border repeats the border. With it, where m > n, the
kernel k is stretched by m / n, and the weights inside the border are divided by their sum. k is the triangle or the
cubic kernel of Keys (1981, IEEE TASSP 29(6), eq. 4) with a = -3/4, with antialiasing a = -1/2: PyTorch's choices.
`jax.image.resize` has a = -1/2 throughout and stops at the border instead of repeating it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class _Method(NamedTuple):
    kernel: Callable[[Array, bool], Array]  # of the distance, and whether antialiasing
    radius: int


def _linear(distance: Array, antialias: bool) -> Array:
    return jnp.maximum(1.0 - jnp.abs(distance), 0.0)


def _cubic(distance: Array, antialias: bool) -> Array:
    a, x = (-0.5 if antialias else -0.75), jnp.abs(distance)
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    far = ((a * x - 5.0 * a) * x + 8.0 * a) * x - 4.0 * a
    return jnp.where(x <= 1.0, near, jnp.where(x < 2.0, far, 0.0))


METHODS = {"bilinear": _Method(_linear, 1), "bicubic": _Method(_cubic, 2)}


def interpolation_weights(
    places: Int[Array, "*places"],
    extent: Int[Array, "*#places"],
    stored: int,
    *,
    method: str = "bicubic",
    antialias: bool = False,
) -> Float[Array, "*places stored"]:
    """What each stored value counts for at places of a new axis; float32, each row sums to 1.

    Args:
        places: Indices i on the new axis.
        extent: Its length n, 1 or more; it need not be static.
        stored: Length m of the stored axis.
        method: A key of `METHODS`.
        antialias: Widen the kernel where the new axis is the shorter one.

    Raises:
        ValueError: There is no such method.
    """
    if method not in METHODS:
        raise ValueError(f"unknown interpolation '{method}': choose {' or '.join(METHODS)}")
    kernel, radius = METHODS[method]
    ratio = stored / extent.astype(jnp.float32)
    centre = (ratio * (places.astype(jnp.float32) + 0.5) - 0.5)[..., None]
    index = jnp.arange(stored).reshape((1,) * places.ndim + (stored,))
    if antialias:
        weights = kernel((index.astype(jnp.float32) - centre) / jnp.maximum(ratio, 1.0)[..., None], True)
        return weights / jnp.sum(weights, axis=-1, keepdims=True)
    floor = jnp.floor(centre)
    weights = jnp.zeros((*places.shape, stored), jnp.float32)
    for tap in range(1 - radius, radius + 1):
        held = jnp.clip(floor.astype(jnp.int32) + tap, 0, stored - 1)
        weights += jnp.where(index == held, kernel(floor + tap - centre, False), 0.0)
    return weights


def resize(
    images: Float[Array, "batch height width channels"],
    size: tuple[int, int],
    *,
    method: str = "bicubic",
    antialias: bool = False,
) -> Float[Array, "batch rows cols channels"]:
    """Images, or maps of features, at another size (rows, cols); float32, not clipped.

    Raises:
        ValueError: There is no such method, or a side is not positive.
    """
    if min(size) < 1:
        raise ValueError(f"images cannot be resized to {size[0]} x {size[1]}: both sides must be positive")

    def weights(new: int, stored: int) -> Array:
        return interpolation_weights(jnp.arange(new), jnp.array([new]), stored, method=method, antialias=antialias)

    rows, cols = weights(size[0], images.shape[1]), weights(size[1], images.shape[2])
    precise = {"precision": jax.lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}
    x = jnp.einsum("rh,bhwc->brwc", rows, images.astype(jnp.float32), **precise)
    return jnp.einsum("sw,brwc->brsc", cols, x, **precise)


def interpolate_table(
    table: Float[Array, "rows cols dim"],
    places: tuple[Int[Array, "batch tokens"], Int[Array, "batch tokens"]],
    grid: Int[Array, "batch 2"],
    *,
    method: str = "bicubic",
    antialias: bool = False,
) -> Float[Array, "batch tokens dim"]:
    """A table of position embeddings, resized to each image's own grid and read at its tokens; float32.

    One matrix product [tokens, rows * cols] x [rows * cols, dim] an image: shapes do not depend on the grid.

    Args:
        table: One embedding a place of the grid that the model was trained on.
        places: Row and column of every token (`nn.patches.token_positions`).
        grid: (rows, cols) of each image; empty ones, (0, 0), get finite values that mean nothing.
        method: A key of `METHODS`.
        antialias: See `interpolation_weights`.
    """
    extent = jnp.maximum(grid, 1)
    rows, cols = (
        interpolation_weights(place, extent[:, axis, None], table.shape[axis], method=method, antialias=antialias)
        for axis, place in enumerate(places)
    )
    weights = (rows[..., :, None] * cols[..., None, :]).reshape(*rows.shape[:2], -1)
    table = table.reshape(-1, table.shape[-1]).astype(jnp.float32)
    return jnp.einsum("bnp,pd->bnd", weights, table, precision=jax.lax.Precision.HIGHEST)
