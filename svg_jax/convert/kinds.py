"""What a state dict is of, and how large: by its names and shapes, never by the name of a file."""

from __future__ import annotations

import collections
import functools
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from svg_jax.config import from_config
from svg_jax.convert import autoencoders, detectors, encoders
from svg_jax.convert.model import DESCRIPTIONS, SIZES, Model, Shapes, count, inside, shape_of, shapes_of
from svg_jax.convert.rules import Table
from svg_jax.convert.tables import INCEPTION, LPIPS, LPIPS_FILES, NEXT_DIT, gemma2
from svg_jax.models.autoencoder import DECODERS, AutoencoderConfig
from svg_jax.models.encoders import encoder_config
from svg_jax.models.gemma2 import Gemma2Config
from svg_jax.models.inception import Inception
from svg_jax.models.lpips import SLICES, LPIPSConfig
from svg_jax.models.next_dit import NextDiTConfig
from svg_jax.models.residual import ResidualConfig
from svg_jax.nn.functional import Network

STATISTICS = {"mean": ("mean", "dinov3_sp_mean"), "std": ("std", "dinov3_sp_std")}
"""Our names, and the release's in its files of either age."""

MEASURE = "python -m svg_jax.latent_stats --checkpoint=WORKDIR --data=PATH --to=NEW"
"""The command that makes such statistics."""

LPIPS_TABLES: dict[str, Table] = {"": LPIPS_FILES, "slices": LPIPS}
"""By the layout of the names: those of the two public files, and those of LPIPS as a whole."""

LACKS = {
    "net": "the weights of VGG16 (torchvision's vgg16-397923af.pth)",
    "lin": "the five heads (vgg.pth of LPIPS v0.1)",
}
"""Halves of LPIPS, by what begins the names of their parameters."""


def kind_of(names: Iterable[str]) -> str | None:
    """The kind that has such keys, or None."""
    keys = set(names)
    if len(keys) == 2 and all(keys & set(theirs) for theirs in STATISTICS.values()):
        return "statistics"
    if encoders.told_by(keys):
        return "encoder"
    if detectors.told_by(keys):
        return "detector"
    if any(key.startswith("decoder.") for key in keys) and (
        "decoder.conv_in.weight" in keys or any(key.startswith("encoder.") for key in keys)
    ):
        return "autoencoder"
    if {"conv_in.weight", "conv_out.weight", "norm_out.weight"} <= keys:
        return "decoder"
    signs = {
        "dit": ("x_embedder.weight", "layers.0.attention.qkv.weight"),
        "text_encoder": (r"(model\.)?embed_tokens.weight", r"(model\.)?layers.0.pre_feedforward_layernorm.weight"),
        "lpips": (r"features.28.weight|net.slice5.28.weight|lin0.model.1.weight",),
        "inception": ("Conv2d_1a_3x3.conv.weight", "Mixed_7c.branch_pool.conv.weight"),
    }
    for kind, patterns in signs.items():
        if all(any(re.fullmatch(pattern, key) for key in keys) for pattern in patterns):
            return kind
    return "autoencoder" if encoders.told_by(inside("encoder.", dict.fromkeys(keys))) else None


def recognise(
    weights: Mapping[str, Any],
    structs: Mapping[str, Any],
    *,
    arguments: Mapping[str, Any] | None = None,
    transformers: Mapping[str, Any] | None = None,
) -> Model:
    """What a state dict is of.

    Args:
        weights: Its tensors; at most a few numbers are read.
        structs: Their shapes and dtypes.
        arguments: Constructor arguments of the release, where the shapes do not say all.
        transformers: The `config.json` that lies beside it.

    Raises:
        ValueError: It is of nothing that has a place here, or its sizes cannot be told.
    """
    kind = kind_of(structs)
    try:
        if kind == "dit":
            return _dit(structs, arguments)
        if kind == "autoencoder":
            return autoencoders.recognise(weights, structs, arguments)
        if kind == "encoder":
            return encoders.recognise(weights, structs, arguments, transformers)
        if kind == "text_encoder":
            return _text_encoder(structs, transformers)
        if kind == "lpips":
            return _lpips(structs)
    except (TypeError, LookupError, ArithmeticError, AttributeError) as error:
        raise ValueError(f"the sizes of the {DESCRIPTIONS[str(kind)]} cannot be told: {error}") from error
    if kind == "inception":
        return _inception(structs)
    if kind == "statistics":
        return _statistics(structs)
    if kind == "detector":
        return Model("detector", "", {}, (), {}, (detectors.NOTE,))
    if kind == "decoder":
        raise ValueError(
            "these are the weights of a decoder alone: name the autoencoder's checkpoint, which has it inside"
        )
    some = ", ".join(list(structs)[:5])
    raise ValueError(f"these weights are of nothing that is known here; their keys begin with {some}")


