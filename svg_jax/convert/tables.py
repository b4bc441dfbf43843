"""The tables of rules, one a network: names of the release on the left, ours on the right."""

from __future__ import annotations

from svg_jax.convert.rules import Carried, Dropped, Filled, Rule, Table
from svg_jax.convert.transforms import (
    CONV2D,
    CONV3D,
    FUSED_BIAS,
    FUSED_LINEAR,
    FUSED_QV_BIAS,
    LEADING_AXIS,
    LINEAR,
    PATCHES,
    Transform,
)
from svg_jax.models.vit import rope_periods
from svg_jax.nn.blocks import qkv_bias_mask


def _renamed(names: dict[str, str]) -> Table:
    """Linear maps that have other names in the release."""
    return tuple(
        Rule(f"{theirs}.{left}", f"{ours}.{right}", transform)
        for theirs, ours in names.items()
        for left, right, transform in (("weight", "kernel", LINEAR), ("bias", "bias", None))
    )


def _norms(names: dict[str, str]) -> Table:
    """Layer norms that have other names in the release."""
    return tuple(
        Rule(f"{theirs}.{left}", f"{ours}.{right}")
        for theirs, ours in names.items()
        for left, right in (("weight", "scale"), ("bias", "bias"))
    )


NEXT_DIT: Table = (
    Rule("{stack:layers|noise_refiner|context_refiner}.{i}.{path:.*norm[12]?}.weight", "{stack}.{path}.scale"),
    Rule("{stack:layers|noise_refiner|context_refiner}.{i}.{path:.+}.weight", "{stack}.{path}.kernel", LINEAR),
    Rule("{stack:layers|noise_refiner|context_refiner}.{i}.{path:.+}.bias", "{stack}.{path}.bias"),
    Rule("{path:cap_embedder.0|norm_final}.weight", "{path}.scale"),
    Rule("{path:.+}.weight", "{path}.kernel", LINEAR),
    Rule("{path:.+}.bias", "{path}.bias"),
)
"""`models.next_dit`: `consolidated.*.pth`."""


def _decoder(convolution: Transform) -> Table:
    return (
        Rule("{path:.*norm(1|2|_out)?}.weight", "{path}.scale"),
        Rule("{path:.+}.weight", "{path}.kernel", convolution),
        Rule("{path:.+}.bias", "{path}.bias"),
    )


DECODER, HY_DECODER = _decoder(CONV2D), _decoder(CONV3D)
"""`models.decoder` and `models.decoder_hy`: what stands under `decoder.` in the autoencoder's checkpoint."""

DINOV3: Table = (
    Rule("blocks.{i}.{norm:norm[12]}.weight", "blocks.{norm}.scale"),
    Rule("blocks.{i}.{path:.+}.weight", "blocks.{path}.kernel", LINEAR),
    Rule("blocks.{i}.{path:.+}.{name:bias|bias_mask|gamma}", "blocks.{path}.{name}"),
    Rule("patch_embed.proj.weight", "patch_embed.proj.kernel", PATCHES),
    Rule("{norm:norm|local_cls_norm}.weight", "{norm}.scale"),
    Rule("{path:.+}.bias", "{path}.bias"),
    Rule("{name:cls_token|storage_tokens|mask_token|rope_embed.periods}", "{name}"),
)
"""`models.vit`: DINOv3 as torch.hub distributes it."""

LEARNT_VIT: Table = (
    Carried("mask_token", "for masked training"),
    Rule("blocks.{i}.{norm:norm[12]}.weight", "blocks.{norm}.scale"),
    Rule("blocks.{i}.{path:.+}.weight", "blocks.{path}.kernel", LINEAR),
    Rule("blocks.{i}.{path:.+}.{name:bias|gamma}", "blocks.{path}.{name}"),
    Rule("patch_embed.proj.weight", "patch_embed.proj.kernel", PATCHES),
    Rule("pos_embed", "pos_embed", LEADING_AXIS),
    Rule("register_tokens", "storage_tokens"),
    Rule("cls_token", "cls_token"),
    Rule("norm.weight", "norm.scale"),
    Rule("{path:patch_embed.proj|norm}.bias", "{path}.bias"),
)
"""`models.vit_learnt`: DINOv2 of torch.hub and the encoder of MAE's own files, which have the names of timm."""

