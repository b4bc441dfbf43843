"""The formulas against what XLA counts in the compiled programs.

XLA counts a loop's body once, so each network has one layer of each kind, whose loop it unrolls; and it counts
element-wise operations too, which the formulas leave out: so the widths are such that matrix products make nearly all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from svg_jax.models import flops
from svg_jax.models.autoencoder import AutoencoderConfig
from svg_jax.models.decoder import Decoder, DecoderConfig
from svg_jax.models.decoder_hy import HyDecoder, HyDecoderConfig
from svg_jax.models.discriminator import DiscriminatorConfig, PatchDiscriminator
from svg_jax.models.gemma2 import Gemma2, Gemma2Config
from svg_jax.models.lpips import VGG16, LPIPSConfig
from svg_jax.models.next_dit import NextDiT, NextDiTConfig
from svg_jax.models.residual import ResidualConfig, ResidualViT
from svg_jax.models.vit import ViT, ViTConfig
from svg_jax.nn.functional import Network

BATCH, IMAGE_TOKENS, TEXT_TOKENS = 2, 64, 32
DIT = NextDiTConfig(
    in_channels=64, text_dim=192, dim=256, num_layers=1, num_refiner_layers=1, num_heads=4, num_kv_heads=2,
    axes_dims=(32, 16, 16), axes_lens=(64, 16, 16), attention="xla",
)  # fmt: skip
VIT = ViTConfig(dim=512, num_layers=1, num_heads=8, hidden_dim=1024, attention="xla")
GEMMA = Gemma2Config.tiny(
    dim=256, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=64, hidden_dim=512, attention="xla"
)
DECODER = DecoderConfig(z_channels=64, channels=64, channel_multipliers=(1, 1, 2), num_res_blocks=1)


def counted(function: Callable[..., Any], *shapes: Any) -> float:
    """What XLA counts in a function of these arguments."""
    analysis = jax.jit(function).lower(*shapes).compile().cost_analysis()
    assert analysis is not None
    return float(analysis["flops"])


def struct(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def dit_inputs() -> tuple[Any, ...]:
    image, text = struct(BATCH, IMAGE_TOKENS, DIT.in_channels), struct(BATCH, TEXT_TOKENS, DIT.text_dim)
    return image, struct(BATCH), text, struct(BATCH, 2, dtype=jnp.int32), struct(BATCH, TEXT_TOKENS, dtype=bool)


def run_dit(network: Network[NextDiT], params: Any, image: Any, time: Any, text: Any, grid: Any, mask: Any) -> Any:
    return network(params)(image, time, text, grid=grid, text_mask=mask)


def test_next_dit_is_what_xla_counts() -> None:
    network = Network(lambda rngs: NextDiT(DIT, rngs=rngs))
    found = counted(lambda params, *inputs: run_dit(network, params, *inputs), network.shapes, *dit_inputs())
    assert 1.0 <= found / (BATCH * flops.next_dit(DIT, IMAGE_TOKENS, TEXT_TOKENS)) < 1.03


def test_a_sequence_of_several_images_is_what_xla_counts() -> None:
    network = Network(lambda rngs: NextDiT(DIT, rngs=rngs))
    image, time, _, grid, _ = dit_inputs()
    text, segments = struct(1, 2 * TEXT_TOKENS, DIT.text_dim), struct(1, 2 * TEXT_TOKENS, dtype=jnp.int32)

    def run(params: Any, image: Any, time: Any, text: Any, grid: Any, segments: Any) -> Any:
        return network(params)(image, time, text, grid=grid, text_segments=segments)

    found = counted(run, network.shapes, image, time, text, grid, segments)
    assert 1.0 <= found / flops.next_dit(DIT, IMAGE_TOKENS, 2 * TEXT_TOKENS, BATCH) < 1.03


def test_the_packed_stage_does_more_images_for_the_same_operations() -> None:
    sizes = NextDiTConfig(), AutoencoderConfig.svg_p(), Gemma2Config()
    alone, packed = flops.text_to_image_step(*sizes, 256, 512), flops.text_to_image_step(*sizes, 256, 768, 4)
    assert 1.7 < 4 * alone / packed < 1.8
    assert flops.text_to_image_step(*sizes, 256, 512, 1) == alone


def test_a_backward_pass_is_two_forward_passes() -> None:
    """But for the embeddings, whose inputs nobody differentiates by: the count is a little below three in all."""
    network = Network(lambda rngs: NextDiT(DIT, rngs=rngs))

    def loss(params: Any, *inputs: Any) -> Any:
        return jnp.sum(run_dit(network, params, *inputs))

    found = counted(jax.value_and_grad(loss), network.shapes, *dit_inputs())
    assert 0.97 < found / (3 * BATCH * flops.next_dit(DIT, IMAGE_TOKENS, TEXT_TOKENS)) < 1.05


@pytest.mark.parametrize("gated", [False, True])
def test_the_vision_model_is_what_xla_counts(gated: bool) -> None:
    config = ViTConfig(**{**vars(VIT), "gated": gated})
    network = Network(lambda rngs: ViT(config, rngs=rngs))
    patches = struct(BATCH, IMAGE_TOKENS, 3 * config.patch_size**2)
    found = counted(lambda params, *x: network(params)(*x), network.shapes, patches, struct(BATCH, 2, dtype=jnp.int32))
    assert 1.0 <= found / (BATCH * flops.vit(config, IMAGE_TOKENS)) < 1.03


def test_the_language_model_is_what_xla_counts() -> None:
    network = Network(lambda rngs: Gemma2(GEMMA, rngs=rngs))
    tokens, mask = struct(BATCH, TEXT_TOKENS, dtype=jnp.int32), struct(BATCH, TEXT_TOKENS, dtype=bool)
    found = counted(lambda params, *x: network(params).features(*x), network.shapes, tokens, mask)
    assert 1.0 <= found / (BATCH * flops.gemma2_features(GEMMA, TEXT_TOKENS)) < 1.03


@pytest.mark.parametrize("grid", [(6, 6), (4, 9)])
def test_the_decoder_is_what_xla_counts(grid: tuple[int, int]) -> None:
    network = Network(lambda rngs: Decoder(DECODER, rngs=rngs))
    found = counted(lambda params, z: network(params)(z), network.shapes, struct(BATCH, *grid, DECODER.z_channels))
    assert 1.0 <= found / (BATCH * flops.decoder(DECODER, grid)) < 1.03


def test_the_other_decoder_is_what_xla_counts() -> None:
    config = HyDecoderConfig(z_channels=64, channels=(128, 64), num_res_blocks=1, factor=2)
    network = Network(lambda rngs: HyDecoder(config, rngs=rngs))
    found = counted(lambda params, z: network(params)(z), network.shapes, struct(BATCH, 6, 6, config.z_channels))
    assert 1.0 <= found / (BATCH * flops.hy_decoder(config, (6, 6))) < 1.03


def test_the_residual_branch_is_what_xla_counts() -> None:
    config = ResidualConfig(dim=512, num_layers=1, num_heads=8, hidden_dim=1024, attention="xla")
    network = Network(lambda rngs: ResidualViT(config, rngs=rngs))
    patches = struct(BATCH, IMAGE_TOKENS, 3 * config.patch_size**2)
    found = counted(lambda params, *x: network(params)(*x), network.shapes, patches, struct(BATCH, 2, dtype=jnp.int32))
    assert 1.0 <= found / (BATCH * flops.residual(config, IMAGE_TOKENS)) < 1.03


def test_the_judges_are_what_xla_counts() -> None:
    lpips, adversary, size = LPIPSConfig((32, 64, 64, 64, 64)), DiscriminatorConfig(32, 2), (32, 48)
    images = struct(BATCH, *size, 3)
    vgg = Network(lambda rngs: VGG16(lpips, rngs=rngs))
    found = counted(lambda params, x: vgg(params)(x)[-1], vgg.shapes, images)
    assert 1.0 <= found / (BATCH * flops.vgg16(lpips, size)) < 1.03
    patch = Network(lambda rngs: PatchDiscriminator(adversary, rngs=rngs))
    found = counted(
        lambda params, x, valid: patch(params)(x, valid, train=True)[0], patch.shapes, images, struct(BATCH, dtype=bool)
    )
    assert 1.0 <= found / (BATCH * flops.discriminator(adversary, size)) < 1.06  # batch-norm is more of it


def test_layers_count_as_often_as_they_are_there() -> None:
    """What the counts above cannot see, as they are of one layer."""
    one, three, five = (
        flops.next_dit(NextDiTConfig(num_layers=n, num_refiner_layers=n), IMAGE_TOKENS, TEXT_TOKENS) for n in (1, 3, 5)
    )
    assert five - three == three - one > 0.7 * one
    assert flops.vit(ViTConfig(num_layers=5), 9) - flops.vit(ViTConfig(num_layers=3), 9) == 2 * (
        flops.vit(ViTConfig(num_layers=2), 9) - flops.vit(ViTConfig(num_layers=1), 9)
    )
    assert flops.gemma2_features(Gemma2Config(num_layers=9), 9) == 8 * flops.gemma2_features(
        Gemma2Config(num_layers=2), 9
    )


def test_a_step_is_three_times_what_is_trained_and_once_what_is_frozen() -> None:
    sizes = AutoencoderConfig(ViTConfig(), DecoderConfig())
    tokens, grid = 16 * 16, (16, 16)
    frozen = flops.vit(sizes.encoder, tokens)
    trained = flops.decoder(sizes.decoder, grid)
    assert flops.autoencoder_step(sizes, None, None, grid) == frozen + 3 * trained
    perceptual, adversary = LPIPSConfig(), DiscriminatorConfig()
    judges = 3 * flops.vgg16(perceptual, (256, 256)) + 7 * flops.discriminator(adversary, (256, 256))
    assert flops.autoencoder_step(sizes, perceptual, adversary, grid) == frozen + 3 * trained + judges
    branch = ResidualConfig()
    with_branch = AutoencoderConfig(ViTConfig(), DecoderConfig(z_channels=392), branch)
    three = flops.autoencoder_step(with_branch, None, None, grid)
    once = flops.autoencoder_step(
        dataclasses.replace(with_branch, residual=dataclasses.replace(branch, frozen=True)), None, None, grid
    )
    assert three - once == 2 * flops.residual(branch, tokens)
    language, dit = flops.gemma2_features(Gemma2Config(), 512), flops.next_dit(NextDiTConfig(), tokens, 512)
    step = flops.text_to_image_step(NextDiTConfig(), sizes, Gemma2Config(), tokens, 512)
    assert step == frozen + language + 3 * dit
    assert 2.0 < dit / (2 * 2.6e9 * tokens) < 4.0  # two a parameter and token, most of them text at 256 px
