"""GenEval's detector, mmdet's Mask2Former with a Swin backbone, as transformers has it.

Read off the code of both; nobody has yet run it on the published file. Beside the names, three things differ. mmdet
packs queries, keys and values into one map. Where Swin merges 2 x 2 patches, the axes are channels, rows, columns in
mmdet and columns, rows, channels in transformers. And mmdet numbers the modules of a transformer's layer in version 2
(`attentions.0`) and names them in version 3 (`self_attn`).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from svg_jax.convert.files import check_local
from svg_jax.convert.formats import Selected, Weights, import_torch, safetensors_writer
from svg_jax.convert.model import count, shape_of
from svg_jax.convert.pretrained import load_pretrained
from svg_jax.convert.rules import Rule, Table, below, iterate_release
from svg_jax.convert.transforms import Transform

NOTE = "converted by a table that nobody has run on the published file yet"
LEVELS, POINTS = 3, 4  # feature maps that the pixel decoder attends to, and points on each

_SIGNS = ("panoptic_head.cls_embed.weight", "backbone.stages.0.blocks.0.attn.w_msa.qkv.weight")
_COMPUTED = re.compile(r"backbone\..+\.relative_position_index")
_HEAD = "panoptic_head."
_MODULES = {  # of a layer, by mmdet's version: the pixel decoder's attention, the decoder's two, feed-forward
    2: {"pixel": "attentions.0", "cross": "attentions.0", "self": "attentions.1", "ffn": "ffns.0"},
    3: {"pixel": "self_attn", "cross": "cross_attn", "self": "self_attn", "ffn": "ffn"},
}


def _unfolded(a: np.ndarray) -> np.ndarray:
    return a.reshape(*a.shape[:-1], 2, 2, -1).swapaxes(-1, -3).reshape(a.shape)


def _folded(a: np.ndarray) -> tuple[np.ndarray, ...]:
    return (a.reshape(*a.shape[:-1], -1, 2, 2).swapaxes(-1, -3).reshape(a.shape),)


MERGED = Transform(_unfolded, _folded)
"""The last axis, [(cols, rows, channels)] <-> [(channels, rows, cols)], of 2 x 2 patches that are merged."""

PACKED = Transform(lambda *parts: np.concatenate(parts), lambda a: tuple(np.split(a, 3)))
"""Three arrays of equal size <-> one, along the first axis."""


def _same(names: Mapping[str, str], words: Iterable[str] = ("weight", "bias")) -> Table:
    return tuple(Rule(f"{left}.{word}", f"{right}.{word}") for left, right in names.items() for word in words)


def _packed(left: Iterable[str], right: str) -> Table:
    """Queries, keys and values; `right` ends as what stands before `weight` does."""
    return tuple(
        Rule(tuple(f"{name}.{word}" for name in left), f"{right}{word}", PACKED) for word in ("weight", "bias")
    )


_BLOCK: Table = (
    *_packed([f"attention.self.{name}" for name in ("query", "key", "value")], "attn.w_msa.qkv."),
    Rule("attention.self.relative_position_bias_table", "attn.w_msa.relative_position_bias_table"),
    *_same({"attention.output.dense": "attn.w_msa.proj"}),
    *_same({"intermediate.dense": "ffn.layers.0.0", "output.dense": "ffn.layers.1"}),
    *_same({"layernorm_before": "norm1", "layernorm_after": "norm2"}),
)
_SWIN: Table = (
    *_same({"embeddings.patch_embeddings.projection": "patch_embed.projection", "embeddings.norm": "patch_embed.norm"}),
    *below("encoder.layers.{stage}.blocks.{block}.", _BLOCK, "stages.{stage}.blocks.{block}."),
    Rule("encoder.layers.{stage}.downsample.reduction.weight", "stages.{stage}.downsample.reduction.weight", MERGED),
    Rule("encoder.layers.{stage}.downsample.norm.weight", "stages.{stage}.downsample.norm.weight", MERGED),
    Rule("encoder.layers.{stage}.downsample.norm.bias", "stages.{stage}.downsample.norm.bias", MERGED),
    *_same({f"hidden_states_norms.stage{n + 1}": f"norm{n}" for n in range(4)}),
)


def _pixel_decoder(modules: Mapping[str, str]) -> Table:
    attention = ("sampling_offsets", "attention_weights", "value_proj", "output_proj")
    layer = (
        *_same({f"self_attn.{name}": f"{modules['pixel']}.{name}" for name in attention}),
        *_same({"fc1": f"{modules['ffn']}.layers.0.0", "fc2": f"{modules['ffn']}.layers.1"}),
        *_same({"self_attn_layer_norm": "norms.0", "final_layer_norm": "norms.1"}),
    )
    return (
        *_same({"input_projections.{level}.0": "input_convs.{level}.conv"}),
        *_same({"input_projections.{level}.1": "input_convs.{level}.gn"}),
        Rule("level_embed", "level_encoding.weight"),
        *below("encoder.layers.{layer}.", layer, "encoder.layers.{layer}."),
        *_same({"adapter_1.0": "lateral_convs.0.conv", "layer_1.0": "output_convs.0.conv"}, ["weight"]),
        *_same({"adapter_1.1": "lateral_convs.0.gn", "layer_1.1": "output_convs.0.gn"}),
        *_same({"mask_projection": "mask_feature"}),
    )


def _transformer(modules: Mapping[str, str]) -> Table:
    cross, own = f"{modules['cross']}.attn", f"{modules['self']}.attn"
    layer = (
        Rule("cross_attn.in_proj_weight", f"{cross}.in_proj_weight"),
        Rule("cross_attn.in_proj_bias", f"{cross}.in_proj_bias"),
        *_packed([f"self_attn.{name}_proj" for name in "qkv"], f"{own}.in_proj_"),
        *_same({"cross_attn.out_proj": f"{cross}.out_proj", "self_attn.out_proj": f"{own}.out_proj"}),
        *_same({"fc1": f"{modules['ffn']}.layers.0.0", "fc2": f"{modules['ffn']}.layers.1"}),
        *_same({"cross_attn_layer_norm": "norms.0", "self_attn_layer_norm": "norms.1", "final_layer_norm": "norms.2"}),
    )
    return (
        *below("decoder.layers.{layer}.", layer, "transformer_decoder.layers.{layer}."),
        *_same({"decoder.layernorm": "transformer_decoder.post_norm"}),
        *_same({f"decoder.mask_predictor.mask_embedder.{n}.0": f"mask_embed.{2 * n}" for n in range(3)}),
        *_same({"queries_embedder": "query_embed", "queries_features": "query_feat"}, ["weight"]),
        *_same({"level_embed": "level_embed"}, ["weight"]),
    )


def mmdet_table(version: int) -> Table:
    """Published names of transformers on the left, mmdet's on the right.

    Args:
        version: Of mmdet, 2 or 3.
    """
    modules = _MODULES[version]
    return (
        *below("model.pixel_level_module.encoder.", _SWIN, "backbone."),
        *below("model.pixel_level_module.decoder.", _pixel_decoder(modules), f"{_HEAD}pixel_decoder."),
        *below("model.transformer_module.", _transformer(modules), _HEAD),
        *_same({"class_predictor": f"{_HEAD}cls_embed"}),
    )


def told_by(names: Iterable[str]) -> bool:
    """Whether a state dict with such keys is of mmdet's Mask2Former with Swin."""
    return set(_SIGNS) <= set(names)


