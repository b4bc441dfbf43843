"""Classifier-free guidance around a network. The modes are settings of one function, `guided`, and combine freely.

mode            settings                    what it does                                        reference
standard        renorm=0                    extrapolates from unconditional to conditional      arXiv 2207.12598
renormalised    renorm=1 (released recipe)  and caps the norm of the result                     arXiv 2503.21758
truncated       interval=(0, END)           guides near noise, conditional alone near data      arXiv 2503.21758
interval        interval=(START, END)       guides at middle noise levels alone                 arXiv 2404.07724
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from svg_jax.flow.shapes import Velocity, append_axes

State = Float[Array, "batch *rest"]
Scalar = float | Float[Array, ""]


def guided(
    velocity: Velocity,
    scale: Scalar,
    *,
    renorm: Scalar = 1.0,
    interval: tuple[Scalar, Scalar] = (0.0, 1.0),
    mask: Bool[Array, "batch tokens"] | None = None,
) -> Velocity:
    """Wraps a network that is called once on [conditional half, unconditional half] into a guided velocity(x, t).

    Guidance acts on all channels of a sample while interval[0] <= t < interval[1]; elsewhere the conditional velocity
    is returned alone. A start of 0 or an end of 1 is no limit at all: Heun's method asks for t = 1 itself, `dopri5` for
    times beyond. Truncation (Lumina-Image 2.0, arXiv 2503.21758) is (0, END); guidance in a limited interval (arXiv
    2404.07724) also spares the noisiest times. Every number may be traced: changing it compiles nothing anew.

    Args:
        velocity: takes x [2 batch, ...] and t [2 batch]; it holds the captions of the first half and the negative
            ones of the second.
        scale: s of `combine`; 1 is the conditional velocity.
        renorm: limit of `renormalise`; 0 switches it off.
        interval: first time with guidance, first time without; (0, 1) is always.
        mask: the valid tokens of one half, None if all are.

    Returns:
        velocity(x, t) for one half, float32.
    """

    def guided_velocity(x: State, t: Float[Array, " batch"]) -> State:
        both = velocity(jnp.concatenate([x, x]), jnp.concatenate([t, t])).astype(jnp.float32)
        conditional, unconditional = jnp.split(both, 2)
        combined = renormalise(combine(conditional, unconditional, scale), conditional, renorm, mask)
        start, end = map(jnp.asarray, interval)
        guide = ((start <= t) | (start <= 0)) & ((t < end) | (end >= 1))
        return jnp.where(append_axes(guide, combined), combined, conditional)

    return guided_velocity


def combine(conditional: State, unconditional: State, scale: Scalar) -> State:
    """The guided velocity v = v_u + s (v_c - v_u) (arXiv 2207.12598, with s = 1 + w)."""
    return unconditional + scale * (conditional - unconditional)


def renormalise(
    combined: State, conditional: State, limit: Scalar, mask: Bool[Array, "batch tokens"] | None = None
) -> State:
    """Caps the norm of each guided sample at `limit` times that of its conditional one; never enlarges it.

    v min(1, limit |v_c| / (|v| + 1e-12)),   |.| the L2 norm over all valid tokens and channels of one sample

    (Lumina-Image 2.0, arXiv 2503.21758). A limit of 0 or less means none.
    """
    shrink = jnp.minimum(1.0, limit * _norm(conditional, mask) / (_norm(combined, mask) + 1e-12))
    return combined * append_axes(jnp.where(jnp.asarray(limit) > 0, shrink, 1.0), combined)


def _norm(x: State, mask: Bool[Array, "batch tokens"] | None) -> Float[Array, " batch"]:
    """L2 norm of each sample over what the mask leaves."""
    if mask is not None:
        x = jnp.where(append_axes(mask, x), x, 0.0)
    return jnp.sqrt(jnp.sum(x**2, axis=tuple(range(1, x.ndim))))
