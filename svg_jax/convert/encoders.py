"""Vision models: which one a state dict is of, its sizes, its table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from svg_jax.config import check_keys
from svg_jax.convert.model import FAMILIES, Model, count, inside, shape_of, shapes_of
from svg_jax.convert.rules import Table, below
from svg_jax.convert.tables import BESIDE, DINOV3, LEARNT_VIT, LEARNT_VIT_TRANSFORMERS, dinov3_transformers
from svg_jax.models.encoders import EncoderConfig
from svg_jax.models.vit import ViTConfig
from svg_jax.models.vit_learnt import PUBLISHED, LearntViTConfig

TRANSFORMERS = "transformers"  # the layout of the names; a prefix that all of them have follows after a colon

_SIGNS = {
    # (family, layout): keys that it has and no other has; of transformers below any of its prefixes
    ("dinov3", ""): ("patch_embed.proj.weight", "rope_embed.periods"),
    ("dinov3", TRANSFORMERS): ("embeddings.patch_embeddings.weight", "layer.0.attention.q_proj.weight"),
    ("dinov2", TRANSFORMERS): ("embeddings.patch_embeddings.projection.weight", "encoder.layer.0.layer_scale1.lambda1"),
    ("mae", TRANSFORMERS): (
        "embeddings.patch_embeddings.projection.weight",
        "encoder.layer.0.intermediate.dense.weight",
    ),
    ("siglip2", TRANSFORMERS): ("embeddings.patch_embedding.weight", "encoder.layers.0.self_attn.q_proj.weight"),
    ("dinov2", ""): ("patch_embed.proj.weight", "pos_embed", "blocks.0.ls1.gamma"),
    ("mae", ""): ("patch_embed.proj.weight", "pos_embed", "blocks.0.attn.qkv.weight"),
}
_ROPE = ("base", "min_period", "max_period", "normalize_coords", "dtype")
_ROPE_IN_TRAINING = ("shift_coords", "jitter_coords", "rescale_coords")
DINOV3_ARGUMENTS = (
    *("embed_dim", "depth", "num_heads", "ffn_ratio", "ffn_layer", "norm_layer", "layerscale_init", "n_storage_tokens"),
    *("qkv_bias", "mask_k_bias", "ffn_bias", "proj_bias", "patch_size", "in_chans"),
    *("untie_cls_and_patch_norms", "untie_global_and_local_cls_norm"),
    *(f"pos_embed_rope_{name}" for name in (*_ROPE, *_ROPE_IN_TRAINING)),
    *("drop_path_rate", "img_size", "device"),  # without effect on the sizes
)
"""Constructor arguments of the models on torch.hub."""

_PREFIXES = {"dinov2": ("", "dinov2."), "mae": ("", "vit."), "siglip2": ("", "vision_model.")}
_MODEL_TYPES = {"mae": "vit_mae", "siglip2": "siglip_vision_model"}


def told_by(names: Iterable[str]) -> tuple[str, str] | None:
    """Family and layout of a vision model with such keys, or None."""
    keys = set(names)
    for (family, layout), signs in _SIGNS.items():
        for prefix in _PREFIXES.get(family, ("",)) if layout else ("",):
            if all(prefix + sign in keys for sign in signs):
                return family, f"{layout}:{prefix}" if prefix else layout
    return None


def table_of(config: EncoderConfig, layout: str) -> Table:
    """The table of a vision model."""
    kind, _, prefix = layout.partition(":")
    if isinstance(config, ViTConfig):
        return dinov3_transformers(gated=config.gated, rope_base=config.rope_base) if kind else DINOV3
    if not kind:
        return LEARNT_VIT
    return (*below(prefix, LEARNT_VIT_TRANSFORMERS[config.family], ours=""), *BESIDE[config.family])


def encoder(config: EncoderConfig, layout: str, notes: tuple[str, ...] = ()) -> Model:
    """The model of a config."""
    return Model("encoder", layout, {"encoder": config}, table_of(config, layout), shapes_of(config), notes)


def recognise(
    weights: Mapping[str, Any],
    structs: Mapping[str, Any],
    arguments: Mapping[str, Any] | None,
    transformers: Mapping[str, Any] | None,
) -> Model:
    """A vision model.

    Args:
        weights: Its tensors; a few numbers are read.
        structs: Their shapes.
        arguments: Of `--architecture`: constructor arguments, or what would stand in a `config.json`.
        transformers: The `config.json` beside it.

    Raises:
        ValueError: Its sizes cannot be told.
    """
    told = told_by(structs)
    if told is None:
        raise ValueError("these are the weights of no vision model that is known here")
    family, layout = told
    if layout:
        config = transformers or arguments
        if config is None:
            raise ValueError(f"a {FAMILIES[family]} of transformers needs its config.json: name the folder with both")
        return encoder(_of_transformers(family, layout, structs, config), layout)
    if family == "dinov3":
        return encoder(_dinov3(weights, structs, arguments), layout)
    return encoder(_learnt(family, structs, arguments), layout)


def _of_transformers(family: str, layout: str, structs: Mapping[str, Any], config: Mapping[str, Any]) -> EncoderConfig:
    if family == "dinov3":
        return ViTConfig.from_transformers(dict(config))
    prefix = layout.partition(":")[2]
    if family == "siglip2":
        if len(structs[f"{prefix}embeddings.patch_embedding.weight"].shape) != 4:
            raise ValueError(
                "this SigLIP 2 takes images of any shape (NaFlex): not supported, only those of one size are"
            )
        config = config.get("vision_config", config)
    registers = f"{prefix}embeddings.register_tokens" in structs
    kind = _MODEL_TYPES.get(family, "dinov2_with_registers" if registers else "dinov2")
    return LearntViTConfig.from_transformers({**config, "model_type": kind})


def _dinov3(weights: Mapping[str, Any], structs: Mapping[str, Any], arguments: Mapping[str, Any] | None) -> ViTConfig:
    if arguments is not None:
        check_keys(arguments, DINOV3_ARGUMENTS, "the DINOv3 of --architecture")
        return ViTConfig.from_release(dict(arguments))
    dim, periods = shape_of(structs, "cls_token", 3)[-1], shape_of(structs, "rope_embed.periods", 1)[0]
    gated = "blocks.0.mlp.w1.weight" in structs
    last = float(weights["rope_embed.periods"][-1])  # base^((n - 1) / n)
    return ViTConfig(
        dim=dim,
        num_layers=count(structs, "blocks."),
        num_heads=dim // (4 * periods),
        hidden_dim=shape_of(structs, f"blocks.0.mlp.{'w1' if gated else 'fc1'}.weight", 2)[0],
        gated=gated,
        qkv_bias="blocks.0.attn.qkv.bias" in structs,
        mask_key_bias="blocks.0.attn.qkv.bias" not in structs or "blocks.0.attn.qkv.bias_mask" in structs,
        local_norm="local_cls_norm.weight" in structs,
        num_storage_tokens=shape_of(structs, "storage_tokens", 3)[1] if "storage_tokens" in structs else 0,
        patch_size=shape_of(structs, "patch_embed.proj.weight", 4)[-1],
        rope_base=float(f"{last ** (periods / (periods - 1)):.4g}") if periods > 1 else 100.0,
    )


def _learnt(family: str, structs: Mapping[str, Any], arguments: Mapping[str, Any] | None) -> LearntViTConfig:
    """DINOv2 or MAE under their own names; how many heads they have, the weights do not tell."""
    dim, gated = shape_of(structs, "cls_token", 3)[-1], "blocks.0.mlp.w12.weight" in structs
    rows = shape_of(structs, f"blocks.0.mlp.{'w12' if gated else 'fc1'}.weight", 2)[0]
    registers = shape_of(structs, "register_tokens", 3)[1] if "register_tokens" in structs else 0
    side = round((shape_of(structs, "pos_embed", 3)[1] - 1) ** 0.5)
    sizes: dict[str, Any] = {
        "family": family,
        "dim": dim,
        "num_layers": count(structs, "blocks."),
        "hidden_dim": rows // 2 if gated else rows,
        "gated": gated,
        "num_storage_tokens": registers,
        "patch_size": shape_of(structs, "patch_embed.proj.weight", 4)[-1],
    }
    check_keys(arguments or (), ("num_heads",), f"the {FAMILIES[family]} of --architecture")
    heads = (arguments or {}).get("num_heads")
    for published in (LearntViTConfig.published(name) for name in PUBLISHED):
        if heads is None and all(getattr(published, name) == value for name, value in sizes.items()):
            heads = published.num_heads
    if heads is None:
        raise ValueError(
            f"this {FAMILIES[family]} is of no published size, and its weights do not tell its heads: give them with "
            '--architecture FILE.json, {"num_heads": ...}'
        )
    return LearntViTConfig(
        **sizes,
        num_heads=heads,
        grid=(side, side),
        qkv_bias="blocks.0.attn.qkv.bias" in structs,
        layer_scale=1.0 if family == "dinov2" else None,
        antialias=registers > 0,
    )


def below_prefix(prefix: str, weights: Mapping[str, Any], structs: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """The few numbers that `recognise` reads, and the shapes, of a vision model inside an autoencoder."""
    own = inside(prefix, structs)
    periods = "rope_embed.periods"
    return ({periods: weights[prefix + periods]} if periods in own else {}), own
