"""Broken records: their causes in a batch, lines of the log, counts over a run and the limit."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable

import pytest

from data_pipelines import broken
from data_pipelines.broken import CAUSES, BadRecordCounter, TooManyBadRecords, by_cause, read_all, summary
from data_pipelines.records import BadRecord, Cause


@pytest.fixture(autouse=True)
def fresh_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broken, "_log", broken._Log())


def failing(causes: dict[int, Cause]) -> Callable[[int], str]:
    def read(slot: int) -> str:
        if slot in causes:
            raise BadRecord(causes[slot], f"list.jsonl:{slot} is broken")
        return f"value {slot}"

    return read


def test_slots_have_values_or_a_cause() -> None:
    values, cause = read_all(failing({1: Cause.MISSING, 3: Cause.STORE}), [10, 11, 12, 13])
    assert values == ["value 0", None, "value 2", None]
    assert cause.tolist() == [0, 1, 0, len(Cause)]
    assert [CAUSES[number - 1] for number in cause if number] == [Cause.MISSING, Cause.STORE]


def test_an_error_of_another_kind_is_no_bad_record() -> None:
    with pytest.raises(KeyError):
        read_all({}.__getitem__, [5])


def test_one_line_names_all_records_since_the_line_before(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="absl"):
        read_all(failing({0: Cause.EMPTY}), [7])
        for first in range(0, 40, 2):
            read_all(failing({0: Cause.DAMAGED, 1: Cause.TIMEOUT}), [first, 100 + first])
        read_all(failing({}), [1])
        assert caplog.messages == ["records skipped: 1 empty (7); the last one: list.jsonl:0 is broken"]
        monkeypatch.setattr(broken, "_SECONDS_BETWEEN_WARNINGS", 0)
        read_all(failing({1: Cause.DAMAGED}), [3, 99])
    damaged = ", ".join(map(str, range(0, 32, 2)))
    timeout = ", ".join(map(str, range(100, 132, 2)))
    assert caplog.messages[1:] == [
        f"records skipped: 21 damaged ({damaged}, …), 20 timeout ({timeout}, …); the last one: list.jsonl:1 is broken"
    ]


def test_counts_by_name() -> None:
    counts = [0] * len(Cause)
    counts[CAUSES.index(Cause.MODE)], counts[CAUSES.index(Cause.KEYS)] = 2, 5
    assert by_cause(counts) == {"mode": 2, "keys": 5}
    assert summary(by_cause(counts)) == "keys 5, mode 2"
    assert summary({}) == "none"


def test_too_many_bad_records_stop_the_run() -> None:
    counter = BadRecordCounter(max_bad_fraction=0.05, min_records=100)
    for _ in range(9):
        counter.update({"missing": 6, "mode": 2}, num_records=10)  # too few to judge
    with pytest.raises(
        TooManyBadRecords,
        match=r"80 of 100 records \(80\.0%\) could not be used \(missing 60, mode 20\), above max_bad_fraction=0\.05",
    ):
        counter.update({"missing": 6, "mode": 2}, num_records=10)


def test_few_bad_records_do_not_stop_the_run() -> None:
    counter = BadRecordCounter(max_bad_fraction=0.05, min_records=100)
    for num_bad in itertools.islice(itertools.cycle([0, 1]), 50):
        counter.update({"empty": num_bad}, num_records=10)
    assert counter.fraction == 0.05
    assert counter.metrics == {"data/bad_fraction": 0.05, "data/bad/empty": 25.0}
    assert str(counter) == "25 of 500 records skipped (empty 25)"


def test_counts_go_on_from_a_checkpoint_and_the_limit_begins_anew() -> None:
    before = BadRecordCounter(1.0)
    before.update({"missing": 90}, 100)
    saved = json.loads(json.dumps({"step": 10, **before.state}))
    counter = BadRecordCounter(0.1, min_records=20, saved=saved)
    counter.judge()
    counter.update({"missing": 1, "keys": 1}, 20)
    assert counter.state == {"records": 120, "bad": {"missing": 91, "keys": 1}}
    with pytest.raises(TooManyBadRecords, match=r"3 of 21 records \(14\.3%\) could not be used \(missing 2, keys 1\)"):
        counter.update({"missing": 1}, 1)


@pytest.mark.parametrize("saved", [None, {}, {"step": 7}], ids=str)
def test_checkpoints_that_count_nothing_begin_at_zero(saved: dict[str, int] | None) -> None:
    counter = BadRecordCounter(0.1, saved=saved)
    assert counter.state == {"records": 0, "bad": {}}
    assert counter.fraction == 0.0
