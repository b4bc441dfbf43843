"""Captions as lists write them, and the choice among several."""

from __future__ import annotations

import collections
from typing import Any

import pytest

from data_pipelines.captions import choose, parse_captions
from data_pipelines.records import BadRecord, Caption, Cause, Record


def record(*captions: Caption, index: int = 0) -> Record:
    return Record(index, "a.jpg", "list.jsonl:1", captions)


@pytest.mark.parametrize(
    ("value", "captions"),
    [
        ("a cat — eine Katze", [("a cat — eine Katze", 1)]),
        (None, [("", 1)]),
        ("", [("", 1)]),
        (" \n ", [("", 1)]),
        (["a cat", "a tabby"], [("a cat", 1), ("a tabby", 1)]),
        ([["a cat", 0.3], ["a tabby", 2]], [("a cat", 0.3), ("a tabby", 2)]),
        ([{"text": "a cat", "weight": 0.5}, {"text": "a tabby"}], [("a cat", 0.5), ("a tabby", 1)]),
        (["a cat", ["a tabby", 3], {"text": None}], [("a cat", 1), ("a tabby", 3), ("", 1)]),
        ([["never", 0], "always"], [("always", 1)]),
        ([], []),
        ("half a \ud83e pair", [("half a ? pair", 1)]),
    ],
)
def test_every_way_to_write_captions(value: Any, captions: list[tuple[str, float]]) -> None:
    parsed = parse_captions(value, "align", "here")
    assert [(caption.text, caption.weight) for caption in parsed] == captions
    assert all(caption.system_prompt == "align" for caption in parsed)


@pytest.mark.parametrize(
    ("value", "cause", "reason"),
    [
        (3, Cause.VALUE, "here is a int; expected a text"),
        ({"text": "a cat"}, Cause.VALUE, "here is a dict; expected a text"),
        (["a cat", 0.5], Cause.VALUE, r"here\[1\] is a float"),
        ([["a cat"]], Cause.VALUE, r"here\[0\] is a list of 1; expected \[text, weight\]"),
        ([["a cat", "0.5"]], Cause.VALUE, r"here\[0\] has the weight '0.5'; expected a number"),
        ([["a cat", True]], Cause.VALUE, "has the weight True"),
        ([["a cat", -1]], Cause.VALUE, "has the weight -1"),
        ([["a cat", float("nan")]], Cause.VALUE, "has the weight nan"),
        ([["a cat", float("inf")]], Cause.VALUE, "has the weight inf"),
        ([["a cat", 10**400]], Cause.VALUE, "has the weight 1000"),
        ([["a cat", 0], ["a dog", 0]], Cause.VALUE, "captions of weight 0 alone"),
        ([{"weight": 1}], Cause.KEYS, r"here\[0\] has the keys \['weight'\]"),
        (
            [{"text": "a cat", "wieght": 1}],
            Cause.KEYS,
            r"has the keys \['text', 'wieght'\]; expected 'text' and 'weight'",
        ),
    ],
)
def test_captions_of_the_wrong_type_are_a_bad_record(value: Any, cause: Cause, reason: str) -> None:
    with pytest.raises(BadRecord, match=reason) as caught:
        parse_captions(value, "base", "here")
    assert caught.value.cause is cause


def test_captions_are_drawn_by_their_weights() -> None:
    captions = parse_captions(
        [["often", 7], ["seldom", 1], ["never", 0], {"text": "sometimes", "weight": 2}], "base", ""
    )
    drawn = collections.Counter(choose(record(*captions, index=i), seed=3, epoch=0).text for i in range(2000))
    assert set(drawn) == {"often", "seldom", "sometimes"}
    # Three standard deviations of 2000 draws: 62, 40, 54.
    assert abs(drawn["often"] - 1400) < 62
    assert abs(drawn["seldom"] - 200) < 40
    assert abs(drawn["sometimes"] - 400) < 54


def test_the_choice_depends_on_seed_epoch_and_record_alone() -> None:
    captions = parse_captions(["a", "b", "c", "d"], "base", "")

    def choices(seed: int, epoch: int, first: int = 0) -> str:
        return "".join(choose(record(*captions, index=first + i), seed, epoch).text for i in range(64))

    assert choices(1, 2) == choices(1, 2)
    assert len({choices(1, 2), choices(2, 1), choices(1, 3), choices(1, 2, first=1)}) == 4
    elsewhere = Record(5, "/other/b.jpg", "shard:7", captions, image=b"")
    assert choose(elsewhere, 1, 2) == choose(record(*captions, index=5), 1, 2)


def test_weights_at_the_limits_of_floats_still_choose() -> None:
    tiny = parse_captions([["a", 5e-324], ["b", 5e-324]], "base", "")
    assert {choose(record(*tiny, index=i), 0, 0).text for i in range(20)} <= {"a", "b"}


def test_a_record_without_a_caption_is_counted_under_that_cause() -> None:
    with pytest.raises(BadRecord, match=r"list\.jsonl:1 has no caption") as caught:
        choose(record(), seed=0, epoch=0)
    assert caught.value.cause is Cause.CAPTION
