"""Inception v3 as FID uses it: the network of December 2015 (arXiv 1512.00567), as `pytorch-fid` has it.

Parameters carry the words of `pt_inception-2015-12-05-6726825d.pth`. It differs from the Inception v3 of other
libraries: 1008 classes, average pools that leave padding out, and a max pool where the last block has an average.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8

from svg_jax.nn.attention import current_platform
from svg_jax.nn.linear import linear, sharded
from svg_jax.nn.resize import resize

SIDE = 299  # pixels of the images that it was trained on
CHANNELS = 2048  # of a feature vector
CLASSES = 1008
EPSILON = 1e-3  # of the batch norms

Features = Float[Array, "batch h w channels"]


class BatchNorm(nnx.Module):
    """(x - running_mean) / sqrt(running_var + eps) * scale + bias: the statistics are parameters here."""

    def __init__(self, channels: int) -> None:
        self.scale = nnx.Param(jnp.ones((channels,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((channels,), jnp.float32))
        self.running_mean = nnx.Param(jnp.zeros((channels,), jnp.float32))
        self.running_var = nnx.Param(jnp.ones((channels,), jnp.float32))

    def __call__(self, x: Features) -> Features:
        scale = self.scale[...] * jax.lax.rsqrt(self.running_var[...] + EPSILON)
        bias = self.bias[...] - self.running_mean[...] * scale
        return x * scale[None, None, None] + bias[None, None, None]


class Unit(nnx.Module):
    """relu(norm(conv(x))); a convolution of stride 1 keeps height and width unless `padding` says "VALID"."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int | tuple[int, int] = 1,
        *,
        stride: int = 1,
        padding: str | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        self.conv = nnx.Conv(
            inputs,
            outputs,
            (size, size) if isinstance(size, int) else size,
            strides=stride,
            padding=padding or ("SAME" if stride == 1 else "VALID"),
            use_bias=False,
            kernel_metadata=sharded(None, None, "embed", "mlp"),
            conv_general_dilated=unpadded if (stride, padding) == (1, "VALID") else jax.lax.conv_general_dilated,
            rngs=rngs,
        )
        self.bn = BatchNorm(outputs)

    def __call__(self, x: Features) -> Features:
        return jax.nn.relu(self.bn(self.conv(x)))


def unpadded(
    x: Features, kernel: Float[Array, "3 3 in out"], strides: tuple[int, int], padding: str, **settings: Any
) -> Float[Array, "batch h-2 w-2 out"]:
    """A convolution of stride 1 that stays inside the image.

    On a CPU, XLA takes longer for that than for one with padding whose border is then cut off.
    """
    if current_platform() != "cpu":
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **settings)
    return jax.lax.conv_general_dilated(x, kernel, strides, "SAME", **settings)[:, 1:-1, 1:-1]


def average_pool(x: Features) -> Features:
    """Over 3 x 3 pixels, of which those outside the image do not count.

    As sums of shifted images, which XLA computes faster than its own windows on a CPU.
    """
    total, count = x, jnp.ones((1, 1, 1, 1))
    for axis in (1, 2):
        size = x.shape[axis]
        padded = jnp.pad(total, [(0, 0)] * axis + [(1, 1)] + [(0, 0)] * (3 - axis))
        total = sum((jax.lax.slice_in_dim(padded, i, i + size, axis=axis) for i in range(3)), jnp.zeros_like(x))
        inside = np.convolve(np.ones(size, np.float32), np.ones(3, np.float32))[1:-1]
        count = count * inside.reshape([-1 if i == axis else 1 for i in range(4)])
    return total / count


def max_pool(x: Features) -> Features:
    """Over 3 x 3 pixels; height and width stay."""
    return nnx.max_pool(x, (3, 3), (1, 1), "SAME")


def halved(x: Features) -> Features:
    """The largest of 3 x 3 pixels, at every other place."""
    return nnx.max_pool(x, (3, 3), (2, 2), "VALID")


def concatenated(*branches: Features) -> Features:
    """Along the channels."""
    return jnp.concatenate(branches, axis=-1)


