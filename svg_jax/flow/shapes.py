"""What the files of `flow` share about shapes: the velocity callable and the alignment of per-sample values."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Array, Float, Shaped

# velocity(x, t): states [batch, ...] and their times [batch] to dx/dt, shaped as x.
Velocity = Callable[[Float[Array, "batch *rest"], Float[Array, " batch"]], Float[Array, "batch *rest"]]


def append_axes(values: Shaped[Array, "*leading"], like: Shaped[Array, "*shape"]) -> Shaped[Array, "*leading_and_ones"]:
    """Adds trailing axes of size one until `values` has the rank of `like`: [B] -> [B, 1, 1], [B, N] -> [B, N, 1].

    Rank promotion aligns shapes from the right, which would match a batch with channels: here it is always spelt out.
    """
    return values.reshape(values.shape + (1,) * (like.ndim - values.ndim))
