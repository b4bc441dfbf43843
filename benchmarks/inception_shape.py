"""At what both sides of `benchmarks.inception` work."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Shape:
    """8-bit images as they come from files."""

    batch: int = 4
    resolution: int = 256

    @property
    def images(self) -> np.ndarray:
        """Random ones, uint8 [batch, resolution, resolution, 3]."""
        size = (self.batch, self.resolution, self.resolution, 3)
        return np.random.default_rng(0).integers(0, 256, size).astype(np.uint8)
