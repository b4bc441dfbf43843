"""DINOv3: the vision transformer whose patch features are the latent space (arXiv 2508.10104).

One sequence an image: class token, storage (register) tokens, patches in row-major order, then empty slots that no
token attends to. Images of different sizes share a batch; each has its own grid, and so its own rotary angles.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt8

from svg_jax.nn.attention import attention
from svg_jax.nn.linear import linear, sharded
from svg_jax.nn.norms import LayerNorm
from svg_jax.nn.patches import patchify, token_mask, token_positions
from svg_jax.nn.rotary import rotate_halves
from svg_jax.nn.stack import scan_layers, stacked
from svg_jax.parallel import constrain_tokens

INIT = nnx.initializers.truncated_normal(0.02)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SWIGLU_ALIGNMENT = {"swiglu": 8, "swiglu32": 32, "swiglu64": 64, "swiglu128": 128}  # of the hidden width


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Sizes of a DINOv3 ViT; the defaults are ViT-S/16."""

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

    def __post_init__(self) -> None:
        if self.dim % self.num_heads or self.head_dim % 4:
            raise ValueError(
                f"dim / num_heads = {self.dim} / {self.num_heads} must be a multiple of 4: "
                "half of a head turns with the row, half with the column"
            )

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.dim // self.num_heads

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


class MaskedBiasLinear(nnx.Module):
    """y = x W + b * m: queries, keys and values with a mask m that takes the bias off the keys."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs) -> None:
        self.dtype = config.dtype
        features = 3 * config.dim
        self.kernel = nnx.Param(INIT(rngs.params(), (config.dim, features), jnp.float32), **sharded("embed", "heads"))
        self.bias = nnx.Param(jnp.zeros((features,), jnp.float32))
        self.bias_mask = nnx.Param(jnp.asarray(qkv_bias_mask((features,))))

    def __call__(self, x: Float[Array, "batch tokens dim"]) -> Float[Array, "batch tokens features"]:
        bias = self.bias[...] * jax.lax.stop_gradient(self.bias_mask[...])
        return x.astype(self.dtype) @ self.kernel[...].astype(self.dtype) + bias.astype(self.dtype)[None, None]


class Attention(nnx.Module):
    """Self-attention; patches are rotated, class and storage tokens are not (their angle is 0)."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs) -> None:
        self.num_heads, self.backend = config.num_heads, config.attention
        if config.qkv_bias and config.mask_key_bias:
            self.qkv: nnx.Module = MaskedBiasLinear(config, rngs=rngs)
        else:
            self.qkv = linear(
                config.dim,
                3 * config.dim,
                ("embed", "heads"),
                use_bias=config.qkv_bias,
                dtype=config.dtype,
                kernel_init=INIT,
                rngs=rngs,
            )
        self.proj = linear(config.dim, config.dim, ("heads", "embed"), dtype=config.dtype, kernel_init=INIT, rngs=rngs)

    def __call__(self, x: Array, rotary: tuple[Array, Array], valid: Array) -> Array:
        qkv = self.qkv(x).reshape(*x.shape[:2], 3, self.num_heads, -1)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        q, k = rotate_halves(q, *rotary), rotate_halves(k, *rotary)
        return self.proj(attention(q, k, v, valid=valid, backend=self.backend).reshape(x.shape))


