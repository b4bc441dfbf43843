"""DINOv3: the vision transformer whose patch features are the latent space (arXiv 2508.10104).

One sequence an image: class token, storage (register) tokens, patches in row-major order, then empty slots that no
token attends to. Images of different sizes share a batch; each has its own grid, and so its own rotary angles.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt8

from svg_jax.models.patch_encoder import PatchEncoder, Sequence
from svg_jax.nn.blocks import INIT, Block, BlockConfig, PatchEmbed
from svg_jax.nn.norms import LayerNorm
from svg_jax.nn.patches import patchify, token_mask, token_positions
from svg_jax.nn.stack import stacked
from svg_jax.parallel import constrain_tokens

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SWIGLU_ALIGNMENT = {"swiglu": 8, "swiglu32": 32, "swiglu64": 64, "swiglu128": 128}  # of the hidden width


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Sizes of a DINOv3 ViT; the defaults are ViT-S/16."""

    family: str = "dinov3"  # see models.encoders
    dim: int = 384
    num_layers: int = 12
    num_heads: int = 6
    hidden_dim: int = 1536  # of the feed-forward layers
    gated: bool = False  # SwiGLU instead of GELU
    qkv_bias: bool = True  # on queries and values; the bias of the keys is masked to zero
    mask_key_bias: bool = True  # false: the keys keep their bias
    local_norm: bool = False  # for the class token of local crops: in the files, unused outside training
    num_storage_tokens: int = 4
    patch_size: int = 16
    rope_base: float = 100.0
    layer_scale: float = 1e-5  # at initialisation
    norm_eps: float = 1e-5
    dtype: str = "float32"  # of the linear maps and attention; the residual stream and the norms are float32
    attention: str = "auto"  # see nn.attention.BACKENDS

    pixel_mean: ClassVar[tuple[float, ...]] = IMAGENET_MEAN
    pixel_std: ClassVar[tuple[float, ...]] = IMAGENET_STD

    def __post_init__(self) -> None:
        if self.family != "dinov3":
            raise ValueError(f"a ViTConfig is of family dinov3, not '{self.family}': see models.encoders")
        if self.dim % self.num_heads or self.head_dim % 4:
            raise ValueError(
                f"dim / num_heads = {self.dim} / {self.num_heads} must be a multiple of 4: "
                "half of a head turns with the row, half with the column"
            )

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.dim // self.num_heads

    @property
    def tokens_in_front(self) -> int:
        """Class token and storage tokens."""
        return 1 + self.num_storage_tokens

    @property
    def block(self) -> BlockConfig:
        """Of its blocks."""
        return BlockConfig(
            dim=self.dim,
            num_heads=self.num_heads,
            hidden_dim=self.hidden_dim,
            gated=self.gated,
            qkv_bias=self.qkv_bias,
            mask_key_bias=self.mask_key_bias,
            layer_scale=self.layer_scale,
            norm_eps=self.norm_eps,
            rotary="halves",
            dtype=self.dtype,
            attention=self.attention,
        )

    @classmethod
    def vits16(cls, **changes: Any) -> ViTConfig:
        """ViT-S/16, 21.6M parameters."""
        return cls(**changes)

    @classmethod
    def vits16plus(cls, **changes: Any) -> ViTConfig:
        """ViT-S+/16, 28.7M parameters: the encoder of the release."""
        return cls(**{"gated": True, **changes})

    @classmethod
    def vitb16(cls, **changes: Any) -> ViTConfig:
        """ViT-B/16, 85.7M parameters."""
        sizes = {"dim": 768, "num_heads": 12, "hidden_dim": 3072}
        return cls(**{**sizes, **changes})

    @classmethod
    def vitl16(cls, **changes: Any) -> ViTConfig:
        """ViT-L/16, 303M parameters."""
        sizes = {"dim": 1024, "num_layers": 24, "num_heads": 16, "hidden_dim": 4096}
        return cls(**{**sizes, **changes})

    @classmethod
    def vith16plus(cls, **changes: Any) -> ViTConfig:
        """ViT-H+/16, 841M parameters."""
        sizes = {"dim": 1280, "num_layers": 32, "num_heads": 20, "hidden_dim": 5120, "gated": True}
        return cls(**{**sizes, **changes})

    @classmethod
    def vit7b16(cls, **changes: Any) -> ViTConfig:
        """ViT-7B/16, 6.7B parameters."""
        sizes = {"dim": 4096, "num_layers": 40, "num_heads": 32, "hidden_dim": 8192, "gated": True}
        return cls(**{**sizes, "qkv_bias": False, "local_norm": True, **changes})

    @classmethod
    def from_release(cls, arguments: dict[str, Any], **changes: Any) -> ViTConfig:
        """From the constructor arguments of the torch.hub models; those that only matter in training are ignored.

        Raises:
            ValueError: The arguments ask for something no published DINOv3 ViT has.
        """
        given = {"norm_layer": "layernorm", "ffn_layer": "mlp", "qkv_bias": True, "mask_k_bias": False, **arguments}
        fixed: dict[str, Any] = {"ffn_bias": True, "proj_bias": True, "in_chans": 3, "untie_cls_and_patch_norms": False}
        fixed |= {"pos_embed_rope_normalize_coords": "separate"}
        fixed |= {"pos_embed_rope_min_period": None, "pos_embed_rope_max_period": None}
        _require(given, {name: (value,) for name, value in fixed.items()})
        _require(given, {"norm_layer": ("layernorm", "layernormbf16"), "ffn_layer": ("mlp", *SWIGLU_ALIGNMENT)})
        hidden, gated = int(given["embed_dim"] * given.get("ffn_ratio", 4.0)), given["ffn_layer"] != "mlp"
        if gated:  # two thirds, so that three matrices weigh as much as two, rounded up
            align = SWIGLU_ALIGNMENT[given["ffn_layer"]]
            hidden = align * math.ceil(int(hidden * 2 / 3) / align)
        values = {
            "dim": given["embed_dim"],
            "num_layers": given["depth"],
            "num_heads": given["num_heads"],
            "hidden_dim": hidden,
            "gated": gated,
            "qkv_bias": given["qkv_bias"],
            "mask_key_bias": given["mask_k_bias"],
            "local_norm": given.get("untie_global_and_local_cls_norm", False),
            "num_storage_tokens": given.get("n_storage_tokens", 0),
            "patch_size": given.get("patch_size", 16),
            "rope_base": float(given.get("pos_embed_rope_base", 100.0)),
            "layer_scale": given.get("layerscale_init", 1e-5),
            "norm_eps": 1e-5 if given["norm_layer"] == "layernormbf16" else 1e-6,
        }
        return cls(**{**values, **changes})

    @classmethod
    def from_transformers(cls, config: dict[str, Any], **changes: Any) -> ViTConfig:
        """From the `config.json` of a `DINOv3ViTModel` folder.

        Raises:
            ValueError: The config asks for something no published DINOv3 ViT has.
        """
        gated = config.get("use_gated_mlp", False)
        fixed: dict[str, Any] = {"key_bias": False, "proj_bias": True, "mlp_bias": True, "num_channels": 3}
        fixed |= {"hidden_act": "silu" if gated else "gelu", "value_bias": config.get("query_bias", True)}
        _require(config, {name: (value,) for name, value in fixed.items()})
        renamed = {"dim": "hidden_size", "num_layers": "num_hidden_layers", "num_heads": "num_attention_heads"}
        renamed |= {"hidden_dim": "intermediate_size", "patch_size": "patch_size", "rope_base": "rope_theta"}
        renamed |= {"num_storage_tokens": "num_register_tokens", "qkv_bias": "query_bias"}
        renamed |= {"layer_scale": "layerscale_value", "norm_eps": "layer_norm_eps"}
        values = {ours: config[theirs] for ours, theirs in renamed.items() if theirs in config}
        return cls(**{"gated": gated, **values, **changes})


