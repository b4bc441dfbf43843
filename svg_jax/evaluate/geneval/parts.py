"""What networks see in the images of a prompt of GenEval, as a part of its results, and the verdicts on that."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import io
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from PIL import Image, ImageOps

from svg_jax.evaluate.generated import Generated
from svg_jax.evaluate.geneval import clip, detector
from svg_jax.evaluate.geneval.colors import ColorClassifier, cut_out
from svg_jax.evaluate.geneval.report import Scored
from svg_jax.evaluate.geneval.rules import Detection, Objects, Options, judge, judged, kept
from svg_jax.evaluate.prompt_sets import COLORS
from svg_jax.evaluate.results import Part, Results
from svg_jax.evaluate.scores import thumbnail


class Task(NamedTuple):
    """A prompt to look at: its place, what it asks for, what was drawn, and its images: names and files."""

    number: int
    metadata: Mapping[str, Any]
    prompt: str
    names: tuple[str, ...]
    files: tuple[str, ...]


def task_of(generated: Generated, number: int) -> Task:
    """One prompt of those that were drawn."""
    entry = generated.entries[number]
    files = [generated.path(entry, sample) for sample in range(generated.num_images)]
    names = tuple(file.relative_to(generated.folder).as_posix() for file in files)
    return Task(number, entry.metadata, entry.prompt, names, tuple(map(str, files)))


class Job(NamedTuple):
    """What a worker is told, beside its task."""

    results: Results
    detector: str
    clip: str
    device: str
    rules: Options
    batch_size: int


class Networks(NamedTuple):
    """What looks at the images, and what that runs on: versions of libraries, and the kind of device."""

    detector: Callable[..., list[dict[str, list[detector.Found]]]]
    colors: ColorClassifier
    runs_on: str


@functools.cache
def load(detector_path: str, clip_path: str, device: str) -> Networks:
    """The networks, once a process."""
    loaded = clip.Clip.load(clip_path, device=device)
    libraries = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers"))
    return Networks(
        detector.Detector.load(detector_path, device=device),
        ColorClassifier(loaded.embed_texts, loaded.embed_images),
        f"{libraries}, {device.partition(':')[0]}",
    )


def look(job: Job, task: Task) -> None:
    """Saves the part of one prompt."""
    networks = load(job.detector, job.clip, job.device)
    job.results.save(task.number, part_of(networks, task, job.rules, job.batch_size))


def part_of(networks: Networks, task: Task, rules: Options, batch_size: int) -> Part:
    """What counts of the detections in the images of a prompt, all of them in a row, and what else a report needs."""
    tag = task.metadata["tag"]
    min_score = rules.counting_threshold if tag == "counting" else rules.threshold
    contents = [epath.Path(file).read_bytes() for file in task.files]
    pictures = [picture(content, file) for content, file in zip(contents, task.files, strict=True)]
    found: list[dict[str, Any]] = []
    for first in range(0, len(pictures), batch_size):
        found += networks.detector(pictures[first : first + batch_size], min_score=min_score)
    rows: dict[str, list[Any]] = {"image": [], "class": [], "box": [], "score": [], "asked": [], "logits": []}
    for i, (image, classes) in enumerate(zip(pictures, found, strict=True)):
        detections = {
            name: [Detection(one.box, float(one.score), mask=one.mask) for one in some]
            for name, some in classes.items()
        }
        objects = kept(detections, tag, rules)
        asked = judged(objects, task.metadata, color=True)
        for name, some in objects.items():
            logits = np.zeros((len(some), len(COLORS)), np.float32)
            if best := some[: asked.get(name, 0)]:
                logits[: len(best)] = networks.colors([cut_out(image, one, rules) for one in best], name)
            rows["image"] += [i] * len(some)
            rows["class"] += [name] * len(some)
            rows["box"] += [one.box for one in some]
            rows["score"] += [one.score for one in some]
            rows["asked"] += [place < len(best) for place in range(len(some))]
            rows["logits"] += list(logits)
    count = len(rows["image"])
    return {
        "metadata": np.array(json.dumps(task.metadata)),
        "prompt": np.array(task.prompt),
        "runs_on": np.array(networks.runs_on),
        "name": np.array(task.names),
        "digest": np.array([hashlib.sha256(content).hexdigest() for content in contents]),
        "size": np.array([image.size for image in pictures]),
        "image": np.array(rows["image"], np.int64),
        "class": np.array(rows["class"], np.str_),
        "box": np.array(rows["box"], np.float32).reshape(count, 4),
        "score": np.array(rows["score"], np.float32),
        "asked": np.array(rows["asked"], np.bool_),
        "logits": np.array(rows["logits"], np.float32).reshape(count, len(COLORS)),
        **{f"thumbnail_{i}": np.frombuffer(thumbnail(image), np.uint8) for i, image in enumerate(pictures)},
    }


def picture(content: bytes, file: str) -> Image.Image:
    """An image file in RGB, turned as its EXIF orientation says.

    Raises:
        ValueError: It cannot be read.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    # Pillow's decoders answer broken bytes with OSError, SyntaxError, struct.error, IndexError and many others.
    except Exception as error:
        raise ValueError(
            f"image {file} cannot be read ({type(error).__name__}: {error}): remove it and draw it again"
        ) from error


def scored(part: Part, rules: Options) -> Iterator[Scored]:
    """The images of a part, judged."""
    metadata = json.loads(str(part["metadata"]))
    for i, name in enumerate(part["name"].tolist()):
        detections: dict[str, list[Detection]] = {}
        for j in np.flatnonzero(part["image"] == i):
            color = COLORS[int(np.argmax(part["logits"][j]))] if part["asked"][j] else ""
            one = Detection(part["box"][j], float(part["score"][j]), color)
            detections.setdefault(str(part["class"][j]), []).append(one)
        objects: Objects = kept(detections, metadata["tag"], rules)
        width, height = part["size"][i].tolist()
        verdict = judge(objects, metadata, rules)
        yield Scored(
            name, str(part["prompt"]), metadata, objects, verdict, part[f"thumbnail_{i}"].tobytes(), (width, height)
        )
