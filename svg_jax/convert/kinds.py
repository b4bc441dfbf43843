"""What a state dict is of, and how large: by its names and shapes, never by the name of a file."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from svg_jax.config import from_config
from svg_jax.convert.rules import Table, differences
from svg_jax.convert.tables import AUTOENCODER, DINOV3, NEXT_DIT, dinov3_transformers, gemma2
from svg_jax.models.decoder import Decoder, DecoderConfig
from svg_jax.models.gemma2 import Gemma2, Gemma2Config
from svg_jax.models.next_dit import NextDiT, NextDiTConfig
from svg_jax.models.vit import ViT, ViTConfig
from svg_jax.nn.functional import Network

Shapes = dict[str, jax.ShapeDtypeStruct]

DESCRIPTIONS = {
    "dit": "diffusion transformer (Next-DiT)",
    "autoencoder": "autoencoder (DINOv3 and a decoder)",
    "encoder": "vision model (DINOv3)",
    "text_encoder": "language model (Gemma 2)",
    "statistics": "latent statistics",
}
"""The kinds, which are also the folders of what is imported."""

STATISTICS = {"mean": ("mean", "dinov3_sp_mean"), "std": ("std", "dinov3_sp_std")}
"""Our names, and the release's in its files of either age."""

SIZES: dict[type, tuple[str, ...]] = {
    NextDiTConfig: ("next_dit_0p8b", "next_dit_2p6b", "next_dit_3b", "next_dit_4b", "next_dit_7b"),
    ViTConfig: ("vits16", "vits16plus", "vitb16", "vitl16", "vith16plus", "vit7b16"),
    DecoderConfig: ("svg",),
    Gemma2Config: ("gemma2_2b",),
}
"""Named constructors of published sizes."""

RESIDUAL_CHANNELS = 8  # what Autoencoder-R adds to the features
UNSIZED = {"dtype", "remat", "layer_scale", "embedding_std", "kernel_std", "rope_base"}  # fields that name no size


@dataclasses.dataclass(frozen=True)
class Model:
    """A network or a set of statistics: its sizes, its parameters and its table."""

    kind: str
    layout: str  # of the names in the release, where there are several
    networks: dict[str, Any]  # the configs of its networks, by the section of our config
    table: Table
    shapes: Shapes
    notes: tuple[str, ...] = ()  # what a user should know

    @property
    def size(self) -> str:
        """The published size, or that it is none."""
        return " + ".join(_size_name(network) or _no_size(network) for network in self.networks.values())

    @property
    def sections(self) -> dict[str, Any]:
        """Our config of it."""
        fields = {name: dataclasses.asdict(network) for name, network in self.networks.items()}
        nested = {"autoencoder": {"autoencoder": fields}, "text_encoder": {"text": fields}}
        return nested.get(self.kind, fields)

    def part(self, name: str) -> str:
        """The field of the train state that a parameter belongs to."""
        trained = self.kind == "dit" or (self.kind == "autoencoder" and name.startswith("decoder."))
        return "ema" if trained else "frozen"

    def differences(self, structs: Mapping[str, Any]) -> dict[str, list[str]]:
        """Keys that are missing, unexpected or of another shape."""
        return differences(structs, self.table, self.shapes)


