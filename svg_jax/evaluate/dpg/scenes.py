"""The demo's own DPG-Bench: questions about its scenes, answered from the things that are found in the pixels."""

from __future__ import annotations

import csv
from collections.abc import Sequence

import numpy as np
from etils import epath
from jaxtyping import UInt8
from PIL import Image

from data_pipelines import scenes
from svg_jax.evaluate.dpg.files import ask, lines, read_answers, read_asked, read_pictures
from svg_jax.evaluate.dpg.rules import COLUMNS, read_questions
from svg_jax.evaluate.dpg.scores import write_scores
from svg_jax.evaluate.generated import Generated
from svg_jax.evaluate.grids import grid_shape
from svg_jax.evaluate.prompt_sets import PromptEntry

ZOOM = 4  # of the pictures in the grids, where the scenes themselves would be small
WARNING = "answers come from the colours of the pixels: no numbers to compare with those of DPG-Bench"
Picture = UInt8[np.ndarray, "h w 3"]


def holds(meaning: str, found: Sequence[scenes.Found]) -> bool:
    """Whether a proposition is true of the things in a picture; shape, colour and box are always those of one thing."""
    category, _, about = meaning.removesuffix(")").partition(" (")
    of_shape = {shape: [one for one in found if one.thing.shape == shape] for shape in scenes.SHAPES}
    match category, about.split(", "):
        case "entity - whole", [shape]:
            return bool(of_shape[shape])
        case "attribute - color", [which, colour]:
            *every, shape = which.split()
            colours = {one.thing.colour for one in of_shape[shape]}
            return colours == {colour} if every else colour in colours
        case "relation - spatial", [first, side, second]:
            pairs = [(a, b) for a in of_shape[first] for b in of_shape[second]]
            return any(a.y2 <= b.y1 if side == "above" else a.x2 <= b.x1 for a, b in pairs)
        case "other - count", ["things", number]:
            return len(found) == int(number.removeprefix("=="))
    raise ValueError(f"scenes: {meaning} is no proposition about them")


def write_question_report(folder: epath.Path, pictures: Sequence[list[Picture]], asked: Sequence[scenes.Scene]) -> None:
    """Goes all the way from a table of questions to the report, by the files that lie between.

    Args:
        folder: For table, grids, questions, answers and report; made if it is not there.
        pictures: Drawn for the prompts of the scenes, up to 4 each and equally many.
        asked: The scenes, each with `dpg_rows`.
    """
    entries = tuple(PromptEntry(i, f"scene{i:02d}", scene.prompt) for i, scene in enumerate(asked))
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "table.csv", "w", newline="") as file:
        csv.writer(file).writerow(["text", *COLUMNS])
        for entry, scene in zip(entries, asked, strict=True):
            rows = enumerate(scenes.dpg_rows(scene), start=1)
            csv.writer(file).writerows((entry.prompt, entry.id, number, *row) for number, row in rows)
    table = read_questions(str(folder / "table.csv"))

    generated = Generated(folder, "dpg", entries, len(pictures[0]), grid=grid_shape(len(pictures[0])))
    questions, answers = [], []
    for entry, drawn in zip(entries, pictures, strict=True):
        generated.save(entry, [Image.fromarray(picture.repeat(ZOOM, 0).repeat(ZOOM, 1)) for picture in drawn])
        some = ask(generated, entry, [question for question in table if question.item_id == entry.id])
        shown = read_pictures(some).items()
        found = {sample: scenes.detect(np.asarray(image)[::ZOOM, ::ZOOM]) for sample, image in shown}
        questions += some
        for each in some:
            answer = "yes" if holds(table[each.row].meaning, found[each.sample]) else "no"
            answers.append({"key": each.key, "answer": answer, "model": "pixels", "weights": "none"})
    (folder / "questions.jsonl").write_text(lines(map(vars, questions)))
    (folder / "answers.jsonl").write_text(lines(answers))

    write_scores(
        str(folder),
        {"prompts": "scenes of the demo", "num_images": generated.num_images},
        table,
        {entry.id: entry.prompt for entry in entries},
        read_asked(folder / "questions.jsonl"),
        read_answers([folder / "answers.jsonl"]),
        ["corrected"],
        title="DPG-Bench of the demo's scenes",
        published=None,
        warnings=[WARNING],
    )
