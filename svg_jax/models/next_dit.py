"""Next-DiT: the single-stream diffusion transformer that predicts the velocity of image features from text and time.

Text tokens pass a context refiner, image tokens a noise refiner; both then form one sequence for the joint layers
(SVG-T2I, arXiv 2512.11749; Lumina-Image 2.0, arXiv 2503.21758). Shapes are fixed and masked: any mixture of aspect
ratios runs through one compiled program.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from svg_jax.nn.attention import attention
from svg_jax.nn.linear import linear
from svg_jax.nn.norms import LayerNorm, RMSNorm
from svg_jax.nn.patches import token_mask, token_positions
from svg_jax.nn.rotary import multi_axis, rotate_interleaved
from svg_jax.nn.stack import scan_layers, stacked
from svg_jax.parallel import constrain_tokens

TIME_FREQUENCIES = 256
MAX_TIME_WIDTH = 1024  # the time embedding, and the input of every modulation


@dataclasses.dataclass(frozen=True)
class NextDiTConfig:
    """Sizes of a Next-DiT; the defaults are the 2.6B model of the release."""

    in_channels: int = 384  # of the image features: 384 without, 392 with the residual branch
    text_dim: int = 2304  # of the text features: Gemma-2-2B
    dim: int = 2304
    num_layers: int = 26
    num_refiner_layers: int = 2
    num_heads: int = 24
    num_kv_heads: int = 8
    multiple_of: int = 256
    ffn_dim_multiplier: float | None = None
    norm_eps: float = 1e-5
    qk_norm: bool = True
    qk_norm_eps: float = 1e-6  # 1e-5 where the weights were trained with NVIDIA apex installed
    axes_dims: tuple[int, int, int] = (32, 32, 32)  # channels of a head that turn with caption index, row, column
    axes_lens: tuple[int, int, int] = (600, 512, 512)  # how many positions each axis has
    patch_size: int = 1  # features a side that make one token
    dtype: str = "float32"  # of the computation; parameters are float32
    remat: str = "none"  # see nn.stack.REMAT
    attention: str = "auto"  # see nn.attention.BACKENDS

    def __post_init__(self) -> None:
        if self.dim % self.num_heads or self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"dim {self.dim}, num_heads {self.num_heads} and num_kv_heads {self.num_kv_heads} must divide in turn"
            )
        if sum(self.axes_dims) != self.head_dim or any(dim % 2 for dim in self.axes_dims):
            raise ValueError(
                f"axes_dims {self.axes_dims} must be even and add up to the head size dim / num_heads = {self.head_dim}"
            )

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def time_dim(self) -> int:
        return min(self.dim, MAX_TIME_WIDTH)

    @property
    def token_channels(self) -> int:
        """Numbers in one image token."""
        return self.in_channels * self.patch_size**2

    @property
    def hidden_dim(self) -> int:
        """Of the feed-forward layers: 4 dim times the multiplier, rounded up to `multiple_of`."""
        hidden = int((self.ffn_dim_multiplier or 1.0) * 4 * self.dim)
        return self.multiple_of * math.ceil(hidden / self.multiple_of)

    @classmethod
    def next_dit_0p8b(cls, **changes: Any) -> NextDiTConfig:
        sizes = {"dim": 1152, "num_layers": 28, "num_heads": 16, "axes_dims": (24, 24, 24)}
        return cls(**{**sizes, **changes})

    @classmethod
    def next_dit_2p6b(cls, **changes: Any) -> NextDiTConfig:
        """The published model."""
        return cls(**changes)

    @classmethod
    def next_dit_3b(cls, **changes: Any) -> NextDiTConfig:
        sizes = {"dim": 2592, "num_layers": 30, "axes_dims": (36, 36, 36)}
        return cls(**{**sizes, **changes})

    @classmethod
    def next_dit_4b(cls, **changes: Any) -> NextDiTConfig:
        sizes = {"dim": 2880, "num_layers": 32, "axes_dims": (40, 40, 40)}
        return cls(**{**sizes, **changes})

    @classmethod
    def next_dit_7b(cls, **changes: Any) -> NextDiTConfig:
        sizes = {"dim": 3840, "num_layers": 32, "num_heads": 32, "axes_dims": (40, 40, 40)}
        return cls(**{**sizes, **changes})

    @classmethod
    def from_release(cls, arguments: dict[str, Any], **changes: Any) -> NextDiTConfig:
        """From the constructor arguments of the PyTorch release."""
        values = dict(arguments)
        renamed = {"n_layers": "num_layers", "n_refiner_layers": "num_refiner_layers", "n_heads": "num_heads"}
        renamed |= {"n_kv_heads": "num_kv_heads", "cap_feat_dim": "text_dim"}
        values = {renamed.get(key, key): tuple(v) if isinstance(v, list) else v for key, v in values.items()}
        if values.get("num_kv_heads", 0) is None:
            values["num_kv_heads"] = values["num_heads"]
        return cls(**{**values, **changes})


class Attention(nnx.Module):
    """Grouped-query self-attention with normalised, rotated queries and keys."""

    def __init__(self, config: NextDiTConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        width = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        self.qkv = linear(config.dim, width, ("embed", "heads"), use_bias=False, dtype=config.dtype, rngs=rngs)
        self.out = linear(config.dim, config.dim, ("heads", "embed"), use_bias=False, dtype=config.dtype, rngs=rngs)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, eps=config.qk_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, eps=config.qk_norm_eps)

    def __call__(self, x: Array, rotary: tuple[Array, Array], valid: Array) -> Array:
        heads, kv_heads = self.config.num_heads, self.config.num_kv_heads
        qkv = self.qkv(x).reshape(*x.shape[:2], heads + 2 * kv_heads, self.config.head_dim)
        q, k, v = jnp.split(qkv, (heads, heads + kv_heads), axis=2)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate_interleaved(q, *rotary), rotate_interleaved(k, *rotary)
        return self.out(attention(q, k, v, valid=valid, backend=self.config.attention).reshape(x.shape))


class FeedForward(nnx.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x) (arXiv 2002.05202)."""

    def __init__(self, config: NextDiTConfig, *, rngs: nnx.Rngs) -> None:
        dim, hidden, dtype = config.dim, config.hidden_dim, config.dtype
        self.w1 = linear(dim, hidden, ("embed", "mlp"), use_bias=False, dtype=dtype, rngs=rngs)
        self.w2 = linear(hidden, dim, ("mlp", "embed"), use_bias=False, dtype=dtype, rngs=rngs)
        self.w3 = linear(dim, hidden, ("embed", "mlp"), use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.w2(jax.nn.silu(self.w1(x)) * self.w3(x))


def modulation(config: NextDiTConfig, features: int, *, rngs: nnx.Rngs) -> nnx.List[Any]:
    """SiLU, then a linear map that starts at zero (adaLN-Zero, arXiv 2212.09748)."""
    zeros = nnx.initializers.zeros_init()
    axes = ("embed", "mlp")
    return nnx.List(
        [jax.nn.silu, linear(config.time_dim, features, axes, kernel_init=zeros, dtype=config.dtype, rngs=rngs)]
    )


class Block(nnx.Module):
    """x + tanh(g) * norm2(f(norm1(x) * (1 + s))), f = attention, then feed-forward; s = 0 and no g if unmodulated."""

    def __init__(self, config: NextDiTConfig, *, modulated: bool, rngs: nnx.Rngs) -> None:
        self.attention = Attention(config, rngs=rngs)
        self.feed_forward = FeedForward(config, rngs=rngs)
        self.attention_norm1 = RMSNorm(config.dim, eps=config.norm_eps)
        self.attention_norm2 = RMSNorm(config.dim, eps=config.norm_eps)
        self.ffn_norm1 = RMSNorm(config.dim, eps=config.norm_eps)
        self.ffn_norm2 = RMSNorm(config.dim, eps=config.norm_eps)
        if modulated:
            self.adaLN_modulation = modulation(config, 4 * config.dim, rngs=rngs)

    def __call__(self, x: Array, rotary: tuple[Array, Array], valid: Array, time: Array | None = None) -> Array:
        if time is None:
            x = x + self.attention_norm2(self.attention(self.attention_norm1(x), rotary, valid))
            x = x + self.ffn_norm2(self.feed_forward(self.ffn_norm1(x)))
        else:
            scale1, gate1, scale2, gate2 = jnp.split(sequence(self.adaLN_modulation, time)[:, None], 4, axis=-1)
            branch = self.attention(self.attention_norm1(x) * (1 + scale1), rotary, valid)
            x = x + jnp.tanh(gate1) * self.attention_norm2(branch)
            branch = self.feed_forward(self.ffn_norm1(x) * (1 + scale2))
            x = x + jnp.tanh(gate2) * self.ffn_norm2(branch)
        return constrain_tokens(x)


class TimestepEmbedder(nnx.Module):
    """Sinusoids of t, then an MLP; t is used raw in [0, 1], without a factor 1000."""

    def __init__(self, config: NextDiTConfig, *, rngs: nnx.Rngs) -> None:
        normal = nnx.initializers.normal(0.02)
        self.mlp = nnx.List(
            [
                linear(
                    TIME_FREQUENCIES,
                    config.time_dim,
                    ("embed", None),
                    kernel_init=normal,
                    dtype=config.dtype,
                    rngs=rngs,
                ),
                jax.nn.silu,
                linear(
                    config.time_dim, config.time_dim, ("embed", None), kernel_init=normal, dtype=config.dtype, rngs=rngs
                ),
            ]
        )

    def __call__(self, t: Float[Array, " batch"]) -> Float[Array, "batch time_dim"]:
        return sequence(self.mlp, time_sinusoids(t))


def time_sinusoids(t: Float[Array, " batch"], features: int = TIME_FREQUENCIES) -> Float[Array, "batch features"]:
    """[cos(t w_0) .. cos(t w_k), sin(t w_0) .. sin(t w_k)], w_i = 10000^(-i / k), k = features / 2; float32."""
    half = features // 2
    frequencies = jnp.exp(-math.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = t.astype(jnp.float32)[:, None] * frequencies[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class FinalLayer(nnx.Module):
    """linear(norm(x) * (1 + s)); the linear map starts at zero, so that an untrained network predicts zero."""

    def __init__(self, config: NextDiTConfig, *, rngs: nnx.Rngs) -> None:
        zeros = nnx.initializers.zeros_init()
        self.norm = LayerNorm(config.dim, eps=1e-6, affine=False)
        self.linear = linear(
            config.dim, config.token_channels, ("embed", None), kernel_init=zeros, dtype=config.dtype, rngs=rngs
        )
        self.adaLN_modulation = modulation(config, config.dim, rngs=rngs)

    def __call__(self, x: Array, time: Array) -> Array:
        return self.linear(self.norm(x) * (1 + sequence(self.adaLN_modulation, time)[:, None]))


class NextDiT(nnx.Module):
    """velocity(x, t | text)."""

    def __init__(self, config: NextDiTConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        refiners, dtype = config.num_refiner_layers, config.dtype
        self.x_embedder = linear(config.token_channels, config.dim, (None, "embed"), dtype=dtype, rngs=rngs)
        self.t_embedder = TimestepEmbedder(config, rngs=rngs)
        self.cap_embedder = nnx.List(
            [
                RMSNorm(config.text_dim, eps=config.norm_eps),
                linear(
                    config.text_dim,
                    config.dim,
                    ("embed", None),
                    kernel_init=nnx.initializers.truncated_normal(0.02),
                    dtype=dtype,
                    rngs=rngs,
                ),
            ]
        )
        self.context_refiner = stacked(lambda rngs: Block(config, modulated=False, rngs=rngs), refiners, rngs=rngs)
        self.noise_refiner = stacked(lambda rngs: Block(config, modulated=True, rngs=rngs), refiners, rngs=rngs)
        self.layers = stacked(lambda rngs: Block(config, modulated=True, rngs=rngs), config.num_layers, rngs=rngs)
        self.norm_final = RMSNorm(config.dim, eps=config.norm_eps)  # never used: the release carries it in its files
        self.final_layer = FinalLayer(config, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "batch image_tokens channels"],
        t: Float[Array, " batch"],
        text: Float[Array, "batch text_tokens text_dim"],
        *,
        grid: Int[Array, "batch 2"],
        text_mask: Bool[Array, "batch text_tokens"],
    ) -> Float[Array, "batch image_tokens channels"]:
        """Predicts x1 - x0 (data minus noise) at x_t.

        Args:
            x: Noised image features, row-major, the first rows * cols tokens of each image valid.
            t: Time, 0 for noise and 1 for data.
            text: Text features, right padded.
            grid: (rows, cols) of each image, in tokens.
            text_mask: Which text tokens are valid.

        Returns:
            float32 velocity; what stands in masked slots means nothing.
        """
        config = self.config
        dtype = jnp.dtype(config.dtype)
        text_tokens, image_tokens = text.shape[1], x.shape[1]
        if text_tokens >= config.axes_lens[0]:
            raise ValueError(f"{text_tokens} text tokens, but axes_lens[0] = {config.axes_lens[0]} allows fewer")

        image_mask = token_mask(grid, image_tokens)
        cos, sin = multi_axis(positions(grid, text_mask, image_tokens), config.axes_dims, config.axes_lens)
        text_rotary = cos[:, :text_tokens], sin[:, :text_tokens]
        image_rotary = cos[:, text_tokens:], sin[:, text_tokens:]

        time = self.t_embedder(t)
        text = sequence(self.cap_embedder, text.astype(dtype))
        image = constrain_tokens(self.x_embedder(x.astype(dtype)))
        run = functools.partial(scan_layers, remat=config.remat, dtype=config.dtype)
        text, _ = run(self.context_refiner, text, text_rotary, text_mask)
        image, _ = run(self.noise_refiner, image, image_rotary, image_mask, time)

        # Attention sees positions and a mask, not an order: padding between text and image changes nothing.
        joint = jnp.concatenate([text, image], axis=1)
        valid = jnp.concatenate([text_mask, image_mask], axis=1)
        joint, _ = run(self.layers, constrain_tokens(joint), (cos, sin), valid, time)
        return self.final_layer(joint[:, text_tokens:], time).astype(jnp.float32)


def positions(
    grid: Int[Array, "batch 2"], text_mask: Bool[Array, "batch text_tokens"], image_tokens: int
) -> Int[Array, "batch tokens 3"]:
    """Text token i is at (i, 0, 0), image token (r, c) at (number of valid text tokens, r, c)."""
    batch, text_tokens = text_mask.shape
    text = jnp.broadcast_to(jnp.arange(text_tokens, dtype=jnp.int32)[None], (batch, text_tokens))
    after = jnp.sum(text_mask, axis=1, dtype=jnp.int32)[:, None]
    rows, cols = token_positions(grid, image_tokens)
    image = jnp.stack([jnp.broadcast_to(after, rows.shape), rows, cols], axis=-1)
    return jnp.concatenate([jnp.pad(text[..., None], ((0, 0), (0, 0), (0, 2))), image], axis=1)


def sequence(layers: nnx.List[Any], x: Array) -> Array:
    """Applies one after the other."""
    for layer in layers:
        x = layer(x)
    return x