_RESIDUAL_HEAD: Table = (
    Rule("heads.{n:0|2}.weight", "heads.{n}.kernel", LINEAR),
    Rule("heads.{n:0|2}.bias", "heads.{n}.bias"),
)
_TORCHVISION_LAYER = "encoder.layers.encoder_layer_{i}"

RESIDUAL: dict[str, Table] = {
    "rope": (
        Carried("head.{name:weight|bias}", "of a classifier, unused in the release too"),
        Carried("freqs_t_{axis:x|y}", "rows and columns, computed here"),
        Rule("blocks.{i}.{norm:norm[12]}.weight", "blocks.{norm}.scale"),
        Rule("blocks.{i}.gamma_{n}", "blocks.ls{n}.gamma"),
        Rule("blocks.{i}.{path:.+}.weight", "blocks.{path}.kernel", LINEAR),
        Rule("blocks.{i}.{path:.+}.bias", "blocks.{path}.bias"),
        Rule("patch_embed.proj.weight", "patch_embed.proj.kernel", PATCHES),
        Rule("{name:cls_token|freqs}", "{name}"),
        *_RESIDUAL_HEAD,
        Rule("norm.weight", "norm.scale"),
        Rule("{path:patch_embed.proj|norm}.bias", "{path}.bias"),
    ),
    "learnt": (
        Rule(f"{_TORCHVISION_LAYER}.self_attention.in_proj_weight", "blocks.attn.qkv.kernel", LINEAR),
        Rule(f"{_TORCHVISION_LAYER}.self_attention.in_proj_bias", "blocks.attn.qkv.bias"),
        *_renamed({f"{_TORCHVISION_LAYER}.self_attention.out_proj": "blocks.attn.proj"}),
        *_renamed({f"{_TORCHVISION_LAYER}.mlp.{n}": f"blocks.mlp.{ours}" for n, ours in ((0, "fc1"), (3, "fc2"))}),
        *_norms({f"{_TORCHVISION_LAYER}.ln_{n}": f"blocks.norm{n}" for n in (1, 2)} | {"encoder.ln": "norm"}),
        Rule("conv_proj.weight", "patch_embed.proj.kernel", PATCHES),
        Rule("conv_proj.bias", "patch_embed.proj.bias"),
        Rule("class_token", "cls_token"),
        Rule("encoder.pos_embedding", "pos_embed", LEADING_AXIS),
        *_RESIDUAL_HEAD,
    ),
}
"""`models.residual`: what stands under `extra_vit.`, of either family (the second is torchvision's)."""

DISCRIMINATOR: Table = (
    Carried("main.{n}.num_batches_tracked", "a count that nothing reads"),
    Rule("main.{n}.{name:running_mean|running_var|bias}", "main.{n}.{name}"),
    Rule("main.{n:[369]|1[258]}.weight", "main.{n}.scale"),
    Rule("main.{n}.weight", "main.{n}.kernel", CONV2D),
)
"""`models.discriminator`: every third module is a batch norm, but for the first and the last."""

_SLICES = {1: "0|2", 2: "5|7", 3: "10|12|14", 4: "17|19|21", 5: "24|26|28"}  # convolutions of VGG16, by LPIPS's slices
_HEADS: Table = (Rule("lin{n:[0-4]}.model.1.weight", "lin{n}.model.1.kernel", CONV2D),)


def _vgg16(names: str) -> Table:
    """VGG16's convolutions; `names` says what they are called, where `{slice}` is LPIPS's slice."""
    return tuple(
        Rule(f"{names.format(slice=k)}.{{n:{found}}}.{theirs}", f"net.slice{k}.{{n}}.{ours}", transform)
        for k, found in _SLICES.items()
        for theirs, ours, transform in (("weight", "kernel", CONV2D), ("bias", "bias", None))
    )


