"""The patch discriminator: one logit for every patch of an image (PatchGAN, arXiv 1611.07004, section 3.2.2).

4 x 4 convolutions with batch normalisation and leaky ReLU; a logit sees 70 x 70 pixels with the released three layers.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from svg_jax.nn.functional import Params
from svg_jax.nn.linear import conv

EPSILON = 1e-5
MOMENTUM = 0.1  # weight of a new batch in the running statistics
NORMAL = nnx.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True)
class DiscriminatorConfig:
    """Sizes; the defaults are the released ones."""

    channels: int = 64
    num_layers: int = 3
    dtype: str = "float32"

    @property
    def smallest_side(self) -> int:
        """Pixels a side that leave it a place to judge: two convolutions of stride 1 each take one away."""
        return 3 * 2**self.num_layers


class Statistics(NamedTuple):
    """Of the inputs of a batch normalisation, one row a group of images that were normalised together."""

    mean: Float[Array, "groups c"]
    var: Float[Array, "groups c"]  # with n - 1, as the running one has it
    valid: Bool[Array, " groups"]  # whether there was an image


class BatchNorm(nnx.Module):
    """(x - mean) / sqrt(var + eps) * scale + bias (arXiv 1502.03167), statistics and result in float32.

    Mean and variance run over the valid images of the global batch, or over each image alone (`per_image`).
    """

    def __init__(self, features: int, *, rngs: nnx.Rngs) -> None:
        self.scale = nnx.Param(1.0 + NORMAL(rngs.params(), (features,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((features,), jnp.float32))
        self.running_mean = nnx.Param(jnp.zeros((features,), jnp.float32))
        self.running_var = nnx.Param(jnp.ones((features,), jnp.float32))

    def __call__(
        self, x: Float[Array, "batch h w c"], valid: Bool[Array, " batch"], *, per_image: bool
    ) -> tuple[Float[Array, "batch h w c"], Statistics]:
        """Normalises with the statistics of the batch, and returns them."""
        batch, height, width, channels = x.shape
        x = x.astype(jnp.float32)
        here = jnp.where(valid[:, None, None, None], x, 0.0)
        axes = (1, 2) if per_image else (0, 1, 2)
        images = jnp.ones((batch,)) if per_image else jnp.maximum(jnp.sum(valid, dtype=jnp.float32), 1.0)[None]
        count = (images * (height * width))[:, None]
        mean = jnp.sum(here, axis=axes).reshape(-1, channels) / count
        deviation = jnp.where(valid[:, None, None, None], x - mean[:, None, None], 0.0)
        squares = jnp.sum(jnp.square(deviation), axis=axes).reshape(-1, channels)
        y = self._affine(deviation, squares / count)
        found = Statistics(mean, squares / jnp.maximum(count - 1.0, 1.0), valid if per_image else valid.any()[None])
        return y, found

    def with_running_statistics(self, x: Float[Array, "batch h w c"]) -> Float[Array, "batch h w c"]:
        """Normalises with those of past batches."""
        deviation = x.astype(jnp.float32) - self.running_mean[...][None, None, None]
        return self._affine(deviation, self.running_var[...][None])

    def _affine(self, deviation: Float[Array, "batch h w c"], var: Float[Array, "groups c"]) -> Array:
        scale = jax.lax.rsqrt(var + EPSILON) * self.scale[...][None]
        return deviation * scale[:, None, None] + self.bias[...][None, None, None]


class LeakyReLU(nnx.Module):
    """max(x, 0.2 x)."""

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        return jax.nn.leaky_relu(x, 0.2)


class PatchDiscriminator(nnx.Module):
    """Images [B, H, W, 3] in [-1, 1] -> logits [B, h, w], high for real patches."""

    def __init__(self, config: DiscriminatorConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        layers: list[nnx.Module] = []
        width = 3
        for i in range(config.num_layers + 1):
            wider, first = config.channels * min(2**i, 8), i == 0
            stride = 2 if i < config.num_layers else 1
            layers.append(self._conv(width, wider, stride, use_bias=first, rngs=rngs))
            layers += [LeakyReLU()] if first else [BatchNorm(wider, rngs=rngs), LeakyReLU()]
            width = wider
        layers.append(self._conv(width, 1, 1, use_bias=True, rngs=rngs))
        self.main = nnx.List(layers)

    def _conv(self, width: int, wider: int, stride: int, *, use_bias: bool, rngs: nnx.Rngs) -> nnx.Conv:
        return conv(
            width,
            wider,
            4,
            stride=stride,
            padding=1,
            use_bias=use_bias,
            kernel_init=NORMAL,
            dtype=self.config.dtype,
            rngs=rngs,
        )

    def __call__(
        self,
        images: Float[Array, "batch height width 3"],
        valid: Bool[Array, " batch"] | None = None,
        *,
        train: bool = True,
        per_image: bool = False,
    ) -> tuple[Float[Array, "batch h w"], dict[str, Statistics]]:
        """Logits in float32, and the statistics of every batch normalisation by its name (none without `train`).

        Args:
            images: The batch.
            valid: Which slots hold an image; the others enter no statistics, and their logits mean nothing.
            train: Normalise with the statistics of the batch instead of the running ones.
            per_image: Each image has statistics of its own, as in a batch of images of different sizes.

        Raises:
            ValueError: The images are too small for a single patch.
        """
        smallest = self.config.smallest_side
        if min(images.shape[1:3]) < smallest:
            raise ValueError(
                f"images of {images.shape[1]} x {images.shape[2]} pixels are too small for a discriminator with "
                f"{self.config.num_layers} layers: choose at least {smallest} pixels a side, or fewer layers "
                "(config.loss.disc_num_layers)"
            )
        valid = jnp.ones((images.shape[0],), bool) if valid is None else valid
        x, found = images, {}
        for i, layer in enumerate(self.main):
            if not isinstance(layer, BatchNorm):
                x = layer(x)
            elif train:
                x, found[f"main.{i}"] = layer(x, valid, per_image=per_image)
            else:
                x = layer.with_running_statistics(x)
        return x[..., 0].astype(jnp.float32), found


def running_statistics(params: Params, passes: list[dict[str, Statistics]]) -> Params:
    """The running statistics after some passes: r <- 0.9 r + 0.1 s, for one group of images after the other.

    Args:
        params: The discriminator's.
        passes: What the passes returned, in their order. Where they have several groups, the first group of all passes
            comes before the second.
    """
    new = {}
    for name in passes[0]:
        for kind in ("mean", "var"):
            groups = jnp.stack([getattr(found[name], kind) for found in passes], axis=1)  # [groups, passes, c]
            valid = jnp.stack([found[name].valid for found in passes], axis=1)
            old = params[f"{name}.running_{kind}"]
            new[f"{name}.running_{kind}"] = _followed(old, groups.reshape(-1, old.size), valid.reshape(-1))
    return new


def _followed(old: Float[Array, " c"], values: Float[Array, "n c"], valid: Bool[Array, " n"]) -> Float[Array, " c"]:
    """The moving average after `values`, one after the other; those that are not valid change nothing."""
    kept = jnp.where(valid, 1.0 - MOMENTUM, 1.0)
    after = jnp.cumprod(kept[::-1])[::-1] / kept  # how much of each value is left at the end
    weights = jnp.where(valid, MOMENTUM * after, 0.0)
    return jnp.prod(kept) * old + jnp.sum(weights[:, None] * values, axis=0)
