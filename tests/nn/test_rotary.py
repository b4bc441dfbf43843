"""Rotary embeddings as rotations in the complex plane."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from svg_jax.nn.rotary import axis_table, multi_axis, rotate_halves, rotate_interleaved
from tests.vectors import assert_close

DIMS, LENGTHS = (4, 2, 6), (20, 5, 7)
HEAD = sum(DIMS)
POSITIONS = np.array([[(0, 0, 0), (19, 4, 6), (3, 2, 1)], [(7, 0, 5), (1, 1, 1), (0, 4, 0)]])


def angles() -> tuple[jax.Array, jax.Array]:
    return multi_axis(jnp.asarray(POSITIONS), DIMS, LENGTHS)


def heads(seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (*POSITIONS.shape[:2], 3, HEAD))


def halves_order(x: jax.Array) -> jax.Array:
    """Channels (0, 1, 2, 3, ..) to (0, 2, .., 1, 3, ..)."""
    return jnp.concatenate([x[..., 0::2], x[..., 1::2]], axis=-1)


def test_table_is_position_times_frequency() -> None:
    cos, sin = axis_table(6, 9, theta=100.0)
    assert cos.shape == sin.shape == (9, 3)
    assert cos.dtype == sin.dtype == np.float32
    expected = np.arange(9)[:, None] * 100.0 ** (-np.arange(3)[None] / 3)
    np.testing.assert_allclose(cos + 1j * sin, np.exp(1j * expected), atol=2e-6)


def test_each_axis_owns_its_channels() -> None:
    cos, sin = angles()
    start = 0
    for axis, (dim, length) in enumerate(zip(DIMS, LENGTHS, strict=True)):
        table, own = axis_table(dim, length), slice(start // 2, (start + dim) // 2)
        np.testing.assert_array_equal(cos[..., own], table[0][POSITIONS[..., axis]])
        np.testing.assert_array_equal(sin[..., own], table[1][POSITIONS[..., axis]])
        start += dim
    assert cos.shape[-1] == start // 2


def test_interleaved_is_a_complex_product() -> None:
    cos, sin = map(np.asarray, angles())
    x = np.asarray(heads(), np.float64)
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * (cos + 1j * sin)[:, :, None]
    actual = rotate_interleaved(heads(), *angles())
    assert_close(actual[..., 0::2], turned.real, 1e-6)
    assert_close(actual[..., 1::2], turned.imag, 1e-6)


def test_halves_are_the_same_rotation_in_another_order() -> None:
    expected = halves_order(rotate_interleaved(heads(), *angles()))
    assert_close(rotate_halves(halves_order(heads()), *angles()), expected, 1e-6)


@pytest.mark.parametrize("rotate", [rotate_interleaved, rotate_halves])
def test_position_zero_turns_nothing_and_no_position_changes_a_norm(rotate) -> None:
    turned = rotate(heads(), *angles())
    np.testing.assert_array_equal(turned[0, 0], heads()[0, 0])
    assert_close(jnp.linalg.norm(turned, axis=-1), jnp.linalg.norm(heads(), axis=-1), 1e-6)


@pytest.mark.parametrize("rotate", [rotate_interleaved, rotate_halves])
def test_products_depend_on_the_difference_of_positions(rotate) -> None:
    def products(shift: int) -> jax.Array:
        cos, sin = multi_axis(jnp.asarray(POSITIONS) + shift, DIMS, tuple(n + 8 for n in LENGTHS))
        q, k = rotate(heads(1), cos, sin), rotate(heads(2), cos, sin)
        return jnp.einsum("bqhd,bkhd->bhqk", q, k)

    assert_close(products(8), products(0), 1e-5)


@pytest.mark.parametrize("rotate", [rotate_interleaved, rotate_halves])
def test_bfloat16_is_rounded_once(rotate) -> None:
    x = heads().astype(jnp.bfloat16)
    turned = rotate(x, *angles())
    assert turned.dtype == jnp.bfloat16
    np.testing.assert_array_equal(turned, rotate(x.astype(jnp.float32), *angles()).astype(jnp.bfloat16))
