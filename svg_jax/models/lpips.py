"""LPIPS: how different two images look, by the features of a VGG16 that was trained to classify (arXiv 1801.03924).

Its weights come from two public files, see `svg_jax.adversarial.PERCEPTUAL_WEIGHTS`.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from svg_jax.nn.linear import conv
from svg_jax.nn.stack import recomputed

SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
SLICES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))  # places of the convolutions in VGG16
EPSILON = 1e-10
SMALLEST_SIDE = 16  # pixels; of less, the last layer sees nothing


@dataclasses.dataclass(frozen=True)
class LPIPSConfig:
    """Widths of the five slices; the defaults are VGG16's, which the published weights have."""

    channels: tuple[int, ...] = (64, 128, 256, 512, 512)
    remat: str = "none"  # of each slice: see nn.stack.REMAT
    dtype: str = "float32"


class VGG16(nnx.Module):
    """The convolutional part of VGG16 (arXiv 1409.1556, column D) without its last pooling."""

    def __init__(self, config: LPIPSConfig, *, rngs: nnx.Rngs) -> None:
        self.dtype, self.remat = config.dtype, config.remat
        width = 3
        for i, places in enumerate(SLICES):
            convs = {}
            for place in places:
                convs[str(place)] = conv(width, config.channels[i], 3, rngs=rngs, dtype=config.dtype)
                width = config.channels[i]
            setattr(self, f"slice{i + 1}", nnx.Dict(convs))

    def __call__(self, x: Float[Array, "batch h w 3"]) -> list[Float[Array, "batch h2 w2 c"]]:
        """What relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3 give."""
        x, found = x.astype(self.dtype), []
        for i in range(len(SLICES)):
            x = recomputed(functools.partial(self.slice, i), self.remat)(x)
            found.append(x)
        return found

    def slice(self, i: int, x: Float[Array, "batch h w in"]) -> Float[Array, "batch h2 w2 out"]:
        """Pooling, but for the first one, and convolutions."""
        if i > 0:
            x = nnx.max_pool(x, (2, 2), (2, 2))
        for place in SLICES[i]:
            x = jax.nn.relu(getattr(self, f"slice{i + 1}")[str(place)](x))
        return x


class Head(nnx.Module):
    """Weights of the channels; a positive one each in the published file."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs) -> None:
        self.model = nnx.Dict({"1": conv(channels, 1, 1, rngs=rngs, use_bias=False, dtype="float32")})

    def __call__(self, x: Float[Array, "batch h w c"]) -> Float[Array, " batch"]:
        """Weighted sum over channels, mean over places."""
        return jnp.mean(self.model["1"](x), axis=(1, 2, 3))


class LPIPS(nnx.Module):
    """d(a, b) = Σ_l mean over places of w_l · (f_l(a) / |f_l(a)| - f_l(b) / |f_l(b)|)^2   (arXiv 1801.03924, eq. 1).

    f_l are the features of five layers. Dropout before the weights, which the release has in training code, is off.
    """

    def __init__(self, config: LPIPSConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.net = VGG16(config, rngs=rngs)
        for i, channels in enumerate(config.channels):
            setattr(self, f"lin{i}", Head(channels, rngs=rngs))

    def __call__(self, a: Float[Array, "batch h w 3"], b: Float[Array, "batch h w 3"]) -> Float[Array, " batch"]:
        """Distance of the images of each pair, in [-1, 1], float32.

        Raises:
            ValueError: Images of less than 16 pixels a side, of which the last layer sees nothing.
        """
        return jnp.sum(self.by_layer(a, b), axis=0)

    def by_layer(self, a: Float[Array, "batch h w 3"], b: Float[Array, "batch h w 3"]) -> Float[Array, "5 batch"]:
        """The terms of the sum."""
        if min(a.shape[1:3]) < SMALLEST_SIDE:
            raise ValueError(
                f"LPIPS of images of {a.shape[1]} x {a.shape[2]} pixels: they need at least {SMALLEST_SIDE} a side"
            )
        distances = [
            getattr(self, f"lin{i}")(jnp.square(_unit(of_a) - _unit(of_b)))
            for i, (of_a, of_b) in enumerate(zip(self.features(a), self.features(b), strict=True))
        ]
        return jnp.stack(distances)

    def features(self, x: Float[Array, "batch h w 3"]) -> list[Float[Array, "batch h2 w2 c"]]:
        """VGG16's, of pixels in [-1, 1]."""
        shift, scale = (jnp.array(values)[None, None, None] for values in (SHIFT, SCALE))
        return self.net((x.astype(jnp.float32) - shift) / scale)


def _unit(x: Float[Array, "batch h w c"]) -> Float[Array, "batch h w c"]:
    """x / (|x| + 1e-10) over channels, float32; where all are zero, zero with a gradient of zero."""
    x = x.astype(jnp.float32)
    squares = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    some = squares != 0  # NaN is some, and stays
    return jnp.where(some, x / (jnp.sqrt(jnp.where(some, squares, 1.0)) + EPSILON), 0.0)
