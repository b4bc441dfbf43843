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
from svg_jax.models.decoder_hy import HyDecoderConfig
from svg_jax.models.discriminator import DiscriminatorConfig
from svg_jax.models.encoders import EncoderConfig
from svg_jax.models.gemma2 import Gemma2Config
from svg_jax.models.lpips import SLICES, LPIPSConfig
from svg_jax.models.next_dit import TIME_FREQUENCIES, NextDiTConfig
from svg_jax.models.residual import ResidualConfig


def text_to_image_step(
    model: NextDiTConfig,
    sizes: AutoencoderConfig,
    text: Gemma2Config,
    image_tokens: int,
    text_tokens: int,
    pack: int = 1,
) -> float:
    """Of one sequence in a training step: 3 transformer + vision model + residual branch + language model.

    A sequence holds `pack` images of `image_tokens` each, and their captions, which share `text_tokens`.
    """
    frozen = pack * vit(sizes.encoder, image_tokens) + gemma2_features(text, text_tokens)
    if sizes.residual is not None:
        frozen += pack * residual(sizes.residual, image_tokens)
    return 3 * next_dit(model, image_tokens, text_tokens, pack) + frozen


def autoencoder_step(
    sizes: AutoencoderConfig,
    perceptual: LPIPSConfig | None,
    adversary: DiscriminatorConfig | None,
    grid: tuple[int, int],
) -> float:
    """Of one image in a training step: vision model + 3 (decoder + residual branch) + 3 VGG16 + 7 discriminator.

    A frozen residual branch counts once. VGG16 reads the image and its reconstruction, and takes a gradient back to the
    pixels of one. The discriminator reads both and is trained on both, and takes the generator's gradient back once.
    """
    tokens, pixels = grid[0] * grid[1], (grid[0] * sizes.decoder.factor, grid[1] * sizes.decoder.factor)
    total = vit(sizes.encoder, tokens) + 3 * decode(sizes.decoder, grid)
    if sizes.residual is not None:
        total += (1 if sizes.residual.frozen else 3) * residual(sizes.residual, tokens)
    if perceptual is not None:
        total += 3 * vgg16(perceptual, pixels)
    if adversary is not None:
        total += 7 * discriminator(adversary, pixels)
    return total


