"""Tiny autoencoders with random weights, and pictures to put through them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from PIL import Image

from svg_jax.checkpoint import save_params
from svg_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from svg_jax.models.decoder import DecoderConfig
from svg_jax.models.residual import ResidualConfig
from svg_jax.models.vit import ViTConfig
from svg_jax.nn.functional import Network
from tests.tiny import random_params

PATCH = 8
ENCODER = ViTConfig(dim=16, num_layers=1, num_heads=2, hidden_dim=32, patch_size=PATCH, num_storage_tokens=1)
DECODER = DecoderConfig(z_channels=16, channels=32, channel_multipliers=(1, 1, 1, 1), num_res_blocks=1)
PLAIN = AutoencoderConfig(ENCODER, DECODER)
RESIDUAL = AutoencoderConfig(
    ENCODER,
    dataclasses.replace(DECODER, z_channels=20),
    ResidualConfig(dim=16, num_layers=1, num_heads=2, hidden_dim=32, out_channels=4, patch_size=PATCH, grid=(4, 4)),
)


def network_of(sizes: AutoencoderConfig) -> Network[Autoencoder]:
    return Network(lambda rngs: Autoencoder(sizes, rngs=rngs))


def write_autoencoder(workdir: Path, sizes: AutoencoderConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """As a training run leaves it; gives the weights."""
    weights = random_params(network_of(sizes).shapes, seed)
    trained = {name: value for name, value in weights.items() if sizes.trained(name)}
    frozen = {name: value for name, value in weights.items() if name not in trained}
    save_params(str(workdir), {"ema": trained, "frozen": frozen}, {"autoencoder": dataclasses.asdict(sizes)})
    return weights


def write_pictures(folder: Path, count: int, size: tuple[int, int] = (40, 36)) -> Path:
    """PNG files of smooth noise, in folders of four."""
    generator = np.random.default_rng(0)
    for i in range(count):
        file = folder / f"{i // 4}" / f"{i:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(generator.integers(0, 256, (4, 4, 3), np.uint8))
        coarse.resize(size, Image.Resampling.BICUBIC).save(file)
    return folder
