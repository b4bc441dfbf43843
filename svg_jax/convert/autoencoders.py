"""Autoencoders: encoder, residual branch, decoder, and what adversarial training adds, told by their weights.

In the release's checkpoint (Lightning's `state_dict`) they stand below `encoder.`, `extra_vit.`, `decoder.` and
`loss.`; the latent statistics are a file of their own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from svg_jax.config import check_keys
from svg_jax.convert import encoders
from svg_jax.convert.model import Model, Shapes, count, inside, shape_of, shapes_of
from svg_jax.convert.rules import Carried, Rule, Table, below, differences, report
from svg_jax.convert.tables import DECODER, DISCRIMINATOR, HY_DECODER, LPIPS, RESIDUAL
from svg_jax.models.autoencoder import AutoencoderConfig
from svg_jax.models.decoder import DecoderConfig
from svg_jax.models.decoder_hy import HyDecoderConfig
from svg_jax.models.discriminator import DiscriminatorConfig
from svg_jax.models.lpips import LPIPSConfig
from svg_jax.models.residual import ResidualConfig

DECODER_TABLES = {"conv": DECODER, "hy": HY_DECODER}
ARGUMENTS = ("encoder", "decoder", "extra_vit", "resize")
"""What `--architecture` may tell of an autoencoder."""

DDCONFIG = (
    *("z_channels", "out_ch", "ch", "ch_mult", "num_res_blocks"),
    *("double_z", "resolution", "in_channels", "attn_resolutions", "dropout"),  # without effect on the decoder
)
HYCONFIG = (
    *("z_channels", "out_channels", "block_out_channels", "num_res_blocks"),
    *("ffactor_spatial", "ffactor_temporal", "upsample_match_channel"),
)
EXTRA_VIT = ("output_dim", "mask_ratio", "use_outnorm", "vit_type", "frozen", "num_heads")
"""Arguments of the decoders and of the residual branch in the release's configs, and what weights do not tell."""

RESIDUAL_SIGNS = {"rope": "extra_vit.freqs", "learnt": "extra_vit.encoder.pos_embedding"}

DISCRIMINATOR_PREFIX, LPIPS_PREFIX, LOGVAR = "loss.discriminator.", "loss.perceptual_loss.", "loss.logvar"
LOSS: dict[str, Table] = {
    DISCRIMINATOR_PREFIX: below(DISCRIMINATOR_PREFIX, DISCRIMINATOR),
    LPIPS_PREFIX: below(LPIPS_PREFIX, LPIPS),
    LOGVAR: (Rule(LOGVAR, LOGVAR),),
}
BESIDE: Table = (
    Carried("loss.{path:.+}", "of a loss that is not used here"),
    Carried("norm_vit.{name:weight|bias}", "in the files of Autoencoder-R, unused there too"),
    Carried("mask_token", "for masking residual latents, which was not asked for (mask_ratio)"),
    Carried("colorize", "for pictures in the release's logs"),
)


def autoencoder(
    config: AutoencoderConfig, layout: str = "", loss: Shapes | None = None, notes: tuple[str, ...] = ()
) -> Model:
    """The model of a config.

    Args:
        config: It.
        layout: Of the encoder's names.
        loss: Parameters of the losses that are there too, by our names.
        notes: What a user should know.
    """
    residual = config.residual
    networks: dict[str, Any] = {"encoder": config.encoder, "decoder": config.decoder}
    beside = {"resize": config.resize} | ({"residual": None} if residual is None else {})
    table: Table = (
        *below("encoder.", encoders.table_of(config.encoder, layout)),
        *below("decoder.", DECODER_TABLES[config.decoder.family]),
    )
    shapes = _below("encoder.", config.encoder) | _below("decoder.", config.decoder)
    if residual is not None:
        networks["residual"] = residual
        table += below("extra_vit.", RESIDUAL[residual.family])
        shapes |= _below("extra_vit.", residual)
        if residual.mask_ratio > 0:
            table += (Rule("mask_token", "mask_token"),)
            shapes["mask_token"] = jax.ShapeDtypeStruct((1, residual.out_channels, 1), jnp.float32)
    else:
        table += (Carried("extra_vit.{path:.+}", "of a residual branch, whose channels the decoder does not read"),)
    parts = tuple(prefix for prefix in LOSS if any(name.startswith(prefix) for name in loss or ()))
    table += tuple(row for prefix in parts for row in LOSS[prefix])
    shapes |= loss or {}
    trained = {name for name in shapes if config.trained(name)}
    trained |= {name for name in loss or () if not name.startswith(LPIPS_PREFIX) and ".running_" not in name}
    return Model("autoencoder", layout, networks, (*table, *BESIDE), shapes, notes, frozenset(trained), beside)


