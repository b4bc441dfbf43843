"""mmdet's Mask2Former: its names and shapes as its code makes them, and the same network in transformers."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from svg_jax.convert.detectors import (
    load_mmdet,
    mmdet_table,
    to_transformers,
    told_by,
    transformers_config,
    version_of,
)
from svg_jax.convert.formats import Weights
from svg_jax.convert.pretrained import UNUSED
from svg_jax.convert.rules import to_jax
from svg_jax.evaluate.geneval.detector import Detector
from tests.convert.release import run
from tests.convert.test_bad_input import error
from tests.evaluate.geneval.test_detector import pictures
from tests.evaluate.geneval.test_detector import small as small
from tests.evaluate.tiny_networks import tiny_detector

Shapes = dict[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of a network; by default those of mmdet's configuration `mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco`."""

    dim: int = 96
    depths: tuple[int, ...] = (2, 2, 18, 2)
    heads: tuple[int, ...] = (3, 6, 12, 24)
    window: int = 7
    mlp: int = 4
    features: int = 256
    pixel_layers: int = 6
    pixel_hidden: int = 1024
    pixel_heads: int = 8
    layers: int = 9
    hidden: int = 2048
    queries: int = 100
    classes: int = 80


TINY = Sizes(16, (2, 1, 2, 1), (1, 2, 2, 4), 4, 2, 32, 2, 48, 4, 3, 40, 12)


