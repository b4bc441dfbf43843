"""Normalisations. Statistics are float32 whatever the input, the output has the dtype of the input."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale (arXiv 1910.07467).

    The normalised value is cast to the input's dtype before the product, as in the release.
    """

    def __init__(self, features: int, *, eps: float) -> None:
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((features,), jnp.float32))

    def __call__(self, x: Float[Array, "... features"]) -> Float[Array, "... features"]:
        scale = self.scale[...].astype(x.dtype)
        return rms_normalise(x, self.eps).astype(x.dtype) * scale.reshape((1,) * (x.ndim - 1) + (-1,))


class OffsetRMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * (1 + scale): Gemma stores its weights around 0, and multiplies in float32."""

    def __init__(self, features: int, *, eps: float) -> None:
        self.eps = eps
        self.scale = nnx.Param(jnp.zeros((features,), jnp.float32))

    def __call__(self, x: Float[Array, "... features"]) -> Float[Array, "... features"]:
        scale = 1.0 + self.scale[...].astype(jnp.float32)
        return (rms_normalise(x, self.eps) * scale.reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


def rms_normalise(x: Float[Array, "... features"], eps: float) -> Float[Array, "... features"]:
    """x / sqrt(mean(x^2) + eps) over the last axis, float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)


class LayerNorm(nnx.Module):
    """(x - mean) / sqrt(var + eps) * scale + bias (arXiv 1607.06450); without `affine`, no scale and no bias."""

    def __init__(self, features: int, *, eps: float, affine: bool = True) -> None:
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((features,), jnp.float32)) if affine else None
        self.bias = nnx.Param(jnp.zeros((features,), jnp.float32)) if affine else None

    def __call__(self, x: Float[Array, "... features"]) -> Float[Array, "... features"]:
        y = standardise(x.astype(jnp.float32), (-1,), self.eps)
        if self.scale is not None and self.bias is not None:
            shape = (1,) * (x.ndim - 1) + (-1,)
            y = y * self.scale[...].astype(jnp.float32).reshape(shape) + self.bias[...].astype(jnp.float32).reshape(
                shape
            )
        return y.astype(x.dtype)


class GroupNorm(nnx.Module):
    """Statistics over height, width and the channels of one of 32 groups (arXiv 1803.08494), for [B, H, W, C]."""

    def __init__(self, features: int, *, eps: float = 1e-6, groups: int = 32) -> None:
        if features % groups:
            raise ValueError(
                f"GroupNorm has {groups} groups, and {features} channels are not a multiple of {groups}: "
                "choose other widths"
            )
        self.eps, self.groups = eps, groups
        self.scale = nnx.Param(jnp.ones((features,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((features,), jnp.float32))

    def __call__(self, x: Float[Array, "batch h w features"]) -> Float[Array, "batch h w features"]:
        grouped = x.astype(jnp.float32).reshape(*x.shape[:3], self.groups, -1)
        y = standardise(grouped, (1, 2, 4), self.eps).reshape(x.shape)
        scale, bias = self.scale[...].astype(jnp.float32), self.bias[...].astype(jnp.float32)
        return (y * scale[None, None, None] + bias[None, None, None]).astype(x.dtype)


def standardise(x: Float[Array, "..."], axes: tuple[int, ...], eps: float) -> Float[Array, "..."]:
    """(x - mean) / sqrt(var + eps) over some axes, the variance in a second pass."""
    x = x - jnp.mean(x, axis=axes, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=axes, keepdims=True) + eps)