def _below(prefix: str, config: Any) -> Shapes:
    return {prefix + name: shape for name, shape in shapes_of(config).items()}


def recognise(weights: Mapping[str, Any], structs: Mapping[str, Any], arguments: Mapping[str, Any] | None) -> Model:
    """An autoencoder.

    Args:
        weights: Its tensors; a few numbers are read.
        structs: Their shapes.
        arguments: Of `--architecture`, each of them optional: constructor arguments of the `encoder`, of the `decoder`
            (a `ddconfig` or `hyconfig`) and of `extra_vit` (an `extra_vit_config`, and `num_heads`); `resize`.

    Raises:
        ValueError: A part is missing or of a kind that is not known here, or the parts do not fit together.
    """
    given, decoder = arguments or {}, inside("decoder.", structs)
    check_keys(given, ARGUMENTS, "the autoencoder of --architecture")
    check_keys(given.get("extra_vit") or (), EXTRA_VIT, "the extra_vit of --architecture")
    numbers, vision = encoders.below_prefix("encoder.", weights, structs)
    for name, found in (("encoder", vision), ("decoder", decoder)):
        if not found:
            raise ValueError(
                f"this autoencoder has no '{name}.' keys: the release's checkpoint holds vision model and decoder"
            )
    model = encoders.recognise(numbers, vision, given.get("encoder"), None)
    encoder = model.networks["encoder"]
    decoder_config = _decoder(decoder, given.get("decoder"))
    notes: tuple[str, ...] = ()
    residual = None
    if decoder_config.z_channels > encoder.dim:
        residual, notes = _residual(structs, given.get("extra_vit"), decoder_config.z_channels - encoder.dim)
    config = AutoencoderConfig(encoder, decoder_config, residual, given.get("resize", False))
    loss, of_loss = _loss(structs)
    return autoencoder(config, model.layout, loss, (*notes, *of_loss))