def linear(name: str, outputs: int, inputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def norm(name: str, channels: int) -> Shapes:
    return {f"{name}.weight": (channels,), f"{name}.bias": (channels,)}


def swin(sizes: Sizes) -> Shapes:
    """mmdet/models/backbones/swin.py, and its PatchEmbed and PatchMerging."""
    shapes = {
        "backbone.patch_embed.projection.weight": (sizes.dim, 3, 4, 4),
        "backbone.patch_embed.projection.bias": (sizes.dim,),
        "backbone.patch_embed.norm.weight": (sizes.dim,),
        "backbone.patch_embed.norm.bias": (sizes.dim,),
    }
    for i, depth in enumerate(sizes.depths):
        width = sizes.dim * 2**i
        for j in range(depth):
            block = f"backbone.stages.{i}.blocks.{j}."
            shapes |= norm(f"{block}norm1", width)
            shapes[f"{block}attn.w_msa.relative_position_bias_table"] = ((2 * sizes.window - 1) ** 2, sizes.heads[i])
            shapes[f"{block}attn.w_msa.relative_position_index"] = (sizes.window**2, sizes.window**2)
            shapes |= linear(f"{block}attn.w_msa.qkv", 3 * width, width)
            shapes |= linear(f"{block}attn.w_msa.proj", width, width)
            shapes |= norm(f"{block}norm2", width)
            shapes |= linear(f"{block}ffn.layers.0.0", sizes.mlp * width, width)
            shapes |= linear(f"{block}ffn.layers.1", width, sizes.mlp * width)
        if i < 3:
            shapes |= norm(f"backbone.stages.{i}.downsample.norm", 4 * width)
            shapes[f"backbone.stages.{i}.downsample.reduction.weight"] = (2 * width, 4 * width)
        shapes |= norm(f"backbone.norm{i}", width)
    return shapes


def head(sizes: Sizes, version: int) -> Shapes:
    """Mask2FormerHead, MSDeformAttnPixelDecoder and their layers, mmcv's in version 2 and mmdet's own in version 3."""
    c, points = sizes.features, sizes.pixel_heads * 3 * 4
    shapes: Shapes = {}
    pixel = "panoptic_head.pixel_decoder."
    for i, stage in enumerate((3, 2, 1)):  # from low to high resolution
        shapes[f"{pixel}input_convs.{i}.conv.weight"] = (c, sizes.dim * 2**stage, 1, 1)
        shapes[f"{pixel}input_convs.{i}.conv.bias"] = (c,)
        shapes |= norm(f"{pixel}input_convs.{i}.gn", c)
    for i in range(sizes.pixel_layers):
        layer = f"{pixel}encoder.layers.{i}."
        attention = f"{layer}attentions.0." if version == 2 else f"{layer}self_attn."
        shapes |= linear(f"{attention}sampling_offsets", points * 2, c)
        shapes |= linear(f"{attention}attention_weights", points, c)
        shapes |= linear(f"{attention}value_proj", c, c)
        shapes |= linear(f"{attention}output_proj", c, c)
        ffn = f"{layer}ffns.0." if version == 2 else f"{layer}ffn."
        shapes |= linear(f"{ffn}layers.0.0", sizes.pixel_hidden, c) | linear(f"{ffn}layers.1", c, sizes.pixel_hidden)
        shapes |= norm(f"{layer}norms.0", c) | norm(f"{layer}norms.1", c)
    shapes[f"{pixel}level_encoding.weight"] = (3, c)
    shapes[f"{pixel}lateral_convs.0.conv.weight"] = (c, sizes.dim, 1, 1)
    shapes |= norm(f"{pixel}lateral_convs.0.gn", c)
    shapes[f"{pixel}output_convs.0.conv.weight"] = (c, c, 3, 3)
    shapes |= norm(f"{pixel}output_convs.0.gn", c)
    shapes |= {f"{pixel}mask_feature.weight": (c, c, 1, 1), f"{pixel}mask_feature.bias": (c,)}
    for i in range(sizes.layers):
        layer = f"panoptic_head.transformer_decoder.layers.{i}."
        for attention in ("attentions.0", "attentions.1") if version == 2 else ("self_attn", "cross_attn"):
            shapes[f"{layer}{attention}.attn.in_proj_weight"] = (3 * c, c)
            shapes[f"{layer}{attention}.attn.in_proj_bias"] = (3 * c,)
            shapes |= linear(f"{layer}{attention}.attn.out_proj", c, c)
        ffn = f"{layer}ffns.0." if version == 2 else f"{layer}ffn."
        shapes |= linear(f"{ffn}layers.0.0", sizes.hidden, c) | linear(f"{ffn}layers.1", c, sizes.hidden)
        for n in range(3):
            shapes |= norm(f"{layer}norms.{n}", c)
    shapes |= norm("panoptic_head.transformer_decoder.post_norm", c)
    shapes["panoptic_head.query_embed.weight"] = (sizes.queries, c)
    shapes["panoptic_head.query_feat.weight"] = (sizes.queries, c)
    shapes["panoptic_head.level_embed.weight"] = (3, c)
    shapes |= linear("panoptic_head.cls_embed", sizes.classes + 1, c)
    for n in (0, 2, 4):
        shapes |= linear(f"panoptic_head.mask_embed.{n}", c, c)
    return shapes


def structs(sizes: Sizes, version: int) -> dict[str, jax.ShapeDtypeStruct]:
    shapes = swin(sizes) | head(sizes, version)
    return {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}


def mmdet_weights(version: int, seed: int = 0) -> Weights:
    """Random ones of the tiny size; norms near one, so that the network is no chaos."""
    rng = np.random.default_rng(seed)
    told = structs(TINY, version)

    def make(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name.endswith("relative_position_index"):
            return np.zeros(shape, np.float32)
        scale = 1.0 if "cls_embed" in name else 0.2
        offset = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        return (offset + scale * rng.standard_normal(shape)).astype(np.float32)

    arrays = {name: make(name, struct.shape) for name, struct in told.items()}
    return Weights(told, arrays.__getitem__)


def saved(weights: Weights, path: Path) -> Path:
    state = {name: torch.from_numpy(array) for name, array in weights.items()}
    torch.save({"meta": {"mmdet_version": "2.25.0", "CLASSES": ("person",)}, "state_dict": state}, path)
    return path


@pytest.mark.parametrize("version", [2, 3])
def test_the_published_size_is_told_from_the_shapes(version: int) -> None:
    published = structs(Sizes(), version)
    assert told_by(published)
    assert version_of(published) == version
    config = transformers_config(published)
    swin_s = config.pop("backbone_config")
    assert swin_s == {
        "model_type": "swin",
        "embed_dim": 96,
        "patch_size": 4,
        "depths": [2, 2, 18, 2],
        "num_heads": [3, 6, 12, 24],
        "window_size": 7,
        "mlp_ratio": 4.0,
        "out_features": ["stage1", "stage2", "stage3", "stage4"],
    }
    assert config == {
        "architectures": ["Mask2FormerForUniversalSegmentation"],
        "model_type": "mask2former",
        "feature_size": 256,
        "mask_feature_size": 256,
        "hidden_dim": 256,
        "encoder_layers": 6,
        "encoder_feedforward_dim": 1024,
        "decoder_layers": 10,
        "dim_feedforward": 2048,
        "num_attention_heads": 8,
        "num_queries": 100,
        "num_labels": 80,
    }


@pytest.mark.parametrize("version", [2, 3])
def test_every_number_arrives_and_comes_back(version: int) -> None:
    weights = mmdet_weights(version)
    theirs = to_transformers(weights)
    back = to_jax(theirs, mmdet_table(version))
    assert back.keys() == {name for name in weights if not name.endswith("relative_position_index")}
    for name, array in back.items():
        np.testing.assert_array_equal(array, weights[name])


def test_names_are_those_that_transformers_saves(tmp_path: Path) -> None:
    made = load_file(Path(tiny_detector(tmp_path)) / "model.safetensors")
    assert {name for name in made if not UNUSED.fullmatch(name)} == set(to_transformers(mmdet_weights(2)))


@pytest.mark.parametrize("version", [2, 3])
def test_windows_and_merged_patches_are_computed_as_in_mmdet(version: int) -> None:
    weights = mmdet_weights(version)
    network = load_mmdet(weights, "these")
    stage = network.model.pixel_level_module.encoder.swin.encoder.layers[0]
    state = {name: torch.from_numpy(array) for name, array in weights.items() if name.startswith("backbone.stages.0.")}
    torch.manual_seed(0)

    # PatchMerging gathers 2 x 2 patches by nn.Unfold.
    x, merging = torch.randn(2, 6 * 8, TINY.dim), "backbone.stages.0.downsample."
    patches = nn.Unfold(2, stride=2)(x.view(2, 6, 8, -1).permute(0, 3, 1, 2)).transpose(1, 2)
    width = 4 * TINY.dim
    merged = F.layer_norm(patches, (width,), state[f"{merging}norm.weight"], state[f"{merging}norm.bias"])
    expected = F.linear(merged, state[f"{merging}reduction.weight"])
    torch.testing.assert_close(stage.downsample(x, (6, 8)), expected, rtol=1e-4, atol=1e-5)

    # WindowMSA: one map for queries, keys and values, and its own way to count relative positions.
    side, attention = TINY.window, "backbone.stages.0.blocks.0.attn.w_msa."
    rows = (torch.arange(0, (2 * side - 1) * side, 2 * side - 1)[:, None] + torch.arange(side)[None]).reshape(1, -1)
    index = (rows + rows.T).flip(1)
    bias = state[f"{attention}relative_position_bias_table"][index].permute(2, 0, 1)
    x = torch.randn(5, side**2, TINY.dim)
    qkv = F.linear(x, state[f"{attention}qkv.weight"], state[f"{attention}qkv.bias"])
    q, k, v = qkv.reshape(5, side**2, 3, TINY.heads[0], -1).permute(2, 0, 3, 1, 4)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + bias
    mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape)
    expected = F.linear(mixed, state[f"{attention}proj.weight"], state[f"{attention}proj.bias"])
    found = stage.blocks[0].attention(x)
    torch.testing.assert_close(found[0] if isinstance(found, tuple) else found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("version", [2, 3])
def test_the_decoders_attentions_are_computed_as_in_mmdet(version: int) -> None:
    weights = mmdet_weights(version)
    layer = load_mmdet(weights, "these").model.transformer_module.decoder.layers[1]
    names = (
        {"self": "attentions.1", "cross": "attentions.0"}
        if version == 2
        else {"self": "self_attn", "cross": "cross_attn"}
    )
    torch.manual_seed(0)
    x, place, memory = (torch.randn(7, 1, TINY.features) for _ in range(3))

    def theirs(which: str, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        prefix = f"panoptic_head.transformer_decoder.layers.1.{names[which]}.attn."
        module = nn.MultiheadAttention(TINY.features, TINY.pixel_heads)
        module.load_state_dict(
            {n.removeprefix(prefix): torch.from_numpy(weights[n]) for n in weights if n.startswith(prefix)}
        )
        with torch.no_grad():
            return module(query, key, value)[0]

    found = layer.self_attn(hidden_states=x, position_embeddings=place)[0]
    torch.testing.assert_close(found, theirs("self", x + place, x + place, x), rtol=1e-4, atol=1e-5)
    found = layer.cross_attn(x + place, memory, memory)[0]
    torch.testing.assert_close(found, theirs("cross", x + place, memory, memory), rtol=1e-4, atol=1e-5)


def test_both_versions_are_one_network() -> None:
    two, three = mmdet_weights(2), mmdet_weights(3)
    words = (
        ("attentions.0.attn", "cross_attn.attn"),
        ("attentions.1.attn", "self_attn.attn"),
        ("attentions.0", "self_attn"),
    )

    def renamed(name: str) -> str:
        for old, new in (*words, ("ffns.0", "ffn")):
            name = name.replace(old, new)
        return name

    same = Weights(three.structs, {renamed(name): array for name, array in two.items()}.__getitem__)
    expected = to_transformers(two)
    for name, array in to_transformers(same).items():
        np.testing.assert_array_equal(array, expected[name])


def test_imported_and_named_as_it_is_the_detections_are_equal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = saved(mmdet_weights(2), tmp_path / "official.pth")
    run("inspect", file)
    assert "detector (Mask2Former with Swin, of mmdet)" in capsys.readouterr().out
    run("import", file, "--to", tmp_path)
    said = capsys.readouterr().out
    assert str(tmp_path / "detector") in said
    assert "nobody has run on the published file yet" in said
    config = json.loads((tmp_path / "detector/config.json").read_text())
    assert config["num_queries"] == TINY.queries
    assert config["svg_jax_source"] == hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    assert "detector already" in error(capsys, "import", file, "--to", tmp_path)

    found = [Detector.load(str(path), device="cpu")(pictures()) for path in (file, tmp_path / "detector")]
    assert sum(len(objects) for objects in found[0][0].values()) > 10
    for one, other in zip(*found, strict=True):
        assert list(one) == list(other)
        for name in one:
            for a, b in zip(one[name], other[name], strict=True):
                assert a.score == b.score
                np.testing.assert_array_equal(a.mask, b.mask)


def changed(weights: Weights, path: Path, **changes: Any) -> Path:
    """A file with some tensors replaced, or left out where None."""
    arrays = dict(weights) | {name.replace("__", "."): value for name, value in changes.items()}
    arrays = {name: value for name, value in arrays.items() if value is not None}
    told = {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in arrays.items()}
    return saved(Weights(told, arrays.__getitem__), path)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = mmdet_weights(2)
    lacking = changed(weights, tmp_path / "lacking.pth", panoptic_head__query_embed__weight=None)
    told = error(capsys, "import", lacking, "--to", tmp_path)
    assert "lacking.pth" in told
    assert "queries_embedder" in told
    unknown = changed(weights, tmp_path / "unknown.pth", backbone__extra__weight=np.zeros(3, np.float32))
    assert "backbone.extra.weight" in error(capsys, "import", unknown, "--to", tmp_path)
    other = changed(weights, tmp_path / "other.pth", panoptic_head__level_embed__weight=np.zeros((4, 32), np.float32))
    assert "level_embed" in error(capsys, "import", other, "--to", tmp_path)
    assert not (tmp_path / "detector").exists()
