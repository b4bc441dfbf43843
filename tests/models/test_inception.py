from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.inception import random_weights
from svg_jax.convert.rules import to_release
from svg_jax.convert.tables import INCEPTION
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


BLOCKS = jax.jit(lambda params, x: NETWORK(params).blocks(x))  # resized before, so that it is compiled once


@pytest.mark.golden
def test_features_and_blocks_with_weights_of_the_formula(weights: dict[str, np.ndarray]) -> None:
    given = arrays("inception_formula")
    count = sum(name.startswith("image") for name in given)
    assert count
    for k in range(count):
        *maps, features = BLOCKS(weights, resized(jnp.asarray(given[f"image{k}"])[None]))
        for i, found in enumerate(maps):
            assert_close(found.mean(axis=(1, 2))[0], given[f"block{i}_mean_{k}"], 1e-4, f"block {i} of image {k}")
        assert_close(features[0], given[f"pool3_{k}"], 1e-4, f"pool3 of image {k}")


def test_features_are_those_of_the_pytorch_module_on_random_weights() -> None:
    """Of a small and of a large image that are no squares."""
    torch = pytest.importorskip("torch")
    from benchmarks.inception_peer import load

    ours = random_weights()
    theirs = load(to_release(ours, INCEPTION))
    draw = np.random.default_rng(5)
    for height, width in ((40, 72), (451, 300)):
        image = draw.integers(0, 256, (1, height, width, 3)).astype(np.uint8)
        with torch.inference_mode():
            expected = theirs(torch.tensor(image).permute(0, 3, 1, 2)).numpy()
        assert expected.std() > 0.1
        found = BLOCKS(ours, resized(jnp.asarray(image)))[-1]
        assert_close(found, expected, 1e-4, f"{height} x {width}")


def test_logits_leave_the_bias_out(weights: dict[str, np.ndarray]) -> None:
    """As the Inception Score has them."""
    features = np.random.default_rng(6).standard_normal((2, CHANNELS)).astype(np.float32)
    found = NETWORK({name: jnp.asarray(value) for name, value in weights.items()}).logits(jnp.asarray(features))
    assert_close(found, features @ weights["fc.kernel"], 1e-5, "logits")
