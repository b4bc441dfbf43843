from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from svg_jax.evaluate.dpg.files import Answers, Asked
from svg_jax.evaluate.dpg.rules import (
    Question,
    by_prompt,
    counted,
    is_yes,
    judge,
    normalised,
    oddities,
    read_questions,
    totals,
)
from svg_jax.evaluate.dpg.scores import Outcome, evaluate
from tests.evaluate.vectors import facts

VARIANTS = facts("dpg_cases")["variants"]
HEAD = (
    "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,question_natural_language"
)


def question(number: int, *parents: int, row: int | None = None, item: str = "a", meaning: str = "") -> Question:
    return Question(
        number if row is None else row, item, number, parents, meaning or "entity - whole (x)", f"{number}?"
    )


def asked_and_answered(variant: dict[str, Any]) -> Outcome:
    """What the mode `official` makes of a variant: its items as rows of a table, its answers under keys."""
    table = [question(1, item="thrown away")] if variant["first_row_is_throwaway"] else []
    asked, answers = [], {}
    for item in variant["items"]:
        for place, given in enumerate(item["questions"]):
            parents = tuple(parent for parent in given["dependency"] if parent)
            row = len(table)
            table.append(Question(row, item["item_id"], given["id"], parents, given["tuple"], given["question"]))
            for sample in range(variant["pic_num"]) if item["item_id"] not in variant["images_missing"] else ():
                key = f"{row} {sample}"
                asked.append(Asked(key, item["item_id"], sample, row, "", (0, 0, 1, 1), given["question"]))
                answers[key] = item["answers"][sample][place]
    return evaluate(table, asked, Answers("model", "weights", answers), variant["pic_num"], "official")


@pytest.mark.golden
@pytest.mark.parametrize("variant", VARIANTS, ids=[variant["name"] for variant in VARIANTS])
def test_official_scores(variant: dict[str, Any]) -> None:
    outcome, expected = asked_and_answered(variant), variant["expected"]
    assert outcome.judged.keys() == expected["items"].keys()
    for item_id, item in expected["items"].items():
        assert outcome.judged[item_id].pictures == pytest.approx(item["crops"], rel=1e-12)
        assert outcome.judged[item_id].score == pytest.approx(item["score"], rel=1e-12)
    assert sorted(outcome.left_out["questions they depend on"]) == sorted(expected["failed"])
    assert sorted(outcome.left_out["pictures"]) == sorted(variant["images_missing"])
    for level, found in (("l1", outcome.totals.broad), ("l2", outcome.totals.detailed)):
        assert {name: 100 * total.value for name, total in found.items()} == pytest.approx(expected[level], rel=1e-12)
    assert 100 * outcome.totals.overall.value == pytest.approx(expected["score"], rel=1e-12)


def test_what_is_lost_takes_along_only_what_comes_later() -> None:
    chain = [question(1), question(2, 1), question(3, 2)]
    assert counted(chain, [False, True, True], "corrected") == [False, False, False]
    assert counted(chain[::-1], [True, True, False], "corrected") == [True, False, False]
    assert counted([question(1), question(2), question(3, 1, 2)], [True, False, True], "official")[2] is False


def test_a_parent_that_is_not_there() -> None:
    orphan = [question(2, 9), question(1), question(3, 1, 9)]
    with pytest.raises(KeyError):
        counted(orphan, [True, True, True], "official")
    assert counted(orphan, [True, True, True], "corrected") == [True, True, True]
    # The official program has found its answer before it comes to the parent that is not there.
    assert counted(orphan[1:], [False, True], "official") == [False, False]
    assert oddities(orphan) == [
        "2 propositions depend on one that their prompt does not have, the first: 2 of a: they are judged without"
    ]


def test_which_questions_a_prompt_has() -> None:
    table = [question(1, item="a", row=0), question(2, item="a", row=1), question(1, item="b", row=2)]
    table += [question(3, item="a", row=3), question(1, item="b", row=4)]
    official = {item: [q.row for q in found] for item, found in by_prompt(table, "official").items()}
    corrected = {item: [q.row for q in found] for item, found in by_prompt(table, "corrected").items()}
    assert official == {"a": [3], "b": [4]}  # the last place of each in the table, and never the first row
    assert corrected == {"a": [0, 1, 3], "b": [4]}
    assert len(oddities(table)) == 1


def test_a_prompt_whose_only_question_is_never_asked() -> None:
    table = [question(1, item="a", row=0), question(1, item="b", row=1)]
    asked = [Asked(f"{row}", item, 0, row, "", (0, 0, 1, 1), "1?") for row, item in enumerate("ab")]
    answers = Answers("model", "weights", {"0": "yes", "1": "yes"})
    outcome = evaluate(table, asked, answers, 1, "official")
    assert outcome.left_out["questions"] == ["a"]
    assert outcome.warnings == ["a is left out for want of questions, as by the official program"]
    assert evaluate(table, asked, answers, 1, "corrected").judged.keys() == {"a", "b"}


