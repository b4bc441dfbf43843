"""Softmax attention: one function, whatever network calls it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

MASKED = -1e30  # finite, so that a row with no valid key stays free of NaN


def attention(
    q: Float[Array, "batch queries heads dim"],
    k: Float[Array, "batch keys kv_heads dim"],
    v: Float[Array, "batch keys kv_heads dim"],
    *,
    valid: Bool[Array, "batch keys"] | None = None,
    positions: Int[Array, "batch queries"] | None = None,
    causal: bool = False,
    window: int | Int[Array, ""] | None = None,
    scale: float | None = None,
    logit_softcap: float | None = None,
) -> Float[Array, "batch queries heads dim"]:
    """softmax(q k^T * scale + mask) v.

    Grouped queries: query head h reads key and value head h // (heads / kv_heads) (arXiv 2305.13245). Logits and
    softmax are float32.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        valid: Keys that exist; the others are never attended to.
        positions: Place i of each query among the keys: 0, 1, .. by default.
        causal: Query i sees keys j <= i.
        window: Query i sees keys j > i - window only.
        scale: Factor on the logits, 1 / sqrt(dim) by default.
        logit_softcap: c in c * tanh(logits / c), applied before the mask (Gemma 2, arXiv 2408.00118).
    """
    batch, queries, heads, dim = q.shape
    keys, kv_heads = k.shape[1:3]
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads cannot share {kv_heads} key heads evenly")
    scale = dim**-0.5 if scale is None else scale
    # Heads before tokens: as products of matrices, not of strided slices, attention is up to twice as fast on a CPU.
    q = q.reshape(batch, queries, kv_heads, heads // kv_heads, dim).transpose(0, 2, 3, 1, 4)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)

    logits = jnp.einsum("bhgqd,bhkd->bhgqk", q, k, preferred_element_type=jnp.float32) * scale
    if logit_softcap is not None:
        logits = logit_softcap * jnp.tanh(logits / logit_softcap)
    mask = attention_mask(queries, keys, valid=valid, positions=positions, causal=causal, window=window)
    if mask is not None:
        logits = jnp.where(mask[:, None, None], logits, MASKED)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    out = jnp.einsum("bhgqk,bhkd->bhgqd", weights, v)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, queries, heads, dim)


def attention_mask(
    queries: int,
    keys: int,
    *,
    valid: Bool[Array, "batch keys"] | None = None,
    positions: Int[Array, "batch queries"] | None = None,
    causal: bool = False,
    window: int | Int[Array, ""] | None = None,
) -> Bool[Array, "#batch #queries keys"] | None:
    """What a query may look at, as one boolean array, or None where it may look at everything."""
    mask = None if valid is None else valid[:, None, :]
    if causal or window is not None:
        places = jnp.arange(queries)[None] if positions is None else positions
        distance = places[:, :, None] - jnp.arange(keys)[None, None, :]
        near = distance >= 0 if causal else jnp.ones(distance.shape, bool)
        if window is not None:
            near &= distance < window
        mask = near if mask is None else mask & near
    return mask
