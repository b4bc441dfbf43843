"""When a picture counts as correct in GenEval (arXiv 2310.11513), given what a detector found in it.

As the official evaluator decides, in float32: nothing here reads a picture or needs a network.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from svg_jax.evaluate.prompt_sets import COLORS, TASKS
from svg_jax.evaluate.scores import Score

# What GenEval calls the classes of COCO, in the order of a detector's outputs; COCO itself, and the labels inside
# checkpoints, say mouse, remote and keyboard, and some of them sofa or tvmonitor.
# fmt: off
CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "computer mouse", "tv remote", "computer keyboard", "cell phone", "microwave", "oven", "toaster",
    "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)
# fmt: on
DRAWS = 1000  # of the bootstrap


@dataclasses.dataclass(frozen=True)
class Options:
    """Those of the official evaluator, with its defaults.

    Attributes:
        threshold: Detections count whose score is above it.
        counting_threshold: The same, in the task `counting`.
        max_objects: Of one class; the best are taken.
        max_overlap: Objects of one class that overlap a better one by this much or more are dropped; 1 keeps all.
        position_threshold: Share of both objects' sizes by which their centres may differ without a relation.
        background: What surrounds an object where its colour is judged: a colour as Pillow names it, or `original`.
        crop: Whether its colour is judged in its box alone, rather than in the whole picture.
    """

    threshold: float = 0.3
    counting_threshold: float = 0.9
    max_objects: int = 16
    max_overlap: float = 1.0
    position_threshold: float = 0.1
    background: str = "#999"
    crop: bool = True


@dataclasses.dataclass(frozen=True, eq=False)
class Detection:
    """One object.

    Attributes:
        box: x1, y1, x2, y2 in pixels; x2 and y2 are one more than those of the last pixel.
        score: Of the detector, in [0, 1].
        color: One of `COLORS`; "" where no clause asked.
        mask: Its pixels.
    """

    box: Float[np.ndarray, "4"]
    score: float
    color: str = ""
    mask: Bool[np.ndarray, "h w"] | None = None


Objects = Mapping[str, Sequence[Detection]]  # by class


class Verdict(NamedTuple):
    """Whether all clauses hold; why not, a line for each that does not."""

    correct: bool
    reason: str


def kept(detections: Objects, tag: str, options: Options) -> dict[str, list[Detection]]:
    """What counts of the detections of a picture for a task, by class and best first; no class is empty.

    Of equal scores the one that the detector gave first comes first.
    """
    threshold = np.float32(options.counting_threshold if tag == "counting" else options.threshold)
    objects = {}
    for name, found in detections.items():
        scores = np.array([detection.score for detection in found], np.float32)
        order = np.argsort(-scores, kind="stable")
        best = [found[i] for i in order[scores[order] > threshold][: options.max_objects]]
        if best:
            objects[name] = best if options.max_overlap == 1 else _apart(best, options.max_overlap)
    return objects


def _apart(best_first: Sequence[Detection], max_overlap: float) -> list[Detection]:
    chosen: list[Detection] = []
    for detection in best_first:
        if all(overlap(better.box, detection.box) < np.float32(max_overlap) for better in chosen):
            chosen.append(detection)
    return chosen


def overlap(a: Float[np.ndarray, "4"], b: Float[np.ndarray, "4"]) -> np.float32:
    """Intersection over union of boxes whose last pixels are counted in: a side is x2 - x1 + 1."""
    first, last = np.maximum(a[:2], b[:2]), np.minimum(a[2:], b[2:])
    intersection = _area(first, last)
    union = _area(a[:2], a[2:]) + _area(b[:2], b[2:]) - intersection
    return np.float32(intersection / union if union else 0)


def _area(first: Float[np.ndarray, "2"], last: Float[np.ndarray, "2"]) -> np.float32:
    width, height = np.maximum(last - first + np.float32(1), np.float32(0))
    return width * height


def relations(a: Float[np.ndarray, "4"], b: Float[np.ndarray, "4"], threshold: float) -> set[str]:
    """Where `a` is as seen from `b`: none, one or, on a diagonal, two of left of, right of, above, below.

    With the offset o of their centres and their sizes s, the offset counts as far as it leaves a dead zone,
    r = sign(o) max(|o| - threshold (s_a + s_b), 0) per axis, and a relation holds where r / |o| is beyond a half.
    """
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    offset = (a[:2] + a[2:]) / np.float32(2) - (b[:2] + b[2:]) / np.float32(2)
    sizes = np.abs(a[2:] - a[:2]) + np.abs(b[2:] - b[:2])
    beyond = np.maximum(np.abs(offset) - np.float32(threshold) * sizes, np.float32(0)) * np.sign(offset)
    if np.all(np.abs(beyond) < np.float32(1e-3)):
        return set()
    x, y = beyond / np.linalg.norm(offset)
    holds = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name, value in holds.items() if value}


def judged(objects: Objects, metadata: Mapping[str, Any], *, color: bool = False) -> dict[str, int]:
    """How many of the best objects of each class the clauses look at; with `color`, those whose colour is asked for.

    An include clause that has too few objects asks for no colours.
    """
    counts: dict[str, int] = {}
    for clause in metadata.get("include", ()):
        name, count, found = clause["class"], clause["count"], len(objects.get(clause["class"], ()))
        if not color or ("color" in clause and found >= count):
            counts[name] = max(counts.get(name, 0), min(count, found))
    for clause in metadata.get("exclude", ()) if not color else ():
        counts[clause["class"]] = len(objects.get(clause["class"], ()))
    return counts


def judge(objects: Objects, metadata: Mapping[str, Any], options: Options) -> Verdict:
    """Judges a picture.

    Args:
        objects: What `kept` gave, with the colours that `judged(..., color=True)` names.
        metadata: `include` clauses, all of which must hold, and `exclude` clauses, none of which may; a clause has a
            `class`, a `count`, and maybe a `color` and a `position`: a relation, and the number of the include clause
            whose objects it is to.
        options: Of `position_threshold` only.
    """
    reasons = []
    groups: list[Sequence[Detection] | None] = []  # the objects of each include clause so far, None where it failed
    for clause in metadata.get("include", ()):
        found = objects.get(clause["class"], ())[: clause["count"]]
        failure = _failure(clause, found, groups, options)
        reasons += [failure] if failure else []
        groups.append(None if failure else found)
    for clause in metadata.get("exclude", ()):
        name, count, number = clause["class"], clause["count"], len(objects.get(clause["class"], ()))
        if number >= count:
            reasons.append(f"expected {name}<{count}, found {number}")
    return Verdict(not reasons, "\n".join(reasons))


def _failure(
    clause: Mapping[str, Any],
    found: Sequence[Detection],
    groups: Sequence[Sequence[Detection] | None],
    options: Options,
) -> str:
    """Why an include clause fails, in the words of the official evaluator; "" where it holds."""
    name, count = clause["class"], clause["count"]
    if len(found) < count:
        return f"expected {name}>={count}, found {len(found)}"
    if "color" in clause:
        wanted, colors = clause["color"], Counter(detection.color for detection in found)
        if colors[wanted] < count:
            names = [*COLORS, *sorted(set(colors) - set(COLORS))]
            listed = ", ".join(f"{colors[color]} {color}" for color in names if colors[color])
            return f"expected {wanted} {name}>={count}, found {colors[wanted]} {wanted}; and {listed}"
    if "position" in clause:
        relation, target = clause["position"]
        others = groups[target]
        if others is None:
            return f"no target for {name} to be {relation}"
        for one in found:
            for other in others:
                held = relations(one.box, other.box, options.position_threshold)
                if relation not in held:
                    return f"expected {name} {relation} target, found {' and '.join(sorted(held))} target"
    return ""


def totals(verdicts: Iterable[tuple[Mapping[str, Any], bool]], *, seed: int = 0) -> list[Score]:
    """The scores of a set: (metadata, correct) of each picture, in any order.

    Per task the mean over its pictures; `overall`, the unweighted mean of the tasks; `image_accuracy`, the mean over
    all pictures; `prompt_accuracy`, the share of prompts of which any picture is correct, where prompts of equal
    metadata are one. Intervals hold the middle 95% of `DRAWS` bootstrap draws of the prompts within each task.
    """
    prompts: dict[str, dict[str, list[bool]]] = {}  # by task
    for metadata, correct in verdicts:
        same = prompts.setdefault(metadata["tag"], {})
        same.setdefault(json.dumps(metadata, sort_keys=True), []).append(correct)
    tasks = sorted(prompts, key=lambda task: (TASKS.index(task) if task in TASKS else len(TASKS), task))
    counts = [np.array([(sum(some), len(some)) for _, some in sorted(prompts[task].items())]) for task in tasks]

    generator = np.random.default_rng(seed)
    points = _means(tasks, [count[None] for count in counts])
    draws = _means(tasks, [count[generator.integers(len(count), size=(DRAWS, len(count)))] for count in counts])
    images, number = sum(int(count[:, 1].sum()) for count in counts), sum(map(len, counts))
    sizes = {task: int(count[:, 1].sum()) for task, count in zip(tasks, counts, strict=True)}
    sizes |= {"overall": images, "image_accuracy": images, "prompt_accuracy": number}
    found = []
    for name, (value,) in points.items():
        low, high = np.quantile(draws[name], [0.025, 0.975])
        found.append(Score(name, float(value), float(low), float(high), sizes[name]))
    return found


def _means(tasks: Sequence[str], counts: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Of [draws, prompts, 2] numbers of correct and of all pictures a task: each score, [draws]."""
    sums = [count.sum(axis=1) for count in counts]
    means = {task: correct / number for task, (correct, number) in zip(tasks, (s.T for s in sums), strict=True)}
    correct, number = np.sum(sums, axis=0).T
    any_correct = np.sum([(count[..., 0] > 0).sum(axis=1) for count in counts], axis=0)
    means["overall"] = np.mean(list(means.values()), axis=0)
    means["image_accuracy"] = correct / number
    means["prompt_accuracy"] = any_correct / sum(count.shape[1] for count in counts)
    return means
