from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from svg_jax.evaluate.results import Results

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
