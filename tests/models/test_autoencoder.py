"""Encoder, latent statistics and decoder in one object."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import tiny_autoencoder
from svg_jax.models.autoencoder import Autoencoder, AutoencoderConfig, LatentStatistics, to_uint8
from svg_jax.models.decoder import DecoderConfig
from svg_jax.models.vit import ViTConfig
from svg_jax.nn.functional import Network, params_of


def tiny() -> AutoencoderConfig:
    sizes = tiny_autoencoder.autoencoder()
    return AutoencoderConfig(ViTConfig(**sizes["encoder"]), DecoderConfig(**sizes["decoder"]))


def test_statistics_normalise_a_channel_and_back() -> None:
    """z = (f - mean) / (std + 1e-8), to the last bit of float32 where std is small."""
    statistics = LatentStatistics(3)
    statistics.mean[...] = jnp.array([1.0, -2.0, 0.5])
    statistics.std[...] = jnp.array([2.0, 0.25, 1e-8])
    features = jnp.arange(12, dtype=jnp.float32).reshape(2, 2, 3)
    z = statistics.normalise(features)
    expected = (np.arange(12).reshape(2, 2, 3) - [1.0, -2.0, 0.5]) / (np.array([2.0, 0.25, 1e-8]) + 1e-8)
    np.testing.assert_allclose(z, expected, rtol=1e-6)
    np.testing.assert_allclose(statistics.denormalise(z), features, rtol=1e-6, atol=1e-6)


def test_latents_are_normalised_features_and_decoding_undoes_it() -> None:
    config = tiny()
    network = Network(lambda rngs: Autoencoder(config, rngs=rngs))
    params = jax.jit(network.init)(jax.random.key(0))
    params |= {"latents.mean": jnp.linspace(-1, 1, 12), "latents.std": jnp.linspace(0.5, 2, 12)}
    patches = jax.random.randint(jax.random.key(1), (2, 6, 192), 0, 256).astype(jnp.uint8)
    grid = jnp.array([[2, 3], [1, 2]])

    @jax.jit
    def run(params):
        model = network(params)
        features, z = model.features(patches, grid), model.encode(patches, grid)
        return features, z, model.decode(z, (2, 3)), model.decoder(features.reshape(2, 2, 3, 12))

    features, z, decoded, direct = run(params)
    assert features.shape == z.shape == (2, 6, 12)
    mean, std = (params[f"latents.{name}"][None, None] for name in ("mean", "std"))
    np.testing.assert_allclose(z, (features - mean) / std, rtol=1e-5, atol=1e-5)
    assert decoded.shape == (2, 16, 24, 3)
    np.testing.assert_allclose(decoded, direct, rtol=1e-4, atol=1e-4)


def test_pixels_are_rounded_and_clipped() -> None:
    values = jnp.array([-2.0, -1.0, 0.0, 1.0, 3.0]).reshape(1, 1, 5, 1)
    assert to_uint8(values).reshape(-1).tolist() == [0, 0, 128, 255, 255]


def test_the_released_autoencoder_fits_together_and_others_are_refused() -> None:
    config = AutoencoderConfig.svg_p()
    assert config.decoder.factor == config.encoder.patch_size == 16
    assert set(params_of(LatentStatistics(4))) == {"mean", "std"}
    with pytest.raises(ValueError, match="encoder makes 384 channels and the decoder reads 392"):
        AutoencoderConfig(config.encoder, dataclasses.replace(config.decoder, z_channels=392))
    with pytest.raises(ValueError, match="16 pixels a side and the decoder makes 8"):
        AutoencoderConfig(config.encoder, dataclasses.replace(config.decoder, channel_multipliers=(1, 1, 2, 2)))