def restored(config: Mapping[str, Any], saved: Shapes | None = None) -> Model:
    """What a workdir's config says it holds: one that was imported, or of a training run of ours.

    Args:
        config: It.
        saved: The parameters that are there, which tell what adversarial training has left in an autoencoder's.

    Raises:
        ValueError: The config is of something else.
    """
    kind, layout = config.get("kind"), config.get("origin", {}).get("layout", "")
    if kind == "statistics":
        return Model("statistics", layout, {}, (), {})
    if kind == "inception":
        return _inception({})
    if "model" in config:
        return _model("dit", "", from_config(NextDiTConfig, config["model"]))
    if "autoencoder" in config:
        section = config["autoencoder"]
        loss = {name: shape for name, shape in (saved or {}).items() if name.startswith("loss.")}
        return autoencoders.autoencoder(_autoencoder_config(section), layout, loss)
    if "text" in config:
        return _model("text_encoder", layout, from_config(Gemma2Config, config["text"]["encoder"]))
    if "encoder" in config:
        return encoders.encoder(encoder_config(config["encoder"]), layout)
    if "lpips" in config:
        lacks = next((half for half, what in LACKS.items() if config.get("lacks") == _lacking(what)), None)
        return lpips(from_config(LPIPSConfig, config["lpips"]), layout, lacks)
    raise ValueError("its config is of nothing that can be exported")


def _autoencoder_config(section: Mapping[str, Any]) -> AutoencoderConfig:
    decoder, residual = section["decoder"], section.get("residual")
    return AutoencoderConfig(
        encoder_config(section["encoder"]),
        from_config(DECODERS[decoder.get("family", "conv")][0], decoder),
        from_config(ResidualConfig, residual) if residual else None,
        section.get("resize", False),
    )


def _model(kind: str, layout: str, config: Any, notes: tuple[str, ...] = ()) -> Model:
    shapes = shapes_of(config)
    if kind == "dit":
        return Model(kind, layout, {"model": config}, NEXT_DIT, shapes, notes, frozenset(shapes))
    return Model(kind, layout, {"encoder": config}, gemma2(layout), shapes, notes)


