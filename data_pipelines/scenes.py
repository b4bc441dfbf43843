"""Captioned scenes of coloured shapes, and a judge that reads a scene back from its pixels.

The demo's data set: one to three flat shapes on a plain light ground, each in one corner of the picture (a single
shape also in the centre), with a caption that fixes everything but a small jitter of place and size. A scene is a
function of ``(seed, index)`` alone. Some (colour, shape) pairs never occur in training scenes; asking for them tests
whether a model composes what it learned.

    scene = sample_scene(seed=0, index=7)    # scene.prompt == "a red circle at the top left and a …"
    image = render(scene)                    # uint8 [64, 64, 3]
    score(image, scene)                      # {"colour": True, "shape": True, "count": True, …}

The judge knows the palette and the shapes but nothing of how an image came about, so the same program scores
renderings, reconstructions and generated pictures. Numpy and Pillow only.
"""

import functools
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image

IMAGE_SIZE = 64
BACKGROUND = (244, 244, 240)
COLOURS = {
    "red": (214, 40, 40),
    "orange": (240, 126, 28),
    "yellow": (244, 206, 44),
    "green": (40, 158, 78),
    "cyan": (48, 196, 208),
    "blue": (44, 92, 214),
    "purple": (158, 64, 190),
    "black": (32, 32, 36),
}
SHAPES = ("circle", "square", "triangle", "cross")
# Name of a place -> its centre (row, column) in pixels.
CORNERS = {"top left": (16, 16), "top right": (16, 48), "bottom left": (48, 16), "bottom right": (48, 48)}
PLACES = CORNERS | {"centre": (32, 32)}
# Two of a kind stand side by side, along one edge.
EDGES = {
    "at the top": ("top left", "top right"),
    "at the bottom": ("bottom left", "bottom right"),
    "on the left": ("top left", "bottom left"),
    "on the right": ("top right", "bottom right"),
}
HELD_OUT = frozenset({("blue", "circle"), ("red", "square"), ("green", "triangle"), ("yellow", "cross")})
PAIRS = tuple(itertools.product(COLOURS, SHAPES))
KINDS = {"one": 0.4, "two": 0.3, "pair": 0.15, "trio": 0.15}
ASPECTS = ("colour", "shape", "count", "position", "all")

_SIZES = (20, 24)  # smallest and largest side of a shape, pixels
_JITTER = 2  # largest shift of a shape from its place, pixels, along each axis
_SUPERSAMPLING = 8
_MIN_AREA = 40  # pixels; smaller components are specks, not things
_MIN_CONTRAST = 80  # of 255; the largest channel difference from the ground that makes a pixel part of a thing
_MIN_OVERLAP = 0.7  # intersection over union with the best shape, below which the shape is none of ours


class Thing(NamedTuple):
    """One shape of a scene. As found by the judge, ``shape`` is "unknown" where it resembles none of ours."""

    colour: str
    shape: str
    place: str


class Box(NamedTuple):
    """The square a shape is drawn into, in pixels."""

    top: int
    left: int
    size: int


class Found(NamedTuple):
    """A thing in a picture, and the first and one past the last of its columns and rows."""

    thing: Thing
    x1: int
    y1: int
    x2: int
    y2: int


@dataclass(frozen=True)
class Scene:
    """What is asked for (``prompt``, ``things``) and one way of drawing it (``boxes``, one a thing)."""

    prompt: str
    things: tuple[Thing, ...]
    boxes: tuple[Box, ...]
    kind: str

    def to_record(self) -> dict[str, Any]:
        """The scene as plain JSON values; the inverse of `scene_from_record`."""
        things = [thing._asdict() | box._asdict() for thing, box in zip(self.things, self.boxes, strict=True)]
        return {"prompt": self.prompt, "kind": self.kind, "things": things}


def scene_from_record(record: dict[str, Any]) -> Scene:
    """The scene that a line of `write_scenes`'s JSONL file describes."""
    return Scene(
        prompt=record["prompt"],
        things=tuple(Thing(*(thing[name] for name in Thing._fields)) for thing in record["things"]),
        boxes=tuple(Box(*(thing[name] for name in Box._fields)) for thing in record["things"]),
        kind=record["kind"],
    )


# ---------------------------------------------------------------------------------------------------------------------
# Drawing
# ---------------------------------------------------------------------------------------------------------------------


