"""LPIPS against the release: distances, layers, features and gradients, with VGG16's full widths."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

from svg_jax.models.lpips import LPIPS, SLICES, LPIPSConfig
from svg_jax.nn.functional import Network, Params
from tests.vectors import Case, assert_close


@functools.cache
def load() -> tuple[Case, Network[LPIPS], Params]:
    """Weights by the recipe of the vectors: convolutions in network order, then the heads."""
    case, config = Case.load("lpips"), LPIPSConfig()
    draw = np.random.default_rng(case.config["weight_seed"])
    params, sums, width = {}, [], 3
    for i, (places, channels) in enumerate(zip(SLICES, config.channels, strict=True)):
        for place in places:
            kernel = draw.standard_normal((channels, width, 3, 3), dtype=np.float32)
            kernel *= np.float32(np.sqrt(2 / (9 * width)))
            params[f"net.slice{i + 1}.{place}.kernel"] = kernel.transpose(2, 3, 1, 0)
            bias = draw.standard_normal((channels,), dtype=np.float32) * np.float32(0.05)
            params[f"net.slice{i + 1}.{place}.bias"] = bias
            sums.append(np.abs(kernel).sum())
            width = channels
    for i, channels in enumerate(config.channels):
        head = np.abs(draw.standard_normal((1, channels, 1, 1), dtype=np.float32)) / np.float32(channels)
        params[f"lin{i}.model.1.kernel"] = head.transpose(2, 3, 1, 0)
    np.testing.assert_allclose(sums, case.outputs["conv_weight_checksums_sum_abs"], rtol=1e-6)
    network = Network(lambda rngs: LPIPS(config, rngs=rngs))
    return case, network, {name: jnp.asarray(value) for name, value in params.items()}


def nhwc(x: np.ndarray) -> Array:
    return jnp.asarray(x.transpose(0, 2, 3, 1))


@pytest.mark.golden
def test_distances_features_and_gradients() -> None:
    case, network, params = load()

    @jax.jit
    def run(params, a, b):
        model = network(params)
        distance, pull = jax.vjp(lambda b: model(a, b), b)
        return distance, pull(jnp.ones_like(distance))[0], model.by_layer(a, b), model.features(a)

    for height, width in case.config["sizes"]:
        name = f"{height}x{width}"
        expected = {k.removeprefix(name + "."): v for k, v in case.outputs.items() if k.startswith(name + ".")}
        a, b = (nhwc(case.inputs[f"{side}_{name}"]) for side in "ab")
        distance, gradient, by_layer, features = run(params, a, b)
        assert_close(distance, expected["lpips"][:, 0, 0, 0], 1e-4, f"{name} distance")
        assert_close(by_layer, expected["per_layer"][..., 0, 0, 0], 1e-4, f"{name} by layer")
        assert_close(gradient.transpose(0, 3, 1, 2), expected["grad_b"], 1e-4, f"{name} gradient")
        for i, values in enumerate(features):
            some = expected[f"feat_a_{i}_first4ch"]
            assert_close(values[..., : some.shape[1]].transpose(0, 3, 1, 2), some, 1e-4, f"{name} features {i}")


@functools.cache
def narrow() -> Network[LPIPS]:
    return Network(lambda rngs: LPIPS(LPIPSConfig((4, 4, 4, 4, 4)), rngs=rngs))


def test_equal_images_and_dead_features() -> None:
    """The distance of an image to itself is zero with a gradient of zero, also where no feature is active."""
    params = narrow().init(jax.random.key(0))
    dead = {name: value if "kernel" in name else jnp.full_like(value, -100.0) for name, value in params.items()}
    image = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (1, 16, 16, 3)), jnp.float32)
    value_and_grad = jax.jit(jax.value_and_grad(lambda b, params: narrow()(params)(image, b).sum()))
    for weights, other in ((params, image), (dead, -image)):
        distance, gradient = value_and_grad(other, weights)
        assert abs(distance) < 1e-12
        assert jnp.abs(gradient).max() < 1e-6
    assert value_and_grad(-image, params)[0] != 0


def test_small_images() -> None:
    with pytest.raises(ValueError, match="LPIPS of images of 8 x 40 pixels: they need at least 16"):
        narrow()(narrow().init(jax.random.key(0)))(jnp.zeros((1, 8, 40, 3)), jnp.zeros((1, 8, 40, 3)))
