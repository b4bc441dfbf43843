"""The convolutional decoder against the release: square and oblong, inside values, gradients."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from svg_jax.convert.rules import to_jax, to_release
from svg_jax.convert.tables import DECODER
from svg_jax.models.autoencoder import DECODERS
from svg_jax.models.decoder import Decoder, DecoderConfig, decode_in_tiles
from svg_jax.models.decoder_hy import HyDecoderConfig
from svg_jax.nn.functional import Network, Params
from tests.vectors import Case, assert_close


@functools.cache
def load(dtype: str = "float32") -> tuple[Case, Network[Decoder], Params]:
    case = Case.load("decoder")
    config = DecoderConfig.from_release(case.config["model"], dtype=dtype)
    network = Network(lambda rngs: Decoder(config, rngs=rngs))
    params = {key: jnp.asarray(value) for key, value in to_jax(case.weights(), DECODER, network.shapes).items()}
    return case, network, params


def nhwc(x: np.ndarray) -> np.ndarray:
    return x.transpose(0, 2, 3, 1)


@pytest.mark.golden
def test_pixels_at_every_size() -> None:
    case, network, params = load()
    for height, width in case.config["sizes"]:
        name = f"{height}x{width}"
        y = jax.jit(lambda p, z: network(p)(z))(params, nhwc(case.inputs[f"z_{name}"]))
        assert_close(y, nhwc(case.outputs[f"{name}.y"]), 1e-4, name)


@pytest.mark.golden
def test_values_inside() -> None:
    case, network, params = load()
    for height, width in case.config["sizes"]:
        prefix = f"{height}x{width}.inter."
        expected = {key.removeprefix(prefix): nhwc(v) for key, v in case.outputs.items() if key.startswith(prefix)}

        @jax.jit
        def stages(params, z):
            model, out = network(params), {}
            x = out["conv_in"] = model.conv_in(z)
            for part in ("block_1", "attn_1", "block_2"):
                x = out[f"mid.{part}"] = getattr(model.mid, part)(x)
            for i in reversed(range(len(model.up))):
                level = model.up[i]
                for j, block in enumerate(level.block):
                    x = out[f"up.{i}.block.{j}"] = block(x)
                    if level.attn:
                        x = out[f"up.{i}.attn.{j}"] = level.attn[j](x)
                if level.upsample is not None:
                    x = out[f"up.{i}.upsample"] = level.upsample(x)
            return out

        out = stages(params, nhwc(case.inputs[f"z_{height}x{width}"]))
        assert expected.keys() <= out.keys()
        for key, value in expected.items():
            assert_close(out[key], value, 1e-4, key)


@pytest.mark.golden
def test_gradients() -> None:
    """Of the mean of squares of the first sample of the last size."""
    case, network, params = load()
    height, width = case.config["sizes"][-1]
    z = nhwc(case.inputs[f"z_{height}x{width}"])[:1]
    loss = jax.jit(jax.value_and_grad(lambda p, z: jnp.mean(jnp.square(network(p)(z))), argnums=(0, 1)))
    value, (grads, grad_z) = loss(params, z)
    assert_close(value, case.outputs["grad.loss"], 1e-5)
    assert_close(grad_z, nhwc(case.outputs["grad.z"]), 1e-4)
    released = to_release({key: np.asarray(g) for key, g in grads.items()}, DECODER)
    names = [key.removeprefix("grad.") for key in case.outputs if key.startswith("grad.") and key[5:] in released]
    assert names
    for name in names:
        assert_close(released[name], case.outputs[f"grad.{name}"], 1e-4, name)


@pytest.mark.golden
def test_bfloat16() -> None:
    case, network, params = load("bfloat16")
    height, width = case.config["sizes"][0]
    y = jax.jit(lambda p, z: network(p)(z))(params, nhwc(case.inputs[f"z_{height}x{width}"]))
    assert_close(y, nhwc(case.outputs[f"{height}x{width}.y"]), 3e-2)


def test_the_released_decoder_makes_sixteen_pixels_of_a_feature() -> None:
    network = Network(lambda rngs: Decoder(DecoderConfig.svg(), rngs=rngs))
    image = jax.eval_shape(lambda p, z: network(p)(z), network.shapes, jax.ShapeDtypeStruct((1, 3, 5, 384), "float32"))
    assert image.shape == (1, 48, 80, 3)


def test_widths_that_group_norm_cannot_split_are_refused() -> None:
    with pytest.raises(ValueError, match="48 channels are not a multiple of 32"):
        Network(lambda rngs: Decoder(DecoderConfig(channels=48, channel_multipliers=(1, 1)), rngs=rngs))


@pytest.fixture(scope="module")
def random_decoder() -> tuple[Network[Decoder], Params]:
    config = DecoderConfig(z_channels=6, channels=32, channel_multipliers=(1, 1, 1), num_res_blocks=1)
    network = Network(lambda rngs: Decoder(config, rngs=rngs))
    return network, jax.jit(network.init)(jax.random.key(0))


def smooth(rows: int, cols: int) -> jax.Array:
    """A field that varies slowly, so that every square of it has about the statistics of the whole."""
    y, x = jnp.linspace(0, 9, rows)[:, None, None], jnp.linspace(0, 9, cols)[None, :, None]
    return jnp.sin(y + x + jnp.arange(6.0)[None, None])[None]


def test_tiles_come_closer_to_the_whole_the_larger_they_are(random_decoder: tuple[Network[Decoder], Params]) -> None:
    network, params = random_decoder
    z = smooth(40, 33)
    whole = network(params)(z)

    def error(tile: int) -> float:
        tiled = jax.jit(lambda p, z: decode_in_tiles(network(p), z, tile))(params, z)
        assert tiled.shape == whole.shape
        return float(jnp.mean(jnp.abs(tiled - whole)) / jnp.std(whole))

    assert error(24) < min(0.15, error(12) / 2)


def test_tiles_of_a_decoder_without_statistics_are_exact(random_decoder: tuple[Network[Decoder], Params]) -> None:
    """Places and weights of the squares, by a stand-in that looks at each feature alone: pixels must not move."""

    class Repeat:
        config = random_decoder[0](random_decoder[1]).config

        def coarse(self, z: jax.Array) -> jax.Array:
            return z

        def fine(self, x: jax.Array) -> jax.Array:
            return jnp.repeat(jnp.repeat(x[..., :3], self.config.factor, axis=1), self.config.factor, axis=2)

    z = jax.random.normal(jax.random.key(1), (2, 23, 9, 6))
    assert_close(decode_in_tiles(Repeat(), z, 8), Repeat().fine(z), 1e-6)


def test_an_image_of_one_tile_is_decoded_whole(random_decoder: tuple[Network[Decoder], Params]) -> None:
    network, params = random_decoder
    z = smooth(6, 5)
    assert (decode_in_tiles(network(params), z, 6) == network(params)(z)).all()
    with pytest.raises(ValueError, match="tiles of 2 features a side are too small"):
        decode_in_tiles(network(params), z, 2)


def test_tiles_need_the_memory_of_one() -> None:
    config = DecoderConfig(z_channels=6, channels=32, channel_multipliers=(1, 1, 1, 1, 1), num_res_blocks=0)
    network = Network(lambda rngs: Decoder(config, rngs=rngs))
    z = jax.ShapeDtypeStruct((1, 32, 32, 6), jnp.float32)

    def temporary(tile: int | None) -> int:
        def decode(params, z):
            return network(params)(z) if tile is None else decode_in_tiles(network(params), z, tile)

        return jax.jit(decode).lower(network.shapes, z).compile().memory_analysis().temp_size_in_bytes

    assert temporary(8) < temporary(None) / 3


@pytest.mark.parametrize(
    "sizes",
    [
        DecoderConfig(z_channels=8, channels=32, channel_multipliers=(1, 1), num_res_blocks=0),
        HyDecoderConfig(z_channels=8, channels=(32, 32), num_res_blocks=0, factor=2),
    ],
    ids=["conv", "hy"],
)
def test_recomputing_blocks_changes_no_gradient(sizes: DecoderConfig | HyDecoderConfig) -> None:
    z = np.random.default_rng(0).normal(size=(1, 3, 4, 8)).astype(np.float32)
    _, module = DECODERS[sizes.family]
    params, found = None, []
    for remat in ("none", "full"):
        config = dataclasses.replace(sizes, remat=remat)
        network = Network(lambda rngs, config=config: module(config, rngs=rngs))
        params = jax.jit(network.init)(jax.random.key(0)) if params is None else params
        gradient = jax.jit(jax.grad(lambda p, network=network: jnp.sum(jnp.square(network(p)(z)))))
        assert ("remat" in str(jax.make_jaxpr(gradient)(params))) == (remat == "full")
        found.append(gradient(params))
    for name, value in found[0].items():
        assert_close(found[1][name], value, 1e-6, name)
