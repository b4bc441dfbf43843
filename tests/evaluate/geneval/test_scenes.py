from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
from etils import epath
from PIL import Image

from data_pipelines import scenes
from svg_jax.evaluate.geneval.scenes import score_scenes, write_scene_report
from svg_jax.evaluate.prompt_sets import TASKS


def test_perfect_pictures_are_correct_in_every_task(tmp_path: Path) -> None:
    asked = [scenes.sample_scene(1, i) for i in range(96)]
    scores = write_scene_report(epath.Path(tmp_path / "out"), [scenes.render(scene) for scene in asked], asked)
    assert [score.name for score in scores][:7] == [*TASKS, "overall"]
    assert {score.value for score in scores} == {1.0}
    rows = [json.loads(line) for line in (tmp_path / "out" / "images.jsonl").read_text().splitlines()]
    assert len(rows) == sum(score.count or 0 for score in scores[:6])
    assert len({row["filename"] for row in rows}) == len(rows)
    report = json.loads((tmp_path / "out" / "results.json").read_text())
    assert report["scores"]["overall"] == 1.0
    assert "Qwen" not in (tmp_path / "out" / "results.md").read_text()  # nothing to compare with


def test_what_is_wrong_is_told_in_the_words_of_the_rules() -> None:
    kinds = {kind: scenes.sample_scene(5, 0, kind=kind) for kind in scenes.KINDS}
    empty = np.full((64, 64, 3), scenes.BACKGROUND, np.uint8)
    reasons = [one.verdict.reason for one in score_scenes([empty] * 4, list(kinds.values()))]
    assert reasons
    assert all(reason.endswith("found 0") or "no target" in reason for reason in reasons)

    pair, trio = kinds["pair"], kinds["trio"]
    (thing,) = {(thing.colour, thing.shape) for thing in trio.things}
    other = scenes.Scene(
        pair.prompt, tuple(thing._replace(shape=trio.things[0].shape) for thing in pair.things), (), "pair"
    )
    (counted,) = score_scenes([scenes.render(trio)], [other])
    assert counted.verdict.reason == f"expected {thing[1]}<3, found 3"

    one = kinds["one"]
    ((colour, shape, place),) = one.things
    wrong = "black" if colour != "black" else "red"
    painted = scenes.Scene("", (scenes.Thing(wrong, shape, place),), one.boxes, "one")
    single, colors = score_scenes([scenes.render(painted)], [one])
    assert single.verdict.correct
    assert colors.verdict.reason == f"expected {colour} {shape}>=1, found 0 {colour}; and 1 {wrong}"
    assert Image.open(io.BytesIO(single.thumbnail)).size == (256, 256)
    assert single.size == (64, 64)
