"""The release's weights into workdirs of ours."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
from etils import epath

from configs import base
from svg_jax.checkpoint import FOLDER, load_config, open_params, save_params
from svg_jax.convert import detectors, kinds, sources
from svg_jax.convert.formats import Selected, Weights
from svg_jax.convert.kinds import LACKS, MEASURE, STATISTICS
from svg_jax.convert.model import Model
from svg_jax.convert.rules import Converted, carried, dropped
from svg_jax.convert.sources import Source, open_source, recognise
from svg_jax.models.autoencoder import extended
from svg_jax.models.lpips import LPIPSConfig

logger = logging.getLogger("svg_jax")

Arrays = Mapping[str, np.ndarray]

RESOLUTION = 1024  # pixels, of the published diffusion transformer
RESIDUAL_CHANNELS = 8  # of the published Autoencoder-R, whose statistics the release makes from the others


def latent_statistics(arrays: Arrays, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each latent channel, float32, from the release's file.

    The last row counts: that of the last layer. The 8 channels that Autoencoder-R adds get the average of the others.

    Args:
        arrays: `mean` and `std`, [layers, channels] or [1, 1, channels], or `dinov3_sp_mean` and `dinov3_sp_std`.
        channels: Of the latents.

    Raises:
        ValueError: They are of another number of channels.
    """

    def last(names: tuple[str, ...]) -> np.ndarray:
        array = next(arrays[name] for name in names if name in arrays)
        row = np.asarray(array).reshape(-1, array.shape[-1])[-1].astype(np.float32)
        if len(row) not in (channels, channels - RESIDUAL_CHANNELS):
            raise ValueError(
                f"the latent statistics are of {len(row)} channels and the latents have {channels}: `{MEASURE}` "
                "measures those of an autoencoder"
            )
        return extended(row, channels)

    mean, std = last(STATISTICS["mean"]), last(STATISTICS["std"])
    if not (np.isfinite(mean).all() and np.isfinite(std).all() and (std > 0).all()):
        raise ValueError("the latent statistics hold numbers that are not finite, or a standard deviation of zero")
    return mean, std


def import_weights(
    sources: list[Path], to: str, *, arguments: Mapping[str, Any] | None = None, overwrite: bool = False
) -> list[str]:
    """Brings the release's weights over; one line on each.

    Args:
        sources: Files and folders of the release, one of each kind, in any order.
        to: Folder that gets a workdir for each kind.
        arguments: The content of `--architecture`.
        overwrite: Whether workdirs that are there may be replaced; each is, once the new one is complete.

    Raises:
        ValueError: A source is not what it should be, two are of one kind, or do not fit each other.
        FileExistsError: There is a workdir of that kind already. Nothing has been written then.
        FileNotFoundError: There is no such source.
        ImportError: A source needs PyTorch.
    """
    opened: dict[str, tuple[Source, Model]] = {}
    for path in sources:
        source = open_source(path)
        model = recognise(source, arguments)
        if model.kind in opened:
            source = _joined(opened[model.kind], (source, model))
            model = recognise(source, arguments)
        opened[model.kind] = source, model
    root = epath.Path(to).absolute()
    for kind, (_, model) in opened.items():
        if (root / kind).exists() and not overwrite and not _completes(model, root / kind):
            raise FileExistsError(
                f"there is {root / kind} already: choose another --to, or replace it with --overwrite"
            )

    converted = {kind: _parts(source, model) for kind, (source, model) in opened.items()}
    lines = _with_latents(root, opened, converted)
    if "lpips" in opened:
        opened["lpips"] = _completed(root / "lpips", *opened["lpips"], converted["lpips"])
    for kind, (source, model) in opened.items():
        with _replacing(root / kind) as folder:
            if kind == "detector":  # which runs in PyTorch, from a folder of transformers
                detectors.write_folder(source.path, source.weights, Path(folder))
            else:
                save_params(str(folder), converted[kind], _config(source, model))
            for file in source.tokenizer:
                (folder / "tokenizer").mkdir(exist_ok=True)
                epath.Path(file).copy(folder / "tokenizer" / file.name)
        lines += _told(source, model, root / kind)
    return lines


