from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from svg_jax.models.inception import CHANNELS, CLASSES, Inception, resized
from svg_jax.nn.functional import Network
from tests.evaluate.vectors import arrays, inception_weights
from tests.vectors import assert_close

NETWORK = Network(lambda rngs: Inception(rngs=rngs))


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    return inception_weights(NETWORK.shapes)


def test_names_and_shapes_are_those_of_the_checkpoint(weights: dict[str, np.ndarray]) -> None:
    assert {name: value.shape for name, value in weights.items()} == {n: s.shape for n, s in NETWORK.shapes.items()}
    assert weights["fc.kernel"].shape == (CHANNELS, CLASSES)


@pytest.mark.golden
def test_features_and_blocks_with_weights_of_the_formula(weights: dict[str, np.ndarray]) -> None:
    given = arrays("inception_formula")
    blocks = jax.jit(lambda params, x: NETWORK(params).blocks(x))  # resized before, so that it is compiled once
    count = sum(name.startswith("image") for name in given)
    assert count
    for k in range(count):
        *maps, features = blocks(weights, resized(jnp.asarray(given[f"image{k}"])[None]))
        for i, found in enumerate(maps):
            assert_close(found.mean(axis=(1, 2))[0], given[f"block{i}_mean_{k}"], 1e-4, f"block {i} of image {k}")
        assert_close(features[0], given[f"pool3_{k}"], 1e-4, f"pool3 of image {k}")