def _decoder(structs: Mapping[str, Any], arguments: Mapping[str, Any] | None) -> DecoderConfig | HyDecoderConfig:
    kernel: tuple[int, ...] = structs["conv_in.weight"].shape if "conv_in.weight" in structs else ()
    if kernel[2:] == (3, 3, 3):
        check_keys(arguments or (), HYCONFIG, "the decoder of --architecture")
        return HyDecoderConfig.from_release(dict(arguments)) if arguments else _hy_decoder(structs)
    if kernel[2:] != (3, 3):
        raise ValueError("this autoencoder has a decoder of neither published kind: not supported")
    if arguments:
        check_keys(arguments, DDCONFIG, "the decoder of --architecture")
        return DecoderConfig.from_release(dict(arguments))
    widths = [shape_of(structs, f"up.{i}.block.0.conv1.weight", 4)[0] for i in range(count(structs, "up."))]
    channels = math.gcd(*widths)
    return DecoderConfig(
        z_channels=kernel[1],
        out_channels=shape_of(structs, "conv_out.weight", 4)[0],
        channels=channels,
        channel_multipliers=tuple(width // channels for width in widths),
        num_res_blocks=count(structs, "up.0.block.") - 1,
    )


def _hy_decoder(structs: Mapping[str, Any]) -> HyDecoderConfig:
    widths = [shape_of(structs, f"up.{i}.block.0.conv1.weight", 5)[0] for i in range(count(structs, "up."))]
    ups = [i for i in range(len(widths)) if f"up.{i}.upsample.conv.weight" in structs]
    grown = [shape_of(structs, f"up.{i}.upsample.conv.weight", 5)[0] for i in ups]
    matches = all(rows == 4 * widths[i + 1] for i, rows in zip(ups, grown, strict=True) if i + 1 < len(widths))
    if not matches and any(rows != 4 * widths[i] for i, rows in zip(ups, grown, strict=True)):
        raise ValueError("this autoencoder has a decoder that makes video, or one of no published kind: not supported")
    return HyDecoderConfig(
        z_channels=structs["conv_in.weight"].shape[1],
        out_channels=shape_of(structs, "conv_out.weight", 5)[0],
        channels=tuple(widths),
        num_res_blocks=count(structs, "up.0.block.") - 1,
        factor=2 ** len(ups),
        match_channels=matches,
    )


def _residual(
    structs: Mapping[str, Any], arguments: Mapping[str, Any] | None, channels: int
) -> tuple[ResidualConfig, tuple[str, ...]]:
    """The residual branch, and what of it the weights do not tell."""
    family = next((family for family, sign in RESIDUAL_SIGNS.items() if sign in structs), None)
    if family is None:
        some = "is none of the two ViTs that are known here" if inside("extra_vit.", structs) else "is missing"
        raise ValueError(
            f"the decoder reads {channels} channels beside the vision model's, and the residual branch that makes "
            f"them (extra_vit.*) {some}"
        )
    own, given = inside("extra_vit.", structs), dict(arguments or {})
    rope = family == "rope"
    dim, _, patch_size, _ = shape_of(own, "patch_embed.proj.weight" if rope else "conv_proj.weight", 4)
    hidden = "blocks.0.mlp.fc1.weight" if rope else "encoder.layers.encoder_layer_0.mlp.0.weight"
    side = 16 if rope else round((shape_of(own, "encoder.pos_embedding", 3)[1] - 1) ** 0.5)
    sizes: dict[str, Any] = {
        "family": family,
        "dim": dim,
        "num_layers": count(own, "blocks." if rope else "encoder.layers.encoder_layer_"),
        "hidden_dim": shape_of(own, hidden, 2)[0],
        "out_channels": shape_of(own, "heads.2.weight", 2)[0],
        "patch_size": patch_size,
        "grid": (side, side),
    }
    head = 64 if rope else 48  # channels of the published branches' heads
    heads = given.pop("num_heads", None) or max(dim // head, 1)
    released = ResidualConfig.from_release({"output_dim": sizes["out_channels"], "use_outnorm": True} | given)
    behaviour = {name: getattr(released, name) for name in ("match", "mask_ratio", "frozen")}
    note = (
        ()
        if dim % head == 0 or "num_heads" in (arguments or {})
        else (f"the residual branch is of no published size: {heads} heads are guessed (--architecture tells them)",)
    )
    return ResidualConfig(num_heads=heads, **sizes, **behaviour), note


def _loss(structs: Mapping[str, Any]) -> tuple[Shapes, tuple[str, ...]]:
    """Parameters of the losses that are there and fit, by our names, and what is said of them."""
    found: Shapes = {}
    notes = []
    for prefix, table, sized, what in (
        (DISCRIMINATOR_PREFIX, DISCRIMINATOR, _discriminator, "discriminator"),
        (LPIPS_PREFIX, LPIPS, _lpips, "LPIPS"),
    ):
        own = inside(prefix, structs)
        if not own:
            continue
        try:
            shapes = sized(own)
            problem = report(differences(own, table, shapes), limit=3)
        except (ValueError, LookupError) as error:
            problem = str(error)
        if problem:
            notes.append(f"its {what} is of another kind than those here, and only carried along ({problem})")
        else:
            found |= {prefix + name: shape for name, shape in shapes.items()}
    if LOGVAR in structs and not structs[LOGVAR].shape:
        found[LOGVAR] = jax.ShapeDtypeStruct((), jnp.float32)
    if any(name.startswith(DISCRIMINATOR_PREFIX) for name in found):
        notes.append("with its discriminator: adversarial training goes on with that")
    else:
        notes.append("without a discriminator: adversarial training that goes on from here begins with a fresh one")
    return found, tuple(notes)


def _discriminator(structs: Mapping[str, Any]) -> Shapes:
    last = count(structs, "main.") - 1  # convolutions at 0, 2, 5, 8, ...
    return shapes_of(DiscriminatorConfig(shape_of(structs, "main.0.weight", 4)[0], num_layers=(last - 2) // 3))


def _lpips(structs: Mapping[str, Any]) -> Shapes:
    return shapes_of(LPIPSConfig(tuple(shape_of(structs, f"lin{i}.model.1.weight", 4)[1] for i in range(5))))
