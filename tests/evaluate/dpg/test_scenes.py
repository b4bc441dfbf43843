from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from data_pipelines import scenes
from svg_jax.evaluate.dpg.rules import by_prompt, judge, read_questions
from svg_jax.evaluate.dpg.scenes import write_question_report

TWO = scenes.Scene(
    "a green cross at the bottom left and a cyan square at the top left",
    (scenes.Thing("green", "cross", "bottom left"), scenes.Thing("cyan", "square", "top left")),
    (scenes.Box(38, 6, 20), scenes.Box(6, 6, 20)),
    "two",
)
PAIR = scenes.Scene(
    "two red circles at the top",
    (scenes.Thing("red", "circle", "top left"), scenes.Thing("red", "circle", "top right")),
    (scenes.Box(6, 6, 20), scenes.Box(6, 38, 20)),
    "pair",
)


def changed(scene: scenes.Scene, *things: tuple[str, str]) -> np.ndarray:
    """The picture with the first things of these colours and shapes, and without the others."""
    painted = tuple(scenes.Thing(*new, old.place) for new, old in zip(things, scene.things, strict=False))
    return scenes.render(scenes.Scene("", painted, scene.boxes[: len(painted)], scene.kind))


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def answers(
    folder: Path, scene: scenes.Scene, pictures: Sequence[np.ndarray]
) -> tuple[list[list[bool]], list[list[bool]]]:
    """Of each picture what is answered by yes, and what counts."""
    write_question_report(epath.Path(folder), [list(pictures)], [scene])
    (questions,) = by_prompt(read_questions(folder / "table.csv"), "corrected").values()
    texts = [list(row["answers"].values()) for row in rows_of(folder / "images.jsonl")]
    judged = judge(questions, texts, "corrected")
    assert [row["corrected"] for row in rows_of(folder / "images.jsonl")] == judged.pictures
    return [list(row) for row in judged.raw], [list(row) for row in judged.counted]


def test_perfect_pictures_score_100(tmp_path: Path) -> None:
    asked = [scene for i in range(40) if scenes.dpg_rows(scene := scenes.sample_scene(1, i))]
    assert {scene.kind for scene in asked} == set(scenes.KINDS)
    folder = epath.Path(tmp_path / "out")
    for _ in range(2):  # as when the demo runs again
        write_question_report(folder, [[scenes.render(scene)] * 4 for scene in asked], asked)
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["scores"]["corrected"] == dict.fromkeys(("entity", "attribute", "relation", "other", "overall"), 1.0)
    assert found["counts"]["corrected"]["overall"] == len(asked)
    assert found["settings"]["judge"]["model"] == "pixels"
    assert len(found["warnings"]) == 1
    assert "Qwen" not in (tmp_path / "out" / "results.md").read_text()  # nothing to compare with
    page = (tmp_path / "out" / "index.html").read_text()
    assert asked[0].prompt in page
    assert "http" not in page


def test_questions_are_in_the_form_of_the_official_table() -> None:
    assert scenes.dpg_rows(TWO) == [
        ("0", "entity - whole (cross)", "Is there a cross?"),
        ("1", "attribute - color (cross, green)", "Is the cross green?"),
        ("0", "entity - whole (square)", "Is there a square?"),
        ("3", "attribute - color (square, cyan)", "Is the square cyan?"),
        ("2, 4", "relation - spatial (square, above, cross)", "Is the square above the cross?"),
    ]
    assert scenes.dpg_rows(PAIR)[1:] == [
        ("1", "attribute - color (every circle, red)", "Is every circle red?"),
        ("1", "other - count (things, ==2)", "Are there exactly 2 things?"),
    ]
    alike = tuple(thing._replace(shape="cross") for thing in TWO.things)
    assert scenes.dpg_rows(scenes.Scene("", alike, TWO.boxes, "two")) == []


def test_colours_belong_to_their_things(tmp_path: Path) -> None:
    right = [True] * 5
    pictures = [
        changed(TWO, ("green", "cross"), ("cyan", "square")),
        changed(TWO, ("green", "cross"), ("green", "square")),  # a wrong colour takes the relation along
        changed(TWO, ("cyan", "cross"), ("green", "square")),
        changed(TWO, ("cyan", "square"), ("green", "cross")),  # upside down
    ]
    raw, counted = answers(tmp_path / "out", TWO, pictures)
    assert raw == [
        right,
        [True, True, True, False, True],
        [True, False, True, False, True],
        [True, True, True, True, False],
    ]
    assert counted == [
        right,
        [True, True, True, False, False],
        [True, False, True, False, False],
        [True, True, True, True, False],
    ]


def test_a_missing_thing_loses_what_depends_on_it(tmp_path: Path) -> None:
    empty = np.full((64, 64, 3), scenes.BACKGROUND, np.uint8)
    raw, counted = answers(tmp_path / "two", TWO, [changed(TWO, ("green", "cross")), empty])
    assert raw == counted == [[True, True, False, False, False], [False] * 5]

    pictures = [
        changed(PAIR, ("red", "circle"), ("blue", "circle")),
        changed(PAIR, ("red", "circle")),
        changed(PAIR, ("red", "square"), ("red", "square")),  # as many, but of another kind
    ]
    raw, counted = answers(tmp_path / "pair", PAIR, pictures)
    assert raw == [[True, False, True], [True, True, False], [False, False, True]]
    assert counted == [[True, False, True], [True, True, False], [False, False, False]]
