"""Encoder, latent statistics and decoder in one object."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import tiny_autoencoder
from svg_jax.models.autoencoder import Autoencoder, AutoencoderConfig, LatentStatistics, extended, to_uint8
from svg_jax.models.decoder import DecoderConfig
from svg_jax.models.decoder_hy import HyDecoder, HyDecoderConfig
from svg_jax.models.residual import ResidualConfig
from svg_jax.models.vit import ViTConfig, normalise_pixels
from svg_jax.models.vit_learnt import LearntViTConfig
from svg_jax.nn.functional import Network, Params, params_of
from svg_jax.nn.patches import patchify
from svg_jax.nn.resize import resize
from svg_jax.parallel import batch_sharding, make_mesh
from tests.vectors import assert_close


def tiny() -> AutoencoderConfig:
    sizes = tiny_autoencoder.autoencoder()
    encoder = ViTConfig(**sizes["encoder"])
    return AutoencoderConfig(encoder, DecoderConfig(**{**sizes["decoder"], "z_channels": encoder.dim}))


def tiny_r(**changes: object) -> AutoencoderConfig:
    """An Autoencoder-R of 12 + 4 channels."""
    p = tiny()
    residual = ResidualConfig(dim=16, num_layers=1, num_heads=2, hidden_dim=32, out_channels=4, patch_size=8)
    residual = dataclasses.replace(residual, layer_scale=0.5, **changes)
    return AutoencoderConfig(p.encoder, dataclasses.replace(p.decoder, z_channels=16), residual)


@pytest.fixture(scope="module")
def autoencoder_r() -> tuple[Network[Autoencoder], Params, jax.Array]:
    """The network, its parameters, and eight images of 16 x 24 pixels."""
    network = Network(lambda rngs: Autoencoder(tiny_r(), rngs=rngs))
    images = jax.random.randint(jax.random.key(1), (8, 16, 24, 3), 0, 256).astype(jnp.uint8)
    return network, jax.jit(network.init)(jax.random.key(0)), images


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
    smaller = dataclasses.replace(config.decoder, channel_multipliers=(1, 1, 2, 2))
    with pytest.raises(ValueError, match=r"16 pixels a side and the decoder makes 8 .* set autoencoder.resize"):
        AutoencoderConfig(config.encoder, smaller)
    assert AutoencoderConfig(config.encoder, smaller, resize=True).patch_size == 8


def test_the_released_residual_autoencoder_fits_together_and_others_are_refused() -> None:
    config = AutoencoderConfig.svg_r()
    assert (config.latent_channels, config.patch_size) == (392, 16)
    assert config.residual is not None
    with pytest.raises(ValueError, match=r"384 channels and the residual branch 8 more and the decoder reads 384"):
        dataclasses.replace(config, decoder=DecoderConfig.svg())
    with pytest.raises(ValueError, match=r"residual branch has 14 pixels a side .* set residual.patch_size to 16"):
        dataclasses.replace(config, residual=dataclasses.replace(config.residual, patch_size=14))
    other = dataclasses.replace(config, decoder=HyDecoderConfig())
    network = Network(lambda rngs: Autoencoder(other, rngs=rngs))
    images = jax.ShapeDtypeStruct((2, 48, 80, 3), jnp.uint8)
    z = jax.eval_shape(lambda p, x: network(p).features_of_images(x), network.shapes, images)
    assert z.shape == (2, 3, 5, 392)
    assert isinstance(network(network.shapes).decoder, HyDecoder)


def test_training_changes_the_decoder_and_a_branch_that_is_not_frozen() -> None:
    names = ["encoder.norm.scale", "latents.mean", "decoder.conv_in.bias", "extra_vit.freqs", "mask_token"]
    assert [tiny().trained(name) for name in names] == [False, False, True, False, False]
    assert [tiny_r().trained(name) for name in names] == [False, False, True, True, True]
    assert [tiny_r(frozen=True).trained(name) for name in names] == [False, False, True, False, False]


def test_images_and_padded_patches_have_the_same_latents(
    autoencoder_r: tuple[Network[Autoencoder], Params, jax.Array],
) -> None:
    """Slots without an image, and padding whatever it holds, enter no statistics."""
    network, params, images = autoencoder_r
    valid = jnp.arange(8) != 2
    by_image = jax.jit(lambda p, x, valid: network(p).features_of_images(x, valid))
    z = by_image(params, images, valid)
    assert z.shape == (8, 2, 3, 16)
    patches = jnp.pad(patchify(images, 8), ((0, 0), (0, 5), (0, 0)), constant_values=77)
    grid = jnp.where(valid[:, None], jnp.array([[2, 3]]), 0)
    padded = jax.jit(lambda p, x, grid: network(p).features(x, grid))(params, patches, grid)
    keep = np.asarray(valid)
    assert_close(padded[:, :6].reshape(z.shape)[keep], z[keep], 1e-5)
    changed = by_image(params, images.at[2].set(0), valid)
    np.testing.assert_array_equal(changed[keep], z[keep])
    assert_close(by_image(params, images.astype(jnp.float32), valid)[keep], z[keep], 1e-6, "float pixels")


def test_latents_do_not_depend_on_the_devices(autoencoder_r: tuple[Network[Autoencoder], Params, jax.Array]) -> None:
    network, params, images = autoencoder_r
    run = jax.jit(lambda p, x: network(p).features_of_images(x))
    mesh = make_mesh({"fsdp": 8})
    with jax.set_mesh(mesh):
        sharded = run(params, jax.device_put(images, batch_sharding(mesh)))
    assert len(sharded.sharding.device_set) == 8
    assert_close(sharded, run(params, images), 1e-5)


def test_gradients_reach_the_branch_unless_it_is_frozen_and_never_the_encoder(
    autoencoder_r: tuple[Network[Autoencoder], Params, jax.Array],
) -> None:
    _, params, images = autoencoder_r
    for frozen in (False, True):
        network = Network(lambda rngs, frozen=frozen: Autoencoder(tiny_r(frozen=frozen), rngs=rngs))
        z_sum = jax.jit(jax.grad(lambda p, n=network: jnp.sum(n(p).features_of_images(images[:2]) ** 3)))
        touched = {name.split(".")[0] for name, gradient in z_sum(params).items() if np.any(gradient)}
        assert touched == (set() if frozen else {"extra_vit"})


def test_a_key_masks_residual_channels_alone(autoencoder_r: tuple[Network[Autoencoder], Params, jax.Array]) -> None:
    plain, params, images = autoencoder_r
    network = Network(lambda rngs: Autoencoder(tiny_r(mask_ratio=0.5), rngs=rngs))
    assert network.shapes["mask_token"].shape == (1, 4, 1)
    params = params | {"mask_token": jnp.array([[[1.0], [2.0], [3.0], [4.0]]])}

    @jax.jit
    def run(params: Params, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        without = {name: value for name, value in params.items() if name != "mask_token"}
        model = network(params)
        masked = model.features_of_images(images, key=key)
        return plain(without).features_of_images(images), model.features_of_images(images), masked

    z, unmasked, masked = run(params, jax.random.key(3))
    np.testing.assert_array_equal(z, unmasked)
    np.testing.assert_array_equal(z[..., :12], masked[..., :12])
    hidden = np.all(np.asarray(masked[..., 12:]) == [1.0, 2.0, 3.0, 4.0], axis=(1, 2, 3))
    assert 0 < hidden.sum() < 8
    np.testing.assert_array_equal(masked[~hidden], z[~hidden])


def test_an_encoder_of_other_patches_sees_images_resized() -> None:
    """An encoder with patches of 6 pixels for a decoder with 4: 8 x 12 pixels become 12 x 18."""
    encoder = LearntViTConfig(dim=8, num_layers=1, num_heads=1, hidden_dim=8, patch_size=6, grid=(2, 2))
    decoder = DecoderConfig(z_channels=8, channels=32, channel_multipliers=(1, 1, 1), num_res_blocks=0)
    network = Network(lambda rngs: Autoencoder(AutoencoderConfig(encoder, decoder, resize=True), rngs=rngs))
    params = jax.jit(network.init)(jax.random.key(0))
    images = jax.random.randint(jax.random.key(1), (2, 9, 12, 3), 0, 256).astype(jnp.uint8)  # one row too many

    @jax.jit
    def run(params: Params) -> tuple[jax.Array, jax.Array]:
        model = network(params)
        larger = resize(images[:, :8].astype(jnp.float32), (12, 18))
        patches = normalise_pixels(patchify(larger, 6), encoder.pixel_mean, encoder.pixel_std)
        return model.features_of_images(images), model.encoder(patches, jnp.array([[2, 3], [2, 3]]))

    z, features = run(params)
    assert z.shape == (2, 2, 3, 8)
    assert_close(z.reshape(2, 6, 8), features, 1e-6)
    with pytest.raises(ValueError, match=r"patches of 4 .* encoder with patches of 6: batches of whole images can"):
        network(params).features(patchify(images, 4), jnp.array([[2, 3], [2, 3]]))
    with pytest.raises(ValueError, match="images of 3 x 12 are smaller than a patch of 4 x 4"):
        network(params).features_of_images(images[:, :3])


def test_statistics_of_too_many_channels_are_refused() -> None:
    np.testing.assert_allclose(extended(np.array([1.0, 3.0]), 4), [1.0, 3.0, 2.0, 2.0])
    with pytest.raises(ValueError, match="statistics of 3 channels do not fit latents of 2"):
        extended(np.ones(3), 2)