def version_of(names: Iterable[str]) -> int:
    """The version of mmdet that names its modules so."""
    return 3 if any(name.startswith(f"{_HEAD}transformer_decoder.layers.0.cross_attn.") for name in names) else 2


def transformers_config(structs: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers' `config.json` says of mmdet's weights: their shapes tell all.

    Args:
        structs: What has a shape, by mmdet's names.

    Raises:
        ValueError: A tensor that tells a size is missing, or has another number of axes.
    """
    modules = _MODULES[version_of(structs)]

    def rows(name: str, rank: int = 2) -> int:
        return shape_of(structs, name, rank)[0]

    stages = range(count(structs, "backbone.stages."))
    blocks = [f"backbone.stages.{stage}.blocks.0" for stage in stages]
    tables = [shape_of(structs, f"{block}.attn.w_msa.relative_position_bias_table", 2) for block in blocks]
    dim, _, _, patch = shape_of(structs, "backbone.patch_embed.projection.weight", 4)
    pixels, decoder = f"{_HEAD}pixel_decoder.encoder.layers.", f"{_HEAD}transformer_decoder.layers."
    queries, hidden = shape_of(structs, f"{_HEAD}query_feat.weight", 2)
    return {
        "architectures": ["Mask2FormerForUniversalSegmentation"],
        "model_type": "mask2former",
        "backbone_config": {
            "model_type": "swin",
            "embed_dim": dim,
            "patch_size": patch,
            "depths": [count(structs, f"backbone.stages.{stage}.blocks.") for stage in stages],
            "num_heads": [heads for _, heads in tables],
            "window_size": (math.isqrt(tables[0][0]) + 1) // 2,
            "mlp_ratio": rows(f"{blocks[0]}.ffn.layers.0.0.weight") / dim,
            "out_features": [f"stage{stage + 1}" for stage in stages],
        },
        "feature_size": rows(f"{_HEAD}pixel_decoder.input_convs.0.conv.weight", 4),
        "mask_feature_size": rows(f"{_HEAD}pixel_decoder.mask_feature.weight", 4),
        "hidden_dim": hidden,
        "encoder_layers": count(structs, pixels),
        "encoder_feedforward_dim": rows(f"{pixels}0.{modules['ffn']}.layers.0.0.weight"),
        "decoder_layers": count(structs, decoder) + 1,
        "dim_feedforward": rows(f"{decoder}0.{modules['ffn']}.layers.0.0.weight"),
        "num_attention_heads": rows(f"{pixels}0.{modules['pixel']}.attention_weights.weight") // (LEVELS * POINTS),
        "num_queries": queries,
        "num_labels": rows(f"{_HEAD}cls_embed.weight") - 1,
    }


def to_transformers(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """mmdet's tensors by the names that transformers publishes such networks under.

    Raises:
        ValueError: A tensor has no rule.
    """
    kept = Selected(weights, [name for name in weights if not _COMPUTED.fullmatch(name)])
    return {
        name: np.ascontiguousarray(array) for name, array in iterate_release(kept, mmdet_table(version_of(weights)))
    }


def load_mmdet(weights: Weights, what: str) -> Any:
    """The network, of transformers.

    Args:
        weights: By mmdet's names.
        what: Where they are from, for messages.

    Raises:
        ValueError: Something is missing, of another shape or unknown.
        ImportError: PyTorch is not installed.
    """
    torch = import_torch()
    import transformers

    try:
        config = transformers.Mask2FormerConfig(**transformers_config(weights.structs))
        state = {name: torch.from_numpy(array.copy()) for name, array in to_transformers(weights).items()}
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error
    name = "Mask2FormerForUniversalSegmentation"
    return load_pretrained(name, what, pretrained_model_name_or_path=None, config=config, state_dict=state)


def write_folder(file: Path, weights: Weights, folder: Path) -> None:
    """Fills a folder of transformers from mmdet's weights, which must be whole; errors as `load_mmdet`.

    Its config tells under `svg_jax_source` how the SHA-256 of the file begins, by which mmdet names its files.
    """
    check_local(folder)
    load_mmdet(weights, str(file))
    state = to_transformers(weights)
    with file.open("rb") as stream:
        source = hashlib.file_digest(stream, "sha256").hexdigest()[:16]
    config = transformers_config(weights.structs) | {"svg_jax_source": source}
    structs = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in state.items()}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    with safetensors_writer(folder / "model.safetensors", structs, {"format": "pt"}) as write:
        for name, array in state.items():
            write(name, array)
