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
from svg_jax.nn.segments import lengths_of, places, to_tokens
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

    def __call__(
        self, x: Array, rotary: tuple[Array, Array], valid: Array | None, segments: Array | None = None
    ) -> Array:
        heads, kv_heads = self.config.num_heads, self.config.num_kv_heads
        qkv = self.qkv(x).reshape(*x.shape[:2], heads + 2 * kv_heads, self.config.head_dim)
        q, k, v = jnp.split(qkv, (heads, heads + kv_heads), axis=2)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate_interleaved(q, *rotary), rotate_interleaved(k, *rotary)
        mixed = attention(q, k, v, valid=valid, segments=segments, backend=self.config.attention)
        return self.out(mixed.reshape(x.shape))


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

    def __call__(
        self,
        x: Array,
        rotary: tuple[Array, Array],
        valid: Array | None,
        time: Array | None = None,
        segments: Array | None = None,
    ) -> Array:
        if time is None:
            x = x + self.attention_norm2(self.attention(self.attention_norm1(x), rotary, valid, segments))
            x = x + self.ffn_norm2(self.feed_forward(self.ffn_norm1(x)))
        else:
            values = sequence(self.adaLN_modulation, time)
            values = values[:, None] if segments is None else to_tokens(values, segments)
            scale1, gate1, scale2, gate2 = jnp.split(values, 4, axis=-1)
            branch = self.attention(self.attention_norm1(x) * (1 + scale1), rotary, valid, segments)
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
        text: Float[Array, "rows text_tokens text_dim"],
        *,
        grid: Int[Array, "batch 2"],
        text_mask: Bool[Array, "rows text_tokens"] | None = None,
        text_segments: Int[Array, "rows text_tokens"] | None = None,
    ) -> Float[Array, "batch image_tokens channels"]:
        """Predicts x1 - x0 (data minus noise) at x_t.

        Args:
            x: Noised image features, row-major, the first rows * cols tokens of each image valid.
            t: Time, 0 for noise and 1 for data.
            text: Text features, right padded; a row for each image, or for `batch / rows` images that follow one
                another in the batch: those and their captions form one sequence, in which each sees its own.
            grid: (rows, cols) of each image, in tokens.
            text_mask: Which text tokens are valid, with a row for each image.
            text_segments: Of which image of its row each text token is, see `nn.segments`; in the place of
                `text_mask`. Every caption must have fewer tokens than `axes_lens[0]`.

        Returns:
            float32 velocity; what stands in masked slots means nothing.
        """
        config = self.config
        dtype = jnp.dtype(config.dtype)
        (rows, text_tokens), image_tokens = text.shape[:2], x.shape[1]
        image_mask = token_mask(grid, image_tokens)
        time = time_of_rows = self.t_embedder(t)
        if text_segments is None:
            if text_tokens >= config.axes_lens[0]:
                raise ValueError(f"{text_tokens} text tokens, but axes_lens[0] = {config.axes_lens[0]} allows fewer")
            assert text_mask is not None
            ids = positions(grid, text_mask, image_tokens)
            valid, segments = jnp.concatenate([text_mask, image_mask], axis=1), None
        else:
            ids = packed_positions(grid, text_segments, image_tokens)
            valid, segments = None, packed_segments(text_segments, image_mask)
            time_of_rows = time.reshape(rows, -1, time.shape[-1])
        cos, sin = multi_axis(ids, config.axes_dims, config.axes_lens)
        text_rotary = cos[:, :text_tokens], sin[:, :text_tokens]
        image_rotary = tuple(table[:, text_tokens:].reshape(*x.shape[:2], -1) for table in (cos, sin))

        text = sequence(self.cap_embedder, text.astype(dtype))
        image = constrain_tokens(self.x_embedder(x.astype(dtype)))
        run = functools.partial(scan_layers, remat=config.remat, dtype=config.dtype)
        text, _ = run(self.context_refiner, text, text_rotary, text_mask, None, text_segments)
        image, _ = run(self.noise_refiner, image, image_rotary, image_mask, time)

        # Attention sees positions and a mask, not an order: padding between text and image changes nothing, nor does
        # it matter what stands between an image and its caption.
        joint = jnp.concatenate([text, image.reshape(rows, -1, config.dim)], axis=1)
        joint, _ = run(self.layers, constrain_tokens(joint), (cos, sin), valid, time_of_rows, segments)
        return self.final_layer(joint[:, text_tokens:].reshape(image.shape), time).astype(jnp.float32)


def positions(
    grid: Int[Array, "batch 2"], text_mask: Bool[Array, "batch text_tokens"], image_tokens: int
) -> Int[Array, "batch tokens 3"]:
    """Text token i is at (i, 0, 0), image token (r, c) at (number of valid text tokens, r, c)."""
    text = jnp.broadcast_to(jnp.arange(text_mask.shape[1], dtype=jnp.int32)[None], text_mask.shape)
    return _positions(grid, text, jnp.sum(text_mask, axis=1, dtype=jnp.int32), image_tokens)


def packed_positions(
    grid: Int[Array, "batch 2"], text_segments: Int[Array, "rows text_tokens"], image_tokens: int
) -> Int[Array, "rows tokens 3"]:
    """The `positions` that each image and its caption have alone."""
    lengths = lengths_of(text_segments, grid.shape[0] // text_segments.shape[0])
    text = jnp.where(text_segments > 0, places(text_segments), 0)
    return _positions(grid, text, lengths.reshape(-1), image_tokens)


def _positions(
    grid: Int[Array, "batch 2"], text: Int[Array, "rows text_tokens"], after: Int[Array, " batch"], image_tokens: int
) -> Int[Array, "rows tokens 3"]:
    rows, cols = token_positions(grid, image_tokens)
    image = jnp.stack([jnp.broadcast_to(after[:, None], rows.shape), rows, cols], axis=-1)
    image = image.reshape(text.shape[0], -1, 3)
    return jnp.concatenate([jnp.pad(text[..., None], ((0, 0), (0, 0), (0, 2))), image], axis=1)


def packed_segments(
    text_segments: Int[Array, "rows text_tokens"], image_mask: Bool[Array, "batch image_tokens"]
) -> Int[Array, "rows tokens"]:
    """Segments of [text | image | image | ..]."""
    by_image = image_mask.reshape(text_segments.shape[0], -1, image_mask.shape[1])
    number = jnp.arange(1, by_image.shape[1] + 1, dtype=jnp.int32)[None, :, None]
    image = jnp.where(by_image, number, 0).reshape(text_segments.shape[0], -1)
    return jnp.concatenate([text_segments, image], axis=1)


def sequence(layers: nnx.List[Any], x: Array) -> Array:
    """Applies one after the other."""
    for layer in layers:
        x = layer(x)
    return x
