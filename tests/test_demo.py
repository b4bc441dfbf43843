"""The parts of the demo that are its own: running doors, killing them, and what it writes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines import scenes
from svg_jax.demo import GENEVAL, Demo, agreement, config_file, curve, labelled_grid, loss_fall, table


def test_a_command_that_fails_ends_the_demo(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="status 3"):
        Demo(tmp_path).run([sys.executable, "-c", "raise SystemExit(3)"])


def test_a_command_is_killed_when_its_checkpoint_appears(tmp_path: Path) -> None:
    mark = tmp_path / "checkpoint"
    code = f"import pathlib, time; pathlib.Path({str(mark)!r}).touch(); time.sleep(60)"
    demo = Demo(tmp_path)
    assert demo.run([sys.executable, "-c", code], kill_after=mark)
    assert not demo.run([sys.executable, "-c", ""], kill_after=mark)  # it was there before
    assert not demo.run([sys.executable, "-c", ""], kill_after=tmp_path / "never")


def test_commands_name_configs_that_exist(tmp_path: Path) -> None:
    for name in ("tiny_autoencoder", "tiny_scenes", "tiny_photographs"):
        assert Path(config_file(name)).is_file()
    command = Demo(tmp_path).command("train", "tiny_scenes", "dit", "scenes/train", 5)
    assert f"--config.text.tokenizer={tmp_path / 'tokenizer'}" in command
    assert "--config.num_train_steps=5" in command


def test_perfect_pictures_agree_with_what_was_asked() -> None:
    asked = [scenes.sample_scene(1, i) for i in range(24)]
    pictures = [scenes.render(scene) for scene in asked]
    assert min(agreement(pictures, asked).values()) == 1.0
    assert agreement(pictures[1:] + pictures[:1], asked)["all"] < 0.3


def test_scenes_are_scored_by_the_rules_of_geneval(tmp_path: Path) -> None:
    asked = [scenes.sample_scene(1, i) for i in range(40)]
    pictures = [scenes.render(scene) for scene in asked]
    shares = Demo(tmp_path).geneval(pictures[1:] + pictures[:1], asked)
    rendered, drawn = shares.values()
    assert set(rendered) == {*GENEVAL, "image_accuracy", "prompt_accuracy"}
    assert set(rendered.values()) == {1.0}
    assert drawn["overall"] < 0.5
    assert "expected" in (tmp_path / "geneval" / "index.html").read_text()


def test_a_table_for_the_terminal() -> None:
    lines = table({"all": {"x": 1.0, "a_long_name": 0.5}, "some": {"x": 0.25}}, ("x", "a_long_name")).splitlines()
    assert [line.split() for line in lines] == [["x", "a_long_name"], ["all", "1.00", "0.50"], ["some", "0.25", "-"]]
    assert len({len(line) for line in lines}) == 1


def test_loss_fall_and_curve() -> None:
    lines = [{"loss": float(2 - i / 20)} for i in range(20)]
    fall = loss_fall(lines)
    assert fall == {"loss at first": pytest.approx(1.975), "loss at last": pytest.approx(1.075)}
    points = [tuple(map(float, point.split(","))) for point in curve([line["loss"] for line in lines]).split()]
    assert points[0] == (0.0, 0.0)
    assert points[-1] == (600.0, 160.0)


def test_a_labelled_grid_holds_every_picture() -> None:
    pictures = [np.full((16, 16, 3), value, np.uint8) for value in (10, 90, 170)]
    grid = np.asarray(labelled_grid(pictures, ["one", "two words", "three more words"], columns=2))
    for value in (10, 90, 170):
        assert (grid == value).all(axis=-1).sum() >= 32 * 32


def test_the_report_is_written_and_the_page_is_one_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo = Demo(tmp_path)
    for run in ("autoencoder", "dit"):
        (tmp_path / run).mkdir()
        rows = [{"step": i, "loss": 2.0 / (i + 1)} for i in range(10)]
        (tmp_path / run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("samples", "reconstructions"):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{name}.png")
    shares = dict.fromkeys(scenes.ASPECTS, 0.5)
    demo.report |= {
        "shares that agree": {"generated": shares, "chance": shares},
        "GenEval": {"rendered": dict.fromkeys(GENEVAL, 1.0), "drawn": {"overall": 0.375}},
        "photographs": {
            "grids (rows, cols) in the first five batches": [[8, 8], [4, 16]],
            "compilations of the train step": 1,
            "loss at first": 2.0,
            "loss at last": 1.0,
        },
    }
    demo.write_report("dit")
    page = (tmp_path / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "0.50" in page
    assert "0.38" in page
    assert 'href="geneval/index.html"' in page
    assert 'href="dpg/index.html"' in page
    assert "http" not in page
    assert json.loads((tmp_path / "report.json").read_text())["diffusion transformer"]["loss at first"] == 2.0
    out = capsys.readouterr().out
    assert "2 aspect ratios, train step compiled 1 time(s)" in out
    assert "overall" in out