def sample_scene(seed: int, index: int, *, held_out: bool = False, kind: str | None = None) -> Scene:
    """Draws scene ``index`` of the set ``seed``.

    Args:
      seed: names the set.
      index: place in the set; scenes of one set are independent of each other.
      held_out: whether every thing is one of the `HELD_OUT` pairs; otherwise none is.
      kind: "one", "two" (two different things), "pair" (two alike) or "trio" (three alike); None draws it by `KINDS`.
    """
    rng = np.random.default_rng((seed, index, int(held_out)))
    kind = kind or str(rng.choice(list(KINDS), p=list(KINDS.values())))
    pairs = [pair for pair in PAIRS if (pair in HELD_OUT) == held_out]
    picked = [pairs[i] for i in rng.choice(len(pairs), size=2, replace=False)]
    colour, shape = picked[0]
    places: tuple[str, ...]
    if kind == "one":
        places = (_pick(rng, PLACES),)
        core = f"{_a(colour)} {shape} {_at(places[0])}"
    elif kind == "two":
        places = tuple(str(place) for place in rng.permutation(list(CORNERS))[:2])
        core = " and ".join(f"{_a(c)} {s} {_at(place)}" for (c, s), place in zip(picked, places, strict=True))
    elif kind == "pair":
        edge = _pick(rng, EDGES)
        places = EDGES[edge]
        core = f"two {colour} {_plural(shape)} {edge}"
    elif kind == "trio":
        empty = _pick(rng, CORNERS)
        places = tuple(place for place in CORNERS if place != empty)
        core = f"three {colour} {_plural(shape)} with none {_at(empty)}"
    else:
        raise ValueError(f"scenes: unknown kind {kind!r}; expected one of {sorted(KINDS)}")
    kinds_of_things = picked if kind == "two" else [picked[0]] * len(places)
    things = tuple(Thing(c, s, place) for (c, s), place in zip(kinds_of_things, places, strict=True))
    opening = str(rng.choice(["", "a picture of ", "a drawing of "]))
    return Scene(opening + core, things, tuple(_box(rng, thing.place) for thing in things), kind)


def _pick(rng: np.random.Generator, names: Iterable[str]) -> str:
    names = list(names)
    return names[int(rng.integers(len(names)))]


def _a(word: str) -> str:
    return ("an " if word[0] in "aeiou" else "a ") + word


def _at(place: str) -> str:
    return "in the centre" if place == "centre" else f"at the {place}"


def _plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


def _box(rng: np.random.Generator, place: str) -> Box:
    size = int(rng.integers(_SIZES[0], _SIZES[1] + 1))
    row, column = np.array(PLACES[place]) - size // 2 + rng.integers(-_JITTER, _JITTER + 1, size=2)
    return Box(int(row), int(column), size)


def _inside(shape: str, y: Float[np.ndarray, "h 1"], x: Float[np.ndarray, "1 w"]) -> Bool[np.ndarray, "h w"]:
    """Which points of the unit square belong to a shape that fills it; y runs downwards."""
    if shape == "circle":
        return (y - 0.5) ** 2 + (x - 0.5) ** 2 < 0.25
    if shape == "square":
        return (np.abs(y - 0.5) < 0.5) & (np.abs(x - 0.5) < 0.5)
    if shape == "triangle":
        return (np.abs(x - 0.5) < y / 2) & (y < 1)
    return (np.abs(y - 0.5) < 1 / 6) | (np.abs(x - 0.5) < 1 / 6)  # cross: arms a third of the side wide


def _unit_mask(shape: str, size: int) -> Bool[np.ndarray, "size size"]:
    points = (np.arange(size) + 0.5) / size
    return np.broadcast_to(_inside(shape, points[:, None], points[None, :]), (size, size))


@functools.cache
def _coverage(shape: str, size: int) -> Float[np.ndarray, "size size 1"]:
    """The share of each pixel that the shape covers, by supersampling."""
    fine = _unit_mask(shape, size * _SUPERSAMPLING)
    return fine.reshape(size, _SUPERSAMPLING, size, _SUPERSAMPLING).mean((1, 3))[:, :, None]


def render(scene: Scene) -> UInt8[np.ndarray, "64 64 3"]:
    """The picture of a scene."""
    image = np.full((IMAGE_SIZE, IMAGE_SIZE, 3), BACKGROUND, np.float64)
    for thing, (top, left, size) in zip(scene.things, scene.boxes, strict=True):
        covered = _coverage(thing.shape, size)
        region = image[top : top + size, left : left + size]
        region += covered * (np.array(COLOURS[thing.colour]) - region)
    return np.round(image).astype(np.uint8)


