"""GenEval's results: verdicts in the official evaluator's form, the table, and the page with boxes and reasons."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from svg_jax.evaluate.geneval.rules import Detection, Objects, Verdict, judged, totals
from svg_jax.evaluate.prompt_sets import TASKS
from svg_jax.evaluate.published import GENEVAL
from svg_jax.evaluate.scores import Box, Card, Report, Score, write_report

OFFICIAL = dict(zip(TASKS, (80, 99, 80, 94, 100, 100), strict=True))  # prompts a task
OFFICIAL_IMAGES = 4  # a prompt


class Scored(NamedTuple):
    """A picture and what is made of it.

    Attributes:
        filename: Its name, of no other picture of the set.
        prompt: What was drawn, which may say more than the prompt in the metadata.
        metadata: What was asked.
        objects: What counts of the detections, with the colours that were asked for.
        verdict: Of the rules.
        thumbnail: A JPEG.
        size: (width, height) in pixels as it was judged.
    """

    filename: str
    prompt: str
    metadata: Mapping[str, Any]
    objects: Objects
    verdict: Verdict
    thumbnail: bytes
    size: tuple[int, int]


def write(
    folder: epath.Path,
    title: str,
    settings: Mapping[str, Any],
    scored: Callable[[], Iterable[Scored]],
    *,
    published: bool = True,
    warnings: Sequence[str] = (),
) -> tuple[list[Score], str]:
    """Writes the report; returns the scores, and the table with the page's address.

    Args:
        folder: For `results.json`, `images.jsonl`, `results.md` and `index.html`.
        title: Of the table and the page.
        settings: Everything that the scores depend on.
        scored: Gives the pictures in their order; called several times, so that none need be kept.
        published: Whether scores of others stand below.
        warnings: Sentences without a full stop.
    """
    scores = totals((one.metadata, one.verdict.correct) for one in scored())
    report = Report(
        title,
        settings,
        scores,
        GENEVAL if published else None,
        warnings,
        (row(one) for one in scored()),
        (card(one) for one in scored()),
    )
    return scores, write_report(folder, report)


def row(scored: Scored) -> dict[str, Any]:
    """The line of `images.jsonl`, under the keys of the official evaluator: its summary scripts read the file."""
    details = {
        name: [[*map(float, detection.box), float(detection.score)] for detection in found]
        for name, found in scored.objects.items()
    }
    colors = {
        name: [detection.color for detection in found if detection.color] for name, found in scored.objects.items()
    }
    return {
        "filename": scored.filename,
        "tag": scored.metadata["tag"],
        "prompt": scored.metadata["prompt"],
        "correct": scored.verdict.correct,
        "reason": scored.verdict.reason,
        "metadata": json.dumps(scored.metadata),
        "details": json.dumps(details),
        "colors": {name: some for name, some in colors.items() if some},
    }


def card(scored: Scored) -> Card:
    """The picture of the page, with a box around whatever was found."""
    counts = judged(scored.objects, scored.metadata)
    boxes = [
        _box(name, detection, is_judged=place < counts.get(name, 0))
        for name, found in scored.objects.items()
        for place, detection in enumerate(found)
    ]
    metadata, verdict = scored.metadata, scored.verdict
    return Card(
        name=scored.filename,
        prompt=scored.prompt,
        task=metadata["tag"],
        passed=verdict.correct,
        reason=verdict.reason,
        picture=scored.thumbnail,
        size=scored.size,
        boxes=boxes,
    )


def _box(name: str, detection: Detection, *, is_judged: bool) -> Box:
    x1, y1, x2, y2 = map(float, detection.box)
    return Box(x1, y1, x2, y2, name, detection.color or None, float(detection.score), is_judged)


def unlike_official(metadata: Sequence[Mapping[str, Any]], num_images: int) -> list[str]:
    """What of a set of prompts, and of the images for each, is not as in GenEval."""
    found = []
    tasks = [one["tag"] for one in metadata]
    counts = {task: tasks.count(task) for task in TASKS}
    if missing := [task for task in TASKS if not counts[task]]:
        found.append(f"there are no prompts of {', '.join(missing)}: overall is the mean of the other tasks")
    if counts != OFFICIAL:
        found.append(
            f"GenEval has {sum(OFFICIAL.values())} prompts and this set {len(metadata)}: the scores are of another set"
        )
    if num_images != OFFICIAL_IMAGES:
        found.append(
            f"GenEval has {OFFICIAL_IMAGES} images a prompt and this set {num_images}, on which prompt_accuracy depends"
        )
    return found
