"""The convolutional decoder: image features to pixels, any height and width (the decoder of arXiv 2112.10752).

Resolution doubles between levels; the released one has five levels and so a factor 16. Attention sits in the middle and
after every block of the lowest level, in the released "woattn" configs too.
"""

from __future__ import annotations

import abc
import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from svg_jax.nn.attention import attention
from svg_jax.nn.linear import conv, doubled_convolution
from svg_jax.nn.norms import GroupNorm
from svg_jax.nn.stack import recomputed

MakeConv = Callable[..., nnx.Module]  # (in_features, out_features, size, *, rngs, dtype), like `conv`


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a decoder; the defaults are the released one of Autoencoder-P."""

    family: str = "conv"
    z_channels: int = 384
    out_channels: int = 3
    channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)  # from full resolution to the lowest
    num_res_blocks: int = 2
    remat: str = "none"  # of each block, in training: see nn.stack.REMAT
    dtype: str = "float32"

    @property
    def factor(self) -> int:
        """Pixels a side for one feature."""
        return 2 ** (len(self.channel_multipliers) - 1)

    @classmethod
    def svg(cls, **changes: Any) -> DecoderConfig:
        """The released decoder (`ch` 128, `ch_mult` 1, 1, 2, 2, 4)."""
        return cls(**changes)

    @classmethod
    def from_release(cls, arguments: dict[str, Any], **changes: Any) -> DecoderConfig:
        """From the `ddconfig` of a release config; keys that never had an effect there are ignored."""
        values = {
            "z_channels": arguments["z_channels"],
            "out_channels": arguments["out_ch"],
            "channels": arguments["ch"],
            "channel_multipliers": tuple(arguments["ch_mult"]),
            "num_res_blocks": arguments["num_res_blocks"],
        }
        return cls(**{**values, **changes})


class ResBlock(nnx.Module):
    """shortcut(x) + conv2(silu(norm2(conv1(silu(norm1(x)))))); the shortcut is 1 x 1 where the width changes."""

    def __init__(
        self, in_channels: int, out_channels: int, *, rngs: nnx.Rngs, dtype: str, make_conv: MakeConv = conv
    ) -> None:
        self.norm1 = GroupNorm(in_channels)
        self.conv1 = make_conv(in_channels, out_channels, 3, rngs=rngs, dtype=dtype)
        self.norm2 = GroupNorm(out_channels)
        self.conv2 = make_conv(out_channels, out_channels, 3, rngs=rngs, dtype=dtype)
        changes = in_channels != out_channels
        self.nin_shortcut = make_conv(in_channels, out_channels, 1, rngs=rngs, dtype=dtype) if changes else None

    def __call__(self, x: Float[Array, "batch h w in"]) -> Float[Array, "batch h w out"]:
        y = self.conv1(jax.nn.silu(self.norm1(x)))
        y = self.conv2(jax.nn.silu(self.norm2(y)))
        return (x if self.nin_shortcut is None else self.nin_shortcut(x)) + y


class AttentionBlock(nnx.Module):
    """x + proj(attention(norm(x))) over all positions, one head."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs, dtype: str, make_conv: MakeConv = conv) -> None:
        self.norm = GroupNorm(channels)
        self.q = make_conv(channels, channels, 1, rngs=rngs, dtype=dtype)
        self.k = make_conv(channels, channels, 1, rngs=rngs, dtype=dtype)
        self.v = make_conv(channels, channels, 1, rngs=rngs, dtype=dtype)
        self.proj_out = make_conv(channels, channels, 1, rngs=rngs, dtype=dtype)

    def __call__(self, x: Float[Array, "batch h w c"]) -> Float[Array, "batch h w c"]:
        batch, height, width, channels = x.shape
        y = self.norm(x)
        q, k, v = (project(y).reshape(batch, height * width, 1, channels) for project in (self.q, self.k, self.v))
        return x + self.proj_out(attention(q, k, v).reshape(x.shape))