class MLP(nnx.Module):
    """fc2(gelu(fc1 x)), GELU exact."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs) -> None:
        dim, hidden, dtype = config.dim, config.hidden_dim, config.dtype
        self.fc1 = linear(dim, hidden, ("embed", "mlp"), dtype=dtype, kernel_init=INIT, rngs=rngs)
        self.fc2 = linear(hidden, dim, ("mlp", "embed"), dtype=dtype, kernel_init=INIT, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))


class SwiGLU(nnx.Module):
    """w3(silu(w1 x) * w2 x) (arXiv 2002.05202)."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs) -> None:
        dim, hidden, dtype = config.dim, config.hidden_dim, config.dtype
        self.w1 = linear(dim, hidden, ("embed", "mlp"), dtype=dtype, kernel_init=INIT, rngs=rngs)
        self.w2 = linear(dim, hidden, ("embed", "mlp"), dtype=dtype, kernel_init=INIT, rngs=rngs)
        self.w3 = linear(hidden, dim, ("mlp", "embed"), dtype=dtype, kernel_init=INIT, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.w3(jax.nn.silu(self.w1(x)) * self.w2(x))


class LayerScale(nnx.Module):
    """x * gamma, a channel (arXiv 2103.17239)."""

    def __init__(self, config: ViTConfig) -> None:
        self.gamma = nnx.Param(jnp.full((config.dim,), config.layer_scale, jnp.float32))

    def __call__(self, x: Float[Array, "batch tokens dim"]) -> Float[Array, "batch tokens dim"]:
        return x.astype(jnp.float32) * self.gamma[...].astype(jnp.float32)[None, None]


class Block(nnx.Module):
    """x + ls1(attn(norm1(x))), then x + ls2(mlp(norm2(x)))."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs) -> None:
        self.norm1 = LayerNorm(config.dim, eps=config.norm_eps)
        self.attn = Attention(config, rngs=rngs)
        self.ls1 = LayerScale(config)
        self.norm2 = LayerNorm(config.dim, eps=config.norm_eps)
        self.mlp = SwiGLU(config, rngs=rngs) if config.gated else MLP(config, rngs=rngs)
        self.ls2 = LayerScale(config)

    def __call__(self, x: Array, rotary: tuple[Array, Array], valid: Array) -> Array:
        x = x + self.ls1(self.attn(self.norm1(x), rotary, valid))
        return constrain_tokens(x + self.ls2(self.mlp(self.norm2(x))))


class PatchEmbed(nnx.Module):
    """A linear map of each patch."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs) -> None:
        features = 3 * config.patch_size**2
        self.proj = linear(features, config.dim, (None, "embed"), dtype=config.dtype, kernel_init=INIT, rngs=rngs)

    def __call__(self, patches: Float[Array, "batch tokens pixels"]) -> Float[Array, "batch tokens dim"]:
        return self.proj(patches)


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


class ViT(nnx.Module):
    """Patches -> normalised patch features."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.patch_embed = PatchEmbed(config, rngs=rngs)
        self.cls_token = nnx.Param(INIT(rngs.params(), (1, 1, config.dim), jnp.float32))
        if config.num_storage_tokens:
            self.storage_tokens = nnx.Param(
                INIT(rngs.params(), (1, config.num_storage_tokens, config.dim), jnp.float32)
            )
        self.mask_token = nnx.Param(jnp.zeros((1, config.dim), jnp.float32))  # for masked training; unused here
        self.rope_embed = RopeEmbed(config)
        self.blocks = stacked(lambda rngs: Block(config, rngs=rngs), config.num_layers, rngs=rngs)
        self.norm = LayerNorm(config.dim, eps=config.norm_eps)
        if config.local_norm:
            self.local_cls_norm = LayerNorm(config.dim, eps=config.norm_eps)

    @property
    def patch_size(self) -> int:
        """Pixels a side of a patch."""
        return self.config.patch_size

    @property
    def dim(self) -> int:
        """Channels of a feature."""
        return self.config.dim

    def __call__(
        self,
        patches: Float[Array, "batch tokens pixels"],
        grid: Int[Array, "batch 2"],
        mask: Bool[Array, "batch tokens"] | None = None,
    ) -> Float[Array, "batch tokens dim"]:
        """Normalised patch features.

        Args:
            patches: Normalised pixels (`normalise_pixels`), row-major, (row, column, channel) inside a patch.
            grid: (rows, cols) of each image in patches; (0, 0) for none.
            mask: Which slots hold a patch, the first rows * cols by default.

        Returns:
            float32; what stands in empty slots means nothing.
        """
        return self.outputs(patches, grid, mask).patch_tokens

    def outputs(
        self,
        patches: Float[Array, "batch tokens pixels"],
        grid: Int[Array, "batch 2"],
        mask: Bool[Array, "batch tokens"] | None = None,
    ) -> ViTOutput:
        """All tokens after the last norm; arguments as for calling."""
        x, rotary, valid = self.embed(patches, grid, mask)
        x, _ = scan_layers(self.blocks, x, rotary, valid, dtype=self.config.dtype)
        return self.split(self.norm(x))

    def hidden_states(
        self,
        patches: Float[Array, "batch tokens pixels"],
        grid: Int[Array, "batch 2"],
        mask: Bool[Array, "batch tokens"] | None = None,
    ) -> Float[Array, "states batch sequence dim"]:
        """The whole sequence before the first block and after each, not normalised; arguments as for calling."""
        x, rotary, valid = self.embed(patches, grid, mask)
        _, states = scan_layers(self.blocks, x, rotary, valid, dtype=self.config.dtype, collect=True)
        assert states is not None
        return jnp.concatenate([x[None], states])

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
    ) -> tuple[Array, tuple[Array, Array], Array]:
        """The sequence [class, storage, patches], float32, its rotary (cos, sin), and which of its slots are in use."""
        batch, tokens, pixels = patches.shape
        if pixels != 3 * self.patch_size**2:
            raise ValueError(
                f"a patch has {pixels} numbers, but patch_size {self.patch_size} needs {3 * self.patch_size**2}: "
                "cut the images with the encoder's patch_size"
            )
        mask = token_mask(grid, tokens) if mask is None else mask
        patches = jnp.where(mask[..., None], patches, jnp.zeros_like(patches))  # whatever padding holds, NaN included
        tokens_in_front = [self.cls_token[...]]
        if self.config.num_storage_tokens:
            tokens_in_front.append(self.storage_tokens[...])
        front = jnp.concatenate(tokens_in_front, axis=1).astype(jnp.float32)
        front = jnp.broadcast_to(front, (batch, *front.shape[1:]))
        x = jnp.concatenate([front, self.patch_embed(patches).astype(jnp.float32)], axis=1)

        pad = ((0, 0), (front.shape[1], 0))
        angles = jnp.pad(self.rope_embed(grid, tokens), (*pad, (0, 0)))
        valid = jnp.pad(mask, pad, constant_values=True)
        return constrain_tokens(x), (jnp.cos(angles), jnp.sin(angles)), valid

    def split(self, x: Float[Array, "batch sequence dim"]) -> ViTOutput:
        """A sequence into its three kinds of tokens."""
        front = 1 + self.config.num_storage_tokens
        return ViTOutput(x[:, 0], x[:, 1:front], x[:, front:])


def rope_periods(count: int, base: float) -> np.ndarray:
    """base^(i / count) for i < count, float32."""
    return (base ** (np.arange(count, dtype=np.float64) / count)).astype(np.float32)


def qkv_bias_mask(shape: tuple[int, ...]) -> np.ndarray:
    """1 for queries, 0 for keys, 1 for values, each a third of the last axis."""
    thirds = np.array([1.0, 0.0, 1.0], np.float32)
    return np.broadcast_to(np.repeat(thirds, shape[-1] // 3), shape)


def normalise_pixels(patches: UInt8[Array, "... pixels"]) -> Float[Array, "... pixels"]:
    """0 .. 255 -> (v / 255 - mean) / std with the statistics of ImageNet, channel fastest; float32."""
    repeats, shape = patches.shape[-1] // 3, (1,) * (patches.ndim - 1) + (-1,)
    mean = np.tile(np.array(IMAGENET_MEAN, np.float32), repeats).reshape(shape)
    std = np.tile(np.array(IMAGENET_STD, np.float32), repeats).reshape(shape)
    return (patches.astype(jnp.float32) / 255.0 - mean) / std
