"""The stand-in encoder: well-conditioned, invertible features from random blocks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import tiny_autoencoder
from data_pipelines import scenes
from svg_jax.models.stand_in import cosine_patch_embedding, with_cosine_patches
from svg_jax.models.vit import ViT, ViTConfig, normalise_pixels
from svg_jax.nn.functional import Network
from svg_jax.nn.patches import patchify


def test_signals_are_orthogonal_and_the_channel_mean_is_zero() -> None:
    config = ViTConfig(dim=12, num_heads=1, patch_size=8)
    kernel, bias = cosine_patch_embedding(config)
    gram = kernel[:, :-2].T @ kernel[:, :-2]
    np.testing.assert_allclose(gram, np.eye(10) / 64, atol=1e-6)
    np.testing.assert_allclose(kernel.sum(axis=1), 0, atol=1e-6)
    assert bias.sum() == 0


def test_features_keep_what_the_patch_embedding_saw() -> None:
    """Blocks and norms of the demo's encoder change the signals by little, in size and in direction."""
    config = ViTConfig(**tiny_autoencoder.autoencoder()["encoder"])
    network = Network(lambda rngs: ViT(config, rngs=rngs))
    params = with_cosine_patches(jax.jit(network.init)(jax.random.key(0)), config)
    images = jnp.asarray(np.stack([scenes.render(scenes.sample_scene(0, i)) for i in range(8)]))
    pixels = normalise_pixels(patchify(images, config.patch_size))
    features = jax.jit(lambda p, x: network(p)(x, jnp.full((8, 2), 8, jnp.int32)))(params, pixels)
    signals = np.asarray(pixels).reshape(-1, 192) @ cosine_patch_embedding(config)[0]
    features = np.asarray(features).reshape(-1, config.dim)
    for channel in range(config.dim):
        assert np.corrcoef(features[:, channel], signals[:, channel])[0, 1] > 0.97, channel
        assert 0.8 < features[:, channel].std() / signals[:, channel].std() < 1.25, channel


def test_too_many_channels_for_the_patch_are_refused() -> None:
    with pytest.raises(ValueError, match="4 x 4 patches has 3 to 50 channels, not 64"):
        cosine_patch_embedding(ViTConfig(dim=64, num_heads=4, patch_size=4))
