"""Softmax attention: one function, whatever network calls it and whatever computes it."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from svg_jax.nn.attention import chunked, cudnn, splash, xla
from svg_jax.nn.attention.masks import MASKED, RESULT, Mask, Segments, attention_mask
from svg_jax.parallel import BATCH

__all__ = ["BACKENDS", "MASKED", "RESULT", "attention", "attention_mask", "choose"]

BACKENDS = {"xla": xla, "chunked": chunked, "tpu_splash": splash, "gpu_cudnn": cudnn}

# From how many logits on a device they are no longer made all at once: elsewhere for their memory (256 MiB), on a CPU
# for its cache.
MANY_LOGITS = 2**26
MANY_LOGITS_CPU = 2**20


def attention(
    q: Float[Array, "batch queries heads dim"],
    k: Float[Array, "batch keys kv_heads dim"],
    v: Float[Array, "batch keys kv_heads dim"],
    *,
    valid: Bool[Array, "batch keys"] | None = None,
    segments: Int[Array, "batch keys"] | None = None,
    positions: Int[Array, "batch queries"] | None = None,
    causal: bool = False,
    window: int | Int[Array, ""] | None = None,
    scale: float | None = None,
    logit_softcap: float | None = None,
    backend: str = "auto",
) -> Float[Array, "batch queries heads dim"]:
    """softmax(q k^T * scale + mask) v.

    Grouped queries: query head h reads key and value head h // (heads / kv_heads) (arXiv 2305.13245). Logits and
    softmax are float32. A query that sees no key gets a finite value that means nothing.

    Under a mesh (`jax.set_mesh`) each device attends for its part of the batch, of the heads (`tensor`) and of the
    queries (`context`, unless it matters where they stand) to all keys. What an axis does not divide stays whole.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        valid: Keys that exist; the others are never attended to.
        segments: Of as many queries as keys, each sees those of its own segment only; 0 is padding, whose results
            mean nothing. In the place of `valid`.
        positions: Place i of each query among the keys: 0, 1, .. by default.
        causal: Query i sees keys j <= i.
        window: Query i sees keys j > i - window only.
        scale: Factor on the logits, 1 / sqrt(dim) by default.
        logit_softcap: c in c * tanh(logits / c), applied before the mask (Gemma 2, arXiv 2408.00118).
        backend: One of `BACKENDS`, or "auto", see `choose`.

    Raises:
        ValueError: Heads that cannot be shared, or a backend that cannot do what is asked for.
    """
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads cannot share {k.shape[2]} key heads evenly")
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"unknown attention backend '{backend}': choose auto, {', '.join(BACKENDS)}")
    if segments is not None and (valid is not None or q.shape[1] != k.shape[1]):
        raise ValueError("segments are of as many queries as keys, and go without `valid`: padding is segment 0")
    fixed = window if isinstance(window, int) else None
    by_place = causal or window is not None
    arrays = {
        "valid": valid,
        "positions": positions if by_place else None,
        "window": window if fixed is None else None,
        "of_queries": segments,
        "of_keys": segments,
    }
    settings = {"scale": q.shape[-1] ** -0.5 if scale is None else scale, "logit_softcap": logit_softcap}
    platform = current_platform()

    def run(q: Array, k: Array, v: Array, arrays: dict[str, Array]) -> Array:
        parts = Segments(arrays["of_queries"], arrays["of_keys"]) if "of_keys" in arrays else None
        mask = Mask(arrays.get("valid"), arrays.get("positions"), causal, arrays.get("window", fixed), parts)
        name = choose(platform, q, k, mask, logit_softcap) if backend == "auto" else backend
        if reason := BACKENDS[name].refusal(platform, q, k, mask, logit_softcap):
            raise ValueError(f"attention backend '{name}' cannot do this: {reason}; choose another, or 'auto'")
        return BACKENDS[name].attend(q, k, v, mask, platform=platform, **settings)

    given = {name: jnp.asarray(value) for name, value in arrays.items() if value is not None}
    return over_mesh(run, split_queries=not by_place)(q, k, v, given)


def choose(platform: str, q: Array, k: Array, mask: Mask, logit_softcap: float | None) -> str:
    """What "auto" stands for, at the sizes of one device: the kernel of the platform where it can do what is asked."""
    if (
        platform == "tpu"
        and k.shape[1] >= splash.FEWEST_KEYS
        and not splash.refusal(platform, q, k, mask, logit_softcap)
    ):
        return "tpu_splash"
    if platform == "gpu" and not cudnn.refusal(platform, q, k, mask, logit_softcap):
        return "gpu_cudnn"
    logits = math.prod(q.shape[:3]) * k.shape[1]
    return "chunked" if logits >= (MANY_LOGITS_CPU if platform == "cpu" else MANY_LOGITS) else "xla"


def current_platform() -> str:
    """'cpu', 'gpu' or 'tpu': that of the mesh, which may be of absent devices, or the default one without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    found = jax.default_backend() if mesh.empty or mesh.abstract_device is None else mesh.abstract_device.platform
    return "gpu" if found == "cuda" else found


def over_mesh(run: Callable[..., Array], *, split_queries: bool) -> Callable[..., Array]:
    """`run(q, k, v, arrays)` on each device's own part: kernels cannot be partitioned from outside."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or mesh.manual_axes:  # nothing to split, or the caller has done so
        return run

    def split(q: Array, k: Array, v: Array, arrays: dict[str, Array]) -> Array:
        def axis(names: str | tuple[str, ...], *sizes: int) -> str | tuple[str, ...] | None:
            devices = math.prod(mesh.shape[name] for name in ((names,) if isinstance(names, str) else names))
            return None if any(size % devices for size in sizes) else names

        batch, heads = axis(BATCH[0], q.shape[0]), axis("tensor", q.shape[2], k.shape[2])
        queries = axis("context", q.shape[1]) if split_queries else None
        specs = {"window": PartitionSpec(), "of_queries": PartitionSpec(batch, queries)}
        specs |= dict.fromkeys(("valid", "positions", "of_keys"), PartitionSpec(batch))
        out, keys = PartitionSpec(batch, queries, heads), PartitionSpec(batch, None, heads)
        inputs = out, keys, keys, {name: specs[name] for name in arrays}
        return jax.shard_map(run, in_specs=inputs, out_specs=out, check_vma=False)(q, k, v, arrays)

    return split