def _parts(source: Source, model: Model) -> dict[str, Arrays]:
    """A source's tensors as ours, by the field of the train state; nothing is read yet."""
    if model.kind == "detector":
        return {}
    if model.kind == "statistics":
        names = dict(zip(STATISTICS, model.layout.split(","), strict=True))
        return {"frozen": {ours: source.weights[name] for ours, name in names.items()}}

    def convert(weights: Weights) -> Converted:
        try:
            return Converted(weights, weights.structs, model.table, model.shapes)
        except ValueError as error:
            raise ValueError(f"{source.path}: {error}") from error

    ours = convert(source.weights)
    parts: dict[str, Arrays] = {}
    for part in ("ema", "frozen"):
        parts[part] = Selected(ours, [name for name in ours if model.part(name) == part])
    parts["carried"] = Selected(source.weights, list(carried(source.weights.structs, model.table)))
    if source.raw is not None:
        parts["params"] = convert(source.raw)
    return parts


def _joined(one: tuple[Source, Model], other: tuple[Source, Model]) -> Source:
    """Two files of one kind, which must be the halves of one model.

    Raises:
        ValueError: They are two models.
    """
    if one[1].kind != "lpips" or {"lacks"} - one[1].beside.keys() or one[1].beside == other[1].beside:
        raise ValueError(
            f"{one[0].path} and {other[0].path} are both a {one[1].title}: name one, or the folder that holds both"
        )
    return sources.joined(one[0], other[0])


def _completes(model: Model, workdir: epath.Path) -> bool:
    """Whether a half of LPIPS is what the one in a workdir lacks."""
    if model.kind != "lpips" or not (workdir / FOLDER).exists():
        return False
    lacks = {model.beside.get("lacks"), load_config(str(workdir)).get("lacks")}
    return None not in lacks and len(lacks) == len(LACKS)


def _completed(workdir: epath.Path, source: Source, model: Model, parts: dict[str, Arrays]) -> tuple[Source, Model]:
    """LPIPS with the half that came before, if it completes that.

    Raises:
        ValueError: The halves are of different widths.
    """
    if not _completes(model, workdir):
        return source, model
    config, saved = load_config(str(workdir)), open_params(str(workdir))
    widths = config["lpips"]["channels"], list(model.networks["lpips"].channels)
    if widths[0] != widths[1]:
        raise ValueError(
            f"{source.path}: its widths are {widths[1]} and those of the other half, in {workdir}, {widths[0]}"
        )
    parts["frozen"] = collections.ChainMap(cast(Any, parts["frozen"]), cast(Any, saved["frozen"]))
    if "carried" in saved:
        parts["carried"] = collections.ChainMap(cast(Any, parts["carried"]), cast(Any, saved["carried"]))
    names = [*config["origin"]["sources"], *source.origin["sources"]]
    whole = kinds.lpips(LPIPSConfig(tuple(widths[1])), model.layout)
    return dataclasses.replace(source, origin={**source.origin, "sources": names}), whole


def _put(few: dict[str, np.ndarray], arrays: Arrays) -> Arrays:
    """`arrays` with some replaced or added."""
    return collections.ChainMap(few, cast(Any, arrays))


