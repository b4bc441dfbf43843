"""The residual branch of Autoencoder-R against the release, on padded tokens, and over devices."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from svg_jax.convert.rules import below, to_jax
from svg_jax.convert.tables import DECODER, DINOV3, RESIDUAL
from svg_jax.models.autoencoder import Autoencoder, AutoencoderConfig, LatentStatistics, extended
from svg_jax.models.decoder import Decoder, DecoderConfig
from svg_jax.models.residual import (
    ResidualConfig,
    ResidualViT,
    initial_freqs,
    masked,
    match_distribution,
    mixed_angles,
)
from svg_jax.models.vit import ViTConfig, normalise_pixels
from svg_jax.nn.functional import Network, Params
from svg_jax.nn.patches import patchify, token_mask, token_positions
from svg_jax.parallel import batch_sharding, make_mesh
from tests.vectors import Case, assert_close

TINY = ResidualConfig(dim=16, num_layers=2, num_heads=2, hidden_dim=32, patch_size=4, layer_scale=0.5)


def rope_config(case: Case, **changes: Any) -> ResidualConfig:
    sizes, branch = case.config["rope_vit"], case.config["extra_vit"]
    values = {
        "dim": sizes["embed_dim"],
        "num_layers": sizes["depth"],
        "num_heads": sizes["num_heads"],
        "hidden_dim": int(sizes["embed_dim"] * sizes["mlp_ratio"]),
        "patch_size": sizes["patch_size"],
        "rope_theta": sizes["rope_theta"],
        "layer_scale": sizes["init_scale"],
    }
    return ResidualConfig.from_release(branch, **{**values, **changes})


@functools.cache
def load(**changes: Any) -> tuple[Case, Network[Autoencoder], Params]:
    """The vectors' Autoencoder-R, with a decoder of our own: theirs makes a pixel of a feature, which fits no patch."""
    case = Case.load("residual")
    residual = rope_config(case, **changes)
    encoder = ViTConfig.from_release(case.config["dino"])
    levels = encoder.patch_size.bit_length()
    channels = encoder.dim + residual.out_channels
    decoder = DecoderConfig(z_channels=channels, channels=32, channel_multipliers=(1,) * levels, num_res_blocks=0)
    config = AutoencoderConfig(encoder, decoder, residual)
    network = Network(lambda rngs: Autoencoder(config, rngs=rngs))
    weights = case.weights()
    rules = (*below("encoder.", DINOV3), *below("extra_vit.", RESIDUAL["rope"]))
    theirs = {key: value for key, value in weights.items() if key.startswith(("encoder.", "extra_vit."))}
    ours = ("encoder.", "extra_vit.")
    shapes = {name: shape for name, shape in network.shapes.items() if name.startswith(ours)}
    rest = {name: shape for name, shape in network.shapes.items() if not name.startswith(ours)}
    params = to_jax(theirs, rules, shapes) | {name: np.zeros(s.shape, s.dtype) for name, s in rest.items()}
    return case, network, {name: jnp.asarray(value) for name, value in params.items()}


def pixels_of(case: Case, size: tuple[int, int]) -> np.ndarray:
    """The images of one size, 0 .. 255, not rounded."""
    height, width = size
    return ((case.inputs[f"image_pm1_{height}x{width}"] + 1.0) * 127.5).astype(np.float32)


def grid_of(case: Case, size: tuple[int, int]) -> tuple[int, int]:
    patch = case.config["rope_vit"]["patch_size"]
    return size[0] // patch, size[1] // patch


