"""The frozen vision models that an autoencoder may have, by their family.

Each has a config with `family`, `dim`, `patch_size`, `pixel_mean` and `pixel_std`, and a module that is called with
normalised patches [B, N, p * p * 3], the grid [B, 2] of each image and, if need be, a mask [B, N], and returns patch
features [B, N, dim], float32.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from svg_jax.config import from_config
from svg_jax.models.vit import ViT, ViTConfig
from svg_jax.models.vit_learnt import FAMILIES, LearntViT, LearntViTConfig

EncoderConfig = ViTConfig | LearntViTConfig
Encoder = ViT | LearntViT

ENCODERS: dict[str, tuple[type[EncoderConfig], Callable[..., Encoder]]] = {  # config and module
    "dinov3": (ViTConfig, ViT),
    **{family: (LearntViTConfig, LearntViT) for family in FAMILIES},
}


def encoder_config(section: Mapping[str, Any]) -> EncoderConfig:
    """The config of the section's `family`, DINOv3 where it names none.

    Raises:
        ValueError: There is no such family, or it has no such field.
    """
    family = section.get("family", "dinov3")
    if family not in ENCODERS:
        nearest = difflib.get_close_matches(str(family), ENCODERS, n=1)
        hint = f"did you mean '{nearest[0]}'?" if nearest else f"choose one of {', '.join(ENCODERS)}"
        raise ValueError(f"unknown encoder.family '{family}': {hint}")
    return from_config(ENCODERS[family][0], dict(section))


def make_encoder(config: EncoderConfig, *, rngs: nnx.Rngs) -> Encoder:
    """A fresh encoder."""
    return ENCODERS[config.family][1](config, rngs=rngs)
