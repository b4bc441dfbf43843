"""Several samples in one sequence: each token's segment is 1, 2, .. for the sample that it is of, or 0 for padding."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def segments_of(lengths: Int[Array, "rows samples"], tokens: int) -> Int[Array, "rows tokens"]:
    """Segments of samples that stand one after the other without padding between them."""
    ends = jnp.cumsum(lengths, axis=1)
    ended = jnp.sum(jnp.arange(tokens)[None, :, None] >= ends[:, None, :], axis=-1, dtype=jnp.int32)
    return jnp.where(ended < lengths.shape[1], ended + 1, 0)


def places(segments: Int[Array, "rows tokens"]) -> Int[Array, "rows tokens"]:
    """How many tokens of its segment stand before each, where the tokens of a segment stand together."""
    index = jnp.arange(segments.shape[1], dtype=jnp.int32)[None]
    first = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return index - jax.lax.cummax(jnp.where(first, index, 0), axis=1)


def lengths_of(segments: Int[Array, "rows tokens"], samples: int) -> Int[Array, "rows samples"]:
    """How many tokens each sample has."""
    return jnp.sum(segments[:, :, None] == jnp.arange(1, samples + 1)[None, None], axis=1, dtype=jnp.int32)


def to_tokens(
    values: Float[Array, "rows samples channels"], segments: Int[Array, "rows tokens"]
) -> Float[Array, "rows tokens channels"]:
    """Each token's sample's values, zeros for padding; a product, whose gradient is one too and no scatter."""
    samples = jnp.arange(1, values.shape[1] + 1)
    chosen = (segments[:, :, None] == samples[None, None]).astype(values.dtype)
    return jnp.einsum("rts,rsc->rtc", chosen, values, precision=jax.lax.Precision.HIGHEST)