class BlockA(nnx.Module):
    """35 x 35: windows of 1, 5 and 3 + 3 pixels, and a pool."""

    def __init__(self, inputs: int, pooled: int, *, rngs: nnx.Rngs) -> None:
        self.branch1x1 = Unit(inputs, 64, rngs=rngs)
        self.branch5x5_1 = Unit(inputs, 48, rngs=rngs)
        self.branch5x5_2 = Unit(48, 64, 5, rngs=rngs)
        self.branch3x3dbl_1 = Unit(inputs, 64, rngs=rngs)
        self.branch3x3dbl_2 = Unit(64, 96, 3, rngs=rngs)
        self.branch3x3dbl_3 = Unit(96, 96, 3, rngs=rngs)
        self.branch_pool = Unit(inputs, pooled, rngs=rngs)

    def __call__(self, x: Features) -> Features:
        return concatenated(
            self.branch1x1(x),
            self.branch5x5_2(self.branch5x5_1(x)),
            self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
            self.branch_pool(average_pool(x)),
        )


class BlockB(nnx.Module):
    """35 x 35 to 17 x 17."""

    def __init__(self, inputs: int, *, rngs: nnx.Rngs) -> None:
        self.branch3x3 = Unit(inputs, 384, 3, stride=2, rngs=rngs)
        self.branch3x3dbl_1 = Unit(inputs, 64, rngs=rngs)
        self.branch3x3dbl_2 = Unit(64, 96, 3, rngs=rngs)
        self.branch3x3dbl_3 = Unit(96, 96, 3, stride=2, rngs=rngs)

    def __call__(self, x: Features) -> Features:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return concatenated(self.branch3x3(x), double, halved(x))


class BlockC(nnx.Module):
    """17 x 17: rows and columns of 7 pixels in `width` channels, and a pool."""

    def __init__(self, inputs: int, width: int, *, rngs: nnx.Rngs) -> None:
        self.branch1x1 = Unit(inputs, 192, rngs=rngs)
        self.branch7x7_1 = Unit(inputs, width, rngs=rngs)
        self.branch7x7_2 = Unit(width, width, (1, 7), rngs=rngs)
        self.branch7x7_3 = Unit(width, 192, (7, 1), rngs=rngs)
        self.branch7x7dbl_1 = Unit(inputs, width, rngs=rngs)
        self.branch7x7dbl_2 = Unit(width, width, (7, 1), rngs=rngs)
        self.branch7x7dbl_3 = Unit(width, width, (1, 7), rngs=rngs)
        self.branch7x7dbl_4 = Unit(width, width, (7, 1), rngs=rngs)
        self.branch7x7dbl_5 = Unit(width, 192, (1, 7), rngs=rngs)
        self.branch_pool = Unit(inputs, 192, rngs=rngs)

    def __call__(self, x: Features) -> Features:
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        return concatenated(
            self.branch1x1(x),
            self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x))),
            self.branch7x7dbl_5(self.branch7x7dbl_4(double)),
            self.branch_pool(average_pool(x)),
        )


class BlockD(nnx.Module):
    """17 x 17 to 8 x 8."""

    def __init__(self, inputs: int, *, rngs: nnx.Rngs) -> None:
        self.branch3x3_1 = Unit(inputs, 192, rngs=rngs)
        self.branch3x3_2 = Unit(192, 320, 3, stride=2, rngs=rngs)
        self.branch7x7x3_1 = Unit(inputs, 192, rngs=rngs)
        self.branch7x7x3_2 = Unit(192, 192, (1, 7), rngs=rngs)
        self.branch7x7x3_3 = Unit(192, 192, (7, 1), rngs=rngs)
        self.branch7x7x3_4 = Unit(192, 192, 3, stride=2, rngs=rngs)

    def __call__(self, x: Features) -> Features:
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return concatenated(self.branch3x3_2(self.branch3x3_1(x)), seven, halved(x))