def _dit(structs: Mapping[str, Any], arguments: Mapping[str, Any] | None) -> Model:
    if arguments is not None:
        return _model("dit", "", NextDiTConfig.from_release(dict(arguments)))
    dim, channels = shape_of(structs, "x_embedder.weight", 2)
    hidden = shape_of(structs, "layers.0.feed_forward.w1.weight", 2)[0]
    given: dict[str, Any] = {
        "in_channels": channels,
        "text_dim": shape_of(structs, "cap_embedder.1.weight", 2)[1],
        "qk_norm": "layers.0.attention.q_norm.weight" in structs,
    }
    layers, width = count(structs, "layers."), shape_of(structs, "layers.0.attention.qkv.weight", 2)[0]
    for name in SIZES[NextDiTConfig]:
        config = getattr(NextDiTConfig, name)(**given)
        rows = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        if (config.dim, config.num_layers, config.hidden_dim, rows) == (dim, layers, hidden, width):
            return _model("dit", "", config)
    if not given["qk_norm"]:
        raise ValueError(
            "this diffusion transformer is of no published size, and without q and k norms its weights do not tell "
            "its heads: give the release's constructor arguments with --architecture FILE.json"
        )
    head = shape_of(structs, "layers.0.attention.q_norm.weight", 1)[0]
    if head % 6:
        raise ValueError(
            f"this diffusion transformer is of no published size, and heads of {head} channels do not split into three "
            "equal axes: give the release's constructor arguments with --architecture FILE.json"
        )
    config = NextDiTConfig(
        dim=dim,
        num_layers=layers,
        num_refiner_layers=count(structs, "noise_refiner."),
        num_heads=dim // head,
        num_kv_heads=(width // head - dim // head) // 2,
        multiple_of=hidden,
        ffn_dim_multiplier=hidden / (4 * dim),
        axes_dims=(head // 3,) * 3,
        **given,
    )
    note = (
        f"of no published size, with {layers} layers: axes_dims {config.axes_dims} and patch size 1 are guessed "
        "(--architecture tells them)"
    )
    return _model("dit", "", config, (note,))


def _text_encoder(structs: Mapping[str, Any], transformers: Mapping[str, Any] | None) -> Model:
    if transformers is None:
        raise ValueError("a Gemma 2 needs its config.json: name the folder with both")
    prefix = "model." if "model.embed_tokens.weight" in structs else ""
    return _model("text_encoder", prefix, Gemma2Config.from_transformers(dict(transformers)))


def lpips(config: LPIPSConfig, layout: str, lacks: str | None = None) -> Model:
    """LPIPS, or one half of it.

    Args:
        config: Its widths.
        layout: Of the names, a key of `LPIPS_TABLES`.
        lacks: The half that is not there, a key of `LACKS`.
    """
    shapes = {name: shape for name, shape in shapes_of(config).items() if lacks is None or not name.startswith(lacks)}
    beside = {} if lacks is None else {"lacks": _lacking(LACKS[lacks])}
    return Model(
        "lpips", layout, {"lpips": config}, LPIPS_TABLES[layout], shapes, tuple(beside.values()), beside=beside
    )


def _lacking(what: str) -> str:
    return f"this is one half of LPIPS, and {what} lack: import them too, into the same folder"


def _lpips(structs: Mapping[str, Any]) -> Model:
    layout = "slices" if "net.slice5.28.weight" in structs else ""
    heads = "lin0.model.1.weight" in structs
    lasts = [
        (f"net.slice{i + 1}." if layout else "features.") + f"{places[-1]}.weight" for i, places in enumerate(SLICES)
    ]
    if heads:
        channels = tuple(shape_of(structs, f"lin{i}.model.1.weight", 4)[1] for i in range(len(SLICES)))
    else:
        channels = tuple(shape_of(structs, name, 4)[0] for name in lasts)
    lacks = None if heads and lasts[-1] in structs else "net" if heads else "lin"
    return lpips(LPIPSConfig(channels), layout, lacks)


def _inception(structs: Mapping[str, Any]) -> Model:
    if "AuxLogits.fc.weight" in structs:
        raise ValueError(
            "this is the Inception v3 of torchvision, whose features are not those of FID: download "
            "pt_inception-2015-12-05-6726825d.pth of pytorch-fid"
        )
    return Model("inception", "", {}, INCEPTION, inception_shapes())


@functools.cache
def inception_shapes() -> Shapes:
    """Its parameters, of which there is one size; nothing is allocated."""
    return Network(lambda rngs: Inception(rngs=rngs)).shapes


def _statistics(structs: Mapping[str, Any]) -> Model:
    names = {ours: next(name for name in theirs if name in structs) for ours, theirs in STATISTICS.items()}
    mean, std = (tuple(structs[name].shape) for name in names.values())
    if mean != std or 0 in mean or not mean:
        raise ValueError(f"latent statistics must be two arrays [layers, channels] alike, and are {mean} and {std}")
    shapes = {ours: jax.ShapeDtypeStruct(structs[name].shape, structs[name].dtype) for ours, name in names.items()}
    return Model("statistics", ",".join(names.values()), {}, (), shapes)


def summary(structs: Mapping[str, Any]) -> dict[str, str]:
    """Number and types of a state dict's tensors, for people."""
    number = collections.Counter(str(struct.dtype) for struct in structs.values())
    parameters = sum(math.prod(struct.shape) for struct in structs.values())
    size = sum(math.prod(struct.shape) * struct.dtype.itemsize for struct in structs.values())
    return {
        "parameters": f"{parameters:,} in {len(structs)} tensors, {size / 2**20:,.1f} MiB",
        "dtypes": ", ".join(f"{dtype} ({tensors} tensors)" for dtype, tensors in number.most_common()),
    }
