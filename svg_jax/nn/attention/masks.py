"""What a query may look at."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

MASKED = -1e30  # of a logit; finite, so that a row with no valid key stays free of NaN
RESULT = "attention"  # the name under which a rematerialisation policy may keep what the backward pass needs


class Segments(NamedTuple):
    """Which sample each token is of, where several share a sequence; see `svg_jax.nn.segments`."""

    queries: Int[Array, "batch queries"]
    keys: Int[Array, "batch keys"]


@dataclasses.dataclass(frozen=True)
class Mask:
    """Query i, at place `positions[i]` (i by default), sees key j if all that is given allows it."""

    valid: Bool[Array, "batch keys"] | None = None  # keys that exist
    positions: Int[Array, "batch queries"] | None = None
    causal: bool = False  # place >= j
    window: int | Int[Array, ""] | None = None  # place - j < window
    segments: Segments | None = None  # equal for i and j

    @property
    def by_place(self) -> bool:
        """Whether it matters where a query stands."""
        return self.causal or self.window is not None


def attention_mask(
    queries: int,
    keys: int,
    *,
    valid: Bool[Array, "batch keys"] | None = None,
    positions: Int[Array, "batch queries"] | None = None,
    causal: bool = False,
    window: int | Int[Array, ""] | None = None,
    segments: Segments | None = None,
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
    if segments is not None:
        same = segments.queries[:, :, None] == segments.keys[:, None, :]
        mask = same if mask is None else mask & same
    return mask
