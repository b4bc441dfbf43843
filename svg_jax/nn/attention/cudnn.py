"""Attention by cuDNN's kernel, for NVIDIA GPUs."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from svg_jax.nn.attention.masks import Mask

LARGEST_HEAD = 128


def refusal(platform: str, q: Array, k: Array, mask: Mask, logit_softcap: float | None) -> str | None:
    """Why it cannot do this, if so."""
    if platform != "gpu":
        return f"it needs an NVIDIA GPU, this is a {platform}"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it computes in bfloat16 or float16, not in {q.dtype}"
    if q.shape[-1] > LARGEST_HEAD or q.shape[-1] % 8:
        return f"heads must have a multiple of 8 and at most {LARGEST_HEAD} channels, these have {q.shape[-1]}"
    if mask.segments is not None:
        return "it takes no `segments`, as several images in one sequence have"
    if mask.by_place:
        return "it takes no mask but `valid`"
    if logit_softcap is not None:
        return "it has no soft cap"
    return None


def attend(
    q: Float[Array, "batch queries heads dim"],
    k: Float[Array, "batch keys kv_heads dim"],
    v: Float[Array, "batch keys kv_heads dim"],
    mask: Mask,
    *,
    scale: float,
    logit_softcap: float | None,
    platform: str,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "batch queries heads dim"]:
    """See `attention`.

    The kernel is fast where the keys that count come first and their number is given: no mask of queries by keys is
    made or read. Attention does not ask in which order keys stand, so those are moved to the front.
    """
    lengths = None
    if mask.valid is not None:
        k, v, lengths = packed(k, v, mask.valid)
    return jax.nn.dot_product_attention(
        q, k, v, scale=scale, key_value_seq_lengths=lengths, implementation=implementation
    )


def packed(
    k: Float[Array, "batch keys kv_heads dim"],
    v: Float[Array, "batch keys kv_heads dim"],
    valid: Bool[Array, "batch keys"],
) -> tuple[Array, Array, Array]:
    """Valid keys and values first, in their order, then zeros; and how many, at least one, are valid."""
    order = jnp.argsort(~valid, axis=1, stable=True)[..., None, None]
    count = jnp.sum(valid, axis=1, dtype=jnp.int32)
    kept = (jnp.arange(valid.shape[1])[None] < count[:, None])[..., None, None]
    # The choice also keeps what the kernel leaves in the gradients of other slots from coming back.
    k, v = (jnp.where(kept, jnp.take_along_axis(x, order, axis=1), jnp.zeros((), x.dtype)) for x in (k, v))
    return k, v, jnp.maximum(count, 1)