LPIPS_FILES: Table = (
    *_HEADS,
    *_vgg16("features"),
    Dropped("classifier.{path:.+}", "VGG16's classifier, which LPIPS does not have"),
)
"""`models.lpips`: torchvision's VGG16 and the heads of LPIPS v0.1, two files."""

LPIPS: Table = (
    *_HEADS,
    *_vgg16("net.slice{slice}"),
    Carried("scaling_layer.{name:shift|scale}", "constants"),
)
"""`models.lpips`: under `loss.perceptual_loss.` in the autoencoder's checkpoint."""

INCEPTION: Table = (
    Carried("{path:.+}.num_batches_tracked", "a count that nothing reads"),
    Rule("{path:.+}.conv.weight", "{path}.conv.kernel", CONV2D),
    Rule("{path:.+}.bn.weight", "{path}.bn.scale"),
    Rule("{path:.+}.bn.{name:bias|running_mean|running_var}", "{path}.bn.{name}"),
    Rule("fc.weight", "fc.kernel", LINEAR),
    Rule("fc.bias", "fc.bias"),
)
"""`models.inception`: `pt_inception-2015-12-05-6726825d.pth`."""


def gemma2(prefix: str = "model.") -> Table:
    """`models.gemma2`: `Gemma2ForCausalLM` of transformers; with an empty prefix `Gemma2Model`."""
    return (
        Carried("lm_head.weight", "the output head is tied to the token embeddings"),
        Carried("{path:.+}.rotary_emb.inv_freq", "computed, not learnt"),
        Rule(f"{prefix}embed_tokens.weight", "embed_tokens.embedding"),
        Rule(f"{prefix}layers.{{i}}.{{norm:.+_layernorm}}.weight", "layers.{norm}.scale"),
        Rule(f"{prefix}layers.{{i}}.{{path:.+}}.weight", "layers.{path}.kernel", LINEAR),
        Rule(f"{prefix}norm.weight", "norm.scale"),
    )


GEMMA2 = gemma2()


def dinov3_transformers(*, gated: bool, rope_base: float = 100.0) -> Table:
    """`models.vit`: `DINOv3ViTModel` of transformers.

    Args:
        gated: `use_gated_mlp` of its config; the same words name different maps in the two kinds.
        rope_base: `rope_theta` of its config.
    """
    mlp = {"gate_proj": "w1", "up_proj": "w2", "down_proj": "w3"} if gated else {"up_proj": "fc1", "down_proj": "fc2"}
    modules = {"attention.o_proj": "attn.proj"} | {f"mlp.{theirs}": f"mlp.{ours}" for theirs, ours in mlp.items()}
    q, k, v = (f"layer.{{i}}.attention.{name}_proj" for name in "qkv")
    return (
        Rule((f"{q}.weight", f"{k}.weight", f"{v}.weight"), "blocks.attn.qkv.kernel", FUSED_LINEAR),
        Rule((f"{q}.bias", f"{v}.bias"), "blocks.attn.qkv.bias", FUSED_QV_BIAS),
        Filled("blocks.attn.qkv.bias_mask", qkv_bias_mask, "transformers has no bias on keys"),
        Filled("rope_embed.periods", lambda shape: rope_periods(shape[0], rope_base), "transformers computes it"),
        *_renamed({f"layer.{{i}}.{theirs}": f"blocks.{ours}" for theirs, ours in modules.items()}),
        *_norms({f"layer.{{i}}.norm{n}": f"blocks.norm{n}" for n in (1, 2)} | {"norm": "norm"}),
        Rule("layer.{i}.layer_scale{n}.lambda1", "blocks.ls{n}.gamma"),
        Rule("embeddings.patch_embeddings.weight", "patch_embed.proj.kernel", PATCHES),
        Rule("embeddings.patch_embeddings.bias", "patch_embed.proj.bias"),
        Rule("embeddings.cls_token", "cls_token"),
        Rule("embeddings.register_tokens", "storage_tokens"),
        Rule("embeddings.mask_token", "mask_token", LEADING_AXIS),
    )


