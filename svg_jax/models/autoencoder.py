"""The SVG autoencoder: a frozen vision model in, latent statistics, a convolutional decoder out (arXiv 2512.11749).

No quantisation, no KL term, no Gaussian assumption: a latent is the feature itself. The diffusion model sees it
normalised by statistics of the data, z = (f - mean) / (std + 1e-8) a channel.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from svg_jax.models.decoder import Decoder, DecoderConfig, decode_in_tiles
from svg_jax.models.vit import ViT, ViTConfig, normalise_pixels

EPSILON = 1e-8


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """Autoencoder-P; the residual branch of Autoencoder-R is not part of it."""

    encoder: ViTConfig
    decoder: DecoderConfig

    def __post_init__(self) -> None:
        if self.encoder.dim != self.decoder.z_channels:
            raise ValueError(
                f"the encoder makes {self.encoder.dim} channels and the decoder reads {self.decoder.z_channels}: "
                "set decoder.z_channels to the encoder's dim"
            )
        if self.encoder.patch_size != self.decoder.factor:
            raise ValueError(
                f"a patch has {self.encoder.patch_size} pixels a side and the decoder makes {self.decoder.factor} of "
                "each feature: give channel_multipliers one level for each doubling, plus one"
            )

    @classmethod
    def svg_p(cls, dtype: str = "float32") -> AutoencoderConfig:
        """The released Autoencoder-P: DINOv3 ViT-S+/16 and the decoder of width 128."""
        return cls(ViTConfig.vits16plus(dtype=dtype), DecoderConfig.svg(dtype=dtype))


class LatentStatistics(nnx.Module):
    """Mean and standard deviation of each feature channel over the training images."""

    def __init__(self, channels: int) -> None:
        self.mean = nnx.Param(jnp.zeros((channels,), jnp.float32))
        self.std = nnx.Param(jnp.ones((channels,), jnp.float32))

    def normalise(self, features: Float[Array, "... channels"]) -> Float[Array, "... channels"]:
        """z = (f - mean) / (std + 1e-8)."""
        shape = (1,) * (features.ndim - 1) + (-1,)
        return (features - self.mean[...].reshape(shape)) / (self.std[...].reshape(shape) + EPSILON)

    def denormalise(self, z: Float[Array, "... channels"]) -> Float[Array, "... channels"]:
        """f = z (std + 1e-8) + mean."""
        shape = (1,) * (z.ndim - 1) + (-1,)
        return z * (self.std[...].reshape(shape) + EPSILON) + self.mean[...].reshape(shape)


class Autoencoder(nnx.Module):
    """Pixels <-> normalised latents."""

    def __init__(self, config: AutoencoderConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.encoder = ViT(config.encoder, rngs=rngs)
        self.latents = LatentStatistics(config.encoder.dim)
        self.decoder = Decoder(config.decoder, rngs=rngs)

    def features(
        self, patches: UInt8[Array, "batch tokens pixels"], grid: Int[Array, "batch 2"]
    ) -> Float[Array, "batch tokens channels"]:
        """The vision model's patch features of padded uint8 patches, float32, not normalised."""
        return self.encoder(normalise_pixels(patches), grid).astype(jnp.float32)

    def encode(
        self, patches: UInt8[Array, "batch tokens pixels"], grid: Int[Array, "batch 2"]
    ) -> Float[Array, "batch tokens channels"]:
        """Normalised latents; what stands in masked slots means nothing."""
        return self.latents.normalise(self.features(patches, grid))

    def decode(
        self, z: Float[Array, "batch tokens channels"], grid: tuple[int, int], tile: int | None = None
    ) -> Float[Array, "batch h w 3"]:
        """Normalised latents of one grid (rows, cols) -> pixels in about [-1, 1]; further tokens are ignored.

        Args:
            z: Latents.
            grid: Rows and columns of all of them.
            tile: Side of the squares of latents that are decoded one after the other, see `decode_in_tiles`.
        """
        rows, cols = grid
        features = self.latents.denormalise(z[:, : rows * cols]).reshape(z.shape[0], rows, cols, z.shape[-1])
        return self.decoder(features) if tile is None else decode_in_tiles(self.decoder, features, tile)


def to_uint8(images: Float[Array, "batch h w 3"]) -> UInt8[Array, "batch h w 3"]:
    """[-1, 1] -> 0 .. 255, clipped and rounded."""
    return jnp.clip(jnp.round((images + 1.0) * 127.5), 0, 255).astype(jnp.uint8)
