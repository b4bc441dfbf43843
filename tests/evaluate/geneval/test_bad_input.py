"""What the command refuses, in a sentence each."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from svg_jax.evaluate.__main__ import main
from svg_jax.evaluate.geneval import command as geneval
from tests.evaluate.geneval.stand_ins import ROWS, paint, results, score, stand_in, write_folder
from tests.evaluate.killed import die


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path)


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return stand_in(monkeypatch)


def test_what_else_than_weights_counts_of_a_network(folder: Path, looked: list[int]) -> None:
    score(folder)
    config = folder / "clip" / "config.json"
    small = {"model_type": "clip", "vision_config": {"hidden_act": "quick_gelu"}}
    config.write_text(json.dumps(small))  # the library's own sizes
    with pytest.raises(SystemExit, match=r"holds results of clip\.hidden_size = 1024, and now it is 768"):
        score(folder)
    score(folder, "small")
    assert "CLIP is not of the size of ViT-L/14" in " ".join(results(folder, "small")["warnings"])
    (folder / "clip" / "tokenizer.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"holds results of clip\.weights = \w{16}, and now it is \w{16}"):
        score(folder, "small")
    config.write_text(json.dumps({"model_type": "siglip"}))
    with pytest.raises(SystemExit, match="holds a network of the type siglip, and a clip is needed"):
        score(folder, "other")
    assert not (folder / "other").exists()


def test_damaged_settings_are_told_with_their_file(folder: Path, looked: list[int]) -> None:
    score(folder)
    for text in ("[]", "{"):
        (folder / "out" / "settings.json").write_text(text)
        with pytest.raises(SystemExit, match=r"out/settings\.json (holds no settings|cannot be read)"):
            score(folder)


def test_other_settings_are_refused(folder: Path, looked: list[int]) -> None:
    score(folder)
    with pytest.raises(SystemExit, match=r"holds results of rules\.threshold = 0\.3, and now it is 0\.5"):
        score(folder, "out", "--threshold=0.5")
    (folder / "detector" / "model.safetensors").write_text("another")
    with pytest.raises(SystemExit, match=r"holds results of detector\.weights = \w{16}, and now it is \w{16}"):
        score(folder)
    score(folder, "other", "--no-crop", "--max-objects=3", "--background=original")
    found = results(folder, "other")
    assert found["settings"]["rules"]["crop"] is False
    assert found["settings"]["rules"]["background"] == "original"
    assert "the rules are not those of the official evaluator" in found["warnings"]


def test_weights_that_are_missing_are_told_with_how_to_get_them(folder: Path, looked: list[int]) -> None:
    images = [f"--images={folder / 'images'}", f"--out={folder / 'out'}"]
    with pytest.raises(SystemExit, match=r"error: GenEval needs a detector: .*mask2former_swin-s.*hf download"):
        main(["geneval", *images])
    with pytest.raises(SystemExit, match=r"error: GenEval needs a clip: .*openai/clip-vit-large-patch14"):
        main(["geneval", *images, f"--detector={folder / 'detector'}"])
    with pytest.raises(SystemExit, match=r"error: --detector .*nowhere: there is nothing: .*download"):
        main(["geneval", *images, f"--detector={folder / 'nowhere'}", f"--clip={folder / 'clip'}"])
    (folder / "clip" / "model.safetensors").unlink()
    with pytest.raises(SystemExit, match=r"error: there are no weights at .*clip"):
        score(folder)
    assert not (folder / "out").exists()


def test_without_torch_the_extra_is_named(folder: Path, looked: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SystemExit, match=r'pip install "svg_jax\[eval\]"'):
        score(folder)


def test_images_that_cannot_be_scored(folder: Path, looked: list[int]) -> None:
    image = folder / "images" / "00001" / "samples" / "0001.png"
    whole = image.read_bytes()
    image.unlink()
    with pytest.raises(SystemExit, match=r"is not complete: 00001/samples/0001\.png is missing or damaged"):
        score(folder)
    image.write_bytes(whole[:60])
    with pytest.raises(SystemExit, match=r"error: image .*00001/samples/0001\.png cannot be read"):
        score(folder)
    image.write_bytes(b"no picture")
    with pytest.raises(SystemExit, match=r"0001\.png is missing or damaged"):
        score(folder)
    image.write_bytes(whole)
    about = folder / "images" / "00003" / "metadata.jsonl"
    about.write_text(json.dumps(ROWS[3] | {"include": [{"class": "sofa", "count": 1}]}))
    with pytest.raises(SystemExit, match=r"prompt 00003 of .*: unknown class 'sofa': "):
        score(folder)
    shutil.rmtree(folder / "images")
    with pytest.raises(SystemExit, match=r"error: there is no folder of pictures"):
        score(folder, "none")
    (folder / "images").mkdir()
    paint({}).save(folder / "images" / "a.png")
    with pytest.raises(SystemExit, match=r"holds images of the set dpg, which does not say what must be seen"):
        score(folder, "none")


def test_numbers_out_of_range(folder: Path) -> None:
    for flag in ("num-workers", "batch-size", "max-objects"):
        with pytest.raises(SystemExit, match=f"error: --{flag} is 0: it must be at least 1"):
            score(folder, "out", f"--{flag}=0")
    for flag, value in (
        ("threshold", "nan"),
        ("counting-threshold", "3"),
        ("max-overlap", "-1"),
        ("position-threshold", "inf"),
    ):
        with pytest.raises(SystemExit, match=f"error: --{flag} is {float(value)}: it must be from 0 to 1"):
            score(folder, "out", f"--{flag}={value}")
    with pytest.raises(SystemExit, match="error: --background is greyish: it must be a colour, as #999 or grey"):
        score(folder, "out", "--background=greyish")
    assert not (folder / "out").exists()


def test_weights_that_cannot_be_loaded_leave_no_folder(folder: Path) -> None:
    for workers in (1, 2):
        with pytest.raises(SystemExit, match="cannot be loaded as CLIPModel"):
            score(folder, "out", f"--num-workers={workers}", "--device=cpu")
        assert not (folder / "out").exists()


def test_a_worker_that_is_killed_is_told(folder: Path, looked: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(geneval, "look", die)
    with pytest.raises(SystemExit, match=r"error: a worker was killed.*fewer --num-workers"):
        score(folder, "out", "--num-workers=2", "--device=cpu")
    assert not list((folder / "out" / "parts").iterdir())
