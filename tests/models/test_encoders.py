"""Encoders by the family that a config names."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from svg_jax.models.encoders import ENCODERS, encoder_config, make_encoder
from svg_jax.models.vit import ViT, ViTConfig, normalise_pixels
from svg_jax.models.vit_learnt import LearntViT, LearntViTConfig
from svg_jax.nn.functional import Network

SIZES = {"dim": 8, "num_layers": 1, "num_heads": 2, "hidden_dim": 8, "patch_size": 2}


@pytest.mark.parametrize("family", ENCODERS)
def test_one_interface(family: str) -> None:
    section = {"family": family, **SIZES}
    config = encoder_config(section)
    network = Network(lambda rngs: make_encoder(config, rngs=rngs))
    params = jax.jit(network.init)(jax.random.key(0))
    encoder = network(params)
    assert (encoder.patch_size, encoder.dim) == (config.patch_size, config.dim) == (2, 8)

    patches = normalise_pixels(jnp.zeros((2, 7, 12), jnp.uint8), config.pixel_mean, config.pixel_std)
    grid, mask = jnp.array([[2, 3], [1, 4]], jnp.int32), jnp.arange(7)[None] < jnp.array([[6], [4]])
    features, masked = jax.jit(lambda params: [network(params)(patches, grid, which) for which in (None, mask)])(params)
    assert features.shape == (2, 7, 8)
    assert features.dtype == jnp.float32
    np.testing.assert_array_equal(masked, features)  # the mask is what the grid says anyway


def test_a_section_names_its_family_or_is_of_dinov3() -> None:
    assert encoder_config(ConfigDict({"dim": 48, "num_heads": 2})) == ViTConfig(dim=48, num_heads=2)
    config = encoder_config(ConfigDict({"family": "mae", "grid": [14, 14]}))
    assert config == LearntViTConfig(family="mae", grid=(14, 14))
    assert [module for _, module in ENCODERS.values()] == [ViT, LearntViT, LearntViT, LearntViT]


def test_unknown_families_and_fields_are_refused() -> None:
    with pytest.raises(ValueError, match="'siglip': did you mean 'siglip2'"):
        encoder_config({"family": "siglip"})
    with pytest.raises(ValueError, match="LearntViTConfig has no 'rope_base'"):
        encoder_config({"family": "mae", "rope_base": 100.0})
    with pytest.raises(ValueError, match="of family dinov3, not 'mae'"):
        ViTConfig(family="mae")
