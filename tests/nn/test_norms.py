"""Norms against float64, and their statistics in float32 whatever the input."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from svg_jax.nn.functional import params_of
from svg_jax.nn.norms import GroupNorm, LayerNorm, OffsetRMSNorm, RMSNorm
from tests.vectors import assert_close

FEATURES, GROUPS, EPS = 64, 32, 1e-3


def inputs(offset: float = 0.5) -> np.ndarray:
    return np.random.default_rng(0).normal(offset, 2.0, (2, 3, 5, FEATURES)).astype(np.float32)


def filled(norm: nnx.Module) -> tuple[nnx.Module, dict[str, np.ndarray]]:
    """The norm with random parameters."""
    draw = np.random.default_rng(1)
    params = {name: draw.normal(size=value.shape) for name, value in params_of(norm).items()}
    for name, value in params.items():
        getattr(norm, name).set_value(jnp.asarray(value, jnp.float32))
    return norm, params


def rms(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + EPS)


def standard(x: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    return (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + EPS)


EXPECTED: dict[str, tuple[Callable[[], nnx.Module], Callable[..., np.ndarray]]] = {
    "rms": (lambda: RMSNorm(FEATURES, eps=EPS), lambda x, scale: rms(x) * scale),
    "offset rms": (lambda: OffsetRMSNorm(FEATURES, eps=EPS), lambda x, scale: rms(x) * (1 + scale)),
    "layer": (lambda: LayerNorm(FEATURES, eps=EPS), lambda x, scale, bias: standard(x, (-1,)) * scale + bias),
    "layer without affine": (lambda: LayerNorm(FEATURES, eps=EPS, affine=False), lambda x: standard(x, (-1,))),
    "group": (
        lambda: GroupNorm(FEATURES, eps=EPS),
        lambda x, scale, bias: standard(x.reshape(2, 3, 5, GROUPS, -1), (1, 2, 4)).reshape(x.shape) * scale + bias,
    ),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_values(name: str) -> None:
    make, expected = EXPECTED[name]
    norm, params = filled(make())
    assert_close(norm(jnp.asarray(inputs())), expected(inputs().astype(np.float64), **params), 1e-5)


@pytest.mark.parametrize("name", EXPECTED)
def test_fresh_norms_only_normalise(name: str) -> None:
    make, expected = EXPECTED[name]
    norm = make()
    neutral = {key: float(key == "scale" and name != "offset rms") for key in params_of(norm)}
    assert_close(norm(jnp.asarray(inputs())), expected(inputs().astype(np.float64), **neutral), 1e-5)
    assert {value.dtype for value in params_of(norm).values()} <= {jnp.dtype("float32")}


@pytest.mark.parametrize("name", EXPECTED)
def test_bfloat16_goes_in_and_out_and_is_rounded_once(name: str) -> None:
    """With a mean far from zero, statistics in bfloat16 would be off by percents."""
    norm = EXPECTED[name][0]()
    x = jnp.asarray(inputs(offset=20.0), jnp.bfloat16)
    y = norm(x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, norm(x.astype(jnp.float32)).astype(jnp.bfloat16))


@pytest.mark.parametrize("name", ["layer", "group"])
def test_a_mean_far_above_the_deviation_costs_few_digits(name: str) -> None:
    make, expected = EXPECTED[name]
    norm, params = filled(make())
    x = inputs(offset=3000.0)
    assert_close(norm(jnp.asarray(x)), expected(x.astype(np.float64), **params), 1e-3)


@pytest.mark.parametrize("name", EXPECTED)
def test_constant_inputs_have_finite_gradients(name: str) -> None:
    norm, _ = filled(EXPECTED[name][0]())
    gradient = jax.grad(lambda x: jnp.sum(norm(x) ** 2))(jnp.zeros((1, 2, 2, FEATURES)))
    assert bool(jnp.isfinite(gradient).all())


def test_widths_that_make_no_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="32 groups, and 48 channels are not a multiple of 32"):
        GroupNorm(48)