class Upsample(nnx.Module):
    """Each pixel becomes 2 x 2, then a 3 x 3 convolution."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs, dtype: str) -> None:
        self.conv = conv(channels, channels, 3, rngs=rngs, dtype=dtype, form=doubled_convolution)

    def __call__(self, x: Float[Array, "batch h w c"]) -> Float[Array, "batch 2*h 2*w c"]:
        return self.conv(x)


class Middle(nnx.Module):
    """Block, attention, block at the lowest resolution."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs, dtype: str, make_conv: MakeConv = conv) -> None:
        self.block_1 = ResBlock(channels, channels, rngs=rngs, dtype=dtype, make_conv=make_conv)
        self.attn_1 = AttentionBlock(channels, rngs=rngs, dtype=dtype, make_conv=make_conv)
        self.block_2 = ResBlock(channels, channels, rngs=rngs, dtype=dtype, make_conv=make_conv)

    def __call__(self, x: Float[Array, "batch h w c"]) -> Float[Array, "batch h w c"]:
        return self.block_2(self.attn_1(self.block_1(x)))


class Level(nnx.Module):
    """One resolution: blocks, each with attention at the lowest one, then an upsampling except at the highest."""

    def __init__(
        self, in_channels: int, out_channels: int, config: DecoderConfig, *, lowest: bool, highest: bool, rngs: nnx.Rngs
    ) -> None:
        widths = [in_channels] + [out_channels] * (config.num_res_blocks + 1)
        self.remat, dtype = config.remat, config.dtype
        self.block = nnx.List([ResBlock(a, b, rngs=rngs, dtype=dtype) for a, b in itertools.pairwise(widths)])
        self.attn = nnx.List(
            [AttentionBlock(out_channels, rngs=rngs, dtype=dtype) for _ in widths[1:]] if lowest else []
        )
        self.upsample = None if highest else Upsample(out_channels, rngs=rngs, dtype=dtype)

    def __call__(self, x: Float[Array, "batch h w in"]) -> Float[Array, "batch h2 w2 out"]:
        for i, block in enumerate(self.block):
            x = recomputed(block, self.remat)(x)
            if self.attn:
                x = recomputed(self.attn[i], self.remat)(x)
        return x if self.upsample is None else recomputed(self.upsample, self.remat)(x)


class PixelDecoder(nnx.Module):
    """What the release's decoders share: a part that sees the whole image, one that does not, the last convolution."""

    config: Any  # with `factor` and `out_channels`
    conv_out: Callable[[Array], Array]  # apart from the rest: adversarial training weighs gradients by its kernel

    def __call__(self, z: Float[Array, "batch h w z_channels"]) -> Float[Array, "batch height width 3"]:
        """float32 pixels; `(x + 1) / 2` is the image."""
        return self.fine(self.coarse(z))

    def hidden(self, z: Float[Array, "batch h w z_channels"]) -> Float[Array, "batch height width c"]:
        """What the last convolution makes pixels of."""
        return self.upper(self.coarse(z))

    def fine(self, x: Float[Array, "batch h2 w2 c"]) -> Float[Array, "batch height width 3"]:
        """Pixels of what `coarse` gave."""
        return self.conv_out(self.upper(x)).astype(jnp.float32)

    @abc.abstractmethod
    def coarse(self, z: Float[Array, "batch h w z_channels"]) -> Float[Array, "batch h2 w2 c"]:
        """Up to the end of the lowest level: all of the attention, and little of the memory."""

    @abc.abstractmethod
    def upper(self, x: Float[Array, "batch h2 w2 c"]) -> Float[Array, "batch height width c"]:
        """The other levels, up to the last convolution."""


