"""Velocity fields whose solutions are known, and that of the vectors."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np

from svg_jax.flow.shapes import append_axes
from tests.vectors import Case


def golden_velocity(x: jax.Array, t: jax.Array) -> jax.Array:
    """The field of the vectors, A x + b t with A and b over channels."""
    matrix, offset = (jnp.asarray(Case.load("sampler").inputs[f"field.{name}"]) for name in ("A", "b"))
    turned = jnp.einsum("ij,bj...->bi...", matrix, x, precision="highest")
    return turned + append_axes(offset[None], x) * append_axes(t, x)


def golden_start() -> jax.Array:
    return jnp.asarray(Case.load("sampler").inputs["field.x"])


def keys(*patterns: re.Pattern[str]) -> list[str]:
    """The stored outputs that one of the patterns describes."""
    return [key for key in Case.load("sampler").outputs if any(pattern.fullmatch(key) for pattern in patterns)]


def match(pattern: re.Pattern[str], key: str) -> re.Match[str]:
    found = pattern.fullmatch(key)
    assert found is not None
    return found


def number(text: str | None) -> float:
    """`6`, `0.5` or `0p5`; 1 where there is none."""
    return float((text or "1").replace("p", "."))


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """Data N(mean, deviation^2) in each dimension: x_t = t mean + s(t) x_0 with s^2 = (t deviation)^2 + (1 - t)^2."""

    mean: float = 0.7
    deviation: float = 0.4

    def spread(self, t: float | np.ndarray) -> np.ndarray:
        t = np.float64(t)
        return np.sqrt(t**2 * self.deviation**2 + (1.0 - t) ** 2)

    def state(self, noise: np.ndarray, t: float) -> np.ndarray:
        """Where the flow has carried noise at time t, float64."""
        return t * self.mean + self.spread(t) * np.float64(noise)

    def velocity(self, x: jax.Array, t: jax.Array) -> jax.Array:
        t = append_axes(t, x)
        variance = t**2 * self.deviation**2 + (1.0 - t) ** 2
        return self.mean + (t * self.deviation**2 - (1.0 - t)) / variance * (x - t * self.mean)
