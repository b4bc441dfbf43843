"""Interpolation against PyTorch's, and what must hold of any."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from svg_jax.nn.patches import token_positions
from svg_jax.nn.resize import interpolate_table, interpolation_weights, resize
from tests.vectors import assert_close

KINDS = [("bilinear", False), ("bicubic", False), ("bilinear", True), ("bicubic", True)]
SIZES = [((7, 5), (11, 16)), ((16, 13), (5, 4)), ((6, 9), (9, 4)), ((2, 1), (5, 3)), ((5, 6), (1, 6))]


@pytest.mark.parametrize(("method", "antialias"), KINDS)
def test_images_equal_pytorch(method: str, antialias: bool) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    images = [rng.normal(size=(2, *old, 3)).astype(np.float32) for old, _ in SIZES]
    found = jax.jit(
        lambda images: [
            resize(x, new, method=method, antialias=antialias) for x, (_, new) in zip(images, SIZES, strict=True)
        ]
    )(images)
    for x, y, (old, new) in zip(images, found, SIZES, strict=True):
        x = torch.from_numpy(x.transpose(0, 3, 1, 2))
        expected = torch.nn.functional.interpolate(x, size=new, mode=method, antialias=antialias)
        assert y.dtype == jnp.float32
        assert_close(y, expected.numpy().transpose(0, 2, 3, 1), 1e-5, f"{old} -> {new}")


@pytest.mark.parametrize("antialias", [False, True])
def test_a_table_is_resized_to_each_images_own_grid(antialias: bool) -> None:
    table = np.random.default_rng(0).normal(size=(6, 5, 3)).astype(np.float32)
    grid, tokens = np.array([[6, 5], [2, 3], [9, 4], [0, 0]], np.int32), 37

    @jax.jit
    def both(table: jax.Array, grid: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        found = interpolate_table(table, token_positions(grid, tokens), grid, antialias=antialias)
        return found, [resize(table[None], size, antialias=antialias) for size in [(6, 5), (2, 3), (9, 4)]]

    found, expected = both(table, grid)
    for row, image in zip(found[:3], expected, strict=True):
        image = image.reshape(-1, 3)
        assert_close(row[: len(image)], image, 1e-6)
    np.testing.assert_array_equal(found[0, :30], table.reshape(30, -1))  # its own grid: nothing is computed anew
    assert np.isfinite(found).all(), "an image that is none"


@pytest.mark.parametrize(("method", "antialias"), KINDS)
def test_weights_sum_to_one_and_keep_what_is_constant(method: str, antialias: bool) -> None:
    places, extent = jnp.arange(23)[None], jnp.array([[23]])
    weights = interpolation_weights(places, extent, 9, method=method, antialias=antialias)
    assert weights.shape == (1, 23, 9)
    assert_close(weights.sum(-1), np.ones((1, 23)), 1e-6)
    assert_close(weights[0, ::-1, ::-1], weights[0], 1e-5)  # neither end is preferred


def test_bad_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="'lanczos': choose bilinear or bicubic"):
        resize(jnp.zeros((1, 4, 4, 3)), (2, 2), method="lanczos")
    with pytest.raises(ValueError, match="to 0 x 2"):
        resize(jnp.zeros((1, 4, 4, 3)), (0, 2))