def kind_of(names: Iterable[str]) -> str | None:
    """The kind that has such keys, or None."""
    keys = set(names)
    if len(keys) == 2 and all(keys & set(theirs) for theirs in STATISTICS.values()):
        return "statistics"
    if any(key.startswith("decoder.") for key in keys) and (
        "decoder.conv_in.weight" in keys or any(key.startswith("encoder.") for key in keys)
    ):
        return "autoencoder"
    if {"conv_in.weight", "conv_out.weight", "norm_out.weight"} <= keys:
        return "decoder"
    signs = {
        "dit": ("x_embedder.weight", "layers.0.attention.qkv.weight"),
        "text_encoder": (r"(model\.)?embed_tokens.weight", r"(model\.)?layers.0.pre_feedforward_layernorm.weight"),
        "encoder": ("patch_embed.proj.weight", "rope_embed.periods"),
        "encoder of transformers": ("embeddings.patch_embeddings.weight", "layer.0.attention.q_proj.weight"),
    }
    for kind, patterns in signs.items():
        if all(any(re.fullmatch(pattern, key) for key in keys) for pattern in patterns):
            return kind.split(" ")[0]
    if any(key.startswith("encoder.") for key in keys) and kind_of(_inside("encoder.", dict.fromkeys(keys))):
        return "autoencoder"
    return None


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
            return _autoencoder(weights, structs, arguments)
        if kind == "encoder":
            return _encoder(weights, structs, arguments, transformers)
        if kind == "text_encoder":
            return _text_encoder(structs, transformers)
    except (TypeError, LookupError, ArithmeticError, AttributeError) as error:
        raise ValueError(f"the sizes of the {DESCRIPTIONS[str(kind)]} cannot be told: {error}") from error
    if kind == "statistics":
        names = {ours: next(name for name in theirs if name in structs) for ours, theirs in STATISTICS.items()}
        mean, std = (tuple(structs[name].shape) for name in names.values())
        if mean != std or 0 in mean or not mean:
            raise ValueError(f"latent statistics must be two arrays [layers, channels] alike, and are {mean} and {std}")
        shapes = {ours: jax.ShapeDtypeStruct(structs[name].shape, structs[name].dtype) for ours, name in names.items()}
        return Model("statistics", ",".join(names.values()), {}, (), shapes)
    if kind == "decoder":
        raise ValueError(
            "these are the weights of a decoder alone: name the autoencoder's checkpoint, which has it inside"
        )
    some = ", ".join(list(structs)[:5])
    raise ValueError(f"these weights are of nothing that is known here; their keys begin with {some}")


def restored(config: Mapping[str, Any]) -> Model:
    """What a workdir's config says it holds: one that was imported, or of a training run of ours.

    Raises:
        ValueError: The config is of something else.
    """
    origin = config.get("origin", {})
    layout = origin.get("layout", "")
    if config.get("kind") == "statistics":
        return Model("statistics", layout, {}, (), {})
    if "model" in config:
        return _model("dit", "", {"model": from_config(NextDiTConfig, config["model"])})
    if "autoencoder" in config:
        section = config["autoencoder"]
        networks = {
            "encoder": from_config(ViTConfig, section["encoder"]),
            "decoder": from_config(DecoderConfig, section["decoder"]),
        }
        return _model("autoencoder", "", networks)
    if "text" in config:
        return _model("text_encoder", layout, {"encoder": from_config(Gemma2Config, config["text"]["encoder"])})
    if "encoder" in config:
        return _model("encoder", layout, {"encoder": from_config(ViTConfig, config["encoder"])})
    raise ValueError("its config is of nothing that can be exported")


def _model(kind: str, layout: str, networks: dict[str, Any], notes: tuple[str, ...] = ()) -> Model:
    if kind == "autoencoder":
        encoder, decoder = networks["encoder"], networks["decoder"]
        shapes = {f"encoder.{name}": shape for name, shape in _shapes(encoder).items()}
        shapes |= {f"decoder.{name}": shape for name, shape in _shapes(decoder).items()}
        return Model(kind, layout, networks, AUTOENCODER, shapes, notes)
    (network,) = networks.values()
    if kind == "encoder":
        of_transformers = dinov3_transformers(gated=getattr(network, "gated", False), rope_base=network.rope_base)
        table = of_transformers if layout == "transformers" else DINOV3
    else:
        table = NEXT_DIT if kind == "dit" else gemma2(layout)
    return Model(kind, layout, networks, table, _shapes(network), notes)


@functools.cache
def _shapes(config: Any) -> Shapes:
    modules: dict[type, Any] = {NextDiTConfig: NextDiT, ViTConfig: ViT, DecoderConfig: Decoder, Gemma2Config: Gemma2}
    return Network(lambda rngs: modules[type(config)](config, rngs=rngs)).shapes