def turned_grid(case: Case, size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns by which the release turns its queries and keys.

    Where an image has as many patches as the construction grid, but another shape, those of that square. Tokens are in
    row-major order whatever the shape, so the same tokens with the square's grid are just what the release computes.
    """
    rows, cols = grid_of(case, size)
    side = case.config["rope_vit"]["img_size"] // case.config["rope_vit"]["patch_size"]
    return (side, side) if rows * cols == side * side else (rows, cols)


def sizes_of(case: Case) -> list[tuple[int, int]]:
    return [(height, width) for height, width in case.config["sizes"]]


@functools.cache
def computed(size: tuple[int, int]) -> dict[str, jax.Array]:
    """Both branches of the images of one size, with every value inside that the vectors have, and our own latents."""
    case, network, params = load()
    grid, turned = grid_of(case, size), turned_grid(case, size)

    @jax.jit
    def run(params: Params, pixels: jax.Array) -> dict[str, jax.Array]:
        model = network(params)
        vit = model.extra_vit
        assert vit is not None
        patches = normalise_pixels(patchify(pixels, model.config.patch_size))
        grids, turns = (jnp.broadcast_to(jnp.array([pair]), (pixels.shape[0], 2)) for pair in (grid, turned))
        last, blocks = vit.run(patches, turns, collect=True)
        places = jnp.stack(token_positions(turns[:1], patches.shape[1]), axis=-1).astype(jnp.float32)
        freqs = vit.freqs[...].reshape(2, vit.config.num_layers, vit.config.num_heads, -1).swapaxes(0, 1)
        angles = jnp.stack([mixed_angles(places, layer)[0].swapaxes(0, 1) for layer in freqs])
        return {
            "dino_patchtokens": model.encoder(patches, grids),
            "vit_out": vit(patches, turns),
            "vit_forward_features": vit.norm(last),
            "vit_cis_cos": jnp.cos(angles),
            "vit_cis_sin": jnp.sin(angles),
            **{f"vit_block_{i}": block for i, block in enumerate(blocks)},
            "latents": model.features_of_images(pixels),
        }

    return run(params, pixels_of(case, size))


def expected_of(case: Case, size: tuple[int, int]) -> dict[str, np.ndarray]:
    prefix = f"{size[0]}x{size[1]}."
    return {key.removeprefix(prefix): value for key, value in case.outputs.items() if key.startswith(prefix)}


@pytest.mark.golden
def test_every_value_inside_at_every_size() -> None:
    case = load()[0]
    seen = set()
    for size in sizes_of(case):
        expected, found = expected_of(case, size), dict(computed(size))
        found["vit_out_BDN"] = found.pop("vit_out").transpose(0, 2, 1)
        for key in found.keys() & expected.keys():
            assert_close(found[key], expected[key], 1e-4, f"{size} {key}")
        seen |= found.keys() & expected.keys()
        if "dino_input" in expected:
            assert_close(normalise_pixels(pixels_of(case, size)).transpose(0, 3, 1, 2), expected["dino_input"], 1e-5)
    last_block = f"vit_block_{case.config['rope_vit']['depth'] - 1}"
    assert {"dino_patchtokens", "vit_forward_features", "vit_out_BDN", "vit_cis_cos", "vit_cis_sin", last_block} <= seen


@pytest.mark.golden
def test_latents_and_pixels_at_every_size() -> None:
    """Latents of each size; where the release has stale coordinates, those of the branch with the square's grid."""
    case = load()[0]
    decoder = Network(lambda rngs: Decoder(DecoderConfig.from_release(case.config["ddconfig"]), rngs=rngs))
    weights = {k.removeprefix("decoder."): v for k, v in case.weights().items() if k.startswith("decoder.")}
    params = {k: jnp.asarray(v) for k, v in to_jax(weights, DECODER, decoder.shapes).items()}
    decode = jax.jit(lambda p, z: decoder(p)(z))
    stale = []
    for size in sizes_of(case):
        out, expected, grid = computed(size), expected_of(case, size), grid_of(case, size)
        features, residual = out["dino_patchtokens"], out["vit_out"]

        def latents(over: str, features: jax.Array = features, residual: jax.Array = residual) -> jax.Array:
            extra = match_distribution(features, residual, jnp.ones(features.shape[:2], bool), over)
            return jnp.concatenate([features, extra], axis=-1)

        z = latents("batch").reshape(features.shape[0], *grid, -1)
        alone, raw = latents("per_image")[:1].reshape(1, *z.shape[1:]), latents("none").reshape(z.shape)
        found = {"z": z, "z_first_image_alone": alone, "z_no_outnorm": raw, "decoded": decode(params, z)}
        for key, value in found.items():
            assert_close(value.transpose(0, 3, 1, 2), expected[key], 1e-4, f"{size} {key}")
        if grid == turned_grid(case, size):
            assert_close(out["latents"].transpose(0, 3, 1, 2), expected["z"], 1e-4, f"{size} of images")
        else:  # ours turns by true rows and columns, so here it must differ from the release
            stale.append(size)
            assert jnp.max(jnp.abs(out["latents"] - z)) > 1e-3 * jnp.max(jnp.abs(z))
    assert stale


@pytest.mark.golden
def test_matching_alone() -> None:
    case = Case.load("residual")
    features, residual = (case.inputs[f"match.{name}"].transpose(0, 2, 1) for name in ("h", "h_vit"))
    out = match_distribution(jnp.asarray(features), jnp.asarray(residual), jnp.ones(features.shape[:2], bool))
    assert_close(out.transpose(0, 2, 1), case.outputs["match.out"], 1e-5)


@pytest.mark.golden
def test_statistics_of_the_further_channels() -> None:
    """Sampling and training divide differently in the release, float32 and bfloat16 statistics; the formula is one."""
    case = Case.load("residual")
    latent = case.inputs["stats.latent"].transpose(0, 2, 3, 1)
    channels, num_layers = latent.shape[-1], case.config["stats_layers"]
    for key in [key for key in case.outputs if key.startswith("stats.ext_")]:
        kind, layer = key.removeprefix("stats.ext_").split("_layer")
        row = case.inputs[f"stats.{kind}"][int(layer) % num_layers]
        assert_close(extended(row, channels), case.outputs[key].reshape(-1), 1e-5, key)
    mean, std = (extended(case.inputs[f"stats.{kind}"][-1], channels) for kind in ("mean", "std"))
    statistics = LatentStatistics(channels)
    statistics.mean[...], statistics.std[...] = jnp.asarray(mean), jnp.asarray(std)
    expected = case.outputs["stats.unnormalised_sampling"].transpose(0, 2, 3, 1)
    assert_close(statistics.denormalise(jnp.asarray(latent)), expected, 1e-5)
    for value, parameter in ((mean, statistics.mean), (std, statistics.std)):
        parameter[...] = jnp.asarray(value).astype(jnp.bfloat16).astype(jnp.float32)
    expected = case.outputs["stats.normalised_training_bf16stats_fp32z"].transpose(0, 2, 3, 1)
    assert_close(statistics.normalise(jnp.asarray(latent)), expected, 1e-5)


@pytest.mark.golden
def test_learnt_positions() -> None:
    case = Case.load("residual_vit_s")
    sizes = case.config["vit"]
    side = sizes["image_size"] // sizes["patch_size"]
    config = ResidualConfig(
        family="learnt",
        dim=sizes["hidden_dim"],
        num_layers=sizes["num_layers"],
        num_heads=sizes["num_heads"],
        hidden_dim=sizes["mlp_dim"],
        out_channels=case.config["output_dim"],
        patch_size=sizes["patch_size"],
        grid=(side, side),
    )
    network = Network(lambda rngs: ResidualViT(config, rngs=rngs))
    params = {k: jnp.asarray(v) for k, v in to_jax(case.weights(), RESIDUAL["learnt"], network.shapes).items()}
    patches = patchify(jnp.asarray(case.inputs["image"].transpose(0, 2, 3, 1)), config.patch_size)
    grid = jnp.full((patches.shape[0], 2), side)

    @jax.jit
    def run(params: Params, patches: jax.Array) -> tuple[jax.Array, ...]:
        model = network(params)
        last, blocks = model.run(patches, grid, collect=True)
        assert blocks is not None
        return model(patches, grid), model.norm(last), blocks

    y, normed, blocks = run(params, patches)
    assert_close(y.transpose(0, 2, 1), case.outputs["y_BDN"], 1e-4)
    assert_close(normed, case.outputs["encoder_out"], 1e-4)
    for i in range(sizes["num_layers"]):
        assert_close(blocks[i], case.outputs[f"layer_{i}"], 1e-4, f"layer {i}")


@pytest.mark.parametrize("family", ["rope", "learnt"])
def test_padding_and_neighbours_change_nothing(family: str) -> None:
    """Images of several grids in one batch of padded tokens, an empty slot among them, against each alone."""
    config = dataclasses.replace(TINY, family=family, grid=(3, 3))
    network = Network(lambda rngs: ResidualViT(config, rngs=rngs))
    params = jax.jit(network.init)(jax.random.key(0))
    grids = [(2, 3), (3, 1), (0, 0), (3, 3)]
    patches = jax.random.normal(jax.random.key(1), (4, 11, 48))
    grid = jnp.array(grids)
    padded = jnp.where(token_mask(grid, 11)[..., None], patches, jnp.nan)
    run = jax.jit(lambda p, x, grid: network(p)(x, grid))
    together = run(params, padded, grid)
    for i, (rows, cols) in enumerate(grids):
        if rows:
            alone = run(params, patches[i : i + 1, : rows * cols], grid[i : i + 1])
            assert_close(together[i, : rows * cols], alone[0], 1e-5, f"{rows} x {cols}")


def test_matching_counts_valid_tokens_only_and_gives_their_scale() -> None:
    features = 3.0 + 2.0 * jax.random.normal(jax.random.key(0), (3, 7, 12))
    residual = 0.1 * jax.random.normal(jax.random.key(1), (3, 7, 4)) - 5.0
    mask = jnp.array([7, 4, 0])[:, None] > jnp.arange(7)[None]
    wild = jnp.where(mask[..., None], 0.0, 1e6)
    out = match_distribution(features + wild, residual + wild, mask)
    f, r, o = (np.asarray(x)[np.asarray(mask)] for x in (features, residual, out))
    scaled = (r - r.mean(0).mean()) / (r.std(0, ddof=1).mean() + 1e-6)
    np.testing.assert_allclose(o, scaled * f.std(0, ddof=1).mean() + f.mean(0).mean(), rtol=1e-4, atol=1e-4)
    for i in (0, 1):
        alone = match_distribution(features[i : i + 1], residual[i : i + 1], mask[i : i + 1])
        each = match_distribution(features + wild, residual + wild, mask, "per_image")[i : i + 1]
        valid = np.asarray(mask[i])
        np.testing.assert_allclose(each[0][valid], alone[0][valid], rtol=1e-5)
        assert not np.allclose(out[i][valid], alone[0][valid], rtol=1e-3)


def test_a_single_token_is_shifted_and_not_scaled() -> None:
    features, residual = jnp.array([[[1.0, 3.0]]]), jnp.array([[[4.0, 6.0]]])
    for over in ("batch", "per_image"):
        out = match_distribution(features, residual, jnp.ones((1, 1), bool), over)
        np.testing.assert_allclose(out, [[[1.0, 3.0]]], rtol=1e-5)


def test_statistics_are_those_of_the_global_batch_on_eight_devices() -> None:
    features = jax.random.normal(jax.random.key(0), (16, 5, 6)) + jnp.arange(16.0)[:, None, None]
    residual = jax.random.normal(jax.random.key(1), (16, 5, 3)) * jnp.arange(16.0)[:, None, None]
    mask = (jnp.arange(16) % 6)[:, None] > jnp.arange(5)[None]
    whole = match_distribution(features, residual, mask)
    rows = batch_sharding(make_mesh({"data": 2, "fsdp": 4}))
    sharded = jax.jit(match_distribution, out_shardings=rows)(*jax.device_put((features, residual, mask), rows))
    assert len(sharded.sharding.device_set) == 8
    np.testing.assert_allclose(sharded, whole, rtol=1e-5, atol=1e-5)


def test_gradients_go_through_values_and_not_through_statistics() -> None:
    """d out / d r = std_f / (std_r + eps), each entry its own; nothing reaches the features."""
    features = jax.random.normal(jax.random.key(0), (2, 3, 4))
    residual = 2.0 * jax.random.normal(jax.random.key(1), (2, 3, 2))
    mask = jnp.ones((2, 3), bool)
    to_features, to_residual = jax.grad(lambda f, r: jnp.sum(match_distribution(f, r, mask)), argnums=(0, 1))(
        features, residual
    )
    assert not np.any(to_features)
    std = [np.std(np.asarray(x), axis=(0, 1), ddof=1).mean() for x in (features, residual)]
    np.testing.assert_allclose(to_residual, np.full((2, 3, 2), std[0] / std[1]), rtol=1e-4)


def test_masking_replaces_all_of_a_share_of_the_images_by_the_token() -> None:
    residual, token = jnp.ones((4000, 2, 3)), jnp.array([[[5.0], [6.0], [7.0]]])
    out = masked(residual, token, 0.25, jax.random.key(0))
    hidden = np.all(np.asarray(out) == [5.0, 6.0, 7.0], axis=(1, 2))
    assert 0.22 < hidden.mean() < 0.28
    assert np.all(np.asarray(out)[~hidden] == 1.0)
    np.testing.assert_array_equal(out, masked(residual, token, 0.25, jax.random.key(0)))


def test_frequencies_at_the_start() -> None:
    """For each head the first half points along one direction and the second along its normal, magnitudes falling."""
    freqs = np.asarray(initial_freqs(jax.random.key(0), 3, 2, 8, 10.0)).reshape(2, 3, 2, 2, 2)
    np.testing.assert_allclose(np.hypot(freqs[0], freqs[1])[..., 0], 1.0, rtol=1e-5)
    np.testing.assert_allclose(np.hypot(freqs[0], freqs[1])[..., 1], 10.0**-0.5, rtol=1e-5)
    np.testing.assert_allclose((freqs[:, :, :, 0] * freqs[:, :, :, 1]).sum(axis=0), 0.0, atol=1e-6)
    assert np.unique(freqs[0, :, :, 0, 0]).size == 6


def test_release_settings_and_the_released_size() -> None:
    release = {"output_dim": 8, "mask_ratio": 0.0, "use_outnorm": True, "vit_type": "vit-rope-s"}
    assert ResidualConfig.from_release(release) == ResidualConfig()
    plain = ResidualConfig.from_release({"output_dim": 8, "vit_type": "vit-s"})
    assert (plain.family, plain.num_layers, plain.num_heads, plain.match) == ("learnt", 6, 8, "none")
    shapes = Network(lambda rngs: ResidualViT(ResidualConfig(), rngs=rngs)).shapes
    assert shapes["freqs"].shape == (2, 12, 192)
    assert 21e6 < sum(shape.size for shape in shapes.values()) < 22e6
    with pytest.raises(ValueError, match="vit_type = 'swin-t' is not supported: vit-rope-s or vit-s"):
        ResidualConfig.from_release({"output_dim": 8, "vit_type": "swin-t"})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"family": "ropes"}, "unknown residual family 'ropes': choose rope or learnt"),
        ({"match": "gpu"}, "unknown residual match 'gpu': choose batch, per_image, none"),
        ({"mask_ratio": 1.5}, "mask_ratio is 1.5: it is a share"),
        ({"num_heads": 64}, "384 / 64 must be whole, and a multiple of 4"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        ResidualConfig(**changes)
