"""Which times a network is trained on, and the shift toward noise that large images need."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from svg_jax.flow.names import unknown

DISTRIBUTIONS = ("lognorm", "uniform", "uniform_LOW_HIGH")


def sample_times(
    key: Key[Array, ""], batch: int, distribution: str = "lognorm", *, mu: float = 0.0, shift: float = 1.0
) -> Float[Array, " batch"]:
    """Training times in [0, 1], one a sample: unit draws -> `times_from_draws` -> `shift_times`.

    Args:
        key: consumed whole; the caller folds in the step.
        batch: how many.
        distribution: `lognorm`, `uniform` or `uniform_LOW_HIGH`, e.g. `uniform_0.1_0.7`.
        mu: location of `lognorm`; positive prefers data.
        shift: factor of `shift_times`, e.g. `resolution_shift(tokens)`; 1 leaves the times alone.

    Raises:
        ValueError: unknown distribution, or an interval outside [0, 1].
    """
    draw = jax.random.normal if distribution == "lognorm" else jax.random.uniform
    return shift_times(times_from_draws(draw(key, (batch,), jnp.float32), distribution, mu), shift)


def times_from_draws(draws: Float[Array, "*batch"], distribution: str, mu: float = 0.0) -> Float[Array, "*batch"]:
    """Maps unit draws to times.

        uniform_a_b    t = a + (b - a) u      u uniform in [0, 1);  `uniform` is a = 0, b = 1
        lognorm        t = sigmoid(mu + z)    z standard normal: the logit-normal of SD3 (arXiv 2403.03206, section 3.1)

    Raises:
        ValueError: unknown distribution, or an interval outside [0, 1].
    """
    if distribution == "lognorm":
        return jax.nn.sigmoid(mu + draws)
    low, high = _interval(distribution)
    return low + (high - low) * draws


def resolution_shift(num_tokens: int) -> float:
    """exp(mu) with mu linear in the sequence length through (256, 0.5) and (4096, 1.15): the factor for `shift_times`.

    The release's rule; `num_tokens` is (training resolution / 16)^2, one value for all aspect ratios of a stage. That
    larger images need more noise is SD3's finding (arXiv 2403.03206, section 5.3.2).
    """
    mu = 0.5 + (1.15 - 0.5) * (num_tokens - 256) / (4096 - 256)
    return math.exp(mu)


def shift_times(
    t: Float[Array, "*batch"], factor: float | Float[Array, ""], power: float = 1
) -> Float[Array, "*batch"]:
    """Moves times toward noise (t = 0) for a factor above 1, keeping 0 and 1.

    t' = t^p / (t^p + factor (1 - t)^p),   for p = 1   t' = t / (t + factor - factor t).

    With noise level s = 1 - t and p = 1 this is s' = factor s / (1 + (factor - 1) s), the shift of SD3 (arXiv
    2403.03206, section 5.3.2). Training passes `resolution_shift(tokens)`, sampling a factor of its own (6 or 10 in the
    release).

    Raises:
        ValueError: the factor is a number and not positive.
    """
    if isinstance(factor, int | float) and not factor > 0:
        raise ValueError(f"time shift is {factor:g}: it must be positive; 1 means no shift, larger values more noise")
    data, noise = t**power, factor * (1.0 - t) ** power
    return data / (data + noise)


def _interval(distribution: str) -> tuple[float, float]:
    """(0, 1) of `uniform`, (LOW, HIGH) of `uniform_LOW_HIGH`."""
    if distribution == "uniform":
        return 0.0, 1.0
    family, *bounds = distribution.split("_")
    try:
        low, high = map(float, bounds)
    except ValueError:
        raise unknown("time distribution", distribution, DISTRIBUTIONS) from None
    if family != "uniform":
        raise unknown("time distribution", distribution, DISTRIBUTIONS)
    if not 0.0 <= low < high <= 1.0:
        raise ValueError(
            f"time distribution '{distribution}': found bounds {low:g} and {high:g}, need 0 <= LOW < HIGH <= 1"
        )
    return low, high
