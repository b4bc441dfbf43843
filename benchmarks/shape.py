"""The one shape at which both sides work, and the settings of the optimiser and of the sampler."""

from __future__ import annotations

import dataclasses
from typing import Any

LEARNING_RATE = 2e-4
BETAS = (0.9, 0.95)
EPS = 1e-15
WEIGHT_DECAY = 0.0
CLIP = 2.0  # global norm of the gradient
EMA_DECAY = 0.95

NUM_STEPS = 20  # of Euler's method, evenly from noise to data
GUIDANCE_SCALE = 4.0  # the guided velocity is no longer than the conditional one


@dataclasses.dataclass(frozen=True)
class Shape:
    """The published model at a quarter of its width: the same head size, grouping of heads and feature widths."""

    dim: int = 576
    num_layers: int = 4
    num_refiner_layers: int = 2
    num_heads: int = 6
    num_kv_heads: int = 2
    axes_dims: tuple[int, int, int] = (32, 32, 32)
    in_channels: int = 384
    text_dim: int = 2304
    rows: int = 16
    cols: int = 16
    text_tokens: int = 64
    batch: int = 4
    dtype: str = "float32"  # of the computation; parameters are float32

    @classmethod
    def next_dit_2p6b(cls, side: int, **changes: Any) -> Shape:
        """The published model in bfloat16, on side x side image tokens and 512 of text."""
        sizes = {"dim": 2304, "num_layers": 26, "num_heads": 24, "num_kv_heads": 8, "rows": side, "cols": side}
        return cls(**{**sizes, "text_tokens": 512, "dtype": "bfloat16", **changes})

    @property
    def image_tokens(self) -> int:
        return self.rows * self.cols
