"""The tables of rules, one a network: names of the release on the left, ours on the right."""

from __future__ import annotations

from svg_jax.convert.rules import (
    CONV2D,
    FUSED_LINEAR,
    FUSED_QV_BIAS,
    LEADING_AXIS,
    LINEAR,
    PATCHES,
    Carried,
    Filled,
    Rule,
    Table,
    below,
)
from svg_jax.models.vit import qkv_bias_mask, rope_periods

NEXT_DIT: Table = (
    Rule("{stack:layers|noise_refiner|context_refiner}.{i}.{path:.*norm[12]?}.weight", "{stack}.{path}.scale"),
    Rule("{stack:layers|noise_refiner|context_refiner}.{i}.{path:.+}.weight", "{stack}.{path}.kernel", LINEAR),
    Rule("{stack:layers|noise_refiner|context_refiner}.{i}.{path:.+}.bias", "{stack}.{path}.bias"),
    Rule("{path:cap_embedder.0|norm_final}.weight", "{path}.scale"),
    Rule("{path:.+}.weight", "{path}.kernel", LINEAR),
    Rule("{path:.+}.bias", "{path}.bias"),
)
"""`models.next_dit`: `consolidated.*.pth`."""

DECODER: Table = (
    Rule("{path:.*norm(1|2|_out)?}.weight", "{path}.scale"),
    Rule("{path:.+}.weight", "{path}.kernel", CONV2D),
    Rule("{path:.+}.bias", "{path}.bias"),
)
"""`models.decoder`: what stands under `decoder.` in the autoencoder's checkpoint."""

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

AUTOENCODER: Table = (
    *below("encoder.", DINOV3),
    *below("decoder.", DECODER),
    Carried("loss.{path:.+}", "LPIPS and the discriminator: adversarial training in the release"),
    Carried("extra_vit.{path:.+}", "the residual branch of Autoencoder-R"),
    Carried("norm_vit.{name:weight|bias}", "in the files of Autoencoder-R, unused there too"),
    Carried("mask_token", "of the residual branch of Autoencoder-R"),
    Carried("colorize", "for pictures in the release's logs"),
)
"""`models.autoencoder`: the `state_dict` of the Lightning checkpoint. The latent statistics are a file of their own."""


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
    renamed = tuple(
        Rule(f"layer.{{i}}.{theirs}.{left}", f"blocks.{ours}.{right}", transform)
        for theirs, ours in modules.items()
        for left, right, transform in (("weight", "kernel", LINEAR), ("bias", "bias", None))
    )
    q, k, v = (f"layer.{{i}}.attention.{name}_proj" for name in "qkv")
    return (
        Rule((f"{q}.weight", f"{k}.weight", f"{v}.weight"), "blocks.attn.qkv.kernel", FUSED_LINEAR),
        Rule((f"{q}.bias", f"{v}.bias"), "blocks.attn.qkv.bias", FUSED_QV_BIAS),
        Filled("blocks.attn.qkv.bias_mask", qkv_bias_mask, "transformers has no bias on keys"),
        Filled("rope_embed.periods", lambda shape: rope_periods(shape[0], rope_base), "transformers computes it"),
        *renamed,
        Rule("layer.{i}.{norm:norm[12]}.weight", "blocks.{norm}.scale"),
        Rule("layer.{i}.{norm:norm[12]}.bias", "blocks.{norm}.bias"),
        Rule("layer.{i}.layer_scale{n}.lambda1", "blocks.ls{n}.gamma"),
        Rule("embeddings.patch_embeddings.weight", "patch_embed.proj.kernel", PATCHES),
        Rule("embeddings.patch_embeddings.bias", "patch_embed.proj.bias"),
        Rule("embeddings.cls_token", "cls_token"),
        Rule("embeddings.register_tokens", "storage_tokens"),
        Rule("embeddings.mask_token", "mask_token", LEADING_AXIS),
        Rule("norm.weight", "norm.scale"),
        Rule("norm.bias", "norm.bias"),
    )