def test_corrected_categories_are_of_all_pictures_after_dependencies() -> None:
    some = [question(1, meaning="entity - whole (car)"), question(2, 1, meaning="attribute - color (car, red (dark))")]
    pictures = [["no", "yes"], ["yes", "yes"], ["Yes.", "no"]]
    corrected = totals([judge(some, pictures, "corrected")], "corrected")
    assert {name: (total.value, total.count) for name, total in corrected.detailed.items()} == {
        "attribute - color": (1 / 3, 3),
        "entity - whole": (2 / 3, 3),
    }
    assert corrected.overall.value == pytest.approx((0 + 1 + 0.5) / 3)
    official = totals([judge(some, pictures, "official")], "official")
    assert {name: (total.value, total.count) for name, total in official.broad.items()} == {
        "attribute": (0.0, 1),
        "entity": (0.0, 1),
    }
    assert official.overall.value == pytest.approx((0 + 1 + 0) / 3)


def test_words_that_are_read_as_yes() -> None:
    assert [normalised(text) for text in (" Yes. ", "YES", "no.", "yes, it is")] == ["yes", "yes", "no", "yes, it is"]
    assert is_yes("Yes.", "corrected")
    assert not is_yes("Yes.", "official")
    assert not is_yes("yes ", "official")


def test_intervals_are_those_of_the_mean_over_prompts() -> None:
    generator = np.random.default_rng(1)
    single = [question(1)]
    judged = [judge(single, [["yes" if value else "no"]], "corrected") for value in generator.random(800) < 0.7]
    found = totals(judged, "corrected")
    mean = np.mean([prompt.score for prompt in judged])
    assert found.overall.value == pytest.approx(mean)
    assert found.overall.count == 800
    width = 2 * 1.96 * np.sqrt(mean * (1 - mean) / 800)
    assert found.overall.high - found.overall.low == pytest.approx(width, rel=0.15)
    assert found == totals(judged, "corrected")
    # One question a prompt: the category is the same quantity.
    assert found.broad["entity"] == found.overall
    with pytest.raises(ValueError, match="none of the prompts could be judged"):
        totals([], "official")


def test_the_table_is_read_as_it_is_written(tmp_path: Path) -> None:
    file = tmp_path / "dpg_bench.csv"
    rows = ['a0,"A red, large\ncar",,1,0,entity,whole,entity - whole (car),Is there a car?']
    rows += ['a0,"A red, large\ncar",,2,"0, 1",attribute,color,"attribute - color (car, red)","Is the car ""red""?"']
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join([HEAD, *rows, ""]).encode())
    first, second = read_questions(file)
    assert first == Question(0, "a0", 1, (), "entity - whole (car)", "Is there a car?")
    assert (second.row, second.parents, second.text) == (1, (1,), 'Is the car "red"?')
    assert (second.category, second.broad_category) == ("attribute - color", "attribute")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "item_id,text\na,b\n",
            r"has no column proposition_id and no column dependency .* but item_id, text: take dpg_bench",
        ),
        (f"{HEAD}\na,t,,1,0,e,w,entity - whole (a),Q?\na,t,,x,0,e,w,entity,Q?\n", r"line 3 has proposition_id 'x'"),
        (f"{HEAD}\na,t,,1,one,e,w,entity,Q?\n", r"line 2 has proposition_id '1' and dependency 'one'"),
        (f"{HEAD}\na,t,,1,0,e,w,entity - whole (a),\n", r"line 2 has nothing in column question_natural_language"),
        (f"{HEAD}\na,t\n", r"line 2 has nothing in column proposition_id"),
        (f"{HEAD}\n", r"has no rows: give the table of DPG-Bench"),
        ("", r"has no column .* but nothing"),
        (f'{HEAD}\na,t,,1,0,e,w,entity,"Q?\na,t,,2,0,e,w,entity,P?\n', r"line 2: not CSV .*quotes closed"),
        (f'{HEAD}\na,t,,1,0,e,w,entity,"Q?\na,t,,2,0,e,w,entity,"P?"\n', r"line 2: not CSV .*quotes closed"),
        (f'{HEAD}\na,t,,1,0,e,w,entity,"Q?\na,t,,2,0,e,w,entity,P?"\n', r"line 2: question_natural_language goes over"),
    ],
)
def test_a_table_that_is_none(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "table.csv"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_questions(file)
    with pytest.raises(FileNotFoundError, match=r"there is no .*none\.csv: --csv is dpg_bench\.csv"):
        read_questions(tmp_path / "none.csv")
