"""The command, mostly with a detector that knows two colours instead of the networks."""

from __future__ import annotations

import collections
import functools
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from svg_jax import distributed
from svg_jax.evaluate.__main__ import main
from svg_jax.evaluate.geneval import command as geneval
from svg_jax.evaluate.geneval import parts
from svg_jax.evaluate.geneval.clip import VIT_L_14
from svg_jax.evaluate.geneval.colors import ColorClassifier
from svg_jax.evaluate.geneval.detector import Detector
from svg_jax.evaluate.geneval.parts import Networks
from svg_jax.evaluate.prompt_sets import COLORS
from tests.evaluate.geneval.stand_ins import (
    CAT,
    CORRECT,
    ROWS,
    embed_images,
    embed_texts,
    files,
    find,
    lines,
    paint,
    results,
    score,
    stand_in,
    write_folder,
)
from tests.evaluate.tiny_networks import tiny_clip, tiny_detector


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path)


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return stand_in(monkeypatch)


def test_images_of_the_official_layout_are_scored(
    folder: Path, looked: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    score(folder)
    assert looked == [2] * 5
    rows = lines(folder)
    assert [row["correct"] for row in rows] == CORRECT
    assert rows[0]["filename"] == "00000/samples/0000.png"
    assert json.loads(rows[0]["details"]) == {"cat": [[*map(float, CAT), pytest.approx(0.95)]]}
    assert rows[1]["reason"] == "expected cat>=1, found 0"
    assert rows[6]["reason"] == "expected blue cat>=1, found 0 blue; and 1 red"
    assert rows[6]["colors"] == {"cat": ["red"]}
    assert rows[8]["reason"] == "expected cat right of target, found left of target"

    # What the official summary computes from the file is what the report says.
    tasks = collections.defaultdict(list)
    prompts = collections.defaultdict(list)
    for row in rows:
        tasks[row["tag"]].append(row["correct"])
        prompts[row["metadata"]].append(row["correct"])
    means = {task: sum(values) / len(values) for task, values in tasks.items()}
    found = results(folder)
    assert {task: found["scores"][task] for task in means} == means
    assert found["scores"]["overall"] == pytest.approx(sum(means.values()) / len(means))
    assert found["scores"]["image_accuracy"] == 0.6
    assert found["scores"]["prompt_accuracy"] == sum(map(any, prompts.values())) / len(prompts) == 0.8
    low, high = found["intervals"]["colors"]
    assert 0 <= low < found["scores"]["colors"] < high <= 1

    settings = found["settings"]
    assert settings["prompt_set"] == "geneval"
    assert settings["rules"]["counting_threshold"] == 0.9
    assert settings["origin"] == {"images": str(folder / "images"), "detector": "detector", "clip": "clip"}
    assert settings["detector"]["weights"] != settings["clip"]["weights"]
    assert settings["clip"].items() >= {**VIT_L_14, "dtype": "float32"}.items()
    assert settings["runs_on"] == ["here"]
    warnings = " ".join(found["warnings"])
    assert "CLIP runs in float32 here, and in float16 on a GPU in the official evaluator" in warnings
    assert "CLIP is not of the size" not in warnings
    assert "did not run on the same" not in warnings
    assert "there are no prompts of counting, color_attr: overall is the mean of the other tasks" in warnings
    assert "the detector is not known to be the official one" in warnings
    assert "GenEval has 4 images a prompt and this set 2" in warnings
    assert "index.html" in capsys.readouterr().out


def test_shards_make_the_same_files(folder: Path, looked: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    score(folder, "whole", "--batch-size=1")
    assert looked == [1] * 10
    score(folder, "shards", "--shard=1/2")
    assert "2 of 5 prompts are there" in capsys.readouterr().out
    assert not (folder / "shards" / "results.json").exists()
    score(folder, "shards", "--shard=0/2")
    assert files(folder / "shards") == {
        name: content.replace(b"/whole/", b"/shards/") for name, content in files(folder / "whole").items()
    }


def test_what_is_done_is_not_done_again(folder: Path, looked: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(distributed, "preempted", lambda turn: turn == 1)
        with pytest.raises(SystemExit) as end:
            score(folder)
    assert end.value.code == distributed.EXIT_PREEMPTED
    assert looked == [2, 2]
    score(folder)
    assert looked == [2] * 5
    once = files(folder / "out")
    score(folder)
    assert looked == [2] * 5
    assert files(folder / "out") == once

    paint({"cat": CAT}).save(folder / "images" / "00002" / "samples" / "0001.png")  # drawn again, and worse
    score(folder)
    assert looked == [2] * 6
    assert [row["correct"] for row in lines(folder)[4:6]] == [True, False]


def test_results_are_formed_again_without_images_weights_and_torch(
    folder: Path, looked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    score(folder)
    before = files(folder / "out")
    for name in ("images", "detector", "clip"):
        shutil.rmtree(folder / name)
    for name in ("results.json", "images.jsonl", "results.md", "index.html"):
        (folder / "out" / name).unlink()
    monkeypatch.setitem(sys.modules, "torch", None)
    score(folder)
    assert files(folder / "out") == before
    main(["geneval", f"--images={folder / 'images'}", f"--out={folder / 'out'}"])
    assert files(folder / "out") == before

    (folder / "out" / "parts" / "000003.npz").unlink()
    with pytest.raises(SystemExit, match=r"error: .*out lacks 1 of 5 prompts and there are no images at .*images"):
        score(folder)


def test_only_images_that_are_not_judged_must_be_there(folder: Path, looked: list[int]) -> None:
    score(folder)
    before = files(folder / "out")
    (folder / "images" / "00001" / "samples" / "0001.png").unlink()
    (folder / "out" / "results.json").unlink()
    score(folder)
    assert looked == [2] * 5
    assert files(folder / "out") == before
    (folder / "out" / "parts" / "000001.npz").unlink()
    with pytest.raises(SystemExit, match=r"is not complete: 00001/samples/0001\.png is missing or damaged"):
        score(folder)


def test_copies_elsewhere_are_the_same_networks_and_images(folder: Path, looked: list[int]) -> None:
    score(folder)
    for name in ("images", "detector", "clip"):
        (folder / name).rename(folder / f"{name}2")
    paths = [f"--{name}={folder / f'{name}2'}" for name in ("images", "detector", "clip")]
    main(["geneval", *paths, f"--out={folder / 'out'}", "--num-workers=1"])
    assert looked == [2] * 5
    origin = {"images": str(folder / "images2"), "detector": "detector2", "clip": "clip2"}
    assert results(folder)["settings"]["origin"] == origin


def test_networks_that_ran_on_different_machines_are_told(
    folder: Path, looked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    score(folder, "out", "--shard=1/2")
    elsewhere = Networks(find, ColorClassifier(embed_texts, embed_images), "there")
    monkeypatch.setattr(parts, "load", functools.cache(lambda *_: elsewhere))
    score(folder)
    found = results(folder)
    assert found["settings"]["runs_on"] == ["here", "there"]
    assert "the networks did not run on the same everywhere: here; there" in found["warnings"]


def test_long_prompts_are_labelled(folder: Path, looked: list[int]) -> None:
    for i, row in enumerate(ROWS):
        about = folder / "images" / f"{i:05d}" / "metadata.jsonl"
        about.write_text(json.dumps(row | {"refined_prompt": row["prompt"] + ", at length" * 40}))
    score(folder)
    found = results(folder)
    assert found["title"] == "GenEval (geneval_long)"
    assert "the prompts are the longer ones of geneval_long" in " ".join(found["warnings"])
    assert lines(folder)[0]["prompt"] == ROWS[0]["prompt"]
    assert "a photo of a cat, at length" in (folder / "out" / "index.html").read_text()


def test_processes_on_one_host_share_its_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.setattr("os.cpu_count", lambda: 6)
    assert geneval.devices(None, None) == ["cuda:0", "cuda:1", "cuda:2"]
    assert [geneval.devices(None, None, (i, 2)) for i in range(2)] == [["cuda:0", "cuda:2"], ["cuda:1"]]
    assert [geneval.devices("cuda", 1, (i, 4)) for i in range(4)] == [["cuda:0"], ["cuda:1"], ["cuda:2"], ["cuda:0"]]
    assert geneval.devices("cuda:1", 2, (0, 2)) == ["cuda:1"] * 2
    assert [len(geneval.devices("cpu", None, (0, number))) for number in (1, 2, 12)] == [6, 3, 1]
    with monkeypatch.context() as patch:
        patch.setattr(distributed, "everyone", lambda *_: ["a", "b", "a", "a"])
        patch.setattr("jax.process_index", lambda: 2)
        assert geneval.neighbours() == (1, 3)
    assert geneval.neighbours() == (0, 1)


def test_networks_in_real_checkpoint_format_on_one_and_two_workers(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (6, 5, 7, 3), dtype=np.uint8)
    tiny_detector(tmp_path / "detector")
    tiny_clip(tmp_path / "clip")
    pictures = [Image.fromarray(some).resize((70 + 10 * i, 50)) for i, some in enumerate(noise)]
    found = Detector.load(str(tmp_path / "detector"), device="cpu")(pictures, 0.3)
    # What was found is asked for, so that CLIP is asked too.
    names = [max(some, key=lambda name: some[name][0].score) for some in found]
    for i in range(3):
        samples = tmp_path / "images" / f"{i:05d}" / "samples"
        samples.mkdir(parents=True)
        for j in range(2):
            pictures[2 * i + j].save(samples / f"{j:04d}.png")
        row = {"tag": "colors", "include": [{"class": names[2 * i], "count": 1, "color": "red"}], "prompt": str(i)}
        (samples.parent / "metadata.jsonl").write_text(json.dumps(row))
    for out, workers in (("one", 1), ("two", 2)):
        score(tmp_path, out, f"--num-workers={workers}", "--device=cpu")
    rows = lines(tmp_path, "one")
    for i in range(3):
        assert set(rows[2 * i]["colors"][names[2 * i]]) <= set(COLORS)
        assert list(json.loads(rows[2 * i]["details"])) == list(found[2 * i])
    assert files(tmp_path / "one") == files(tmp_path / "two")
    (machine,) = results(tmp_path, "one")["settings"]["runs_on"]
    assert re.fullmatch(r"torch [\d.]+\S*, transformers [\d.]+\S*, cpu", machine)
