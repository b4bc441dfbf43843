"""Floating-point operations of the networks, for the utilisation that a run reports.

Model FLOPs are what the mathematics asks for, whatever is recomputed or how it is compiled (Chowdhery et al. 2022,
arXiv 2204.02311, appendix B): matrix products and convolutions only, two operations a multiply-add, of every slot of
the token budgets, masked or not. A trained network counts three times its forward pass (the backward pass multiplies
by the weights' and by the inputs' transposes), a frozen one once.

A linear map of s tokens from a to b channels takes 2 s a b, and attention among s tokens with h heads of c channels
4 s^2 h c, with a causal mask or without.
"""

from __future__ import annotations

import itertools

from svg_jax.models.autoencoder import AutoencoderConfig
from svg_jax.models.decoder import DecoderConfig
from svg_jax.models.gemma2 import Gemma2Config
from svg_jax.models.next_dit import TIME_FREQUENCIES, NextDiTConfig
from svg_jax.models.vit import ViTConfig


def text_to_image_step(
    model: NextDiTConfig, encoder: ViTConfig, text: Gemma2Config, image_tokens: int, text_tokens: int
) -> float:
    """Of one sample in a training step: 3 transformer + vision model + language model."""
    frozen = vit(encoder, image_tokens) + gemma2_features(text, text_tokens)
    return 3 * next_dit(model, image_tokens, text_tokens) + frozen


def autoencoder_step(sizes: AutoencoderConfig, grid: tuple[int, int]) -> float:
    """Of one image in a training step: vision model + 3 decoder."""
    return vit(sizes.encoder, grid[0] * grid[1]) + 3 * decoder(sizes.decoder, grid)


def next_dit(config: NextDiTConfig, image_tokens: int, text_tokens: int) -> float:
    """Of one sample's forward pass.

    A block of width d, m hidden channels, h heads and k key heads of c channels, on s tokens:
    2 s d (2 h + 2 k) c for queries, keys, values and output, 4 s^2 d for attention, 6 s d m for SwiGLU, and
    8 e d for the modulation by a time embedding of e channels where there is one.
    """
    dim, time = config.dim, config.time_dim
    projections = 2 * dim * (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    token = projections + 6 * dim * config.hidden_dim

    def block(tokens: int, modulation: int) -> int:
        return tokens * token + 4 * tokens**2 * dim + modulation

    embeddings = 2 * text_tokens * config.text_dim * dim + 2 * image_tokens * config.token_channels * dim
    embeddings += 2 * (TIME_FREQUENCIES * time + time**2)
    refiners = config.num_refiner_layers * (block(text_tokens, 0) + block(image_tokens, 8 * time * dim))
    joint = config.num_layers * block(image_tokens + text_tokens, 8 * time * dim)
    final = 2 * image_tokens * config.token_channels * dim + 2 * time * dim
    return float(embeddings + refiners + joint + final)


def vit(config: ViTConfig, patches: int) -> float:
    """Of one image's forward pass.

    A block of width d and m hidden channels on s tokens, class and storage tokens among them: 8 s d^2 for queries,
    keys, values and output, 4 s^2 d for attention, 4 s d m for the feed-forward layers, 6 s d m with SwiGLU.
    """
    dim, tokens = config.dim, patches + 1 + config.num_storage_tokens
    matrices = 3 if config.gated else 2
    block = 8 * tokens * dim**2 + 4 * tokens**2 * dim + 2 * matrices * tokens * dim * config.hidden_dim
    return float(2 * patches * 3 * config.patch_size**2 * dim + config.num_layers * block)


def gemma2_features(config: Gemma2Config, tokens: int) -> float:
    """Of one caption's features, for which the last layer is not computed; looking tokens up takes none.

    A layer of width d, m hidden channels, h heads and k key heads of c channels on s tokens: 2 s d (2 h + 2 k) c for
    queries, keys, values and output, 4 s^2 h c for attention, 6 s d m for the gated feed-forward layers.
    """
    projections = 2 * config.dim * (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    attention = 4 * tokens * config.num_heads * config.head_dim
    layer = tokens * (projections + attention + 6 * config.dim * config.hidden_dim)
    return float((config.num_layers - 1) * layer)


def decoder(config: DecoderConfig, grid: tuple[int, int]) -> float:
    """Of one image's forward pass from features of a grid (rows, cols).

    A k x k convolution from a to b channels over r x c places takes 2 a b (k r - 2 p) (k c - 2 p) with p = k // 2 for
    k = 3 and 0 for k = 1: places of the window that lie in the zeros around the image cost nothing.
    """
    rows, cols = grid

    def conv(inputs: int, outputs: int, kernel: int = 3) -> int:
        outside = kernel // 2 * 2
        return 2 * inputs * outputs * (kernel * rows - outside) * (kernel * cols - outside)

    def block(inputs: int, outputs: int) -> int:
        shortcut = conv(inputs, outputs, 1) if inputs != outputs else 0
        return conv(inputs, outputs) + conv(outputs, outputs) + shortcut

    def attention(width: int) -> int:
        return 4 * conv(width, width, 1) + 4 * (rows * cols) ** 2 * width

    widths = [config.channels * multiplier for multiplier in reversed(config.channel_multipliers)]  # lowest first
    lowest = widths[0]
    total = conv(config.z_channels, lowest) + 2 * block(lowest, lowest) + attention(lowest)
    for below, width in itertools.pairwise([lowest, *widths]):
        total += block(below, width) + config.num_res_blocks * block(width, width)
        if rows == grid[0]:  # the lowest level has attention after every block
            total += (config.num_res_blocks + 1) * attention(width)
        if rows < grid[0] * config.factor:
            rows, cols = 2 * rows, 2 * cols
            total += conv(width, width)
    return float(total + conv(widths[-1], config.out_channels))