def write_scenes(folder: str | Path, num: int, seed: int, held_out: bool = False) -> Path:
    """Writes ``num`` scenes as PNG files and one JSONL file with a line for each; returns the JSONL file's path.

    A line holds what the trainer reads, ``{"path": …, "prompt": …}`` (the path relative to the JSONL file), and the
    description of the scene, which the trainer ignores and `scene_from_record` reads back.
    """
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for index in range(num):
        scene = sample_scene(seed, index, held_out=held_out)
        name = f"images/{index:06d}.png"
        Image.fromarray(render(scene)).save(folder / name, compress_level=1)
        lines.append(json.dumps({"path": name} | scene.to_record()))
    records = folder / "records.jsonl"
    records.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return records


def geneval_rows(scene: Scene) -> list[dict[str, Any]]:
    """What GenEval's tasks ask of the picture of a scene, in the form of its metadata: a row a task, shapes as classes.

    One thing: `single_object` and `colors`. Two or three alike: `counting`. Two of different shapes: `two_object` and
    `color_attr`, and `position` where they stand beside or above one another; of things on a diagonal GenEval's margin
    between one relation and two is narrower than their jitter. Two of one shape are no subject of GenEval.
    """
    shapes = [thing.shape for thing in scene.things]
    plain = [{"class": shape, "count": 1} for shape in shapes]
    coloured = [clause | {"color": thing.colour} for clause, thing in zip(plain, scene.things, strict=True)]
    rows: dict[str, dict[str, Any]] = {}
    if scene.kind == "one":
        rows = {"single_object": {"include": plain}, "colors": {"include": coloured}}
    elif scene.kind in ("pair", "trio"):
        (shape,) = set(shapes)
        more = [{"class": shape, "count": len(shapes) + 1}]
        rows = {"counting": {"include": [{"class": shape, "count": len(shapes)}], "exclude": more}}
    elif len(set(shapes)) == 2:
        rows = {"two_object": {"include": plain}, "color_attr": {"include": coloured}}
        (y1, x1), (y2, x2) = (PLACES[thing.place] for thing in scene.things)
        if x1 == x2 or y1 == y2:
            across, down = "right of" if x2 > x1 else "left of", "below" if y2 > y1 else "above"
            relation = across if y1 == y2 else down  # of the second to the first
            rows["position"] = {"include": [plain[0], plain[1] | {"position": [relation, 0]}]}
    return [{"tag": tag, **row, "prompt": scene.prompt} for tag, row in rows.items()]


def dpg_rows(scene: Scene) -> list[tuple[str, str, str]]:
    """What DPG-Bench would ask of the picture of a scene: dependency, tuple and question of each row of its table.

    Of each of one or two things whether it is there and, below that, its colour; below both colours, where the two
    stand to one another. Things alike are asked about together, and counted. Nothing is asked about two different
    things of one shape, because questions call things by their shapes.
    """
    alike = scene.kind in ("pair", "trio")
    things = scene.things[:1] if alike else scene.things
    if len({thing.shape for thing in things}) < len(things):
        return []
    rows, every = [], "every " if alike else ""
    for colour, shape, _ in things:
        rows.append(("0", f"entity - whole ({shape})", f"Is there a {shape}?"))
        meaning = f"attribute - color ({every}{shape}, {colour})"
        rows.append((str(len(rows)), meaning, f"Is {every or 'the '}{shape} {colour}?"))
    if alike:
        count = len(scene.things)
        rows.append(("1", f"other - count (things, =={count})", f"Are there exactly {count} things?"))
    elif len(things) == 2:
        one, other = sorted(things, key=lambda thing: PLACES[thing.place])  # the upper one first, or else the left one
        side = "left of" if PLACES[one.place][0] == PLACES[other.place][0] else "above"
        meaning = f"relation - spatial ({one.shape}, {side}, {other.shape})"
        rows.append(("2, 4", meaning, f"Is the {one.shape} {side} the {other.shape}?"))
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Judging
# ---------------------------------------------------------------------------------------------------------------------


def find_things(image: UInt8[np.ndarray, "h w 3"]) -> list[Thing]:
    """The things in a picture, from its pixels alone; see `detect`."""
    return [found.thing for found in detect(image)]


