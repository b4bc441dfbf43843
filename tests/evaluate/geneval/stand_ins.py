"""What stands in the place of GenEval's networks: a detector and a CLIP that know two colours, and images for them."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from svg_jax.evaluate.__main__ import main
from svg_jax.evaluate.geneval import parts
from svg_jax.evaluate.geneval.clip import VIT_L_14
from svg_jax.evaluate.geneval.colors import ColorClassifier
from svg_jax.evaluate.geneval.detector import Found
from svg_jax.evaluate.geneval.parts import Networks
from svg_jax.evaluate.prompt_sets import COLORS

PAINT = {"cat": (220, 0, 0), "dog": (0, 0, 220)}  # what the stand-in finds, cats red and dogs blue
CAT, DOG = (4, 4, 24, 24), (40, 4, 60, 24)
ROWS: list[dict[str, Any]] = [
    {"tag": "single_object", "include": [{"class": "cat", "count": 1}], "prompt": "a photo of a cat"},
    {"tag": "two_object", "include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1}], "prompt": "both"},
    {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "blue"}], "prompt": "a blue dog"},
    {"tag": "colors", "include": [{"class": "cat", "count": 1, "color": "blue"}], "prompt": "a blue cat"},
    {
        "tag": "position",
        "include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["right of", 0]}],
        "prompt": "a cat right of a dog",
    },
]
DRAWN = [  # of each prompt two images
    [{"cat": CAT}, {"dog": DOG}],
    [{"cat": CAT, "dog": DOG}] * 2,
    [{"dog": DOG}, {"dog": CAT}],
    [{"cat": CAT}, {"cat": DOG}],
    [{"cat": CAT, "dog": DOG}, {"cat": DOG, "dog": CAT}],
]
CORRECT = [True, False, True, True, True, True, False, False, False, True]


def paint(things: Mapping[str, Sequence[int]]) -> Image.Image:
    image = Image.new("RGB", (64, 32), (240, 240, 240))
    for name, (left, top, right, bottom) in things.items():
        ImageDraw.Draw(image).rectangle((left, top, right - 1, bottom - 1), PAINT[name])
    return image


def find(images: Sequence[Image.Image], min_score: float) -> list[dict[str, list[Found]]]:
    """What the detector answers."""
    answers = []
    for image in images:
        masks = {name: (np.asarray(image) == color).all(axis=-1) for name, color in PAINT.items()}
        answers.append(
            {name: [Found(box_of(mask), np.float32(0.95), mask)] for name, mask in masks.items() if mask.any()}
        )
    return answers


def box_of(mask: np.ndarray) -> np.ndarray:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float32)


def embed_texts(texts: Sequence[str]) -> np.ndarray:
    return np.array([[f" {color} " in text or f"{color}-" in text for color in COLORS] for text in texts], np.float32)


def embed_images(images: Sequence[Image.Image]) -> np.ndarray:
    """Red or blue, by the mean pixel."""
    found = np.zeros((len(images), len(COLORS)), np.float32)
    for row, image in zip(found, images, strict=True):
        red, _, blue = np.asarray(image, np.float32).reshape(-1, 3).mean(axis=0)
        row[COLORS.index("red")], row[COLORS.index("blue")] = red, blue
    return found


def write_images(folder: Path, rows: Sequence[Mapping[str, Any]], drawn: Sequence[Sequence[Mapping[str, Any]]]) -> None:
    """As the official program lays them out."""
    for i, (row, images) in enumerate(zip(rows, drawn, strict=True)):
        (folder / f"{i:05d}" / "samples").mkdir(parents=True)
        (folder / f"{i:05d}" / "metadata.jsonl").write_text(json.dumps(row))
        for j, things in enumerate(images):
            paint(things).save(folder / f"{i:05d}" / "samples" / f"{j:04d}.png")


def write_folder(tmp_path: Path) -> Path:
    """Images, and folders that pass for the networks until they are loaded."""
    write_images(tmp_path / "images", ROWS, DRAWN)
    for name in ("detector", "clip"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text(name)
    (tmp_path / "detector" / "config.json").write_text(json.dumps({"model_type": "mask2former"}))
    clip = {"model_type": "clip", "vision_config": {**VIT_L_14, "hidden_act": "quick_gelu"}}
    (tmp_path / "clip" / "config.json").write_text(json.dumps(clip))
    return tmp_path


def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Puts the stand-in in the networks' place; the number of images that it sees at a time."""
    sizes: list[int] = []

    def count(images: Sequence[Image.Image], min_score: float) -> list[dict[str, list[Found]]]:
        sizes.append(len(images))
        return find(images, min_score)

    networks = Networks(count, ColorClassifier(embed_texts, embed_images), "here")
    monkeypatch.setattr(parts, "load", functools.cache(lambda *_: networks))
    return sizes


def score(folder: Path, out: str = "out", *flags: str) -> None:
    paths = {name: folder / name for name in ("images", "detector", "clip")}
    flags = ("--num-workers=1", *flags)  # the last of a kind counts
    main(["geneval", *(f"--{name}={path}" for name, path in paths.items()), f"--out={folder / out}", *flags])


def results(folder: Path, out: str = "out") -> dict[str, Any]:
    return json.loads((folder / out / "results.json").read_text())


def lines(folder: Path, out: str = "out") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / out / "images.jsonl").read_text().splitlines()]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
