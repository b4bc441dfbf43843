from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from svg_jax.samples import SampleFolder

SETTINGS = {"solver": "euler", "num_steps": 4, "seed": 0, "guidance_interval": (0.0, 1.0)}
PLACE = {"index": 0, "sample": 0, "width": 32, "height": 16}


def picture(value: int = 7) -> Image.Image:
    return Image.fromarray(np.full((16, 32, 3), value, np.uint8))


def test_a_picture_carries_its_prompt_and_settings(tmp_path: Path) -> None:
    folder = SampleFolder(str(tmp_path), SETTINGS)
    name = folder.name(0, 0, 32, 16)
    assert not folder.holds(name, "a <b> fox é")
    folder.save(name, picture(), "a <b> fox é", **PLACE)
    assert folder.holds(name, "a <b> fox é")
    with Image.open(tmp_path / name) as image:
        assert image.text["prompt"] == "a <b> fox é"
        assert json.loads(image.text["settings"])["num_steps"] == 4
        assert (np.asarray(image) == 7).all()
    assert not list(tmp_path.rglob("*.part"))


def test_listing_and_gallery(tmp_path: Path) -> None:
    folder = SampleFolder(str(tmp_path), SETTINGS)
    for sample in (1, 0):
        folder.save(
            folder.name(0, sample, 32, 16), picture(), "<script>alert(1)</script>", **PLACE | {"sample": sample}
        )
    folder.save(folder.name(1, 0, 32, 16), picture(), "", **PLACE | {"index": 1})
    folder.finish()
    entries = json.loads((tmp_path / "data.json").read_text())
    assert [entry["image_url"] for entry in entries] == [
        "images/00000_0_32x16.png", "images/00000_1_32x16.png", "images/00001_0_32x16.png",
    ]  # fmt: skip
    assert entries[0] | {"settings": None} == {
        "caption": "<script>alert(1)</script>",
        "image_url": "images/00000_0_32x16.png",
        "resolution": "32x16",
        "solver": "euler",
        "num_sampling_steps": 4,
        "settings": None,
    }
    page = (tmp_path / "index.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 3
    assert "<script>" not in page
    assert "3 pictures of 2 prompts" in page
    assert "http" not in page.replace("http-equiv", "")  # nothing is loaded from elsewhere


def test_a_folder_of_other_settings_is_left_alone(tmp_path: Path) -> None:
    SampleFolder(str(tmp_path), SETTINGS)
    SampleFolder(str(tmp_path), SETTINGS)
    with pytest.raises(ValueError, match=r"holds pictures of num_steps = 4, and now it is 5: choose another --out"):
        SampleFolder(str(tmp_path), SETTINGS | {"num_steps": 5})


def test_a_picture_of_another_prompt_is_left_alone_and_a_damaged_one_drawn_anew(tmp_path: Path) -> None:
    folder = SampleFolder(str(tmp_path), SETTINGS)
    name = folder.name(0, 0, 32, 16)
    folder.save(name, picture(), "a fox", **PLACE)
    with pytest.raises(ValueError, match=r"drawn for another prompt \('a fox'\)"):
        folder.holds(name, "a hen")
    (tmp_path / name).write_bytes(b"\x89PNG")
    assert not folder.holds(name, "a hen")


def test_strange_and_damaged_pictures_are_not_listed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = SampleFolder(str(tmp_path), SETTINGS)
    name = folder.name(0, 0, 32, 16)
    folder.save(name, picture(), "a fox", **PLACE)
    picture().save(tmp_path / "images" / "mine.png")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    folder.save("images/cut.png", noise, "a fox", **PLACE)
    whole = (tmp_path / "images" / "cut.png").read_bytes()
    (tmp_path / "images" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "images" / "none.png").write_bytes(b"")
    folder.finish()
    assert name in (tmp_path / "index.html").read_text()
    assert (tmp_path / "index.html").read_text().count("data:image/jpeg") == 1
    assert {record.args[0].name for record in caplog.records} == {"mine.png", "cut.png", "none.png"}


def test_settings_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(ValueError, match=r"settings\.json cannot be read"):
        SampleFolder(str(tmp_path), SETTINGS)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PermissionError, match="choose another --out"):
        SampleFolder(str(tmp_path / "file" / "out"), SETTINGS)
