"""The SVG autoencoder: a frozen vision model in, latent statistics, a convolutional decoder out (arXiv 2512.11749).

No quantisation, no KL term, no Gaussian assumption: a latent is the feature itself, in Autoencoder-R with the few
channels of a residual branch behind it. The diffusion model sees it normalised by statistics of the data,
z = (f - mean) / (std + 1e-8) a channel.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt8

from svg_jax.models.decoder import Decoder, DecoderConfig, PixelDecoder, decode_in_tiles
from svg_jax.models.decoder_hy import HyDecoder, HyDecoderConfig
from svg_jax.models.encoders import EncoderConfig, make_encoder
from svg_jax.models.residual import ResidualConfig, ResidualViT, masked, match_distribution
from svg_jax.models.vit import ViTConfig, normalise_pixels
from svg_jax.nn.patches import patchify, token_mask
from svg_jax.nn.resize import resize

EPSILON = 1e-8

DECODERS: dict[str, tuple[type[Any], Callable[..., PixelDecoder]]] = {  # config and module, by family
    "conv": (DecoderConfig, Decoder),
    "hy": (HyDecoderConfig, HyDecoder),
}


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """Autoencoder-P, or with `residual` Autoencoder-R.

    With `resize` the encoder may have patches of another size than the decoder makes of a feature: whole images are
    then resized for it, so that a feature stands for the same part of the image as it does for the decoder.
    """

    encoder: EncoderConfig
    decoder: DecoderConfig | HyDecoderConfig
    residual: ResidualConfig | None = None
    resize: bool = False

    def __post_init__(self) -> None:
        if self.latent_channels != self.decoder.z_channels:
            residual = f" and the residual branch {self.residual.out_channels} more" if self.residual else ""
            raise ValueError(
                f"the encoder makes {self.encoder.dim} channels{residual} and the decoder reads "
                f"{self.decoder.z_channels}: set decoder.z_channels to {self.latent_channels}"
            )
        if self.encoder.patch_size != self.decoder.factor and not self.resize:
            raise ValueError(
                f"a patch has {self.encoder.patch_size} pixels a side and the decoder makes {self.decoder.factor} of "
                "each feature: give the decoder as many doublings as it takes, or set autoencoder.resize, by which "
                "whole images are resized for the encoder"
            )
        if self.residual is not None and self.residual.patch_size != self.decoder.factor:
            raise ValueError(
                f"a patch of the residual branch has {self.residual.patch_size} pixels a side and the decoder makes "
                f"{self.decoder.factor} of each feature: set residual.patch_size to {self.decoder.factor}"
            )

    @property
    def latent_channels(self) -> int:
        """Channels of a latent: the encoder's, then the residual branch's."""
        return self.encoder.dim + (self.residual.out_channels if self.residual else 0)

    @property
    def patch_size(self) -> int:
        """Pixels a side for one latent, with which images are cut into patches."""
        return self.decoder.factor

    @classmethod
    def svg_p(cls, dtype: str = "float32") -> AutoencoderConfig:
        """The released Autoencoder-P: DINOv3 ViT-S+/16 and the decoder of width 128."""
        return cls(ViTConfig.vits16plus(dtype=dtype), DecoderConfig.svg(dtype=dtype))

    @classmethod
    def svg_r(cls, dtype: str = "float32") -> AutoencoderConfig:
        """The released Autoencoder-R: the same with a residual branch of 8 channels, 392 in all."""
        return cls(
            ViTConfig.vits16plus(dtype=dtype),
            DecoderConfig.svg(z_channels=392, dtype=dtype),
            ResidualConfig(dtype=dtype),
        )

    def trained(self, name: str) -> bool:
        """Whether training changes the parameter of this name: those of the decoder and of an unfrozen branch."""
        residual = self.residual is not None and not self.residual.frozen
        return name.startswith(("decoder.", "extra_vit.", "mask_token") if residual else "decoder.")


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


def extended(values: Float[np.ndarray, " known"], channels: int) -> Float[np.ndarray, " channels"]:
    """Statistics of an encoder's channels, for latents with more: each further one takes the average of the known.

    So the release does for Autoencoder-R, whose residual channels `match_distribution` has brought to that scale.

    Raises:
        ValueError: There are more values than channels.
    """
    known = values.shape[0]
    if known > channels:
        raise ValueError(f"statistics of {known} channels do not fit latents of {channels}")
    return np.concatenate([values, np.full((channels - known,), values.mean(), values.dtype)])


class Autoencoder(nnx.Module):
    """Pixels <-> normalised latents."""

    def __init__(self, config: AutoencoderConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.encoder = make_encoder(config.encoder, rngs=rngs)
        self.extra_vit = None if config.residual is None else ResidualViT(config.residual, rngs=rngs)
        if config.residual is not None and config.residual.mask_ratio > 0:
            noise = jax.random.normal(rngs.params(), (1, config.residual.out_channels, 1))
            self.mask_token = nnx.Param(0.02 * noise)
        self.latents = LatentStatistics(config.latent_channels)
        self.decoder = DECODERS[config.decoder.family][1](config.decoder, rngs=rngs)

    def features(
        self,
        patches: UInt8[Array, "batch tokens pixels"],
        grid: Int[Array, "batch 2"],
        *,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "batch tokens channels"]:
        """The vision model's features of padded patches, then the residual channels; float32, not normalised.

        No gradient goes into the vision model; it does go into a residual branch that is not frozen.

        Args:
            patches: 0 .. 255, uint8 or float.
            grid: (rows, cols) of each image in patches; (0, 0) for none.
            key: For training: masks residual channels at the branch's `mask_ratio`. Without, nothing is masked.

        Raises:
            ValueError: The encoder's patches are of another size than the decoder's.
        """
        if self.config.encoder.patch_size != self.config.patch_size:
            raise ValueError(
                f"patches of {self.config.patch_size} pixels a side cannot be resized for an encoder with patches of "
                f"{self.config.encoder.patch_size}: batches of whole images can (features_of_images)"
            )
        return self._features(patches, patches, grid, key)

    def features_of_images(
        self,
        images: UInt8[Array, "batch height width 3"],
        valid: Bool[Array, " batch"] | None = None,
        *,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "batch rows cols channels"]:
        """`features` of images of one size, as the decoder reads them; what does not fill a patch is cut off.

        Args:
            images: 0 .. 255, uint8 or float.
            valid: Which slots hold an image, all by default; the others enter no statistics.
            key: As for `features`.

        Raises:
            ValueError: The images are smaller than a patch.
        """
        batch, height, width, _ = images.shape
        patch, encoder_patch = self.config.patch_size, self.config.encoder.patch_size
        rows, cols = height // patch, width // patch
        if rows == 0 or cols == 0:
            raise ValueError(
                f"images of {height} x {width} are smaller than a patch of {patch} x {patch}: enlarge them"
            )
        patches = encoder_patches = patchify(images, patch)
        if encoder_patch != patch:
            whole = images[:, : rows * patch, : cols * patch].astype(jnp.float32)
            encoder_patches = patchify(resize(whole, (rows * encoder_patch, cols * encoder_patch)), encoder_patch)
        grid = jnp.broadcast_to(jnp.array([[rows, cols]], jnp.int32), (batch, 2))
        if valid is not None:
            grid = jnp.where(valid[:, None], grid, 0)
        return self._features(encoder_patches, patches, grid, key).reshape(batch, rows, cols, -1)

    def _features(
        self, encoder_patches: Array, patches: Array, grid: Array, key: PRNGKeyArray | None
    ) -> Float[Array, "batch tokens channels"]:
        """The two halves of a latent, each from pixels cut and normalised as it wants them."""
        sizes, residual = self.config.encoder, self.config.residual
        pixels = normalise_pixels(encoder_patches, sizes.pixel_mean, sizes.pixel_std)
        features = jax.lax.stop_gradient(self.encoder(pixels, grid).astype(jnp.float32))
        if residual is None or self.extra_vit is None:
            return features
        extra = self.extra_vit(normalise_pixels(patches), grid)
        if residual.frozen:
            extra = jax.lax.stop_gradient(extra)
        extra = match_distribution(features, extra, token_mask(grid, features.shape[1]), residual.match)
        if key is not None and residual.mask_ratio > 0:
            extra = masked(extra, self.mask_token[...], residual.mask_ratio, key)
        return jnp.concatenate([features, extra], axis=-1)

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
