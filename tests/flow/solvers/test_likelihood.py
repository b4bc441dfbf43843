from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from svg_jax.flow.solvers import bits_per_dimension, log_likelihood, time_grid
from svg_jax.flow.solvers.likelihood import rademacher_probes
from tests.flow.solvers.fields import Gaussian
from tests.vectors import assert_close

FLOW = Gaussian()
# A flow that mixes dimensions, so that the probes matter: x_1 = exp(M) x_0 with log |det| = trace M.
MATRIX = np.asarray([[0.4, 0.3, -0.2], [-0.5, 0.1, 0.2], [0.1, 0.6, -0.3]], np.float32)


def mixing(x: jax.Array, t: jax.Array) -> jax.Array:
    return jnp.einsum("ij,bj->bi", jnp.asarray(MATRIX), x, precision="highest")


def log_normal(x: np.ndarray) -> np.ndarray:
    return -0.5 * np.sum(np.float64(x) ** 2 + math.log(2 * math.pi), axis=tuple(range(1, x.ndim)))


def data(shape: tuple[int, ...] = (4, 3, 2)) -> jax.Array:
    return FLOW.mean + jax.random.normal(jax.random.key(0), shape)


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
@pytest.mark.parametrize("exact", [True, False])
def test_a_gaussian_has_its_closed_form(method: str, exact: bool) -> None:
    """Its velocity acts on each dimension alone, so that one probe of signs is exact too."""
    x = data()
    keys = None if exact else jax.random.split(jax.random.key(1), len(x))
    times = time_grid(24, reverse=True)
    actual = jax.jit(lambda x: log_likelihood(FLOW.velocity, x, times, keys, method=method))(x)
    size = math.prod(x.shape[1:])
    expected = log_normal((np.asarray(x) - FLOW.mean) / FLOW.deviation) - size * math.log(FLOW.deviation)
    assert_close(actual, expected, 1e-3)
    assert_close(bits_per_dimension(actual, size), -expected / size / math.log(2), 1e-3)


def test_a_mixing_flow_exactly_and_by_probes() -> None:
    x = data((4, 3))
    x0 = np.asarray(x) @ np.asarray(jax.scipy.linalg.expm(-jnp.asarray(MATRIX))).T
    expected = log_normal(x0) - np.trace(MATRIX)
    times = time_grid(12, reverse=True)
    assert_close(jax.jit(lambda x: log_likelihood(mixing, x, times))(x), expected, 1e-4)
    keys = jax.random.split(jax.random.key(1), len(x))
    few, many = (jax.jit(lambda x, n=n: log_likelihood(mixing, x, times, keys, num_probes=n))(x) for n in (1, 512))
    assert np.abs(many - expected).max() < 0.15
    assert np.abs(few - expected).max() > np.abs(many - expected).max()


def test_a_sample_does_not_depend_on_its_batch() -> None:
    x, keys = data((3, 3)), jax.random.split(jax.random.key(1), 3)
    times = time_grid(4, reverse=True)
    run = jax.jit(lambda x, keys: log_likelihood(mixing, x, times, keys, num_probes=2))
    assert_close(run(x[1:2], keys[1:2]), run(x, keys)[1:2], 1e-6)
    assert bool((rademacher_probes(keys, x, 5)[:, 1:2] == rademacher_probes(keys[1:2], x[1:2], 5)).all())


@pytest.mark.parametrize("exact", [True, False])
def test_masked_tokens_do_not_count(exact: bool) -> None:
    x, times = data(), time_grid(6, reverse=True)
    keys = None if exact else jax.random.split(jax.random.key(1), len(x))
    mask = jnp.ones((4, 4), bool).at[:, 3].set(False)
    padded = jnp.pad(x, ((0, 0), (0, 1), (0, 0)), constant_values=9.0)
    run = jax.jit(lambda x, mask: log_likelihood(FLOW.velocity, x, times, keys, mask=mask))
    assert_close(run(padded, mask), run(x, jnp.ones((4, 3), bool)), 1e-5)
