"""The release's second decoder, of three-dimensional convolutions, on single frames."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from svg_jax.convert.rules import to_jax
from svg_jax.convert.tables import HY_DECODER
from svg_jax.models.decoder import decode_in_tiles
from svg_jax.models.decoder_hy import HyDecoder, HyDecoderConfig, Upsample, channels_to_pixels
from svg_jax.nn.functional import Network, Params
from tests.vectors import Case, assert_close, cases

FULL = [name for name in cases("decoder_hy3") if "block_out_channels" in Case.load(name).config["model"]]
PARTS = [name for name in cases("decoder_hy3") if name not in FULL]


@functools.cache
def load(name: str, dtype: str = "float32") -> tuple[Case, Network[HyDecoder], Params]:
    case = Case.load(name)
    config = HyDecoderConfig.from_release(case.config["model"], dtype=dtype)
    network = Network(lambda rngs: HyDecoder(config, rngs=rngs))
    return case, network, converted(case, network)


def converted(case: Case, network: Network[Any]) -> Params:
    arrays = to_jax(case.weights(), HY_DECODER, network.shapes)
    return {name: jnp.asarray(array) for name, array in arrays.items()}


def nhwc(x: np.ndarray) -> np.ndarray:
    """[B, C, H, W], or [B, C, 1, H, W] of a single frame."""
    return (x[:, :, 0] if x.ndim == 5 else x).transpose(0, 2, 3, 1)


@pytest.mark.golden
@pytest.mark.parametrize("name", FULL)
def test_pixels_and_values_inside(name: str) -> None:
    case, network, params = load(name)

    @jax.jit
    def stages(params: Params, z: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        model = network(params)
        out = {"split": model.conv_out(model.hidden(z)).astype(jnp.float32)}
        out["conv_in"] = model.conv_in(z)
        repeated = z[..., -model.config.shortcut_channels :]
        x = out["conv_in"] + jnp.repeat(repeated, model.config.channels[0] // repeated.shape[-1], axis=-1)
        for part in ("block_1", "attn_1", "block_2"):
            x = out[f"mid.{part}"] = getattr(model.mid, part)(x)
        for i, level in enumerate(model.up):
            for j, block in enumerate(level.block):
                x = out[f"up.{i}.block.{j}"] = block(x)
            if level.upsample is not None:
                x = out[f"up.{i}.upsample"] = level.upsample(x)
        return model(z), out

    for height, width in case.config["sizes"]:
        size = f"{height}x{width}"
        y, out = stages(params, nhwc(case.inputs[f"z_{size}"]))
        assert_close(y, nhwc(case.outputs[f"{size}.y"]), 1e-4, size)
        np.testing.assert_array_equal(y, out["split"])
        prefix = f"{size}.inter."
        expected = {key.removeprefix(prefix): v for key, v in case.outputs.items() if key.startswith(prefix)}
        assert expected
        for key, value in expected.items():
            assert_close(out[key], nhwc(value), 1e-4, f"{size} {key}")


@pytest.mark.golden
@pytest.mark.parametrize("name", PARTS)
def test_an_upsampling_that_changes_the_width(name: str) -> None:
    case = Case.load(name)
    sizes = case.config["model"]
    assert not sizes["add_temporal_upsample"]
    network = Network(lambda rngs: Upsample(sizes["in_channels"], sizes["out_channels"], rngs=rngs, dtype="float32"))

    @jax.jit
    def run(params: Params, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        model = network(params)
        return model.conv(x), model(x)

    conv, y = run(converted(case, network), nhwc(case.inputs["x"]))
    assert_close(conv, nhwc(case.outputs["conv"]), 1e-5)
    assert_close(y, nhwc(case.outputs["y"]), 1e-5)


@pytest.mark.golden
def test_bfloat16() -> None:
    case, network, params = load(FULL[0], "bfloat16")
    height, width = case.config["sizes"][0]
    y = jax.jit(lambda p, z: network(p)(z))(params, nhwc(case.inputs[f"z_{height}x{width}"]))
    assert y.dtype == jnp.float32
    assert_close(y, nhwc(case.outputs[f"{height}x{width}.y"]), 3e-2)


def test_other_temporal_taps_are_kept_and_have_no_effect() -> None:
    case, network, params = load(FULL[-1])
    height, width = case.config["sizes"][0]
    z = nhwc(case.inputs[f"z_{height}x{width}"])
    taps = {name: value for name, value in params.items() if value.ndim == 5 and value.shape[0] > 1}
    assert taps
    others = {name: value.at[0].set(7.0).at[-1].set(jnp.nan) for name, value in taps.items()}
    run = jax.jit(jax.value_and_grad(lambda p, z: jnp.mean(jnp.square(network(p)(z)))))
    (value, grads), (changed, _) = run(params, z), run(params | others, z)
    assert value == changed
    for name in taps:
        assert not np.any(grads[name][0])
        assert not np.any(grads[name][-1])
        assert np.any(grads[name][1])


def test_tiles_come_near_the_whole() -> None:
    config = HyDecoderConfig(z_channels=40, channels=(32, 32), num_res_blocks=0, factor=2)
    network = Network(lambda rngs: HyDecoder(config, rngs=rngs))
    params = jax.jit(network.init)(jax.random.key(0))
    y, x = jnp.linspace(0, 9, 24)[:, None, None], jnp.linspace(0, 9, 17)[None, :, None]
    z = jnp.sin(y + x + jnp.arange(40.0)[None, None])[None]
    whole = jax.jit(lambda p, z: network(p)(z))(params, z)
    tiled = jax.jit(lambda p, z: decode_in_tiles(network(p), z, 16))(params, z)
    assert whole.shape == (1, 48, 34, 3)
    assert 0 < jnp.mean(jnp.abs(tiled - whole)) < 0.15 * jnp.std(whole)


def test_channels_become_pixels_row_by_row() -> None:
    """Channel 4 r + 2 c + k of a position, for two channels k, goes to its row r and column c."""
    x = jnp.arange(8.0)[None, None, None]
    np.testing.assert_array_equal(channels_to_pixels(x)[0, ..., 0], [[0, 2], [4, 6]])
    np.testing.assert_array_equal(channels_to_pixels(x)[0, ..., 1], [[1, 3], [5, 7]])


def test_the_released_sizes_fit_together() -> None:
    network = Network(lambda rngs: HyDecoder(HyDecoderConfig(), rngs=rngs))
    image = jax.eval_shape(lambda p, z: network(p)(z), network.shapes, jax.ShapeDtypeStruct((1, 3, 5, 392), "float32"))
    assert image.shape == (1, 48, 80, 3)
    assert network.shapes["up.0.upsample.conv.kernel"].shape == (3, 3, 3, 768, 4 * 384)


def test_sizes_that_cannot_be_built_are_refused() -> None:
    with pytest.raises(ValueError, match=r"3 levels cannot make 8 pixels .* power of 2 up to 4"):
        HyDecoderConfig(channels=(32, 32, 32), factor=8)
    with pytest.raises(ValueError, match="cannot make 6 pixels"):
        HyDecoderConfig(factor=6)
    with pytest.raises(ValueError, match=r"first width 36 is no multiple of the 40 latent channels nor of the last 8"):
        HyDecoderConfig(z_channels=40, channels=(36,), factor=1)
    with pytest.raises(ValueError, match="from 96 to 32 channels has no shortcut: 4 x 32 must be a multiple of 96"):
        Network(lambda rngs: HyDecoder(HyDecoderConfig(channels=(96, 32), factor=2), rngs=rngs))
    release = {"z_channels": 8, "out_channels": 3, "block_out_channels": [32], "num_res_blocks": 0}
    with pytest.raises(ValueError, match="ffactor_temporal = 4 makes video"):
        HyDecoderConfig.from_release({**release, "ffactor_spatial": 1, "ffactor_temporal": 4})
