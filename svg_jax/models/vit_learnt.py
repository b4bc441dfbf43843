"""Vision transformers with stored position tables: DINOv2 (arXiv 2304.07193, with registers 2309.16588), the vision
tower of SigLIP 2 at a fixed resolution (arXiv 2502.14786), and the encoder of MAE (arXiv 2111.06377).

One sequence an image: class token and registers where the model has them, patches in row-major order, then empty slots
that no token attends to. Images of different sizes share a batch; the table is interpolated to each image's own grid,
bicubically as in transformers: antialiased in DINOv2 with registers, not antialiased in the others. (Meta's own code
for DINOv2 without registers reads the table at places shifted by up to a tenth of a patch.)

What these models do elsewhere and not here: MAE's random order of tokens (the release keeps it at mask ratio 0, which
scrambles its latents in space; here they stay in place), SigLIP's pooling head, and mask tokens.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from svg_jax.models.patch_encoder import PatchEncoder, Sequence
from svg_jax.models.vit import IMAGENET_MEAN, IMAGENET_STD
from svg_jax.nn.blocks import INIT, Block, BlockConfig, PatchEmbed
from svg_jax.nn.norms import LayerNorm
from svg_jax.nn.patches import token_mask, token_positions
from svg_jax.nn.resize import interpolate_table
from svg_jax.nn.stack import stacked
from svg_jax.parallel import constrain_tokens

FAMILIES = ("dinov2", "siglip2", "mae")
_ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}  # by the name transformers has for them


@dataclasses.dataclass(frozen=True)
class LearntViTConfig:
    """Sizes of a ViT with a position table; the defaults are DINOv2 ViT-B/14."""

    family: str = "dinov2"  # or siglip2, mae; see models.encoders
    dim: int = 768
    num_layers: int = 12
    num_heads: int = 12
    hidden_dim: int = 3072  # of the feed-forward layers
    gated: bool = False  # SwiGLU
    qkv_bias: bool = True
    activation: str = "gelu"  # or gelu_tanh
    class_token: bool = True
    num_storage_tokens: int = 0  # registers: they have no position
    patch_size: int = 14
    grid: tuple[int, int] = (37, 37)  # rows and columns of the position table
    antialias: bool = False  # when the table is made smaller, see nn.resize
    layer_scale: float | None = 1.0  # at initialisation; None: the model has none
    norm_eps: float = 1e-6
    # What is taken from and divides pixels in [0, 1]. SigLIP was trained with 0.5 and 0.5, but the release of SVG-T2I
    # gives every encoder the statistics of ImageNet: a decoder must see the features it was trained on.
    pixel_mean: tuple[float, ...] = IMAGENET_MEAN
    pixel_std: tuple[float, ...] = IMAGENET_STD
    dtype: str = "float32"  # of the linear maps and attention; the residual stream and the norms are float32
    attention: str = "auto"  # see nn.attention.BACKENDS

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"unknown family of encoders '{self.family}': choose {', '.join(FAMILIES)}")
        if len(self.grid) != 2 or min(self.grid) < 1:
            raise ValueError(f"the position table has rows and columns, both 1 or more, not grid = {self.grid}")
        if len(self.pixel_mean) != 3 or len(self.pixel_std) != 3:
            raise ValueError(
                f"pixel_mean and pixel_std have one number a colour, not {len(self.pixel_mean)} and "
                f"{len(self.pixel_std)}"
            )
        _ = self.block

    @property
    def block(self) -> BlockConfig:
        """Of its blocks."""
        return BlockConfig(
            dim=self.dim,
            num_heads=self.num_heads,
            hidden_dim=self.hidden_dim,
            gated=self.gated,
            fused_gate=True,
            qkv_bias=self.qkv_bias,
            layer_scale=self.layer_scale,
            norm_eps=self.norm_eps,
            activation=self.activation,
            dtype=self.dtype,
            attention=self.attention,
        )

    @property
    def tokens_in_front(self) -> int:
        """Class token and registers."""
        return int(self.class_token) + self.num_storage_tokens

    @classmethod
    def published(cls, name: str, **changes: Any) -> LearntViTConfig:
        """A published size, a key of `PUBLISHED`.

        Raises:
            ValueError: There is none of this name.
        """
        if name not in PUBLISHED:
            nearest = difflib.get_close_matches(name, PUBLISHED, n=1)
            hint = f"did you mean '{nearest[0]}'?" if nearest else f"choose one of {', '.join(PUBLISHED)}"
            raise ValueError(f"no published encoder is called '{name}': {hint}")
        return cls(**{**PUBLISHED[name], **changes})

    @classmethod
    def from_transformers(cls, config: Mapping[str, Any], **changes: Any) -> LearntViTConfig:
        """From the `config.json` of a `Dinov2Model`, `Dinov2WithRegistersModel`, `SiglipVisionModel`, `SiglipModel` or
        `ViTMAEModel` folder; what it leaves out is as in transformers.

        Raises:
            ValueError: The config is of another model, or asks for something that no published one has.
        """
        if config.get("model_type") == "siglip" and "vision_config" in config:
            config = {"model_type": "siglip_vision_model", **config["vision_config"]}
        kind = config.get("model_type")
        if kind not in _TRANSFORMERS:
            raise ValueError(
                f"model_type {kind!r} is no encoder with a position table: {' or '.join(_TRANSFORMERS)} is"
            )
        given = {**_TRANSFORMERS[kind], **config}
        _require(kind, given, num_channels=(3,), hidden_act=tuple(_ACTIVATIONS))
        patch, image = (_square(kind, name, given[name]) for name in ("patch_size", "image_size"))
        hidden, gated = given.get("intermediate_size", 0), given.get("use_swiglu_ffn", False)
        if kind.startswith("dinov2"):
            hidden = int(given["hidden_size"] * given["mlp_ratio"])
            if gated:  # two thirds, so that three matrices weigh as much as two, rounded up to a multiple of 8
                hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
        values = {
            "family": {"siglip_vision_model": "siglip2", "vit_mae": "mae"}.get(kind, "dinov2"),
            "dim": given["hidden_size"],
            "num_layers": given["num_hidden_layers"],
            "num_heads": given["num_attention_heads"],
            "hidden_dim": hidden,
            "gated": gated,
            "qkv_bias": given.get("qkv_bias", True),
            "activation": _ACTIVATIONS[given["hidden_act"]],
            "class_token": kind != "siglip_vision_model",
            "num_storage_tokens": given.get("num_register_tokens", 0),
            "patch_size": patch,
            "grid": (image // patch, image // patch),
            "antialias": kind == "dinov2_with_registers",
            "layer_scale": given.get("layerscale_value"),
            "norm_eps": given["layer_norm_eps"],
        }
        return cls(**{**values, **changes})


_COMMON: dict[str, Any] = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "num_channels": 3}
_COMMON |= {"image_size": 224, "patch_size": 16, "layer_norm_eps": 1e-6}
_DINOV2 = _COMMON | {"hidden_act": "gelu", "mlp_ratio": 4, "layerscale_value": 1.0}
_TRANSFORMERS: dict[str, dict[str, Any]] = {  # what its config.json leaves out, by model_type
    "dinov2": _DINOV2 | {"patch_size": 14},
    "dinov2_with_registers": _DINOV2 | {"num_register_tokens": 4},
    "siglip_vision_model": _COMMON | {"hidden_act": "gelu_pytorch_tanh", "intermediate_size": 3072},
    "vit_mae": _COMMON | {"hidden_act": "gelu", "intermediate_size": 3072, "layer_norm_eps": 1e-12},
}


def _sizes(dim: int, num_layers: int, num_heads: int, hidden_dim: int) -> dict[str, Any]:
    return {"dim": dim, "num_layers": num_layers, "num_heads": num_heads, "hidden_dim": hidden_dim}


_SMALL, _BASE, _LARGE = _sizes(384, 12, 6, 1536), _sizes(768, 12, 12, 3072), _sizes(1024, 24, 16, 4096)
_DINOV2_SIZES = {"s": _SMALL, "b": _BASE, "l": _LARGE, "g": _sizes(1536, 40, 24, 4096) | {"gated": True}}
_REGISTERS = {"num_storage_tokens": 4, "antialias": True}
_SIGLIP2 = {"family": "siglip2", "activation": "gelu_tanh", "class_token": False, "layer_scale": None}
_SO400M = _sizes(1152, 27, 16, 4304)
_MAE = {"family": "mae", "layer_scale": None, "norm_eps": 1e-12}

PUBLISHED: dict[str, dict[str, Any]] = {
    **{f"dinov2_vit{name}14": sizes for name, sizes in _DINOV2_SIZES.items()},
    **{f"dinov2_vit{name}14_reg": sizes | _REGISTERS for name, sizes in _DINOV2_SIZES.items()},
    "siglip2_base_patch16_256": _SIGLIP2 | _BASE | {"patch_size": 16, "grid": (16, 16)},
    "siglip2_large_patch16_256": _SIGLIP2 | _LARGE | {"patch_size": 16, "grid": (16, 16)},
    "siglip2_so400m_patch16_256": _SIGLIP2 | _SO400M | {"patch_size": 16, "grid": (16, 16)},
    "siglip2_so400m_patch14_224": _SIGLIP2 | _SO400M | {"patch_size": 14, "grid": (16, 16)},
    "mae_vitb16": _MAE | _BASE | {"patch_size": 16, "grid": (14, 14)},
    "mae_vitl16": _MAE | _LARGE | {"patch_size": 16, "grid": (14, 14)},
    "mae_vith14": _MAE | _sizes(1280, 32, 16, 5120) | {"patch_size": 14, "grid": (16, 16)},
}
"""Sizes of the published encoders; other resolutions of SigLIP 2 differ in `grid` alone."""


def _require(kind: str, given: Mapping[str, Any], **allowed: tuple[Any, ...]) -> None:
    for name, values in allowed.items():
        if given[name] not in values:
            choices = " or ".join(map(repr, values))
            raise ValueError(f"a {kind} with {name} = {given[name]!r} is not supported: it must be {choices}")


def _square(kind: str, name: str, value: Any) -> int:
    sides = set(value) if isinstance(value, (list, tuple)) else {value}
    if len(sides) != 1:
        raise ValueError(f"a {kind} with {name} = {value!r} is not supported: it must be square")
    return int(sides.pop())


class LearntViT(PatchEncoder):
    """DINOv2, SigLIP 2 or MAE."""

    def __init__(self, config: LearntViTConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        rows, cols = config.grid
        positions = int(config.class_token) + rows * cols
        self.patch_embed = PatchEmbed(config.patch_size, config.dim, config.dtype, rngs=rngs)
        self.pos_embed = nnx.Param(INIT(rngs.params(), (positions, config.dim), jnp.float32))  # class token first
        if config.class_token:
            self.cls_token = nnx.Param(INIT(rngs.params(), (1, 1, config.dim), jnp.float32))
        if config.num_storage_tokens:
            shape = (1, config.num_storage_tokens, config.dim)
            self.storage_tokens = nnx.Param(INIT(rngs.params(), shape, jnp.float32))
        self.blocks = stacked(lambda rngs: Block(config.block, rngs=rngs), config.num_layers, rngs=rngs)
        self.norm = LayerNorm(config.dim, eps=config.norm_eps)

    def embed(
        self,
        patches: Float[Array, "batch tokens pixels"],
        grid: Int[Array, "batch 2"],
        mask: Bool[Array, "batch tokens"] | None = None,
    ) -> Sequence:
        """The sequence [class, registers, patches] with positions, float32, no rotary, and which slots are in use."""
        batch, tokens, _ = patches.shape
        mask = token_mask(grid, tokens) if mask is None else mask
        positions = self.pos_embed[...].astype(jnp.float32)
        parts = []
        if self.config.class_token:
            parts.append(self.cls_token[...].astype(jnp.float32) + positions[None, :1])
            positions = positions[1:]
        if self.config.num_storage_tokens:
            parts.append(self.storage_tokens[...].astype(jnp.float32))
        parts = [jnp.broadcast_to(part, (batch, *part.shape[1:])) for part in parts]

        table = positions.reshape(*self.config.grid, -1)
        places = token_positions(grid, tokens)
        x = self.patch_embed(patches, mask).astype(jnp.float32)
        x = x + interpolate_table(table, places, grid, antialias=self.config.antialias)
        valid = jnp.pad(mask, ((0, 0), (self.config.tokens_in_front, 0)), constant_values=True)
        return constrain_tokens(jnp.concatenate([*parts, x], axis=1)), None, valid
