from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from svg_jax.evaluate.geneval.rules import (
    CLASSES,
    COLORS,
    TASKS,
    Detection,
    Options,
    judge,
    judged,
    kept,
    overlap,
    relations,
    totals,
)
from tests.evaluate.vectors import facts


def detections(given: Mapping[str, list[dict[str, Any]]]) -> dict[str, list[Detection]]:
    return {
        name: [Detection(np.array(one["box"], np.float32), one["score"], one["color"]) for one in found]
        for name, found in given.items()
    }


def found(**boxes: tuple[float, ...]) -> dict[str, list[Detection]]:
    return {name: [Detection(np.array(box, np.float32), 0.95)] for name, box in boxes.items()}


@pytest.mark.golden
def test_every_verdict_and_its_reason() -> None:
    given = facts("geneval_cases")
    assert given["cases"]
    assert tuple(given["colors"]) == COLORS
    assert given["defaults"].items() <= dataclasses.asdict(Options()).items()
    for case in given["cases"]:
        options = Options(**(given["defaults"] | case.get("options", {})))
        metadata, expected = case["metadata"], case["expected"]
        objects = kept(detections(case["detections"]), metadata["tag"], options)
        boxes = {
            name: [[*one.box.tolist(), float(np.float32(one.score))] for one in some] for name, some in objects.items()
        }
        assert boxes == expected["kept"], case["id"]
        assert judge(objects, metadata, options) == (expected["correct"], expected["reason"]), case["id"]


@pytest.mark.golden
def test_totals_of_the_benchmark_cases() -> None:
    given = facts("geneval_cases")
    cases = [case for case in given["cases"] if case["kind"] == "benchmark"]
    verdicts = [(case["metadata"], case["expected"]["correct"]) for case in cases]
    scores = {score.name: score for score in totals(verdicts)}
    expected = given["summary"]
    for task, values in expected["per_task"].items():
        assert scores[task].value == pytest.approx(values["score"])
        assert scores[task].count == values["total"]
    for name in ("overall", "image_accuracy", "prompt_accuracy"):
        assert scores[name].value == pytest.approx(expected[name])
    assert scores["image_accuracy"].count == expected["total_images"]
    assert scores["prompt_accuracy"].count == expected["total_prompts"]
    random.Random(0).shuffle(verdicts)
    assert {score.name: score for score in totals(verdicts)} == scores  # intervals too, whatever the order


def test_intervals_are_those_of_drawing_prompts_anew() -> None:
    """Of p correct among n prompts with one image each, the interval is that of a binomial distribution."""
    right, number = 60, 100
    verdicts = [({"tag": "colors", "prompt": str(i)}, i < right) for i in range(number)]
    colors, overall, images, prompts = totals(verdicts)
    deviation = np.sqrt(0.6 * 0.4 / number)
    assert colors.value == overall.value == images.value == prompts.value == 0.6
    assert colors.low == pytest.approx(0.6 - 1.96 * deviation, abs=0.02)
    assert colors.high == pytest.approx(0.6 + 1.96 * deviation, abs=0.02)
    # Images of a prompt stand and fall together: four times as many of them say no more.
    assert totals([one for one in verdicts for _ in range(4)])[0].low == pytest.approx(colors.low)
    certain = totals([({"tag": task, "prompt": ""}, True) for task in TASKS])
    assert {(score.value, score.low, score.high) for score in certain} == {(1.0, 1.0, 1.0)}


def test_tasks_come_in_their_order_and_weigh_the_same() -> None:
    many = [({"tag": "color_attr", "prompt": str(i)}, False) for i in range(9)]
    scores = totals([*many, ({"tag": "single_object", "prompt": ""}, True)])
    assert [score.name for score in scores][:3] == ["single_object", "color_attr", "overall"]
    assert [score.value for score in scores] == [1.0, 0.0, 0.5, 0.1, 0.1]


def test_what_was_kept_is_kept_again() -> None:
    boxes = np.random.default_rng(0).uniform(0, 100, (40, 2, 2))
    given = [
        Detection(np.concatenate([np.sort(box, axis=0)[0], np.sort(box, axis=0)[1]]).astype(np.float32), 0.5)
        for box in boxes
    ]
    for max_overlap in (1.0, 0.1):
        options = Options(max_overlap=max_overlap)
        once = kept({"cat": given}, "colors", options)["cat"]
        assert kept({"cat": once}, "colors", options)["cat"] == once
        assert once[0] is given[0]
        assert len(once) == 16 if max_overlap == 1 else 1 < len(once) < 16


def test_overlap_and_relations_of_boxes_without_area() -> None:
    point = np.array([5, 5, 5, 5], np.float32)
    assert overlap(point, point) == 1  # a pixel, as the last one counts
    assert overlap(point, point + 2) == 0
    inside_out = np.array([5, 5, 4, 4], np.float32)
    assert overlap(inside_out, inside_out) == 0
    assert relations(point, point, 0.1) == set()
    assert relations(point, point + 10, 0.1) == {"left of", "above"}
    assert relations(point + np.array([10, 0, 10, 0], np.float32), point, 0.1) == {"right of"}


def test_which_objects_the_clauses_look_at() -> None:
    one = Detection(np.zeros(4, np.float32), 0.9)
    metadata = {
        "include": [
            {"class": "cat", "count": 2, "color": "red"},
            {"class": "dog", "count": 2, "color": "red"},
            {"class": "cat", "count": 1},
        ],
        "exclude": [{"class": "bird", "count": 1}],
    }
    objects = {"cat": [one] * 3, "dog": [one], "bird": [one] * 2, "cow": [one]}
    assert judged(objects, metadata) == {"cat": 2, "dog": 1, "bird": 2}
    assert judged(objects, metadata, color=True) == {"cat": 2}  # no colour is asked for where there are too few


def test_colours_beyond_the_ten_are_named_in_the_reason() -> None:
    objects = {"circle": [Detection(np.zeros(4, np.float32), 1.0, color) for color in ("cyan", "red")]}
    row = {"include": [{"class": "circle", "count": 2, "color": "cyan"}]}
    assert judge(objects, row, Options()).reason == "expected cyan circle>=2, found 1 cyan; and 1 red, 1 cyan"


def test_all_objects_must_stand_right_to_all_targets() -> None:
    row = {"include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["above", 0]}]}
    assert judge(found(dog=(0, 50, 20, 70), cat=(0, 0, 20, 20)), row, Options()).correct
    verdict = judge(found(dog=(0, 0, 20, 20), cat=(0, 50, 20, 70)), row, Options())
    assert verdict.reason == "expected cat above target, found below target"


def test_classes_are_those_of_the_detector_under_the_names_of_the_prompts() -> None:
    assert len(set(CLASSES)) == 80
    assert [CLASSES.index(name) for name in ("person", "cat", "computer mouse", "tv remote", "toothbrush")] == [
        0,
        15,
        64,
        65,
        79,
    ]
