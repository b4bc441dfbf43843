"""What a file or folder is, for people."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from svg_jax.checkpoint import FOLDER, load_config, open_params
from svg_jax.convert import kinds
from svg_jax.convert.files import check_local
from svg_jax.convert.model import DESCRIPTIONS, Model
from svg_jax.convert.rules import carried, dropped
from svg_jax.convert.sources import DROPPED, open_source


def inspect(path: Path) -> list[str]:
    """What a file or folder is, as lines for people; a folder of workdirs tells of each.

    Raises:
        FileNotFoundError: It is not there.
        ValueError: It cannot be read.
        ImportError: It is PyTorch's, which is not installed.
    """
    check_local(path)
    workdirs = [path / kind for kind in DESCRIPTIONS if (path / kind / FOLDER).is_dir()]
    if (path / FOLDER).is_dir():
        return _inspect_workdir(path)
    if workdirs:
        return [line for workdir in workdirs for line in [*_inspect_workdir(workdir), ""]][:-1]
    source = open_source(path)
    facts = {"file" if path.is_file() else "folder": str(path), "kind": "unknown"}
    if (wrapper := source.origin["wrapper"]) is not None:
        facts["wrapped"] = f"under the key '{wrapper}'"
    structs = source.weights.structs
    try:
        model = kinds.recognise(source.weights, structs, transformers=source.transformers)
    except ValueError as error:
        kind = kinds.kind_of(structs)
        facts |= {"kind": DESCRIPTIONS.get(str(kind), "unknown"), **kinds.summary(structs), "problem": str(error)}
        return _aligned(facts | {"keys": _some(list(structs))})
    facts |= {"kind": model.title, **_sizes(model), **kinds.summary(structs)}
    if source.raw is not None:
        facts["also"] = "the raw weights beside their moving average"
    if kept := carried(structs, model.table):
        facts["carried"] = _some(list(kept))
    left = [n if why == DROPPED else f"{n} (holds weights too)" for n, why in source.origin["dropped"].items()]
    if left := [*left, *dropped(structs, model.table)]:
        facts["dropped"] = _some(left)
    if model.table:
        facts |= {what: _some(keys) for what, keys in model.differences(structs).items()}
    return _aligned(facts)


def _inspect_workdir(path: Path) -> list[str]:
    config, saved = load_config(str(path)), open_params(str(path))
    facts = {"workdir": str(path), "kind": "unknown"}
    try:
        model = kinds.restored(config)
        facts |= {"kind": model.title, **_sizes(model)}
    except ValueError as error:
        facts["problem"] = str(error)
    if sources := config.get("origin", {}).get("sources"):
        facts["imported from"] = ", ".join(sources)
    for part, params in saved.items():
        facts[part] = "; ".join(kinds.summary(params.shapes).values())
    return _aligned(facts)


def _sizes(model: Model) -> dict[str, str]:
    facts = {"size": model.size} if model.networks else {}
    for section, network in model.networks.items():
        values = {name: value for name, value in vars(network).items() if name not in ("dtype", "remat")}
        facts[section] = ", ".join(f"{name} {value}" for name, value in values.items())
    return facts | ({"note": "; ".join(model.notes)} if model.notes else {})


def _some(names: list[str], limit: int = 20) -> str:
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{len(names)}: {', '.join(names[:limit])}{rest}" if names else "none"


def _aligned(facts: Mapping[str, str]) -> list[str]:
    width = max(map(len, facts)) + 2
    return [f"{name:<{width}}{value}" for name, value in facts.items()]
