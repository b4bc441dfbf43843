"""A workdir's weights as the release has them."""

from __future__ import annotations

import argparse
import collections
import contextlib
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from svg_jax.checkpoint import SavedParams, load_config, open_params
from svg_jax.convert import formats, kinds
from svg_jax.convert.files import check_local, replacing
from svg_jax.convert.formats import Selected, Structs, Write
from svg_jax.convert.kinds import MEASURE, STATISTICS
from svg_jax.convert.model import Model
from svg_jax.convert.rules import iterate_release, release_shapes
from svg_jax.convert.sources import CHECKPOINTS, MODEL_ARGS
from svg_jax.nn.functional import mismatch

TORCH_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin")
SUFFIXES = (*TORCH_SUFFIXES, ".safetensors")
RELEASE_NAMES = {
    "next_dit_0p8b": "NextDiT_08B_GQA_patch1_Adaln_Refiner",
    "next_dit_2p6b": "NextDiT_2B_GQA_patch1_Adaln_Refiner",
    "next_dit_3b": "NextDiT_3B_GQA_patch2_Adaln_Refiner",
    "next_dit_4b": "NextDiT_4B_GQA_patch2_Adaln_Refiner",
    "next_dit_7b": "NextDiT_7B_GQA_patch2_Adaln_Refiner",
}


def export_weights(
    workdir: str,
    target: Path,
    *,
    part: str | None = None,
    dtype: str | None = None,
    statistics: bool = False,
    overwrite: bool = False,
) -> list[str]:
    """Writes a workdir's weights as the release has them; one line on each file.

    Args:
        workdir: One that was imported, or of a training run of ours.
        target: A file whose name ends in one of `SUFFIXES`, or a folder: a checkpoint folder of the release for a
            diffusion transformer, one of transformers for what came from one.
        part: `ema` or `params`; by default the moving average, and both in a folder.
        dtype: Of what holds no integers; by default as saved.
        statistics: Whether an autoencoder's latent statistics are wanted instead of its weights.
        overwrite: Whether `target` may be replaced.

    Raises:
        FileNotFoundError: There is no checkpoint, or not of that part.
        FileExistsError: There is a `target` already, or, to be replaced, one that is no earlier export.
        ValueError: What is there cannot be written so, or `target` and `workdir` overlap.
        ImportError: PyTorch's format is wanted, and PyTorch is not installed.
    """
    check_local(target)
    _check_apart(workdir, target)
    if target.exists() and not overwrite:
        raise FileExistsError(f"there is {target} already: choose another --to, or replace it with --overwrite")
    config = load_config(workdir)
    saved = open_params(workdir)
    model = kinds.restored(config, _shapes(saved))
    origin = config.get("origin", {})
    _check_replaceable(target, _folder_names(model, origin, epath.Path(workdir) / "tokenizer"))
    if statistics or model.kind == "statistics":
        return _export_statistics(model, saved, target)
    if part is not None and part not in saved:
        raise FileNotFoundError(f"{workdir} has no {part}: it has {', '.join(saved)}")

    def of(part: str) -> _Tensors:
        return _Tensors(model, saved, part if part in saved else "ema" if "ema" in saved else "params", dtype)

    with replacing(target) as path:
        if target.suffix:
            return [_write(path, target, of(part or "ema"), origin, model)]
        path.mkdir()
        if model.kind == "dit":
            files = {p: name for p, name in CHECKPOINTS.items() if p in saved}
            if part is not None:
                files = {part: CHECKPOINTS[part]}
            elif "folder" in origin:
                files = {p: name for p, name in CHECKPOINTS.items() if name in origin["folder"]}
            lines = [_write(path / name, target / name, of(p), origin, model) for p, name in files.items()]
            _write_model_args(path / MODEL_ARGS, config, model)
            return lines
        if "texts" not in origin:
            raise ValueError(
                f"{workdir} was not imported from a folder of transformers: name a file, {target}.safetensors or .pth"
            )
        return _write_transformers(path, target, of("frozen"), origin, epath.Path(workdir) / "tokenizer", dtype)


def _shapes(saved: Mapping[str, SavedParams]) -> Structs:
    """Of the parameters that are there, by our names."""
    parts = (params for part, params in saved.items() if part != "carried")
    return {name: shape for params in parts for name, shape in params.shapes.items()}


def _check_apart(workdir: str, target: Path) -> None:
    """Nothing is written over, into or around what is being read."""
    one, other = Path(workdir).resolve(), target.resolve()
    if "://" not in workdir and (one == other or one in other.parents or other in one.parents):
        raise ValueError(f"{target} and the workdir {workdir} lie one in the other: choose another --to")


def _folder_names(model: Model, origin: Mapping[str, Any], tokenizer: epath.Path) -> set[str]:
    """Every file that an export to a folder may write."""
    if model.kind == "dit":
        return {*CHECKPOINTS.values(), MODEL_ARGS}
    of_tokenizer = [file.name for file in tokenizer.iterdir()] if tokenizer.exists() else []
    return {*origin.get("texts", {}), *origin.get("shards", {}).values(), *of_tokenizer}


def _check_replaceable(target: Path, names: set[str]) -> None:
    """A file takes the place of a file alone, a folder that of a folder with nothing else in it than `names`."""
    if not target.exists():
        return
    if target.is_dir() == bool(target.suffix):
        raise FileExistsError(f"{target} is a {'folder' if target.is_dir() else 'file'} already: choose another --to")
    if target.is_dir() and (others := sorted({path.name for path in target.iterdir()} - names)):
        raise FileExistsError(
            f"{target} is not replaced, for it holds what no export writes ({', '.join(others[:3])}): "
            "choose another --to"
        )


