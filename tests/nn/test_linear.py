"""Convolutions: the CPU's own gradient of wide ones against XLA's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxtyping import Array

from svg_jax.nn import linear
from tests.vectors import assert_close


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_wide_convolutions_are_convolutions(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = linear.conv(linear.WIDE, linear.WIDE + 8, 3, rngs=nnx.Rngs(0), dtype=dtype)
    draw = np.random.default_rng(0)
    x = jnp.asarray(draw.normal(size=(2, 3, 4, linear.WIDE)), dtype)
    dy = jnp.asarray(draw.normal(size=(2, 3, 4, linear.WIDE + 8)), dtype)

    def run() -> tuple[Array, Array, Array]:
        def apply(x: Array, kernel: Array) -> Array:
            return linear.convolution(
                x, kernel.astype(dtype), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )

        y, pull = jax.vjp(apply, x, layer.kernel[...])
        return y, *pull(dy)

    assert "custom_vjp" in str(jax.make_jaxpr(lambda x: layer(x))(x))
    ours = run()
    monkeypatch.setattr(linear, "current_platform", lambda: "tpu")
    assert "custom_vjp" not in str(jax.make_jaxpr(lambda x: layer(x))(x))
    for found, expected, what in zip(ours, run(), ("y", "dx", "dkernel"), strict=True):
        assert found.dtype == expected.dtype
        assert_close(found, expected, 1e-5 if dtype == "float32" else 3e-2, what)


@pytest.mark.parametrize(("size", "stride", "padding"), [(4, 2, 1), (4, 1, 1), (3, 2, 0)])
def test_strides_and_padding(size: int, stride: int, padding: int) -> None:
    layer = linear.conv(3, 5, size, rngs=nnx.Rngs(0), stride=stride, padding=padding, use_bias=False)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 9, 8, 3)), jnp.float32)
    padded = np.pad(x, ((0, 0), (padding,) * 2, (padding,) * 2, (0, 0)))
    kernel = np.asarray(layer.kernel[...])
    rows, cols = ((n + 2 * padding - size) // stride + 1 for n in x.shape[1:3])
    windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size), axis=(1, 2))[:, ::stride, ::stride]
    assert_close(layer(x), np.einsum("brcixy,xyio->brco", windows[:, :rows, :cols], kernel), 1e-5)


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (5, 8)])
def test_a_convolution_of_doubled_pixels_is_one_after_doubling(size: tuple[int, int]) -> None:
    """Values and both gradients, in and out channels apart."""
    rng = np.random.default_rng(0)
    x, kernel, dy = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((2, *size, 3), (3, 3, 3, 5), (2, 2 * size[0], 2 * size[1], 5))
    )
    settings = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}

    def doubled_first(x: jax.Array, kernel: jax.Array) -> jax.Array:
        doubled = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        return jax.lax.conv_general_dilated(doubled, kernel, (1, 1), "SAME", **settings)

    def ours(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return linear.doubled_convolution(x, kernel, (1, 1), "SAME", **settings)

    expected, expected_pull = jax.vjp(doubled_first, x, kernel)
    found, pull = jax.vjp(ours, x, kernel)
    for a, b in zip((found, *pull(dy)), (expected, *expected_pull(dy)), strict=True):
        assert_close(a, b, 1e-6)
