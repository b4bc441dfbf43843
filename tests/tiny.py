"""Random weights of every network at tiny size, in the folders that `svg_jax.convert import --to` makes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from configs import base, tiny_scenes
from data_pipelines.text import train_word_tokenizer
from svg_jax import assemble
from svg_jax.checkpoint import save_params
from svg_jax.models.gemma2 import Gemma2Config
from svg_jax.models.stand_in import with_cosine_patches
from svg_jax.models.vit import rope_periods
from svg_jax.nn.blocks import qkv_bias_mask

SIDE = 32  # pixels of a picture by default: 4 x 4 latents


def tiny_config() -> ConfigDict:
    """A text-to-image run on bytes as tokens: a call of the pipeline compiles and draws in seconds."""
    config = tiny_scenes.get_config()
    config.text.encoder = base.section(Gemma2Config.tiny(dim=32, num_layers=2, num_heads=2, num_kv_heads=1))
    config.text.max_tokens = 48
    config.autoencoder.encoder.num_layers = 1
    config.autoencoder.decoder.channel_multipliers = (1, 1, 1, 1)
    config.model.update(text_dim=32, dim=32, num_layers=1, num_heads=2, num_kv_heads=2, axes_dims=(4, 6, 6))
    config.data.resolution = SIDE
    config.sample.num_steps = 4
    config.sample.batch_size = 8
    return config


def write_tiny_weights(folder: Path, *, seed: int = 0) -> None:
    """Writes `folder`/dit, `folder`/autoencoder and `folder`/text_encoder."""
    config = tiny_config()
    dit, autoencoder, text = (
        random_params(network.shapes, seed + i) for i, network in enumerate(assemble.networks(config))
    )
    # Of what random weights leave no picture: the encoder's first layer, and the size of its features.
    of_autoencoder = assemble.autoencoder_config(config.autoencoder)
    encoder = of_autoencoder.encoder
    with_cosines = with_cosine_patches({}, encoder, "encoder.")
    autoencoder |= {name: np.asarray(value) for name, value in with_cosines.items()}
    autoencoder["encoder.rope_embed.periods"] = rope_periods(encoder.head_dim // 4, encoder.rope_base)
    mask = "encoder.blocks.attn.qkv.bias_mask"
    autoencoder[mask] = qkv_bias_mask(autoencoder[mask].shape)
    trained = {name: value for name, value in autoencoder.items() if of_autoencoder.trained(name)}
    frozen = {name: value for name, value in autoencoder.items() if name not in trained}

    sizes = config.to_dict()
    parts = {name: value for name, value in sizes["autoencoder"].items() if name != "checkpoint"}
    save_params(str(folder / "dit"), {"ema": dit}, sizes)
    save_params(str(folder / "autoencoder"), {"ema": trained, "frozen": frozen}, {"autoencoder": parts})
    captions = ["a fox", "a hen", "two owls"]
    train_word_tokenizer(captions, folder / "text_encoder" / "tokenizer", config.text.encoder.vocab_size)
    save_params(str(folder / "text_encoder"), {"frozen": text}, {"text": {"encoder": sizes["text"]["encoder"]}})


def random_params(shapes: Mapping[str, jax.ShapeDtypeStruct], seed: int) -> dict[str, np.ndarray]:
    """Numbers of the size that networks are initialised with, none of them zero or one.

    Drawn here and not by the networks: compiling their initialisation would take longest in every test that uses them.
    """
    generator = np.random.default_rng(seed)

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        noise = generator.standard_normal(shape)
        if name.endswith(".kernel"):
            return noise / np.sqrt(np.prod(shape[:-1]))
        if name.endswith(".embedding"):
            return noise
        return float(name.endswith((".scale", ".std", ".gamma"))) + 0.05 * noise

    return {name: draw(name, shape.shape).astype(shape.dtype) for name, shape in sorted(shapes.items())}
