"""What the frozen vision transformers share: a sequence with the patches last goes through blocks and a norm."""

from __future__ import annotations

import abc
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from svg_jax.nn.norms import LayerNorm
from svg_jax.nn.stack import scan_layers

Sequence = tuple[Array, tuple[Array, Array] | None, Array]


class PatchEncoder(nnx.Module):
    """Patches -> normalised patch features. Subclasses make the attributes below, and the sequence in `embed`."""

    config: Any  # dim, patch_size, tokens_in_front, dtype
    blocks: Any  # stacked
    norm: LayerNorm

    @property
    def patch_size(self) -> int:
        """Pixels a side of a patch."""
        return int(self.config.patch_size)

    @property
    def dim(self) -> int:
        """Channels of a feature."""
        return int(self.config.dim)

    @abc.abstractmethod
    def embed(
        self,
        patches: Float[Array, "batch tokens pixels"],
        grid: Int[Array, "batch 2"],
        mask: Bool[Array, "batch tokens"] | None = None,
    ) -> Sequence:
        """The sequence, float32 [batch, tokens_in_front + tokens, dim], its rotary (cos, sin) or None, and which of its
        slots are in use; arguments as for calling.
        """

    def __call__(
        self,
        patches: Float[Array, "batch tokens pixels"],
        grid: Int[Array, "batch 2"],
        mask: Bool[Array, "batch tokens"] | None = None,
    ) -> Float[Array, "batch tokens dim"]:
        """Normalised patch features.

        Args:
            patches: Pixels normalised with the config's `pixel_mean` and `pixel_std` (`models.vit.normalise_pixels`),
                row-major, (row, column, channel) inside a patch.
            grid: (rows, cols) of each image in patches; (0, 0) for none.
            mask: Which slots hold a patch, the first rows * cols by default.

        Returns:
            float32; what stands in empty slots means nothing.
        """
        return self.sequence(patches, grid, mask)[:, self.config.tokens_in_front :]

    def sequence(
        self,
        patches: Float[Array, "batch tokens pixels"],
        grid: Int[Array, "batch 2"],
        mask: Bool[Array, "batch tokens"] | None = None,
    ) -> Float[Array, "batch sequence dim"]:
        """All tokens after the last norm; arguments as for calling."""
        x, rotary, valid = self.embed(patches, grid, mask)
        x, _ = scan_layers(self.blocks, x, rotary, valid, dtype=self.config.dtype)
        return self.norm(x)

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
