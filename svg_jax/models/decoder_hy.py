"""The release's second decoder (`hyconfig`): the one of HunyuanImage 3.0's autoencoder, for single images.

It differs from `models.decoder` in two ways. Resolution grows by rearranging channels into pixels instead of repeating
pixels, and each change of shape has a shortcut without weights (as in DC-AE, arXiv 2410.10733). Its convolutions were
made for video: three-dimensional, with zeros before and after. Of a single frame only the middle temporal tap of a
kernel sees anything; the other taps are kept, untouched, so that weights go back to the release as they came.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from svg_jax.models.decoder import Middle, PixelDecoder, ResBlock
from svg_jax.nn.linear import PYTORCH_CONV, convolution, sharded
from svg_jax.nn.norms import GroupNorm
from svg_jax.nn.stack import recomputed

RESIDUAL_CHANNELS = 8  # the last latents, which the first shortcut repeats where it cannot repeat all of them


@dataclasses.dataclass(frozen=True)
class HyDecoderConfig:
    """Sizes of a decoder; the defaults are those of the release's `R_hy3` config."""

    family: str = "hy"
    z_channels: int = 392
    out_channels: int = 3
    channels: tuple[int, ...] = (768, 384, 192, 192, 96)  # from the lowest resolution to the highest
    num_res_blocks: int = 2
    factor: int = 16  # pixels a side for one feature
    match_channels: bool = True  # an upsampling makes the width of the next level, not of its own
    remat: str = "none"  # of each block, in training: see nn.stack.REMAT
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.factor < 1 or self.factor.bit_count() != 1 or self.num_upsamplings >= len(self.channels):
            raise ValueError(
                f"a decoder of {len(self.channels)} levels cannot make {self.factor} pixels of a feature: resolution "
                f"doubles between levels, so factor must be a power of 2 up to {2 ** (len(self.channels) - 1)}"
            )
        repeated = self.shortcut_channels
        if self.channels[0] % repeated or self.z_channels < repeated:
            raise ValueError(
                f"the first width {self.channels[0]} is no multiple of the {self.z_channels} latent channels nor of "
                f"the last {RESIDUAL_CHANNELS} of them: the first shortcut repeats one or the other"
            )

    @property
    def num_upsamplings(self) -> int:
        """Levels that double the resolution, the first ones."""
        return self.factor.bit_length() - 1

    @property
    def shortcut_channels(self) -> int:
        """How many of the latents, counted from the last, the first shortcut repeats."""
        return self.z_channels if self.channels[0] % self.z_channels == 0 else RESIDUAL_CHANNELS

    @classmethod
    def from_release(cls, arguments: dict[str, Any], **changes: Any) -> HyDecoderConfig:
        """From the `hyconfig` of a release config.

        Raises:
            ValueError: The decoder would make several frames of an image, or its levels do not fit its factor.
        """
        if arguments.get("ffactor_temporal", 1) != 1:
            raise ValueError(
                f"a decoder with ffactor_temporal = {arguments['ffactor_temporal']} makes video: it must be 1"
            )
        values = {
            "z_channels": arguments["z_channels"],
            "out_channels": arguments["out_channels"],
            "channels": tuple(arguments["block_out_channels"]),
            "num_res_blocks": arguments["num_res_blocks"],
            "factor": arguments["ffactor_spatial"],
            "match_channels": arguments.get("upsample_match_channel", True),
        }
        return cls(**{**values, **changes})