def _size_name(config: Any) -> str | None:
    """The published size that a config is of."""
    inputs = {"in_channels", "text_dim", "z_channels"} & {field.name for field in dataclasses.fields(config)}
    same = {name: getattr(config, name) for name in (UNSIZED | inputs) & vars(config).keys()}
    return next((name for name in SIZES[type(config)] if getattr(type(config), name)(**same) == config), None)


def _no_size(config: Any) -> str:
    """With the depth, so that a missing last layer is seen."""
    depth = f" ({config.num_layers} layers)" if hasattr(config, "num_layers") else ""
    return f"no published size{depth}"


def _inside(prefix: str, items: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in items.items() if name.startswith(prefix)}


def _shape(structs: Mapping[str, Any], name: str, rank: int) -> tuple[int, ...]:
    if name not in structs:
        raise ValueError(f"the weights do not fit: 1 missing: {name}, which tells the size")
    shape = tuple(structs[name].shape)
    if len(shape) != rank:
        raise ValueError(f"the weights do not fit: {name} has the shape {shape} and should have {rank} axes")
    return shape


def _count(structs: Mapping[str, Any], stack: str) -> int:
    """Layers of a stack: the largest index plus one."""
    found = (re.match(rf"{re.escape(stack)}\.(\d+)\.", name) for name in structs)
    return max((int(match[1]) + 1 for match in found if match), default=0)


