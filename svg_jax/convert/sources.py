"""What can be named as a source: a file of weights, a checkpoint folder of the release, a folder of transformers."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from svg_jax.checkpoint import FOLDER
from svg_jax.config import check_keys
from svg_jax.convert import autoencoders, formats, kinds
from svg_jax.convert.files import check_local
from svg_jax.convert.formats import Content, Weights
from svg_jax.convert.model import DESCRIPTIONS, Model

READ_ARCHITECTURES = ("dit", "autoencoder", "encoder")  # kinds whose sizes `--architecture` can tell
CHECKPOINTS = {"params": "consolidated.00-of-01.pth", "ema": "consolidated_ema.00-of-01.pth"}  # of the release
MODEL_ARGS = "model_args.pth"
DROPPED = "a training run's own state, not weights: training here begins its own"
DROPPED_WEIGHTS = "holds weights too, and one set is imported: save the other as a file of its own to have it"
TOKENIZER = re.compile(r"(tokenizer.*|special_tokens_map|added_tokens|chat_template.*)\.(json|model|jinja)")


@dataclasses.dataclass(frozen=True)
class Source:
    """What one SOURCE holds."""

    path: Path
    weights: Weights
    raw: Weights | None  # beside a moving average, what it is the average of
    origin: dict[str, Any]  # for the way back
    transformers: dict[str, Any] | None  # config.json
    tokenizer: tuple[Path, ...] = ()


def open_source(path: Path) -> Source:
    """A file of weights, a checkpoint folder of the release, or a folder of transformers.

    Raises:
        FileNotFoundError: It is not there.
        ValueError: It is something else, or damaged.
        ImportError: It needs PyTorch.
    """
    check_local(path)
    if not path.is_dir():
        return _source(path, formats.open_file(path))
    if (path / FOLDER).is_dir():
        raise ValueError(f"{path} is a workdir of ours already: name it where its weights are wanted")
    if found := sorted(path.glob("consolidated*.pth")):
        return _checkpoint_folder(path, found)
    if (path / "config.json").is_file():
        return _transformers_folder(path)
    raise ValueError(
        f"{path} is neither a checkpoint folder of the release ({CHECKPOINTS['ema']}) nor one of transformers "
        "(config.json and *.safetensors): name a file in it"
    )


def _source(path: Path, content: Content, **more: Any) -> Source:
    origin: dict[str, Any] = {"sources": [path.name], "container": content.container, "wrapper": content.wrapper}
    dropped = dict.fromkeys(content.dropped, DROPPED) | dict.fromkeys(content.others, DROPPED_WEIGHTS)
    origin |= {"metadata": content.metadata, "dropped": dropped, **more}
    return Source(path, content.weights, None, origin, None)


def _checkpoint_folder(path: Path, found: list[Path]) -> Source:
    for file in found:
        if file.name not in CHECKPOINTS.values():
            raise ValueError(
                f"{file} is a piece of a model that was split over devices: not supported, only {CHECKPOINTS['ema']} is"
            )
    contents = {part: formats.open_file(path / name) for part, name in CHECKPOINTS.items() if (path / name) in found}
    args = formats.load_torch(path / MODEL_ARGS) if (path / MODEL_ARGS).is_file() else None
    others = {file.name: DROPPED for file in sorted(path.glob("optimizer.*.pth"))}
    content = contents.get("ema") or contents["params"]
    source = _source(path, content, folder=[CHECKPOINTS[part] for part in contents])
    source.origin["dropped"] |= others
    if args is not None:
        values = vars(args) if isinstance(args, argparse.Namespace) else args
        if not isinstance(values, dict):
            raise ValueError(f"{path / MODEL_ARGS} must hold arguments by name, and holds one {type(args).__name__}")
        source.origin["model_args"] = {str(key): _plain(value) for key, value in values.items()}
    return dataclasses.replace(source, raw=contents["params"].weights if len(contents) > 1 else None)


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _transformers_folder(path: Path) -> Source:
    indices = [*path.glob("*.safetensors.index.json"), *path.glob("*.bin.index.json")]
    weight_map = _json(indices[0]).get("weight_map") if indices else {}
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{indices[0]} must say under 'weight_map' in which file each tensor is: download it again")
    files = sorted({path / name for name in weight_map.values()} or path.glob("*.safetensors"))
    files = files or sorted(path.glob("*.bin"))
    if not files:
        raise ValueError(f"{path} has a config.json and no weights beside it: no *.safetensors, no *.bin")
    contents = [formats.open_file(file) for file in files]
    texts = {file.name: _json(file) for file in sorted(path.glob("*.json")) if not TOKENIZER.fullmatch(file.name)}
    weights = Weights.joined([content.weights for content in contents])
    shards = {name: file.name for file, content in zip(files, contents, strict=True) for name in content.weights}
    source = _source(path, contents[0], texts=texts, shards=shards)
    tokenizer = tuple(file for file in sorted(path.iterdir()) if TOKENIZER.fullmatch(file.name))
    return dataclasses.replace(source, weights=weights, transformers=texts["config.json"], tokenizer=tokenizer)


def joined(one: Source, other: Source) -> Source:
    """Two files as one, where each holds a part of a model."""
    origin = {**one.origin, "sources": [*one.origin["sources"], *other.origin["sources"]]}
    origin["dropped"] = one.origin["dropped"] | other.origin["dropped"]
    return dataclasses.replace(one, weights=Weights.joined([one.weights, other.weights]), origin=origin)


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no readable JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold an object, {{...}}")
    return content


def recognise(source: Source, arguments: Mapping[str, Any] | None = None) -> Model:
    """What a source is of.

    Args:
        source: It.
        arguments: The content of `--architecture`: constructor arguments of the release, or those of each kind.

    Raises:
        ValueError: It is of nothing known here, or its sizes cannot be told.
    """
    kind = kinds.kind_of(source.weights.structs)
    if arguments is not None and not isinstance(arguments, Mapping):
        raise ValueError(f"--architecture must hold an object, {{...}}, and holds {arguments!r}")
    try:
        arguments = None if arguments is None else _of_kind(str(kind), arguments)
        return kinds.recognise(
            source.weights, source.weights.structs, arguments=arguments, transformers=source.transformers
        )
    except ValueError as error:
        raise ValueError(f"{source.path}: {error}") from error


def _of_kind(kind: str, given: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What of `--architecture` is about a kind: all of it, or what stands under the kind's name.

    Raises:
        ValueError: It has a key that nothing reads.
    """
    parts = autoencoders.ARGUMENTS
    by_kind = bool(given.keys() & (DESCRIPTIONS.keys() - set(parts)))
    all_of_it = kind == "autoencoder" and not by_kind
    if not all_of_it and not given.keys() & DESCRIPTIONS.keys():
        return given.get("model", given)
    check_keys(given, READ_ARCHITECTURES if by_kind else (*READ_ARCHITECTURES, *parts), "--architecture")
    return given if all_of_it else given.get(kind)
