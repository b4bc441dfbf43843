"""Attention by JAX's own Pallas kernel for TPUs (splash attention); on a CPU the kernel is interpreted, for tests."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention
from jaxtyping import Array, Bool, Float

from svg_jax.nn.attention.masks import RESULT, Mask

LANES = 128  # blocks are multiples of it
LARGEST_BLOCK = 640  # forward and backward fit the 16 MiB that a kernel has
FEWEST_KEYS = 512  # below, logits are small and XLA does as well


def refusal(platform: str, q: Array, k: Array, mask: Mask, logit_softcap: float | None) -> str | None:
    """Why it cannot do this, if so."""
    if platform not in ("tpu", "cpu"):
        return f"it needs a TPU, this is a {platform}"
    if mask.positions is not None:
        return "it takes no `positions`"
    if mask.window is not None and not isinstance(mask.window, int):
        return "its window is a number that is known when it is compiled"
    if mask.by_place and q.shape[1] != k.shape[1]:
        return f"a causal mask or a window wants as many queries as keys, not {q.shape[1]} and {k.shape[1]}"
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
) -> Float[Array, "batch queries heads dim"]:
    """See `attention`."""
    batch, queries, heads, _ = q.shape
    keys = k.shape[1]
    rows, cols = block(queries), block(keys)
    q = (q.astype(jnp.float32) * scale).astype(q.dtype)
    q, k, v = (pad(x, size).swapaxes(1, 2) for x, size in ((q, rows), (k, cols), (v, cols)))
    kernel = splash_attention.make_splash_mha(
        splash_attention.MultiHeadMask([static_mask(q.shape[2], k.shape[2], mask)] * heads),
        block_sizes=splash_attention.BlockSizes(
            block_q=rows, block_kv=cols, block_q_dkv=rows, block_kv_dkv=cols, block_q_dq=rows, block_kv_dq=cols
        ),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=logit_softcap,
        residual_checkpoint_name=RESULT,
        interpret=platform != "tpu",
    )
    segments = None
    if mask.segments is not None:  # what is filled up joins the padding, and every token sees itself
        segments = splash_attention.SegmentIds(pad(mask.segments.queries, rows), pad(mask.segments.keys, cols))
    elif mask.valid is not None or keys % cols:
        valid = jnp.ones((batch, keys), bool) if mask.valid is None else mask.valid
        ids = (pad(x.astype(jnp.int32), size) for x, size in ((sees_any(valid, queries, mask), rows), (valid, cols)))
        segments = splash_attention.SegmentIds(*ids)
    out = jax.vmap(kernel)(q, k, v, segments)
    return out.swapaxes(1, 2)[:, :queries]


def sees_any(valid: Bool[Array, "batch keys"], queries: int, mask: Mask) -> Bool[Array, "batch queries"]:
    """Which queries have a valid key in sight.

    A query sees the keys of its own segment: valid ones, or, where none of those is in sight, the others. So every
    softmax has something to divide by; without that its backward pass takes each weight for 1.
    """
    before = jnp.pad(jnp.cumsum(valid, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))
    places = jnp.arange(queries)
    first = jnp.zeros_like(places) if mask.window is None else jnp.maximum(places - mask.window + 1, 0)
    last = places + 1 if mask.causal else jnp.full_like(places, valid.shape[1])
    return before[:, last] > before[:, first]


def block(tokens: int) -> int:
    """A multiple of `LANES`: little padding, but large, because every block of queries reads all keys again."""
    return min(range(LARGEST_BLOCK, 0, -LANES), key=lambda size: (tokens + -tokens % size) * (1 + LANES / 2 / size))


def pad(x: Array, size: int) -> Array:
    """Zeros up to the next multiple of `size` on the axis of tokens."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % size), *((0, 0),) * (x.ndim - 2)))


def static_mask(queries: int, keys: int, mask: Mask) -> splash_attention.Mask:
    """What places alone decide."""
    if mask.window is not None:
        assert isinstance(mask.window, int)
        return splash_attention.LocalMask((queries, keys), (mask.window - 1, 0 if mask.causal else None), 0)
    if mask.causal:
        return splash_attention.CausalMask((queries, keys))
    return splash_attention.FullMask((queries, keys))
