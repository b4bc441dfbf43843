"""DINOv2, SigLIP 2 and MAE against the release and transformers, always several grids in one padded batch."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from svg_jax.convert.encoders import table_of, told_by
from svg_jax.convert.rules import to_jax
from svg_jax.models.vit import IMAGENET_MEAN, IMAGENET_STD, normalise_pixels
from svg_jax.models.vit_learnt import PUBLISHED, LearntViT, LearntViTConfig
from svg_jax.nn.functional import Network, Params
from svg_jax.nn.patches import patchify
from svg_jax.nn.resize import resize
from tests.vectors import Case, assert_close, cases

MODEL_TYPES = {"dinov2": "dinov2", "siglip2": "siglip_vision_model", "mae": "vit_mae"}
TRANSFORMERS = [name for family in MODEL_TYPES for name in cases(f"{family}_hf")]
TINY = LearntViTConfig(dim=8, num_layers=1, num_heads=2, hidden_dim=8, grid=(2, 3), patch_size=2)

Images = dict[str, np.ndarray]  # [B, H, W, 3] by "HxW"


def make(config: LearntViTConfig, weights: dict[str, np.ndarray]) -> tuple[Network[LearntViT], Params]:
    told = told_by(weights)
    assert told is not None
    assert told[0] == config.family
    network = Network(lambda rngs: LearntViT(config, rngs=rngs))
    params = to_jax(weights, table_of(config, told[1]), network.shapes)
    return network, {key: jnp.asarray(value) for key, value in params.items()}


def together(network: Network[LearntViT], params: Params, images: Images) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Images of all sizes through one padded batch: (states [L + 1, B, S, D], normalised sequence [B, S, D]) a size.

    What is in the empty slots is NaN, so that nothing which depends on them could be finite.
    """
    patch, front = network(params).patch_size, network(params).config.tokens_in_front
    rows = [row for batch in images.values() for row in np.asarray(patchify(batch, patch))]
    grid = [(v.shape[1] // patch, v.shape[2] // patch) for v in images.values() for _ in v]
    patches = np.full((len(rows), max(map(len, rows)) + 3, rows[0].shape[-1]), np.nan, np.float32)
    for slot, row in zip(patches, rows, strict=True):
        slot[: len(row)] = row

    @jax.jit
    def forward(params: Params, patches: jax.Array, grid: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        vit = network(params)
        states = vit.hidden_states(patches, grid)
        return states, vit.norm(states[-1]), vit(patches, grid)

    states, sequence, features = map(np.asarray, forward(params, patches, np.array(grid, np.int32)))
    assert features.dtype == np.float32
    np.testing.assert_array_equal(features, sequence[:, front:])
    found, start = {}, 0
    for size, batch in images.items():
        rows, cols = grid[start]
        part = slice(start, start + len(batch)), slice(front + rows * cols)
        found[size] = states[:, *part], sequence[part]
        start += len(batch)
    return found


def images_of(case: Case) -> Images:
    images = {
        key.removeprefix("image_"): value.transpose(0, 2, 3, 1)
        for key, value in case.inputs.items()
        if key.startswith("image_") and value.shape[1] == 3
    }
    assert images
    return images


def spatial(sequence: np.ndarray, size: str, config: LearntViTConfig) -> np.ndarray:
    """The patches of a sequence as [B, D, rows, cols]."""
    rows, cols = (int(side) // config.patch_size for side in size.split("x"))
    return sequence[:, config.tokens_in_front :].reshape(len(sequence), rows, cols, -1).transpose(0, 3, 1, 2)


@functools.cache
def loaded(name: str) -> tuple[Case, LearntViTConfig, Network[LearntViT], Params]:
    case = Case.load(name)
    kind = next(kind for family, kind in MODEL_TYPES.items() if name.startswith(family))
    config = LearntViTConfig.from_transformers({"model_type": kind, **case.config["model"]})
    return case, config, *make(config, case.weights())


@pytest.mark.golden
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_every_value_of_transformers(name: str) -> None:
    case, config, network, params = loaded(name)
    checked = set()
    for size, (states, sequence) in together(network, params, images_of(case)).items():
        found = {f"hidden_states_{i}": state for i, state in enumerate(states)}
        found |= {"embeddings": states[0], "last_hidden_state": sequence}
        found |= dict.fromkeys(("latent_BDHW", "patch_features_BDHW", "patch_BDHW"), spatial(sequence, size, config))
        latent = spatial(sequence, size, config).transpose(0, 2, 3, 1)
        found["latent_bilinear_16x16"] = resize(latent, (16, 16), method="bilinear").transpose(0, 3, 1, 2)
        if config.family == "dinov2":
            found["pooler_output"] = sequence[:, 0]
        for key in [key for key in case.outputs if key.startswith(f"{size}.")]:
            what = key.removeprefix(f"{size}.").removeprefix("unshuffled.")
            if what == "pooler_output" and config.family == "siglip2":
                continue  # of the head, which is not part of the encoder
            assert_close(found[what], case.outputs[key], 1e-4, key)
            checked.add(key)
    assert checked == {key for key in case.outputs if not key.startswith("shuffled.") and "pooler" not in key} | {
        key for key in case.outputs if "pooler" in key and config.family == "dinov2"
    }


@pytest.mark.golden
@pytest.mark.parametrize("name", cases("mae_hf") + cases("mae_ref"))
def test_mae_in_order_is_the_releases_with_its_shuffle_undone(name: str) -> None:
    """The release shuffles its tokens even where none is dropped, and forgets the order."""
    case = Case.load(name)
    if name.startswith("mae_ref"):
        model = case.config["model"]
        side = model["img_size"] // model["patch_size"]
        sizes = {"dim": model["embed_dim"], "num_layers": model["depth"], "num_heads": model["num_heads"]}
        sizes |= {"hidden_dim": int(model["embed_dim"] * model["mlp_ratio"]), "patch_size": model["patch_size"]}
        config = LearntViTConfig.published("mae_vitb16", norm_eps=1e-6, grid=(side, side), **sizes)
        network, params = make(config, case.weights())
        images = {f"{model['img_size']}x{model['img_size']}": case.inputs["image"].transpose(0, 2, 3, 1)}
    else:
        _, config, network, params = loaded(name)
        size = "x".join(2 * [str(case.config["model"]["image_size"])])
        images = {size: images_of(case)[size]}
    ((size, (_, sequence)),) = together(network, params, images).items()
    restore = case.outputs["shuffled.ids_restore"][..., None]
    shuffled = case.outputs["shuffled.encoder_tokens" if "ref" in name else "shuffled.last_hidden_state"]
    assert_close(sequence[:, 1:], np.take_along_axis(shuffled[:, 1:], restore, axis=1), 1e-4)
    assert_close(sequence[:, :1], shuffled[:, :1], 1e-4)
    if name.startswith("mae_ref"):
        assert_close(sequence, case.outputs["unshuffled.encoder_tokens"], 1e-4)
        expected = case.outputs["unshuffled.latent"]
        latent = spatial(sequence, size, config).transpose(0, 2, 3, 1)
        found = resize(latent, expected.shape[2:], method="bilinear").transpose(0, 3, 1, 2)
        assert_close(found, expected, 1e-4)


@pytest.mark.golden
@pytest.mark.parametrize("name", cases("mae_ref"))
def test_pixels_are_prepared_as_in_the_release(name: str) -> None:
    case = Case.load(name)
    ((_, image),) = ((key, value) for key, value in case.inputs.items() if key.startswith("image_pm1_NHWC"))
    expected = case.outputs["get_input_224_bicubic_strided"]
    mean, std = (jnp.asarray(values).reshape(1, 1, 1, 3) for values in (IMAGENET_MEAN, IMAGENET_STD))
    resized = resize(((image + 1) / 2 - mean) / std, (224, 224))
    stride = 224 // expected.shape[-1]
    assert_close(resized[:, ::stride, ::stride].transpose(0, 3, 1, 2), expected, 1e-5)


# Sizes in pixels; the position table is 4 x 4: one that is larger, one that is smaller, one of both.
PEERS = {
    "Dinov2": ({"mlp_ratio": 3, "image_size": 24, "patch_size": 6, "layerscale_value": 0.4}, "24x24 36x18 12x48"),
    "Dinov2 gated": ({"use_swiglu_ffn": True, "image_size": 20, "patch_size": 5, "qkv_bias": False}, "20x20 10x35"),
    "Dinov2WithRegisters": ({"num_register_tokens": 3, "image_size": 24, "patch_size": 6}, "24x24 36x18 12x18"),
    "SiglipVision": ({"intermediate_size": 20, "image_size": 24, "patch_size": 6}, "24x24 36x18 12x48"),
    "ViTMAE": ({"intermediate_size": 20, "image_size": 24, "patch_size": 6, "mask_ratio": 0.0}, "24x24 36x18 12x48"),
}


@pytest.mark.parametrize("name", PEERS)
def test_folders_that_transformers_saves(tmp_path: Path, name: str) -> None:
    """Its own modules with random weights, saved as users have them; config.json leaves out what is as by default."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from safetensors.numpy import load_file

    given, sizes = PEERS[name]
    kind = name.split()[0]
    widths = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = getattr(transformers, f"{kind}Config")(**widths, **given)
    torch.manual_seed(0)
    module = getattr(transformers, f"{kind}Model")(config).eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    module.save_pretrained(tmp_path)
    ours = LearntViTConfig.from_transformers(json.loads((tmp_path / "config.json").read_text()))
    network, params = make(ours, load_file(tmp_path / "model.safetensors"))

    rng = np.random.default_rng(0)
    images = {size: rng.normal(size=(1, *map(int, size.split("x")), 3)).astype(np.float32) for size in sizes.split()}
    for size, (_, sequence) in together(network, params, images).items():
        arguments: dict[str, Any] = {} if "Dinov2" in kind else {"interpolate_pos_encoding": True}
        if kind == "ViTMAE":
            arguments["noise"] = torch.arange(sequence.shape[1] - 1)[None].float()
        with torch.no_grad():
            expected = module(torch.from_numpy(images[size].transpose(0, 3, 1, 2)), **arguments).last_hidden_state
        assert_close(sequence, expected.numpy(), 1e-4, size)


def tiny() -> tuple[Network[LearntViT], Params]:
    network = Network(lambda rngs: LearntViT(TINY, rngs=rngs))
    return network, jax.jit(network.init)(jax.random.key(0))


def test_a_slot_without_an_image_stays_finite() -> None:
    network, params = tiny()
    patches, grid = np.full((2, 6, 12), np.nan, np.float32), np.zeros((2, 2), np.int32)
    assert np.isfinite(jax.jit(lambda params, *args: network(params)(*args))(params, patches, grid)).all()


def test_bfloat16_stays_near_float32() -> None:
    network, params = tiny()
    rounded = Network(lambda rngs: LearntViT(dataclasses.replace(TINY, dtype="bfloat16"), rngs=rngs))
    patches, grid = jax.random.normal(jax.random.key(1), (1, 6, 12)), jnp.array([[3, 2]], jnp.int32)
    expected, found = jax.jit(lambda params: [made(params)(patches, grid) for made in (network, rounded)])(params)
    assert found.dtype == jnp.float32
    assert_close(found, expected, 3e-2)


def test_patches_of_another_size_are_refused() -> None:
    network, params = tiny()
    with pytest.raises(ValueError, match="patch_size 2 needs 12"):
        network(params)(jnp.zeros((1, 2, 768)), jnp.array([[1, 2]], jnp.int32))


def test_pixel_statistics_of_the_model_itself() -> None:
    """SigLIP's own are a choice; what is given to every encoder by default are those of ImageNet."""
    config = LearntViTConfig.published("siglip2_base_patch16_256", pixel_mean=(0.5,) * 3, pixel_std=(0.5,) * 3)
    pixels = jnp.array([[[0, 255, 51]]], jnp.uint8)
    assert_close(normalise_pixels(pixels, config.pixel_mean, config.pixel_std), [[[-1.0, 1.0, -0.6]]], 1e-6)
    assert LearntViTConfig.published("siglip2_base_patch16_256").pixel_mean == IMAGENET_MEAN


# Parameters in millions: DINOv2's model card; timm's towers of SigLIP without the head (position tables of 14 x 14,
# 16 x 16, 16 x 16) and encoders of MAE.
@pytest.mark.parametrize(
    ("name", "changes", "millions"),
    [
        ("dinov2_vits14", {}, 22.06),
        ("dinov2_vitb14", {}, 86.58),
        ("dinov2_vitl14", {}, 304.37),
        ("dinov2_vitg14", {}, 1136.48),
        ("dinov2_vitg14_reg", {}, 1136.49),
        ("siglip2_base_patch16_256", {"grid": (14, 14)}, 85.80),
        ("siglip2_large_patch16_256", {}, 303.36),
        ("siglip2_so400m_patch14_224", {}, 412.44),
        ("mae_vitb16", {}, 85.80),
        ("mae_vitl16", {}, 303.30),
        ("mae_vith14", {}, 630.76),
    ],
)
def test_published_sizes_have_the_published_number_of_parameters(name: str, changes: dict, millions: float) -> None:
    config = LearntViTConfig.published(name, **changes)
    shapes = Network(lambda rngs: LearntViT(config, rngs=rngs)).shapes
    assert sum(np.prod(struct.shape) for struct in shapes.values()) / 1e6 == pytest.approx(millions, rel=2e-4)


def test_kernels_carry_logical_axes() -> None:
    config = LearntViTConfig.published("dinov2_vitg14_reg")
    network = Network(lambda rngs: LearntViT(config, rngs=rngs))
    assert network.axes["blocks.mlp.w12.kernel"] == ("layers", "embed", "mlp")
    for key, struct in network.shapes.items():
        assert len(network.axes[key]) == len(struct.shape), key
        assert not key.endswith("kernel") or "embed" in network.axes[key], key


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"model_type": "clip"}, "'clip' is no encoder with a position table"),
        ({"model_type": "siglip2_vision_model"}, "'siglip2_vision_model' is no encoder"),
        ({"model_type": "vit_mae", "hidden_act": "relu"}, "hidden_act = 'relu'"),
        ({"model_type": "dinov2", "image_size": [224, 448]}, "must be square"),
        ({"model_type": "dinov2", "num_channels": 1}, "num_channels = 1"),
        ({"model_type": "dinov2", "hidden_size": 30, "num_attention_heads": 4}, "30 channels"),
    ],
)
def test_what_no_published_model_has_is_refused(config: dict, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        LearntViTConfig.from_transformers(config)


def test_bad_configs_are_refused() -> None:
    with pytest.raises(ValueError, match="did you mean 'dinov2_vitb14'"):
        LearntViTConfig.published("dinov2_vit_b14")
    with pytest.raises(ValueError, match="unknown family of encoders 'dino2'"):
        LearntViTConfig(family="dino2")
    with pytest.raises(ValueError, match="rows and columns"):
        LearntViTConfig(grid=(0, 3))
    with pytest.raises(ValueError, match="one number a colour, not 1 and 3"):
        LearntViTConfig(pixel_mean=(0.5,))


def test_every_published_size_is_of_a_family() -> None:
    assert {LearntViTConfig.published(name).family for name in PUBLISHED} == {"dinov2", "siglip2", "mae"}
