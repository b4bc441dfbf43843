"""The demo's own GenEval: its scenes under the same rules, with what their renderer's colours tell for a detector."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from etils import epath
from jaxtyping import UInt8
from PIL import Image

from data_pipelines import scenes
from svg_jax.evaluate.geneval.report import Scored, write
from svg_jax.evaluate.geneval.rules import Detection, Options, judge, kept
from svg_jax.evaluate.scores import Score, thumbnail

SIDE = 256  # pixels of a picture on the page, where the scenes themselves would be small
Picture = UInt8[np.ndarray, "h w 3"]


def write_scene_report(folder: epath.Path, pictures: Sequence[Picture], asked: Sequence[scenes.Scene]) -> list[Score]:
    """Judges each picture in all tasks that its scene has something for; writes the report, returns its scores.

    Args:
        folder: For the report; made if it is not there.
        pictures: Drawn for the prompts of the scenes.
        asked: The scenes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    judged = list(score_scenes(pictures, asked))
    settings = {"prompts": "scenes of the demo", "num_images": len(pictures), "detector": "the colours of the pixels"}
    warnings = ["classes are shapes, and detections come from colours: no numbers to compare with those of GenEval"]
    scores, _ = write(
        folder, "GenEval of the demo's scenes", settings, lambda: judged, published=False, warnings=warnings
    )
    return scores


def score_scenes(pictures: Sequence[Picture], asked: Sequence[scenes.Scene]) -> Iterator[Scored]:
    """The verdicts, task by task."""
    options = Options()
    for i, (picture, scene) in enumerate(zip(pictures, asked, strict=True)):
        image = Image.fromarray(picture)
        shown = thumbnail(image.resize((SIDE, SIDE), Image.Resampling.NEAREST))
        detections: dict[str, list[Detection]] = {}
        for found in scenes.detect(picture):
            box = np.array([found.x1, found.y1, found.x2, found.y2], np.float32)
            detections.setdefault(found.thing.shape, []).append(Detection(box, 1.0, found.thing.colour))
        for row in scenes.geneval_rows(scene):
            objects = kept(detections, row["tag"], options)
            verdict = judge(objects, row, options)
            yield Scored(f"{i:05d}_{row['tag']}", scene.prompt, row, objects, verdict, shown, image.size)
