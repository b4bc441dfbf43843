"""At what both sides of `benchmarks.autoencoder` work."""

from __future__ import annotations

import dataclasses

from svg_jax.adversarial import LossConfig


@dataclasses.dataclass(frozen=True)
class Shape:
    """Autoencoder-P with its released losses, the discriminator taking part from the first step."""

    batch: int = 4
    resolution: int = 128
    lr: float = 1e-4
    ema: float = 0.999

    @property
    def loss(self) -> LossConfig:
        """The released one."""
        return LossConfig(disc_start=0)