class _Tensors:
    """A workdir's weights under the release's names, one at a time."""

    def __init__(self, model: Model, saved: Mapping[str, SavedParams], part: str, dtype: str | None) -> None:
        found = {name: shape for p in (part, "frozen") if p in saved for name, shape in saved[p].shapes.items()}
        found = {name: shape for name, shape in found.items() if not name.startswith("latents.")}
        if problem := mismatch(model.shapes, found):
            raise ValueError(f"what is saved is not what its config says: {problem}")
        both = collections.ChainMap(*(cast(Any, saved[p]) for p in (part, "frozen") if p in saved))
        self._params, self._table = Selected(both, list(found)), model.table
        self._carried: Mapping[str, np.ndarray] = saved.get("carried", {})
        structs = release_shapes(found, model.table)
        if "carried" in saved:
            structs |= saved["carried"].shapes

        def written(struct: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            changes = dtype is not None and jnp.issubdtype(struct.dtype, jnp.floating)
            return jax.ShapeDtypeStruct(struct.shape, jnp.dtype(dtype) if changes else struct.dtype)

        self.structs: Structs = {name: written(struct) for name, struct in structs.items()}

    def __iter__(self) -> Iterator[tuple[str, np.ndarray]]:
        for name, array in itertools.chain(iterate_release(self._params, self._table), self._carried.items()):
            yield name, array.astype(self.structs[name].dtype, copy=False)


def _write(path: Path, target: Path, tensors: _Tensors, origin: Mapping[str, Any], model: Model) -> str:
    """One file, at `path` for now."""
    if target.suffix in TORCH_SUFFIXES:
        by_kind = "state_dict" if model.kind == "autoencoder" else None
        wrapper = origin["wrapper"] if origin.get("container") == "torch" else by_kind
        writer = formats.torch_writer(path, tensors.structs, wrapper)
    elif target.suffix in SUFFIXES:
        metadata = origin["metadata"] if origin.get("container") == "safetensors" else {"format": "pt"}
        writer = formats.safetensors_writer(path, tensors.structs, metadata)
    else:
        raise ValueError(f"{target}: the name must end in one of {', '.join(SUFFIXES)}, or have no ending")
    with writer as write:
        for name, array in tensors:
            write(name, array)
    return f"{target}: {kinds.summary(tensors.structs)['parameters']}"


def _write_model_args(path: Path, config: Mapping[str, Any], model: Model) -> None:
    """The arguments of the training run, which the release keeps beside its checkpoints."""
    network = model.networks["model"]
    values = {"model": RELEASE_NAMES.get(model.size), "qk_norm": network.qk_norm, "resol": config["data"]["resolution"]}
    args = argparse.Namespace(**config.get("origin", {}).get("model_args", values))
    formats.import_torch().save(args, path)


def _write_transformers(
    path: Path, target: Path, tensors: _Tensors, origin: Mapping[str, Any], tokenizer: epath.Path, dtype: str | None
) -> list[str]:
    """A folder as the one that was imported, in as many pieces."""
    texts = {name: dict(text) for name, text in origin["texts"].items()}
    for key in {"dtype", "torch_dtype"} & texts["config.json"].keys() if dtype else ():
        texts["config.json"][key] = dtype
    for name, text in texts.items():
        (path / name).write_text(json.dumps(text, indent=2, ensure_ascii=False) + "\n")
    for file in tokenizer.iterdir() if tokenizer.exists() else ():
        file.copy(path / file.name)
    shards: dict[str, Structs] = {}
    for name, struct in tensors.structs.items():
        shards.setdefault(origin["shards"][name], {})[name] = struct
    with contextlib.ExitStack() as stack:
        writers: dict[str, Write] = {}
        for file, structs in shards.items():
            torch = file.endswith(TORCH_SUFFIXES)
            writer = (
                formats.torch_writer(path / file, structs)
                if torch
                else formats.safetensors_writer(path / file, structs, origin["metadata"])
            )
            writers[file] = stack.enter_context(writer)
        for name, array in tensors:
            writers[origin["shards"][name]](name, array)
    return [f"{target / file}: {kinds.summary(structs)['parameters']}" for file, structs in shards.items()]


def _export_statistics(model: Model, saved: Mapping[str, SavedParams], target: Path) -> list[str]:
    """As imported; of an autoencoder one row, which the release takes for the last layer's."""
    if model.kind not in ("statistics", "autoencoder"):
        raise ValueError(f"a {model.title} has no latent statistics: name an autoencoder's workdir")
    if target.suffix not in SUFFIXES:
        raise ValueError(f"{target}: the name of statistics must end in one of {', '.join(SUFFIXES)}")
    frozen = saved["frozen"]
    if model.kind == "statistics":
        arrays = {name: frozen[ours] for ours, name in zip(STATISTICS, model.layout.split(","), strict=True)}
    else:
        if not frozen["latents.mean"].any() and (frozen["latents.std"] == 1).all():
            raise ValueError(
                "its latent statistics were never given (mean 0, std 1): import the release's file into the same "
                f"folder, or measure them with `{MEASURE}`"
            )
        channels = model.networks["encoder"].dim  # the release itself extends them to Autoencoder-R's
        arrays = {name: frozen[f"latents.{name}"][None, :channels] for name in STATISTICS}
    structs = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in arrays.items()}
    torch = target.suffix in TORCH_SUFFIXES
    writer = formats.torch_writer if torch else formats.safetensors_writer
    with replacing(target) as path, writer(path, structs) as write:
        for name, array in arrays.items():
            write(name, array)
    return [f"{target}: {', '.join(f'{name} {list(array.shape)}' for name, array in arrays.items())}"]