def next_dit(config: NextDiTConfig, image_tokens: int, text_tokens: int, pack: int = 1) -> float:
    """Of one sequence's forward pass.

    It holds `pack` images of `image_tokens` each, and text; images are refined apart, and the joint layers compute
    attention among all tokens of a sequence and mask what belongs to other images.

    A block of width d, m hidden channels, h heads and k key heads of c channels, on s tokens:
    2 s d (2 h + 2 k) c for queries, keys, values and output, 4 s^2 d for attention, 6 s d m for SwiGLU, and
    8 e d for the modulation by a time embedding of e channels for each image where there is one.
    """
    dim, time = config.dim, config.time_dim
    projections = 2 * dim * (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    token = projections + 6 * dim * config.hidden_dim

    def block(tokens: int, modulation: int) -> int:
        return tokens * token + 4 * tokens**2 * dim + modulation

    image = 2 * image_tokens * config.token_channels * dim + 2 * (TIME_FREQUENCIES * time + time**2)
    image += config.num_refiner_layers * block(image_tokens, 8 * time * dim)
    image += 2 * image_tokens * config.token_channels * dim + 2 * time * dim  # the final layer
    text = 2 * text_tokens * config.text_dim * dim + config.num_refiner_layers * block(text_tokens, 0)
    joint = config.num_layers * block(pack * image_tokens + text_tokens, pack * 8 * time * dim)
    return float(pack * image + text + joint)


def vit(config: EncoderConfig | ResidualConfig, patches: int) -> float:
    """Of one image's forward pass.

    A block of width d and m hidden channels on s tokens, class and storage tokens among them: 8 s d^2 for queries,
    keys, values and output, 4 s^2 d for attention, 4 s d m for the feed-forward layers, 6 s d m with SwiGLU.
    """
    dim, tokens = config.dim, patches + config.tokens_in_front
    matrices = 3 if config.block.gated else 2
    block = 8 * tokens * dim**2 + 4 * tokens**2 * dim + 2 * matrices * tokens * dim * config.hidden_dim
    return float(2 * patches * 3 * config.patch_size**2 * dim + config.num_layers * block)


def residual(config: ResidualConfig, patches: int) -> float:
    """Of one image's forward pass: a ViT, and two linear maps to the residual channels."""
    return vit(config, patches) + 2.0 * patches * config.dim * (config.dim + config.out_channels)


def gemma2_features(config: Gemma2Config, tokens: int) -> float:
    """Of the features of one row of tokens, for which the last layer is not computed; looking tokens up takes none.

    A layer of width d, m hidden channels, h heads and k key heads of c channels on s tokens: 2 s d (2 h + 2 k) c for
    queries, keys, values and output, 4 s^2 h c for attention, 6 s d m for the gated feed-forward layers.
    """
    projections = 2 * config.dim * (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    attention = 4 * tokens * config.num_heads * config.head_dim
    layer = tokens * (projections + attention + 6 * config.dim * config.hidden_dim)
    return float((config.num_layers - 1) * layer)


def conv(inputs: int, outputs: int, kernel: int, size: tuple[int, int], stride: int = 1, padding: int = -1) -> int:
    """Of a square convolution over size (rows, cols): 2 inputs outputs for each place of the window inside the image.

    Places that lie in the zeros around it cost nothing. The padding is half of the kernel where none is given.
    """
    padding = kernel // 2 if padding < 0 else padding

    def places(length: int) -> int:
        starts = range(-padding, length + padding - kernel + 1, stride)
        return sum(min(start + kernel, length) - max(start, 0) for start in starts)

    return 2 * inputs * outputs * places(size[0]) * places(size[1])


def doubled_conv(inputs: int, outputs: int, size: tuple[int, int]) -> int:
    """Of `nn.linear.doubled_convolution`: along an axis of n pixels, the 2n results have two taps each, 2 outside."""
    return 2 * inputs * outputs * (4 * size[0] - 2) * (4 * size[1] - 2)


def decode(config: DecoderConfig | HyDecoderConfig, grid: tuple[int, int]) -> float:
    """Of one image's forward pass from features of a grid (rows, cols), by either decoder."""
    return hy_decoder(config, grid) if isinstance(config, HyDecoderConfig) else decoder(config, grid)


def decoder(config: DecoderConfig, grid: tuple[int, int]) -> float:
    """Of one image's forward pass from features of a grid (rows, cols)."""
    widths = [config.channels * multiplier for multiplier in reversed(config.channel_multipliers)]  # lowest first
    lowest, size = widths[0], grid
    total = conv(config.z_channels, lowest, 3, size) + _middle(lowest, size)
    for below, width in itertools.pairwise([lowest, *widths]):
        total += _block(below, width, size) + config.num_res_blocks * _block(width, width, size)
        if size == grid:  # the lowest level has attention after every block
            total += (config.num_res_blocks + 1) * _attention(width, size)
        if size[0] < grid[0] * config.factor:
            total += doubled_conv(width, width, size)
            size = (2 * size[0], 2 * size[1])
    return float(total + conv(widths[-1], config.out_channels, 3, size))


def hy_decoder(config: HyDecoderConfig, grid: tuple[int, int]) -> float:
    """Of one image's forward pass from features of a grid (rows, cols); of a kernel, the tap that sees the frame."""
    size, width = grid, config.channels[0]
    total = conv(config.z_channels, width, 3, size) + _middle(width, size)
    for i, channels in enumerate(config.channels):
        total += _block(width, channels, size) + config.num_res_blocks * _block(channels, channels, size)
        width = channels
        if i < config.num_upsamplings:
            width = config.channels[i + 1] if config.match_channels else channels
            total += conv(channels, 4 * width, 3, size)
            size = (2 * size[0], 2 * size[1])
    return float(total + conv(width, config.out_channels, 3, size))


def vgg16(config: LPIPSConfig, size: tuple[int, int]) -> float:
    """Of one image's forward pass through the convolutions of LPIPS."""
    total, below = 0, 3
    for places, width in zip(SLICES, config.channels, strict=True):
        total += conv(below, width, 3, size) + (len(places) - 1) * conv(width, width, 3, size)
        below, size = width, (size[0] // 2, size[1] // 2)
    return float(total)


def discriminator(config: DiscriminatorConfig, size: tuple[int, int]) -> float:
    """Of one image's forward pass: 4 x 4 convolutions, all but the last two of stride 2."""
    total, below = 0, 3
    for i in range(config.num_layers + 1):
        width, stride = config.channels * min(2**i, 8), 2 if i < config.num_layers else 1
        total += conv(below, width, 4, size, stride, padding=1)
        below, size = width, ((size[0] - 2) // stride + 1, (size[1] - 2) // stride + 1)
    return float(total + conv(below, 1, 4, size, padding=1))


def _block(inputs: int, outputs: int, size: tuple[int, int]) -> int:
    shortcut = conv(inputs, outputs, 1, size) if inputs != outputs else 0
    return conv(inputs, outputs, 3, size) + conv(outputs, outputs, 3, size) + shortcut


def _attention(width: int, size: tuple[int, int]) -> int:
    return 4 * conv(width, width, 1, size) + 4 * (size[0] * size[1]) ** 2 * width


def _middle(width: int, size: tuple[int, int]) -> int:
    return 2 * _block(width, width, size) + _attention(width, size)