class BlockE(nnx.Module):
    """8 x 8: rows beside columns of 3 pixels, and `pool`."""

    def __init__(self, inputs: int, pool: Callable[[Features], Features], *, rngs: nnx.Rngs) -> None:
        self.pool = pool
        self.branch1x1 = Unit(inputs, 320, rngs=rngs)
        self.branch3x3_1 = Unit(inputs, 384, rngs=rngs)
        self.branch3x3_2a = Unit(384, 384, (1, 3), rngs=rngs)
        self.branch3x3_2b = Unit(384, 384, (3, 1), rngs=rngs)
        self.branch3x3dbl_1 = Unit(inputs, 448, rngs=rngs)
        self.branch3x3dbl_2 = Unit(448, 384, 3, rngs=rngs)
        self.branch3x3dbl_3a = Unit(384, 384, (1, 3), rngs=rngs)
        self.branch3x3dbl_3b = Unit(384, 384, (3, 1), rngs=rngs)
        self.branch_pool = Unit(inputs, 192, rngs=rngs)

    def __call__(self, x: Features) -> Features:
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        return concatenated(
            self.branch1x1(x),
            self.branch3x3_2a(single),
            self.branch3x3_2b(single),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
            self.branch_pool(self.pool(x)),
        )


class Inception(nnx.Module):
    """Images -> the 2048 features whose distribution FID compares."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.Conv2d_1a_3x3 = Unit(3, 32, 3, stride=2, rngs=rngs)
        self.Conv2d_2a_3x3 = Unit(32, 32, 3, padding="VALID", rngs=rngs)
        self.Conv2d_2b_3x3 = Unit(32, 64, 3, rngs=rngs)
        self.Conv2d_3b_1x1 = Unit(64, 80, rngs=rngs)
        self.Conv2d_4a_3x3 = Unit(80, 192, 3, padding="VALID", rngs=rngs)
        self.Mixed_5b = BlockA(192, 32, rngs=rngs)
        self.Mixed_5c = BlockA(256, 64, rngs=rngs)
        self.Mixed_5d = BlockA(288, 64, rngs=rngs)
        self.Mixed_6a = BlockB(288, rngs=rngs)
        self.Mixed_6b = BlockC(768, 128, rngs=rngs)
        self.Mixed_6c = BlockC(768, 160, rngs=rngs)
        self.Mixed_6d = BlockC(768, 160, rngs=rngs)
        self.Mixed_6e = BlockC(768, 192, rngs=rngs)
        self.Mixed_7a = BlockD(768, rngs=rngs)
        self.Mixed_7b = BlockE(1280, average_pool, rngs=rngs)
        self.Mixed_7c = BlockE(2048, max_pool, rngs=rngs)
        self.fc = linear(CHANNELS, CLASSES, ("embed", "vocab"), rngs=rngs)

    def __call__(self, images: UInt8[Array, "batch h w 3"]) -> Float[Array, "batch 2048"]:
        """Features of 8-bit images of any size: the mean over all places of what the last block makes."""
        return self.pooled(resized(images))

    def pooled(self, x: Float[Array, "batch 299 299 3"]) -> Float[Array, "batch 2048"]:
        """Features of images that are resized already, in [-1, 1]."""
        return self.blocks(x)[-1]

    def blocks(
        self, x: Float[Array, "batch 299 299 3"]
    ) -> tuple[Features, Features, Features, Float[Array, "batch 2048"]]:
        """What the four parts make that FID can be computed from: 64, 192, 768 and 2048 channels."""
        x = first = halved(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))))
        x = second = halved(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))
        x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))
        x = third = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        return first, second, third, jnp.mean(x, axis=(1, 2))

    def logits(self, features: Float[Array, "batch 2048"]) -> Float[Array, "batch 1008"]:
        """Of the classes that it was trained on, without the bias.

        So the Inception Score takes them: its code multiplies the features by the kernel and leaves it at that.
        """
        return features @ self.fc.kernel[...]


def resized(images: UInt8[Array, "batch h w 3"]) -> Float[Array, "batch 299 299 3"]:
    """2 v / 255 - 1, resized bilinearly without antialiasing."""
    return 2.0 * resize(images.astype(jnp.float32) / 255.0, (SIDE, SIDE), method="bilinear") - 1.0