def _with_latents(
    root: epath.Path, opened: Mapping[str, tuple[Source, Model]], converted: dict[str, dict[str, Arrays]]
) -> list[str]:
    """Puts the statistics into the autoencoder, whichever of the two is there already; a line if that one changes."""
    statistics = converted["statistics"]["frozen"] if "statistics" in opened else None
    if "autoencoder" in opened:
        if statistics is None and (root / "statistics").exists():
            statistics = dict(open_params(str(root / "statistics"))["frozen"])
        channels = opened["autoencoder"][1].networks["decoder"].z_channels
        if statistics is None:
            logger.warning(
                "no latent statistics are given: latents are not normalised (mean 0, std 1) until they are imported too"
            )
            mean, std = np.zeros(channels, np.float32), np.ones(channels, np.float32)
        else:
            mean, std = latent_statistics(statistics, channels)
        parts = converted["autoencoder"]
        parts["frozen"] = _put({"latents.mean": mean, "latents.std": std}, parts["frozen"])
    elif statistics is not None and (root / "autoencoder").exists():
        config, saved = load_config(str(root / "autoencoder")), open_params(str(root / "autoencoder"))
        if "origin" not in config or _names(root / "autoencoder") != {FOLDER, f"{FOLDER}/0"}:
            raise ValueError(
                f"{root / 'autoencoder'} holds more than an import, and only that is given new latent statistics: "
                "choose another --to"
            )
        mean, std = latent_statistics(statistics, config["autoencoder"]["decoder"]["z_channels"])
        frozen = _put({"latents.mean": mean, "latents.std": std}, saved["frozen"])
        with _replacing(root / "autoencoder") as folder:
            save_params(str(folder), {**saved, "frozen": frozen}, config)
        return [f"{root / 'autoencoder'}: its latent statistics are replaced by these"]
    return []


def _names(workdir: epath.Path) -> set[str]:
    """What lies in a workdir, and its checkpoints."""
    steps = {f"{FOLDER}/{path.name}" for path in (workdir / FOLDER).iterdir()}
    return {path.name for path in workdir.iterdir()} | steps


def _config(source: Source, model: Model) -> dict[str, Any]:
    """What goes beside the parameters: sizes, the released recipe, and where all came from."""
    recipe = base.get_config()
    sections = model.sections
    config: dict[str, Any] = {}
    if model.kind == "dit":
        recipe.data.resolution = RESOLUTION
        config = recipe.to_dict()
        sections["model"] |= {"dtype": recipe.model.dtype, "remat": recipe.model.remat}
    for network in _networks_of(sections, model.kind):
        network["dtype"] = recipe.model.dtype
    return {**config, "kind": model.kind, "origin": {**source.origin, "layout": model.layout}, **sections}


def _networks_of(sections: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    inside = {"autoencoder": "autoencoder", "text_encoder": "text"}.get(kind)
    values = (sections[inside] if inside else sections).values()
    return [value for value in values if isinstance(value, dict) and "dtype" in value]


def _told(source: Source, model: Model, folder: epath.Path) -> list[str]:
    size = f", {model.size}" if model.networks else ""
    number = kinds.summary(source.weights.structs)["parameters"]
    lines = [f"{source.path}: {model.title}{size}, {number} -> {folder}"]
    lines += [f"  note: {note}" for note in model.notes]
    reasons: dict[str, list[str]] = {}
    for name, reason in carried(source.weights.structs, model.table).items():
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        rest = f" and {len(names) - 1} more" if len(names) > 1 else ""
        lines.append(f"  carried for export: {names[0]}{rest} ({reason})")
    left = source.origin["dropped"] | dropped(source.weights.structs, model.table)
    for reason in dict.fromkeys(left.values()):
        lines.append(f"  dropped: {', '.join(name for name in left if left[name] == reason)} ({reason})")
    return lines


@contextlib.contextmanager
def _replacing(folder: epath.Path) -> Iterator[epath.Path]:
    """A new folder that takes the place of `folder` at the end; on an error nothing is left of it, and nothing lost."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside, before = (folder.parent / f".{folder.name}.{state}" for state in ("partial", "before"))
    if before.exists() and not folder.exists():  # stopped between the two renames below
        before.rename(folder)
    for left in (beside, before):
        if left.exists():
            left.rmtree()
    try:
        beside.mkdir()
        yield beside
        if folder.exists():
            folder.rename(before)
        beside.rename(folder)
        if before.exists():
            before.rmtree()
    finally:
        if beside.exists():
            beside.rmtree()