def _dit(structs: Mapping[str, Any], arguments: Mapping[str, Any] | None) -> Model:
    if arguments is not None:
        return _model("dit", "", {"model": NextDiTConfig.from_release(dict(arguments))})
    dim, channels = _shape(structs, "x_embedder.weight", 2)
    hidden = _shape(structs, "layers.0.feed_forward.w1.weight", 2)[0]
    given: dict[str, Any] = {
        "in_channels": channels,
        "text_dim": _shape(structs, "cap_embedder.1.weight", 2)[1],
        "qk_norm": "layers.0.attention.q_norm.weight" in structs,
    }
    layers, width = _count(structs, "layers"), _shape(structs, "layers.0.attention.qkv.weight", 2)[0]
    for name in SIZES[NextDiTConfig]:
        config = getattr(NextDiTConfig, name)(**given)
        rows = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        if (config.dim, config.num_layers, config.hidden_dim, rows) == (dim, layers, hidden, width):
            return _model("dit", "", {"model": config})
    if not given["qk_norm"]:
        raise ValueError(
            "this diffusion transformer is of no published size, and without q and k norms its weights do not tell "
            "its heads: give the release's constructor arguments with --architecture FILE.json"
        )
    head = _shape(structs, "layers.0.attention.q_norm.weight", 1)[0]
    if head % 6:
        raise ValueError(
            f"this diffusion transformer is of no published size, and heads of {head} channels do not split into three "
            "equal axes: give the release's constructor arguments with --architecture FILE.json"
        )
    config = NextDiTConfig(
        dim=dim,
        num_layers=layers,
        num_refiner_layers=_count(structs, "noise_refiner"),
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
    return _model("dit", "", {"model": config}, (note,))


def _autoencoder(weights: Mapping[str, Any], structs: Mapping[str, Any], arguments: Mapping[str, Any] | None) -> Model:
    encoder, decoder = _inside("encoder.", structs), _inside("decoder.", structs)
    for name, found in (("encoder", encoder), ("decoder", decoder)):
        if not found:
            raise ValueError(
                f"this autoencoder has no '{name}.' keys: the release's checkpoint holds vision model and decoder"
            )
    given = arguments or {}
    numbers = {"rope_embed.periods": weights["encoder.rope_embed.periods"]} if "rope_embed.periods" in encoder else {}
    vit = _encoder(numbers, encoder, given.get("encoder"), None).networks["encoder"]
    section = given.get("decoder")
    networks = {"encoder": vit, "decoder": DecoderConfig.from_release(section) if section else _decoder(decoder)}
    notes: tuple[str, ...] = ()
    if any(name.startswith("extra_vit.") for name in structs):
        notes = ("its residual branch (extra_vit) is kept for export; no network here uses it",)
    return _model("autoencoder", "", networks, notes)


def _decoder(structs: Mapping[str, Any]) -> DecoderConfig:
    if "conv_in.weight" not in structs or structs["conv_in.weight"].shape[2:] != (3, 3):
        raise ValueError("this autoencoder has another kind of decoder than the published Autoencoder-P: not supported")
    levels = range(_count(structs, "up"))
    widths = [_shape(structs, f"up.{level}.block.0.conv1.weight", 4)[0] for level in levels]
    channels = math.gcd(*widths)
    return DecoderConfig(
        z_channels=_shape(structs, "conv_in.weight", 4)[1],
        out_channels=_shape(structs, "conv_out.weight", 4)[0],
        channels=channels,
        channel_multipliers=tuple(width // channels for width in widths),
        num_res_blocks=_count(structs, "up.0.block") - 1,
    )


def _encoder(
    weights: Mapping[str, Any],
    structs: Mapping[str, Any],
    arguments: Mapping[str, Any] | None,
    transformers: Mapping[str, Any] | None,
) -> Model:
    if "embeddings.patch_embeddings.weight" in structs:
        config = transformers or arguments
        if config is None:
            raise ValueError("a DINOv3 of transformers needs its config.json: name the folder with both")
        return _model("encoder", "transformers", {"encoder": ViTConfig.from_transformers(dict(config))})
    if arguments is not None:
        return _model("encoder", "", {"encoder": ViTConfig.from_release(dict(arguments))})
    dim, periods = _shape(structs, "cls_token", 3)[-1], _shape(structs, "rope_embed.periods", 1)[0]
    gated = "blocks.0.mlp.w1.weight" in structs
    last = float(weights["rope_embed.periods"][-1])  # base^((n - 1) / n)
    vit = ViTConfig(
        dim=dim,
        num_layers=_count(structs, "blocks"),
        num_heads=dim // (4 * periods),
        hidden_dim=_shape(structs, f"blocks.0.mlp.{'w1' if gated else 'fc1'}.weight", 2)[0],
        gated=gated,
        qkv_bias="blocks.0.attn.qkv.bias" in structs,
        mask_key_bias="blocks.0.attn.qkv.bias" not in structs or "blocks.0.attn.qkv.bias_mask" in structs,
        local_norm="local_cls_norm.weight" in structs,
        num_storage_tokens=_shape(structs, "storage_tokens", 3)[1] if "storage_tokens" in structs else 0,
        patch_size=_shape(structs, "patch_embed.proj.weight", 4)[-1],
        rope_base=float(f"{last ** (periods / (periods - 1)):.4g}") if periods > 1 else 100.0,
    )
    return _model("encoder", "", {"encoder": vit})


def _text_encoder(structs: Mapping[str, Any], transformers: Mapping[str, Any] | None) -> Model:
    if transformers is None:
        raise ValueError("a Gemma 2 needs its config.json: name the folder with both")
    prefix = "model." if "model.embed_tokens.weight" in structs else ""
    return _model("text_encoder", prefix, {"encoder": Gemma2Config.from_transformers(dict(transformers))})


def summary(structs: Mapping[str, Any]) -> dict[str, str]:
    """Number and types of a state dict's tensors, for people."""
    count = collections.Counter(str(struct.dtype) for struct in structs.values())
    parameters = sum(math.prod(struct.shape) for struct in structs.values())
    size = sum(math.prod(struct.shape) * struct.dtype.itemsize for struct in structs.values())
    return {
        "parameters": f"{parameters:,} in {len(structs)} tensors, {size / 2**20:,.1f} MiB",
        "dtypes": ", ".join(f"{dtype} ({number} tensors)" for dtype, number in count.most_common()),
    }
