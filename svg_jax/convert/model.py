"""What a state dict turns out to be of: sizes, parameters, table."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

import jax

from svg_jax.convert.rules import Table, differences
from svg_jax.models.decoder import Decoder, DecoderConfig
from svg_jax.models.decoder_hy import HyDecoder, HyDecoderConfig
from svg_jax.models.discriminator import DiscriminatorConfig, PatchDiscriminator
from svg_jax.models.gemma2 import Gemma2, Gemma2Config
from svg_jax.models.lpips import LPIPS, LPIPSConfig
from svg_jax.models.next_dit import NextDiT, NextDiTConfig
from svg_jax.models.residual import ResidualConfig, ResidualViT
from svg_jax.models.vit import ViT, ViTConfig
from svg_jax.models.vit_learnt import PUBLISHED, LearntViT, LearntViTConfig
from svg_jax.nn.functional import Network

Shapes = dict[str, jax.ShapeDtypeStruct]

DESCRIPTIONS = {
    "dit": "diffusion transformer (Next-DiT)",
    "autoencoder": "autoencoder",
    "encoder": "vision model",
    "text_encoder": "language model (Gemma 2)",
    "statistics": "latent statistics",
    "lpips": "perceptual distance (LPIPS, VGG16)",
    "inception": "Inception of FID",
    "detector": "detector (Mask2Former with Swin, of mmdet)",
}
"""The kinds, which are also the folders of what is imported."""

FAMILIES = {"dinov3": "DINOv3", "dinov2": "DINOv2", "siglip2": "SigLIP", "mae": "MAE"}
"""Names of the vision models."""

SIZES: dict[type, tuple[str, ...]] = {
    NextDiTConfig: ("next_dit_0p8b", "next_dit_2p6b", "next_dit_3b", "next_dit_4b", "next_dit_7b"),
    ViTConfig: ("vits16", "vits16plus", "vitb16", "vitl16", "vith16plus", "vit7b16"),
    DecoderConfig: ("svg",),
    Gemma2Config: ("gemma2_2b",),
}
"""Named constructors of published sizes."""

# Fields that name no size.
UNSIZED = {"dtype", "remat", "layer_scale", "embedding_std", "kernel_std", "rope_base", "attention", "norm_eps"}
UNSIZED |= {"antialias", "grid", "pixel_mean", "pixel_std", "match", "mask_ratio", "frozen"}

MODULES: dict[type, Any] = {
    NextDiTConfig: NextDiT,
    ViTConfig: ViT,
    LearntViTConfig: LearntViT,
    DecoderConfig: Decoder,
    HyDecoderConfig: HyDecoder,
    ResidualConfig: ResidualViT,
    Gemma2Config: Gemma2,
    LPIPSConfig: LPIPS,
    DiscriminatorConfig: PatchDiscriminator,
}


@dataclasses.dataclass(frozen=True)
class Model:
    """A network or a set of statistics: its sizes, its parameters and its table."""

    kind: str
    layout: str  # of the names in the release, where there are several
    networks: dict[str, Any]  # the configs of its networks, by the section of our config
    table: Table
    shapes: Shapes
    notes: tuple[str, ...] = ()  # what a user should know
    trained: frozenset[str] = frozenset()  # parameters that training changes
    beside: dict[str, Any] = dataclasses.field(default_factory=dict)  # what our config says beside the networks

    @property
    def title(self) -> str:
        """The kind, for people."""
        encoder = self.networks.get("encoder")
        family = f" ({FAMILIES[encoder.family]})" if self.kind == "encoder" and encoder else ""
        return DESCRIPTIONS[self.kind] + family

    @property
    def size(self) -> str:
        """The published size, or that it is none."""
        return " + ".join(_size_name(network) or _no_size(network) for network in self.networks.values())

    @property
    def sections(self) -> dict[str, Any]:
        """Our config of it."""
        fields = {name: dataclasses.asdict(network) for name, network in self.networks.items()} | self.beside
        nested = {"autoencoder": {"autoencoder": fields}, "text_encoder": {"text": fields}}
        return nested.get(self.kind, fields)

    def part(self, name: str) -> str:
        """The field of the train state that a parameter belongs to."""
        return "ema" if name in self.trained else "frozen"

    def differences(self, structs: Mapping[str, Any]) -> dict[str, list[str]]:
        """Keys that are missing, unexpected or of another shape."""
        return differences(structs, self.table, self.shapes)


@functools.cache
def shapes_of(config: Any) -> Shapes:
    """The parameters of a network; nothing is allocated."""
    return Network(lambda rngs: MODULES[type(config)](config, rngs=rngs)).shapes


def _size_name(config: Any) -> str | None:
    """The published size that a config is of."""
    same = {name: value for name, value in vars(config).items() if name in UNSIZED}
    return next((name for name, published in _published(config, same).items() if published == config), None)


def _published(config: Any, same: dict[str, Any]) -> dict[str, Any]:
    """The published sizes of such a network, with what names no size as in `config`."""
    if isinstance(config, LearntViTConfig):  # without the resolution, which is the position table's alone
        return {re.sub(r"_\d+$", "", name): LearntViTConfig.published(name, **same) for name in PUBLISHED}
    if isinstance(config, HyDecoderConfig):
        return {"hy": HyDecoderConfig(**same, z_channels=config.z_channels)}
    if isinstance(config, LPIPSConfig):
        return {"vgg16": LPIPSConfig(**same)}
    if isinstance(config, ResidualConfig):
        sizes = {"output_dim": config.out_channels}
        return {k: ResidualConfig.from_release({"vit_type": k, **sizes}, **same) for k in ("vit-rope-s", "vit-s")}
    inputs = {"in_channels", "text_dim", "z_channels"} & vars(config).keys()
    same |= {name: getattr(config, name) for name in inputs}
    return {name: getattr(type(config), name)(**same) for name in SIZES[type(config)]}


def _no_size(config: Any) -> str:
    """With the depth, so that a missing last layer is seen."""
    depth = f" ({config.num_layers} layers)" if hasattr(config, "num_layers") else ""
    return f"no published size{depth}"


def inside(prefix: str, items: Mapping[str, Any]) -> dict[str, Any]:
    """What stands below a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in items.items() if name.startswith(prefix)}


def shape_of(structs: Mapping[str, Any], name: str, rank: int) -> tuple[int, ...]:
    """The shape of a tensor that tells a size.

    Raises:
        ValueError: It is not there, or has another number of axes.
    """
    if name not in structs:
        raise ValueError(f"the weights do not fit: 1 missing: {name}, which tells the size")
    shape = tuple(structs[name].shape)
    if len(shape) != rank:
        raise ValueError(f"the weights do not fit: {name} has the shape {shape} and should have {rank} axes")
    return shape


def count(structs: Mapping[str, Any], stack: str) -> int:
    """Layers of a stack: the largest index plus one. `stack` is what stands before the index."""
    found = (re.match(rf"{re.escape(stack)}(\d+)\.", name) for name in structs)
    return max((int(match[1]) + 1 for match in found if match), default=0)
