from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from etils import epath

from svg_jax.output_folder import output_folder, write_whole

SETTINGS = {"seed": 0, "weights": {"dit": "ab", "origin": {"path": "/here"}}, "origin": {"csv": "a.csv"}}


def taken(folder: Path, **settings: object) -> None:
    output_folder(str(folder), SETTINGS | settings, inside="parts", results="results")


def test_where_things_lay_is_kept_and_not_compared(tmp_path: Path) -> None:
    taken(tmp_path)
    taken(tmp_path, origin={"csv": "b.csv"}, weights={"dit": "ab", "origin": {"path": "/there", "host": 3}})
    taken(tmp_path, origin={})
    assert json.loads((tmp_path / "settings.json").read_text()) == SETTINGS
    with pytest.raises(ValueError, match=r"holds results of weights\.dit = ab, and now it is cd: choose another --out"):
        taken(tmp_path, weights={"dit": "cd", "origin": {"path": "/here"}})


def test_of_two_that_find_an_empty_folder_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have looked for settings before either has written them."""
    monkeypatch.setattr(type(epath.Path(tmp_path)), "exists", lambda path: False)
    taken(tmp_path)
    with pytest.raises(ValueError, match=r"holds results of seed = 0, and now it is 1"):
        taken(tmp_path, seed=1)
    assert json.loads((tmp_path / "settings.json").read_text()) == SETTINGS
    assert not list(tmp_path.glob(".*.part"))


def test_without_links_who_has_been_overtaken_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on gs://, where who comes last wins."""

    def refused(*_: object) -> None:
        raise OSError("no such links")

    def overtaken(file: epath.Path, content: str) -> None:
        write_whole(file, content)
        write_whole(file, json.dumps(SETTINGS))

    monkeypatch.setattr(os, "link", refused)
    monkeypatch.setattr("svg_jax.output_folder.write_whole", overtaken)
    with pytest.raises(ValueError, match=r"holds results of seed = 0, and now it is 1"):
        taken(tmp_path, seed=1)
    taken(tmp_path)


def test_settings_that_are_no_settings(tmp_path: Path) -> None:
    for text in ("[]", "{", "5"):
        (tmp_path / "settings.json").write_text(text)
        with pytest.raises(ValueError, match=r"settings\.json cannot be read .*: choose another --out, or remove it"):
            taken(tmp_path)
