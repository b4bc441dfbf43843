"""Rotary position embeddings (arXiv 2104.09864), in the two layouts that the networks use.

A pair (a, b) of a head is turned by an angle: (a cos - b sin, a sin + b cos). `rotate_interleaved` pairs neighbours
(2i, 2i+1); `rotate_halves` pairs i with i + D/2. Angles, sines and products are float32.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def axis_table(dim: int, length: int, theta: float = 10000.0) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of p * theta^(-2i / dim) for p < length, i < dim / 2; float32 [length, dim / 2].

    The product is taken in float64 on the host and rounded once, as the release does.
    """
    frequencies = 1.0 / theta ** (np.arange(0, dim, 2, dtype=np.float64) / dim)
    angles = np.outer(np.arange(length, dtype=np.float64), frequencies).astype(np.float32)
    return np.cos(angles), np.sin(angles)


def multi_axis(
    positions: Int[Array, "batch tokens axes"], dims: tuple[int, ...], lengths: tuple[int, ...], theta: float = 10000.0
) -> tuple[Float[Array, "batch tokens half"], Float[Array, "batch tokens half"]]:
    """cos and sin for tokens with one position an axis; axis a owns the next `dims[a]` channels of a head."""
    cos, sin = [], []
    for axis, (dim, length) in enumerate(zip(dims, lengths, strict=True)):
        table = axis_table(dim, length, theta)
        cos.append(jnp.asarray(table[0])[positions[..., axis]])
        sin.append(jnp.asarray(table[1])[positions[..., axis]])
    return jnp.concatenate(cos, axis=-1), jnp.concatenate(sin, axis=-1)


def rotate_interleaved(
    x: Float[Array, "batch tokens heads dim"],
    cos: Float[Array, "batch tokens *heads half"],
    sin: Float[Array, "batch tokens *heads half"],
) -> Float[Array, "batch tokens heads dim"]:
    """Turns the pairs (2i, 2i + 1) of every head by the token's angles, or, given an axis of heads, by the head's."""
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    cos, sin = _for_heads(cos), _for_heads(sin)
    return jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(x.shape).astype(x.dtype)


def rotate_halves(
    x: Float[Array, "batch tokens heads dim"],
    cos: Float[Array, "batch tokens *heads half"],
    sin: Float[Array, "batch tokens *heads half"],
) -> Float[Array, "batch tokens heads dim"]:
    """Turns the pairs (i, i + dim / 2) of every head; angles as for `rotate_interleaved`."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = _for_heads(cos), _for_heads(sin)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x.dtype)


def _for_heads(values: Float[Array, "batch tokens *heads half"]) -> Float[Array, "batch tokens #heads half"]:
    return values[:, :, None] if values.ndim == 3 else values
