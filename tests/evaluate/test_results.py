from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest

from svg_jax import distributed
from svg_jax.evaluate.results import Results, at_least_one, conclude, recorded_settings, work_through

SETTINGS = {"step": 3, "metrics": ("psnr",), "autoencoder": {"weights": "ab"}}


def test_parts_come_back_in_order(tmp_path: Path) -> None:
    results = Results(str(tmp_path / "out"), SETTINGS)
    assert results.missing(3) == [0, 1, 2]
    for number in (2, 0):
        results.save(number, {"value": np.full(2, number), "name": np.array(["é", "b"]), "none": np.array([], np.str_)})
    assert Results(str(tmp_path / "out"), SETTINGS).missing(3) == [1]
    results.save(1, {"value": np.full(2, 1)})
    assert [part["value"][0] for part in results.parts(3)] == [0, 1, 2]
    assert results.load(2)["name"].tolist() == ["é", "b"]
    assert not list(tmp_path.rglob("*.part"))


def test_a_damaged_part_is_missing(tmp_path: Path) -> None:
    results = Results(str(tmp_path), SETTINGS)
    results.save(0, {"value": np.arange(1000)})
    file = next((tmp_path / "parts").iterdir())
    whole = file.read_bytes()
    for damaged in (whole[:500], whole[:200] + bytes([whole[200] ^ 1]) + whole[201:], b""):
        file.write_bytes(damaged)
        assert results.missing(1) == [0]
    file.write_bytes(whole)
    assert results.holds(0)


def test_a_folder_of_other_settings_is_left_alone(tmp_path: Path) -> None:
    Results(str(tmp_path), SETTINGS)
    with pytest.raises(ValueError, match=r"results of step = 3, and now it is 4: choose another --out"):
        Results(str(tmp_path), SETTINGS | {"step": 4})
    with pytest.raises(ValueError, match=r"results of seed = None, and now it is 1"):
        Results(str(tmp_path), SETTINGS | {"seed": 1})
    with pytest.raises(ValueError, match=r"results of autoencoder\.weights = ab, and now it is cd"):
        Results(str(tmp_path), SETTINGS | {"autoencoder": {"weights": "cd"}})
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(ValueError, match=r"settings\.json cannot be read"):
        Results(str(tmp_path), SETTINGS)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PermissionError, match="choose another --out"):
        Results(str(tmp_path / "file" / "out"), SETTINGS)


def test_settings_of_before(tmp_path: Path) -> None:
    assert recorded_settings(str(tmp_path / "none")) == {}
    Results(str(tmp_path), SETTINGS)
    assert recorded_settings(str(tmp_path)) == {**SETTINGS, "metrics": ["psnr"]}
    for damaged in (b"{", b"[]", b"\xff"):
        (tmp_path / "settings.json").write_bytes(damaged)
        with pytest.raises(
            ValueError, match=r"settings\.json (cannot be read|holds no settings).*choose another --out"
        ):
            recorded_settings(str(tmp_path))


def test_counts_below_one_are_refused() -> None:
    at_least_one(argparse.Namespace(a=1, num_b=None), "a", "num_b")
    with pytest.raises(ValueError, match="--num-b is 0: it must be at least 1"):
        at_least_one(argparse.Namespace(a=1, num_b=0), "a", "num_b")


def test_every_process_takes_as_many_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else they would not agree on when to end."""
    turns: list[int] = []

    def preempted(turn: int) -> bool:
        turns.append(turn)
        return False

    monkeypatch.setattr(distributed, "preempted", preempted)
    done: list[int] = []
    for shard in (0, 1, 2):
        work_through(7, (shard, 3), [5, 1, 3, 6], done.append, unit="part", size=lambda number: number + 1)
    assert done == [3, 6, 1, 5]
    assert turns == [0, 1, 2] * 3


def test_a_process_that_is_told_to_end_does_so_after_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "preempted", lambda turn: turn == 1)
    done: list[int] = []
    with pytest.raises(SystemExit) as end:
        work_through(9, (1, 2), range(9), done.append, unit="part")
    assert end.value.code == distributed.EXIT_PREEMPTED
    assert done == [1, 3]


def test_the_report_waits_for_the_last_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = Results(str(tmp_path), SETTINGS)
    results.save(0, {})
    conclude(results, 2, "parts", lambda: "the report")
    assert capsys.readouterr().out == "1 of 2 parts are there: the last shard writes the report\n"
    results.save(1, {})
    conclude(results, 2, "parts", lambda: "the report")
    assert capsys.readouterr().out == "the report\n"