class Decoder(PixelDecoder):
    """Features [B, h, w, z_channels] -> images [B, h * factor, w * factor, 3], about in [-1, 1], not clipped."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        widths = [config.channels * multiplier for multiplier in config.channel_multipliers]
        last = len(widths) - 1
        self.conv_in = conv(config.z_channels, widths[-1], 3, rngs=rngs, dtype=config.dtype)
        self.mid = Middle(widths[-1], rngs=rngs, dtype=config.dtype)
        levels: list[Level] = []  # built from the lowest resolution, which is the last index
        for i in range(last, -1, -1):
            below = widths[min(i + 1, last)]
            levels.insert(0, Level(below, widths[i], config, lowest=i == last, highest=i == 0, rngs=rngs))
        self.up = nnx.List(levels)
        self.norm_out = GroupNorm(widths[0])
        self.conv_out = conv(widths[0], config.out_channels, 3, rngs=rngs, dtype=config.dtype)

    def coarse(self, z: Float[Array, "batch h w z_channels"]) -> Float[Array, "batch h2 w2 c"]:
        return self.up[-1](self.mid(self.conv_in(z.astype(self.config.dtype))))

    def upper(self, x: Float[Array, "batch h2 w2 c"]) -> Float[Array, "batch height width c"]:
        for level in reversed(self.up[:-1]):
            x = level(x)
        return jax.nn.silu(self.norm_out(x))


def decode_in_tiles(
    decoder: PixelDecoder, z: Float[Array, "batch h w z_channels"], tile: int
) -> Float[Array, "batch height width 3"]:
    """Decodes overlapping squares of `tile` features a side one after the other, and blends them.

    The lowest level, with all of the attention, sees the whole image; the levels above it, which take the memory, see
    one square at a time. Neighbours share at least a quarter of a side, across which one fades into the other. An
    approximation: the group norms of the upper levels take their statistics from one square. An image that is no
    larger than a square is decoded whole.

    Raises:
        ValueError: Squares of less than 4 features.
    """
    if tile < 4:
        raise ValueError(f"tiles of {tile} features a side are too small: choose at least 4")
    batch, rows, cols, _ = z.shape
    if rows <= tile and cols <= tile:
        return decoder(z)
    x = decoder.coarse(z)
    scale, factor = x.shape[1] // rows, decoder.config.factor * rows // x.shape[1]
    height, width = scale * min(tile, rows), scale * min(tile, cols)
    corners = [(i, j) for i in _tile_starts(x.shape[1], height) for j in _tile_starts(x.shape[2], width)]
    weight = (_ramp(height * factor)[:, None] * _ramp(width * factor)[None])[None, :, :, None]

    def add(canvas: Array, corner: Int[Array, "2"]) -> tuple[Array, None]:
        i, j = corner
        zero = jnp.zeros_like(i)
        square = decoder.fine(jax.lax.dynamic_slice(x, (zero, i, j, zero), (batch, height, width, x.shape[-1])))
        square = jnp.concatenate([square * weight, jnp.broadcast_to(weight, (*square.shape[:-1], 1))], axis=-1)
        at = (zero, i * factor, j * factor, zero)
        there = jax.lax.dynamic_slice(canvas, at, square.shape)
        return jax.lax.dynamic_update_slice(canvas, there + square, at), None

    size = (x.shape[1] * factor, x.shape[2] * factor)
    canvas = jnp.zeros((batch, *size, decoder.config.out_channels + 1))  # the last channel sums the weights
    canvas, _ = jax.lax.scan(add, canvas, jnp.array(corners))
    return canvas[..., :-1] / canvas[..., -1:]


def _tile_starts(length: int, tile: int) -> list[int]:
    """Where squares begin along one side: evenly spread, neighbours sharing at least a quarter."""
    count = 1 + math.ceil((length - tile) / (tile - tile // 4))
    return [round(i * (length - tile) / max(count - 1, 1)) for i in range(count)]


def _ramp(length: int) -> Float[Array, " length"]:
    """Weights that rise over the first quarter and fall over the last one; never zero."""
    distance = jnp.arange(length, dtype=jnp.float32) + 0.5
    return jnp.minimum(1.0, jnp.minimum(distance, length - distance) / (length / 4))
