"""Folders of pictures that other programs drew: GenEval's, and DPG-Bench's grids."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import NamedTuple

from etils import epath

from svg_jax.evaluate.prompt_sets import LONG_KEYS, PromptEntry, check_metadata, is_long

METADATA = "metadata.jsonl"  # of GenEval: the row of a prompt, beside its pictures
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


class Found(NamedTuple):
    """What a folder holds: the files by id and sample (0 for a grid), also those that should be there and are not."""

    prompt_set_name: str
    entries: tuple[PromptEntry, ...]
    num_images: int
    files: Mapping[tuple[str, int], str]


def read_geneval(path: epath.Path) -> Found:
    """Pictures as GenEval's own scripts write them: `NUMBER/metadata.jsonl` and `NUMBER/samples/NUMBER.png`.

    Samples are counted from 0 or from 1; a number that only some prompts have is missing elsewhere.

    Raises:
        FileNotFoundError: There are no pictures.
        ValueError: Metadata are missing or of another form, or two folders or files have one number.
    """
    entries: dict[str, PromptEntry] = {}
    samples: dict[str, dict[int, str]] = {}
    numbered = [child for child in path.iterdir() if child.name.isdecimal() and child.is_dir()]
    for folder in sorted(numbered, key=lambda child: int(child.name)):
        index = int(folder.name)
        entry_id = f"{index:05d}"
        if entry_id in entries:
            raise ValueError(f"{path} has two folders of prompt {index}, of which one is {folder.name}: remove one")
        entries[entry_id] = PromptEntry(index, entry_id, *_metadata(folder))
        samples[entry_id] = {}
        for file in (folder / "samples").glob("*.png"):
            if file.stem.isdecimal() and samples[entry_id].setdefault(int(file.stem), file.name) != file.name:
                raise ValueError(f"{folder}/samples has two pictures {int(file.stem)}, of which one is {file.name}")
    names = {number: name for some in samples.values() for number, name in some.items()}
    if not names:
        raise FileNotFoundError(f"there are no pictures in {path}: expected NUMBER/samples/NUMBER.png")
    first, last = min(1, *names), max(names)
    digits = len(PurePosixPath(names[last]).stem)
    folders = {f"{int(folder.name):05d}": folder.name for folder in numbered}
    files = {
        (entry_id, number - first): f"{folders[entry_id]}/samples/{some.get(number, f'{number:0{digits}d}.png')}"
        for entry_id, some in samples.items()
        for number in range(first, last + 1)
    }
    name = "geneval_long" if is_long(entry.prompt for entry in entries.values()) else "geneval"
    return Found(name, tuple(entries.values()), last - first + 1, files)


def _metadata(folder: epath.Path) -> tuple[str, Mapping[str, object]]:
    """Prompt and row."""
    about = folder / METADATA
    try:
        row = json.loads(about.read_text())
    except FileNotFoundError as error:
        raise ValueError(f"{folder} has no {METADATA}: put GenEval's row of its prompt there") from error
    except ValueError as error:
        raise ValueError(f"{about}: not JSON ({error})") from error
    check_metadata(row, str(about))
    return next(row[key] for key in LONG_KEYS if isinstance(row.get(key), str)), row


def read_grids(path: epath.Path, num_images: int) -> Found:
    """Grids of so many pictures, `ITEM.png` right in the folder or in `images`; their prompts are unknown.

    Raises:
        FileNotFoundError: There are none.
        ValueError: Two files are of one item.
    """
    inside = "images/" if (path / "images").is_dir() else ""
    files: dict[tuple[str, int], str] = {}
    for name in sorted(file.name for file in (path / inside).iterdir()):
        if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith("."):
            item = name.split(".")[0]
            if files.setdefault((item, 0), inside + name) != inside + name:
                raise ValueError(f"{path / inside} has two pictures of item {item}, of which one is {name}: remove one")
    if not files:
        raise FileNotFoundError(f"there are no pictures in {path}: expected NUMBER/samples/NUMBER.png or ITEM.png")
    entries = tuple(PromptEntry(index, item, "") for index, (item, _) in enumerate(files))
    return Found("dpg", entries, num_images, files)
