"""Patches: their order, the way back, and which slots of a padded batch hold one."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from svg_jax.nn.patches import patchify, token_mask, token_positions, unpatchify


def images(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.arange(2 * height * width * channels, dtype=np.int32).reshape(2, height, width, channels)


@pytest.mark.parametrize(("patch", "grid"), [(1, (4, 6)), (2, (2, 3)), (4, (3, 1))])
def test_round_trip(patch: int, grid: tuple[int, int]) -> None:
    x = images(grid[0] * patch, grid[1] * patch)
    patches = patchify(jnp.asarray(x), patch)
    assert patches.shape == (2, grid[0] * grid[1], patch * patch * 3)
    np.testing.assert_array_equal(unpatchify(patches, grid, patch), x)


def test_order_is_row_column_channel() -> None:
    x = images(4, 6)
    patches = patchify(jnp.asarray(x), 2)
    np.testing.assert_array_equal(patches[1, 1 * 3 + 2], x[1, 2:4, 4:6].reshape(-1))


def test_what_fills_no_patch_is_cut_off() -> None:
    x = images(5, 7)
    np.testing.assert_array_equal(patchify(jnp.asarray(x), 2), patchify(jnp.asarray(x[:, :4, :6]), 2))


def test_slots_of_a_padded_batch() -> None:
    grid = jnp.asarray([[2, 3], [3, 1], [0, 0]], jnp.int32)  # the last slot holds no image
    mask, (rows, cols) = token_mask(grid, 7), token_positions(grid, 7)
    np.testing.assert_array_equal(mask.sum(axis=1), [6, 3, 0])
    np.testing.assert_array_equal(rows, [[0, 0, 0, 1, 1, 1, 0], [0, 1, 2, 0, 0, 0, 0], [0] * 7])
    np.testing.assert_array_equal(cols, [[0, 1, 2, 0, 1, 2, 0], [0] * 7, [0] * 7])
    assert rows.dtype == cols.dtype == jnp.int32
    assert np.array_equal(mask, np.arange(7)[None] < np.array([6, 3, 0])[:, None])
