"""Segments of samples that share a sequence: who is of whom, where each stands, and what it gets."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from svg_jax.nn.segments import lengths_of, places, segments_of, to_tokens

LENGTHS = np.array([[2, 1, 3], [4, 2, 2], [1, 1, 1]], np.int32)
SEGMENTS = np.array([[1, 1, 2, 3, 3, 3, 0, 0], [1, 1, 1, 1, 2, 2, 3, 3], [1, 2, 3, 0, 0, 0, 0, 0]], np.int32)


def test_samples_follow_one_another_and_padding_comes_last() -> None:
    np.testing.assert_array_equal(segments_of(jnp.asarray(LENGTHS), 8), SEGMENTS)


def test_lengths_are_the_inverse() -> None:
    np.testing.assert_array_equal(lengths_of(jnp.asarray(SEGMENTS), 3), LENGTHS)


def test_each_sample_begins_at_place_zero() -> None:
    expected = [[0, 1, 0, 0, 1, 2, 0, 1], [0, 1, 2, 3, 0, 1, 0, 1], [0, 0, 0, 0, 1, 2, 3, 4]]
    np.testing.assert_array_equal(places(jnp.asarray(SEGMENTS)), expected)


def test_tokens_get_their_samples_values_and_samples_their_tokens_gradients() -> None:
    values = np.random.default_rng(0).normal(size=(3, 3, 5)).astype(np.float32)

    def total(values: jax.Array) -> jax.Array:
        return jnp.sum(to_tokens(values, jnp.asarray(SEGMENTS)))

    found = np.asarray(to_tokens(jnp.asarray(values), jnp.asarray(SEGMENTS)))
    rows, tokens = np.nonzero(SEGMENTS)
    np.testing.assert_array_equal(found[rows, tokens], values[rows, SEGMENTS[rows, tokens] - 1])
    assert not found[SEGMENTS == 0].any()
    gradient = jax.grad(total)(jnp.asarray(values))
    np.testing.assert_array_equal(gradient, np.broadcast_to(LENGTHS[:, :, None], values.shape))