def _require(given: dict[str, Any], allowed: dict[str, tuple[Any, ...]]) -> None:
    for name, values in allowed.items():
        if name in given and given[name] not in values:
            choices = " or ".join(map(repr, values))
            raise ValueError(f"a DINOv3 with {name} = {given[name]!r} is not supported: it must be {choices}")


class ViTOutput(NamedTuple):
    """What the network says of each image; empty slots hold numbers without meaning."""

    class_token: Float[Array, "batch dim"]
    storage_tokens: Float[Array, "batch storage dim"]
    patch_tokens: Float[Array, "batch tokens dim"]


class RopeEmbed(nnx.Module):
    """Angles of the rotary embedding; the periods are stored with the weights, and those stored are used."""

    def __init__(self, config: ViTConfig) -> None:
        self.periods = nnx.Param(jnp.asarray(rope_periods(config.head_dim // 4, config.rope_base)))

    def __call__(self, grid: Int[Array, "batch 2"], tokens: int) -> Float[Array, "batch tokens half"]:
        """2 pi u / period for u = (row + 0.5) / rows * 2 - 1, then for the column likewise; [B, N, head_dim / 2]."""
        coordinates = jnp.stack(token_positions(grid, tokens), axis=-1).astype(jnp.float32)
        extent = jnp.maximum(grid, 1).astype(jnp.float32)[:, None]
        u = (coordinates + 0.5) / extent * 2.0 - 1.0
        periods = jax.lax.stop_gradient(self.periods[...]).astype(jnp.float32)
        angles = 2.0 * math.pi * u[..., None] / periods[None, None, None]
        return angles.reshape(*angles.shape[:2], -1)


class ViT(PatchEncoder):
    """DINOv3."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.patch_embed = PatchEmbed(config.patch_size, config.dim, config.dtype, rngs=rngs)
        self.cls_token = nnx.Param(INIT(rngs.params(), (1, 1, config.dim), jnp.float32))
        if config.num_storage_tokens:
            self.storage_tokens = nnx.Param(
                INIT(rngs.params(), (1, config.num_storage_tokens, config.dim), jnp.float32)
            )
        self.mask_token = nnx.Param(jnp.zeros((1, config.dim), jnp.float32))  # for masked training; unused here
        self.rope_embed = RopeEmbed(config)
        self.blocks = stacked(lambda rngs: Block(config.block, rngs=rngs), config.num_layers, rngs=rngs)
        self.norm = LayerNorm(config.dim, eps=config.norm_eps)
        if config.local_norm:
            self.local_cls_norm = LayerNorm(config.dim, eps=config.norm_eps)

    def outputs(
        self,
        patches: Float[Array, "batch tokens pixels"],
        grid: Int[Array, "batch 2"],
        mask: Bool[Array, "batch tokens"] | None = None,
    ) -> ViTOutput:
        """All tokens after the last norm, by kind; arguments as for calling."""
        return self.split(self.sequence(patches, grid, mask))

    def images(self, images: Float[Array, "batch height width 3"]) -> ViTOutput:
        """All tokens of normalised images of one size; what does not fill a patch is cut off."""
        batch, height, width, _ = images.shape
        size = (height // self.patch_size, width // self.patch_size)
        grid = jnp.broadcast_to(jnp.asarray(size, jnp.int32)[None], (batch, 2))
        return self.outputs(patchify(images, self.patch_size), grid)

    def embed(
        self,
        patches: Float[Array, "batch tokens pixels"],
        grid: Int[Array, "batch 2"],
        mask: Bool[Array, "batch tokens"] | None = None,
    ) -> Sequence:
        """The sequence [class, storage, patches], float32, its rotary (cos, sin), and which of its slots are in use."""
        batch, tokens, _ = patches.shape
        mask = token_mask(grid, tokens) if mask is None else mask
        tokens_in_front = [self.cls_token[...]]
        if self.config.num_storage_tokens:
            tokens_in_front.append(self.storage_tokens[...])
        front = jnp.concatenate(tokens_in_front, axis=1).astype(jnp.float32)
        front = jnp.broadcast_to(front, (batch, *front.shape[1:]))
        x = jnp.concatenate([front, self.patch_embed(patches, mask).astype(jnp.float32)], axis=1)

        pad = ((0, 0), (front.shape[1], 0))
        angles = jnp.pad(self.rope_embed(grid, tokens), (*pad, (0, 0)))
        valid = jnp.pad(mask, pad, constant_values=True)
        return constrain_tokens(x), (jnp.cos(angles), jnp.sin(angles)), valid

    def split(self, x: Float[Array, "batch sequence dim"]) -> ViTOutput:
        """A sequence into its three kinds of tokens."""
        front = self.config.tokens_in_front
        return ViTOutput(x[:, 0], x[:, 1:front], x[:, front:])


def rope_periods(count: int, base: float) -> np.ndarray:
    """base^(i / count) for i < count, float32."""
    return (base ** (np.arange(count, dtype=np.float64) / count)).astype(np.float32)


def normalise_pixels(
    patches: UInt8[Array, "... pixels"],
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
) -> Float[Array, "... pixels"]:
    """0 .. 255 -> (v / 255 - mean) / std a colour, channel fastest; float32. By default statistics of ImageNet."""
    repeats, shape = patches.shape[-1] // 3, (1,) * (patches.ndim - 1) + (-1,)
    tiled = (np.tile(np.array(values, np.float32), repeats).reshape(shape) for values in (mean, std))
    return (patches.astype(jnp.float32) / 255.0 - next(tiled)) / next(tiled)