def _fused(q: str, k: str, v: str) -> Table:
    """Queries, keys and values, which are one map here."""
    return (
        Rule((f"{q}.weight", f"{k}.weight", f"{v}.weight"), "blocks.attn.qkv.kernel", FUSED_LINEAR),
        Rule((f"{q}.bias", f"{k}.bias", f"{v}.bias"), "blocks.attn.qkv.bias", FUSED_BIAS),
    )


def _embedded(projection: str, positions: Rule) -> Table:
    return (
        Rule(f"embeddings.{projection}.weight", "patch_embed.proj.kernel", PATCHES),
        Rule(f"embeddings.{projection}.bias", "patch_embed.proj.bias"),
        Rule("embeddings.cls_token", "cls_token"),
        Rule("embeddings.register_tokens", "storage_tokens"),
        positions,
    )


_LAYER, _ATTENTION = "encoder.layer.{i}", "encoder.layer.{i}.attention.attention"
_POSITIONS = Rule("embeddings.position_embeddings", "pos_embed", LEADING_AXIS)
_QKV = _fused(f"{_ATTENTION}.query", f"{_ATTENTION}.key", f"{_ATTENTION}.value")

LEARNT_VIT_TRANSFORMERS: dict[str, Table] = {
    "dinov2": (
        Carried("embeddings.mask_token", "for masked training"),
        *_embedded("patch_embeddings.projection", _POSITIONS),
        *_QKV,
        *_renamed({f"{_LAYER}.attention.output.dense": "blocks.attn.proj"}),
        *_renamed({f"{_LAYER}.mlp.{name}": f"blocks.mlp.{name}" for name in ("fc1", "fc2")}),
        *_renamed({f"{_LAYER}.mlp.weights_in": "blocks.mlp.w12", f"{_LAYER}.mlp.weights_out": "blocks.mlp.w3"}),
        *_norms({f"{_LAYER}.norm{n}": f"blocks.norm{n}" for n in (1, 2)} | {"layernorm": "norm"}),
        Rule(f"{_LAYER}.layer_scale{{n}}.lambda1", "blocks.ls{n}.gamma"),
    ),
    "mae": (
        *_embedded("patch_embeddings.projection", _POSITIONS),
        *_QKV,
        *_renamed({f"{_LAYER}.attention.output.dense": "blocks.attn.proj"}),
        *_renamed({f"{_LAYER}.intermediate.dense": "blocks.mlp.fc1", f"{_LAYER}.output.dense": "blocks.mlp.fc2"}),
        *_norms({f"{_LAYER}.layernorm_before": "blocks.norm1", f"{_LAYER}.layernorm_after": "blocks.norm2"}),
        *_norms({"layernorm": "norm"}),
    ),
    "siglip2": (
        Carried("head.{path:.+}", "the pooling head, whose one vector no decoder reads"),
        *_embedded("patch_embedding", Rule("embeddings.position_embedding.weight", "pos_embed")),
        *_fused(*(f"encoder.layers.{{i}}.self_attn.{name}_proj" for name in "qkv")),
        *_renamed({"encoder.layers.{i}.self_attn.out_proj": "blocks.attn.proj"}),
        *_renamed({f"encoder.layers.{{i}}.mlp.fc{n}": f"blocks.mlp.fc{n}" for n in (1, 2)}),
        *_norms({f"encoder.layers.{{i}}.layer_norm{n}": f"blocks.norm{n}" for n in (1, 2)}),
        *_norms({"post_layernorm": "norm"}),
    ),
}
"""`models.vit_learnt`: `Dinov2Model`, `ViTMAEModel` and `SiglipVisionModel` of transformers."""

BESIDE: dict[str, Table] = {
    "dinov2": (Carried("classifier.{path:.+}", "of another task"),),
    "mae": (Carried("decoder.{path:.+}", "the decoder that MAE is trained with"),),
    "siglip2": (
        Carried("text_model.{path:.+}", "the text tower"),
        Carried("{name:logit_scale|logit_bias}", "of the contrast between the two towers"),
    ),
}
"""What stands beside those encoders where they are parts of whole models."""
