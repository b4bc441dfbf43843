"""The training objective: squared error of the velocity on valid tokens, in float32."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from svg_jax.flow.shapes import append_axes


def velocity_loss(
    predicted: Float[Array, "batch tokens *channels"],
    target: Float[Array, "batch tokens *channels"],
    mask: Bool[Array, "batch tokens"],
) -> Float[Array, " batch"]:
    """The conditional flow-matching loss of each sample, averaged over its valid tokens and their channels.

    L_b = 1 / (n_b C) Σ_{i valid} |v(x_t, t)_i - u_i|^2      (arXiv 2210.02747, eq. 9; n_b = number of valid tokens)

    Each sample weighs the same whatever its size. A sample with no valid token has loss 0: see `batch_mean`. Masked
    slots may hold anything, NaN included: they change neither the loss nor its gradient.
    """
    error = predicted.astype(jnp.float32) - target.astype(jnp.float32)
    error = jnp.where(append_axes(mask, error), error, 0.0)
    rest = tuple(range(1, error.ndim))
    channels = math.prod(error.shape[mask.ndim :])
    elements = channels * jnp.sum(mask, axis=tuple(range(1, mask.ndim)), dtype=jnp.float32)
    return jnp.sum(error**2, axis=rest) / jnp.maximum(elements, 1.0)


def batch_mean(losses: Float[Array, " batch"], valid: Bool[Array, " batch"]) -> Float[Array, ""]:
    """Mean over the samples that hold an image (`mask.any(axis=1)`); 0 if none does."""
    return jnp.sum(jnp.where(valid, losses, 0.0)) / jnp.maximum(jnp.sum(valid, dtype=jnp.float32), 1.0)


def loss_by_time(
    losses: Float[Array, " batch"], t: Float[Array, " batch"], valid: Bool[Array, " batch"], num_bins: int
) -> tuple[Float[Array, " bins"], Float[Array, " bins"]]:
    """Sums and counts of the losses in `num_bins` equal bins of [0, 1]; t = 1 falls in the last.

    Sums and counts add up over steps and microbatches, means do not. Invalid samples are in no bin.
    """
    bins = jnp.clip((t * num_bins).astype(jnp.int32), 0, num_bins - 1)
    member = (bins[:, None] == jnp.arange(num_bins)[None, :]) & valid[:, None]
    sums = jnp.sum(jnp.where(member, losses[:, None], 0.0), axis=0)
    return sums, jnp.sum(member, axis=0, dtype=jnp.float32)