class FrameConv(nnx.Module):
    """A three-dimensional convolution of one frame, [B, H, W, C]: that of the kernel's middle temporal tap."""

    def __init__(self, in_features: int, out_features: int, size: int, *, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        self.dtype = dtype
        shape = (size, size, size, in_features, out_features)
        kernel = PYTORCH_CONV(rngs.params(), shape, jnp.float32)
        self.kernel = nnx.Param(kernel, **sharded(None, None, None, "embed", "mlp"))
        self.bias = nnx.Param(jnp.zeros((out_features,), jnp.float32))

    def __call__(self, x: Float[Array, "batch h w in"]) -> Float[Array, "batch h w out"]:
        tap = self.kernel[...][self.kernel.shape[0] // 2].astype(self.dtype)
        y = convolution(x.astype(self.dtype), tap, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return y + self.bias[...].astype(self.dtype)[None, None, None]


class Upsample(nnx.Module):
    """Pixels out of channels: each position's 4 * out channels become 2 x 2 positions, plus x repeated likewise."""

    def __init__(self, in_channels: int, out_channels: int, *, rngs: nnx.Rngs, dtype: str) -> None:
        if 4 * out_channels % in_channels:
            raise ValueError(
                f"an upsampling from {in_channels} to {out_channels} channels has no shortcut: 4 x {out_channels} must "
                f"be a multiple of {in_channels}"
            )
        self.conv = FrameConv(in_channels, 4 * out_channels, 3, rngs=rngs, dtype=dtype)
        self.repeats = 4 * out_channels // in_channels

    def __call__(self, x: Float[Array, "batch h w in"]) -> Float[Array, "batch 2*h 2*w out"]:
        return channels_to_pixels(self.conv(x) + jnp.repeat(x, self.repeats, axis=-1))


def channels_to_pixels(x: Float[Array, "batch h w 4*out"]) -> Float[Array, "batch 2*h 2*w out"]:
    """Channels in the order (row, column, channel), channel fastest, spread over 2 x 2 positions."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height, width, 2, 2, channels // 4).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, 2 * height, 2 * width, channels // 4)


class Level(nnx.Module):
    """One resolution: blocks, then an upsampling unless it is one of the last."""

    def __init__(self, widths: list[int], next_width: int | None, *, rngs: nnx.Rngs, dtype: str, remat: str) -> None:
        self.remat = remat
        self.block = nnx.List(
            [ResBlock(a, b, rngs=rngs, dtype=dtype, make_conv=FrameConv) for a, b in itertools.pairwise(widths)]
        )
        self.upsample = None if next_width is None else Upsample(widths[-1], next_width, rngs=rngs, dtype=dtype)

    def __call__(self, x: Float[Array, "batch h w in"]) -> Float[Array, "batch h2 w2 out"]:
        for block in self.block:
            x = recomputed(block, self.remat)(x)
        return x if self.upsample is None else recomputed(self.upsample, self.remat)(x)


class HyDecoder(PixelDecoder):
    """Features [B, h, w, z_channels] -> images [B, h * factor, w * factor, 3], about in [-1, 1], not clipped."""

    def __init__(self, config: HyDecoderConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        dtype, width = config.dtype, config.channels[0]
        self.conv_in = FrameConv(config.z_channels, width, 3, rngs=rngs, dtype=dtype)
        self.mid = Middle(width, rngs=rngs, dtype=dtype, make_conv=FrameConv)
        levels = []
        for i, channels in enumerate(config.channels):
            next_width = None
            if i < config.num_upsamplings:
                next_width = config.channels[i + 1] if config.match_channels else channels
            widths = [width] + [channels] * (config.num_res_blocks + 1)
            levels.append(Level(widths, next_width, rngs=rngs, dtype=dtype, remat=config.remat))
            width = channels if next_width is None else next_width
        self.up = nnx.List(levels)
        self.norm_out = GroupNorm(width)
        self.conv_out = FrameConv(width, config.out_channels, 3, rngs=rngs, dtype=dtype)

    def coarse(self, z: Float[Array, "batch h w z_channels"]) -> Float[Array, "batch h2 w2 c"]:
        z = z.astype(self.config.dtype)
        repeated = z[..., -self.config.shortcut_channels :]
        shortcut = jnp.repeat(repeated, self.config.channels[0] // repeated.shape[-1], axis=-1)
        return self.up[0](self.mid(self.conv_in(z) + shortcut))

    def upper(self, x: Float[Array, "batch h2 w2 c"]) -> Float[Array, "batch height width c"]:
        for level in self.up[1:]:
            x = level(x)
        return jax.nn.silu(self.norm_out(x))