def detect(image: UInt8[np.ndarray, "h w 3"]) -> list[Found]:
    """The things in a picture and where they are, from its pixels alone.

    A thing is a connected component (4 neighbours) of pixels that differ from the ground. Its colour is the palette
    entry nearest to its median pixel, its shape the one with the largest intersection over union when stretched to
    its bounding box, its place the one nearest to the centre of that box.
    """
    pixels = np.asarray(image, np.float64)
    labels = _components(np.abs(pixels - BACKGROUND).max(-1) > _MIN_CONTRAST)
    detections = []
    for label in np.unique(labels[labels > 0]):
        mask = labels == label
        if mask.sum() < _MIN_AREA:
            continue
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        (top, bottom), (left, right) = rows[[0, -1]], columns[[0, -1]]
        centre = (top + bottom + 1) / 2, (left + right + 1) / 2
        colour = _nearest(COLOURS, np.median(pixels[mask], axis=0))
        place = _nearest(PLACES, np.array(centre))
        thing = Thing(colour, _shape_of(mask[top : bottom + 1, left : right + 1]), place)
        detections.append(Found(thing, int(left), int(top), int(right) + 1, int(bottom) + 1))
    return detections


def _nearest(table: Mapping[str, tuple[int, ...]], value: Float[np.ndarray, " d"]) -> str:
    return min(table, key=lambda name: float(np.sum((np.array(table[name]) - value) ** 2)))


def _components(mask: Bool[np.ndarray, "h w"]) -> np.ndarray:
    """Labels each connected component of a mask with a number of its own; 0 outside.

    Every pixel starts with its own number and takes the largest one along its row run, then its column run, until
    nothing changes.
    """
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        before = labels
        for axis in (0, 1):
            for order in (1, -1):
                labels = _sweep(labels, mask, axis, order)
        if np.array_equal(before, labels):
            return labels


def _sweep(labels: np.ndarray, mask: Bool[np.ndarray, "h w"], axis: int, order: int) -> np.ndarray:
    labels, mask = (np.moveaxis(array, axis, 0)[::order] for array in (labels, mask))
    swept = labels.copy()
    for i in range(1, len(swept)):
        swept[i] = np.where(mask[i], np.maximum(swept[i], swept[i - 1]), 0)
    return np.moveaxis(swept[::order], 0, axis)


def _shape_of(mask: Bool[np.ndarray, "h w"]) -> str:
    overlaps = {}
    for shape in SHAPES:
        y, x = ((np.arange(side) + 0.5) / side for side in mask.shape)
        ideal = np.broadcast_to(_inside(shape, y[:, None], x[None, :]), mask.shape)
        overlaps[shape] = (mask & ideal).sum() / (mask | ideal).sum()
    best = max(overlaps, key=lambda shape: overlaps[shape])
    return best if overlaps[best] >= _MIN_OVERLAP else "unknown"


def compare(found: Sequence[Thing], wanted: Sequence[Thing]) -> dict[str, bool]:
    """Which aspects of the things found agree with those wanted.

    colour, shape, position: the same set of colours, shapes, places occurs. count: equally many things.
    all: the very same things, each with its own colour and shape at its own place, and no others.
    """

    def same(aspect: str) -> bool:
        return {getattr(thing, aspect) for thing in found} == {getattr(thing, aspect) for thing in wanted}

    return {
        "colour": same("colour"),
        "shape": same("shape"),
        "count": len(found) == len(wanted),
        "position": same("place"),
        "all": sorted(found) == sorted(wanted),
    }


def score(image: UInt8[np.ndarray, "h w 3"], scene: Scene) -> dict[str, bool]:
    """Which of `ASPECTS` a picture shows as the scene asks; see `compare`."""
    return compare(find_things(image), scene.things)


def agreement(found: Sequence[Sequence[Thing]], scenes: Sequence[Scene]) -> dict[str, float]:
    """The share of pictures, each given as the things found in it, that agree with their scene, by aspect."""
    scores = [compare(things, scene.things) for things, scene in zip(found, scenes, strict=True)]
    return {aspect: float(np.mean([score[aspect] for score in scores])) for aspect in ASPECTS}


def chance_levels(scenes: Sequence[Scene]) -> dict[str, float]:
    """The agreement a model reaches that draws perfect pictures but ignores their captions, by aspect.

    Every scene's things are scored against the caption of every other scene of the list, and the mean is taken.
    """
    shifts = range(1, len(scenes))
    found = [scene.things for scene in scenes]
    levels = [agreement(found[shift:] + found[:shift], scenes) for shift in shifts]
    return {aspect: float(np.mean([level[aspect] for level in levels])) for aspect in ASPECTS}
