"""Attention in bounded memory: a block of logits at a time, forward and backward.

The recurrence of FlashAttention-2 (arXiv 2307.08691, algorithms 1 and 2) in plain JAX. With s the logits of a block of
keys, m the largest logit that a query has seen and l the sum of its exp(s - m), every block changes the result by

    m' = max(m, max s),   l' = e^(m - m') l + sum e^(s - m'),   o' = e^(m - m') o + e^(s - m') v,

and the answer is o / l. For the backward pass q, k, v, the answer, m and l are kept, so that memory grows with the
tokens and not with their square. There p = e^(s - m) / l is made again, block by block, and with D = sum(do * o / l)

    dv = p^T do,   ds = p * (do v^T - D),   dq = scale * ds k,   dk = scale * ds^T q.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from svg_jax.nn.attention.masks import MASKED, RESULT, Mask

# Queries and keys of a block, at most. A CPU takes one head of keys at a time, whose logits stay in its cache.
CPU_BLOCK = (512, 2048)
BLOCK = (512, 1024)


class Settings(NamedTuple):
    """What does not change from block to block."""

    scale: float
    logit_softcap: float | None
    causal: bool


class Keys(NamedTuple):
    """One head of keys and values in chunks, and what is known of them."""

    k: Float[Array, "chunks chunk dim"]
    v: Float[Array, "chunks chunk dim"]
    places: Int[Array, "chunks chunk"] | None
    valid: Bool[Array, "chunks chunk"] | None
    segments: Int[Array, "chunks chunk"] | None


class Queries(NamedTuple):
    """The queries of one head of keys in chunks; where they stand and in which segment, if it matters."""

    q: Float[Array, "chunks group chunk dim"]
    places: Int[Array, "chunks chunk"] | None
    segments: Int[Array, "chunks chunk"] | None


def refusal(*_: Any) -> None:
    """Nothing is too much for it."""


Kept = tuple[Queries, Keys, Array | None, Array, Array, Array]  # ..., window, answer, m, l


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
    batch, queries, heads, dim = q.shape
    keys, kv_heads = k.shape[1:3]
    most_queries, most_keys = CPU_BLOCK if platform == "cpu" else BLOCK
    rows, cols = chunk(queries, most_queries), chunk(keys, most_keys)

    valid, positions, segments = mask.valid, mask.positions, mask.segments
    if valid is None and segments is None and keys % cols:  # segments tell what is filled up: it joins the padding
        valid = jnp.ones((batch, keys), bool)
    if mask.by_place and positions is None:
        positions = jnp.broadcast_to(jnp.arange(queries)[None], (batch, queries))

    def per_head(x: Array | None, size: int) -> Array | None:
        """[batch, tokens] -> [batch * kv_heads, chunks, chunk]."""
        return None if x is None else jnp.repeat(cut(x, size), kv_heads, axis=0)

    q = cut(q.reshape(batch, queries, kv_heads, heads // kv_heads, dim), rows)
    q = q.transpose(0, 3, 1, 4, 2, 5).reshape(batch * kv_heads, -1, heads // kv_heads, rows, dim)
    k, v = (cut(x, cols).transpose(0, 3, 1, 2, 4).reshape(batch * kv_heads, -1, cols, dim) for x in (k, v))
    places = jnp.arange(k.shape[1] * cols).reshape(-1, cols) if mask.by_place else None
    window = None if mask.window is None else jnp.asarray(mask.window)
    settings = Settings(scale, logit_softcap, mask.causal)

    def head(x: tuple[Array, ...]) -> Array:
        q, k, v, valid, positions, of_queries, of_keys = x
        return _head(settings, Queries(q, positions, of_queries), Keys(k, v, places, valid, of_keys), window)

    heads_at_once = 1 if platform == "cpu" else batch * kv_heads
    of_queries, of_keys = (None, None) if segments is None else segments
    masks = per_head(valid, cols), per_head(positions, rows), per_head(of_queries, rows), per_head(of_keys, cols)
    out = jax.lax.map(head, (q, k, v, *masks), batch_size=heads_at_once)
    out = out.reshape(batch, kv_heads, -1, heads // kv_heads, rows, dim).transpose(0, 2, 4, 1, 3, 5)
    return out.reshape(batch, -1, heads, dim)[:, :queries]


def chunk(size: int, most: int) -> int:
    """The size of the fewest chunks of equal size that are no larger than `most`."""
    return -(-size // -(-size // most))


def cut(x: Array, size: int) -> Array:
    """[batch, tokens, ...] -> [batch, chunks, size, ...], filled up with zeros."""
    batch, tokens, *rest = x.shape
    x = jnp.pad(x, ((0, 0), (0, -tokens % size), *((0, 0),) * len(rest)))
    return x.reshape(batch, -1, size, *rest)


def _block(settings: Settings, rows: Queries, cols: Keys, window: Array | None) -> tuple[Array, Array | None]:
    """Logits [group, queries, keys] of one chunk of queries on one of keys, and which of them count."""
    logits = jnp.einsum("gqd,kd->gqk", rows.q, cols.k, preferred_element_type=jnp.float32) * settings.scale
    if settings.logit_softcap is not None:
        logits = settings.logit_softcap * jnp.tanh(logits / settings.logit_softcap)
    seen = None if cols.valid is None else cols.valid[None]
    if rows.places is not None and cols.places is not None:
        distance = rows.places[:, None] - cols.places[None]
        near = distance >= 0 if settings.causal else jnp.ones(distance.shape, bool)
        if window is not None:
            near &= distance < window
        seen = near if seen is None else near & seen
    if rows.segments is not None and cols.segments is not None:
        same = rows.segments[:, None] == cols.segments[None]
        seen = same if seen is None else same & seen
    return logits, None if seen is None else seen[None]


def _masked(logits: Array, seen: Array | None) -> Array:
    return logits if seen is None else jnp.where(seen, logits, MASKED)


def _forward(settings: Settings, queries: Queries, keys: Keys, window: Array | None) -> tuple[Array, Array, Array]:
    """The answer, m and l of every query."""

    def row(rows: Queries) -> tuple[Array, Array, Array]:
        def step(carry: tuple[Array, Array, Array], cols: Keys) -> tuple[tuple[Array, Array, Array], None]:
            out, top, total = carry
            logits = _masked(*_block(settings, rows, cols, window))
            new = jnp.maximum(top, logits.max(axis=-1))
            shrink, weights = jnp.exp(top - new), jnp.exp(logits - new[..., None])
            added = jnp.einsum("gqk,kd->gqd", weights.astype(cols.v.dtype), cols.v, preferred_element_type=jnp.float32)
            return (shrink[..., None] * out + added, new, shrink * total + weights.sum(axis=-1)), None

        each = rows.q.shape[:-1]
        start = jnp.zeros(rows.q.shape, jnp.float32), jnp.full(each, MASKED), jnp.zeros(each)
        (out, top, total), _ = jax.lax.scan(step, start, keys)
        return (out / total[..., None]).astype(rows.q.dtype), top, total

    return jax.lax.map(row, queries)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _head(settings: Settings, queries: Queries, keys: Keys, window: Array | None) -> Array:
    return _forward(settings, queries, keys, window)[0]


def _head_forward(settings: Settings, queries: Queries, keys: Keys, window: Array | None) -> tuple[Array, Kept]:
    out, top, total = checkpoint_name(_forward(settings, queries, keys, window), RESULT)
    return out, (queries, keys, window, out, top, total)


def _head_backward(settings: Settings, kept: Kept, dout: Array) -> tuple[Queries, Keys, None]:
    queries, keys, window, out, top, total = kept
    inner = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)

    def row(
        sums: tuple[Array, Array], x: tuple[Queries, Array, Array, Array, Array]
    ) -> tuple[tuple[Array, Array], Array]:
        rows, dout, top, total, inner = x

        def step(dq: Array, cols: Keys) -> tuple[Array, tuple[Array, Array]]:
            logits, seen = _block(settings, rows, cols, window)
            p = jnp.exp(_masked(logits, seen) - top[..., None]) / total[..., None]
            dv = jnp.einsum("gqk,gqd->kd", p.astype(dout.dtype), dout, preferred_element_type=jnp.float32)
            dp = jnp.einsum("gqd,kd->gqk", dout, cols.v, preferred_element_type=jnp.float32)
            ds = settings.scale * p * (dp - inner[..., None])
            if settings.logit_softcap is not None:
                ds *= 1 - jnp.square(logits / settings.logit_softcap)
            if seen is not None:  # else a query that sees nothing, all of its p equal, would move the keys
                ds = jnp.where(seen, ds, 0.0)
            ds = ds.astype(cols.k.dtype)
            dk = jnp.einsum("gqk,gqd->kd", ds, rows.q, preferred_element_type=jnp.float32)
            return dq + jnp.einsum("gqk,kd->gqd", ds, cols.k, preferred_element_type=jnp.float32), (dk, dv)

        dq, new = jax.lax.scan(step, jnp.zeros(rows.q.shape, jnp.float32), keys)
        return (sums[0] + new[0], sums[1] + new[1]), dq.astype(rows.q.dtype)

    zeros = jnp.zeros(keys.k.shape, jnp.float32)
    (dk, dv), dq = jax.lax.scan(row, (zeros, zeros), (queries, dout, top, total, inner))
    dkeys = Keys(dk.astype(keys.k.dtype), dv.astype(keys.v.dtype), None, None, None)
    return Queries(dq, None, None), dkeys, None


_head.defvjp(_head_forward, _head_backward)
