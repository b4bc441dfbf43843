"""The door, end to end on random weights: one process, shares, real processes, and one that is killed."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from svg_jax import distributed
from svg_jax.evaluate import generate
from svg_jax.evaluate.__main__ import main
from svg_jax.evaluate.generated import open_generated
from svg_jax.pipeline import Job, SVGPipeline
from tests.cluster import PATIENCE, ROOT, job
from tests.evaluate.test_prompt_sets import ONE, THREE, TWO, write_rows, write_table
from tests.tiny import SIDE, tiny_config, write_tiny_weights

ROWS = [ONE, TWO, THREE, ONE, TWO]
NUM_IMAGES = 3  # 15 pictures, in batches of 8 on as many devices: prompts lie across batches
DEVICES = 8  # in every process: the rows that a device draws at a time decide how pixels are rounded

# As `python -m svg_jax.evaluate`, and killed before the last byte of a picture is written.
KILLED = """
import os, signal, sys
from svg_jax.evaluate import __main__
from svg_jax.evaluate import generated
whole = generated.write_whole

def killed(file, content):
    if file.as_posix().endswith("00002/samples/0001.png"):
        (file.parent / f".{file.name}.part").write_bytes(content[:-1])
        os.kill(os.getpid(), signal.SIGKILL)
    whole(file, content)

generated.write_whole = killed
__main__.main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`weights`, and `metadata.jsonl` of GenEval."""
    folder = tmp_path_factory.mktemp("generate")
    write_tiny_weights(folder / "weights")
    write_rows(folder / "metadata.jsonl", *ROWS)
    return folder


@pytest.fixture(scope="module", autouse=True)
def _loaded_once() -> Iterator[None]:
    """What is compiled for one test serves the next."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SVGPipeline, "from_checkpoint", functools.cache(SVGPipeline.from_checkpoint))
        yield


def arguments(
    folder: Path, out: Path, *more: object, prompts: str = "metadata.jsonl", name: str = "geneval"
) -> list[str]:
    of_set = [f"--set={name}", f"--prompts={folder / prompts}", f"--num-images={NUM_IMAGES}"]
    how = [f"--checkpoint={folder / 'weights'}", "--num-steps=2", "--batch-size=4"]
    return ["generate", *of_set, *how, f"--out={out}", *map(str, more)]


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """What one process draws that nothing interrupts."""
    main(arguments(folder, folder / "whole"))
    return folder / "whole"


def contents(folder: Path) -> dict[str, bytes]:
    """All files but those that a killed process had begun."""
    paths = (path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(".part"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def environment() -> dict[str, str]:
    cache = {"JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir)}
    return os.environ | cache | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3"}


def test_all_is_there_and_says_how_it_was_made(folder: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = open_generated(str(whole))
    assert (len(found.entries), found.num_images) == (len(ROWS), NUM_IMAGES)
    assert found.settings["num_steps"] == 2
    assert found.settings["origin"]["checkpoint"] == str(folder / "weights" / "dit")
    assert (found.settings["ema"], found.settings["step"]) == (True, 0)
    assert found.settings["dtypes"] == dict.fromkeys(("dit", "decoder", "text"), "float32")
    digests = found.settings["weights"]
    assert set(digests) == {"dit", "autoencoder", "text", "tokenizer", "config"}
    assert len(set(digests.values())) == 5
    assert "batch_size" not in found.settings
    flags = ("--num-steps=2", "--solver=euler", "--guidance-interval", 0, 1, "--dtype=float32")
    main(arguments(folder, whole, "--check", *flags))
    assert capsys.readouterr().out == f"all {len(ROWS) * (NUM_IMAGES + 1)} files are in {whole}\n"


def test_a_picture_depends_on_its_prompt_and_on_the_places_of_both(folder: Path, whole: Path) -> None:
    found = open_generated(str(whole))
    pixels = [np.asarray(found.picture(entry, i), int) for entry in found.entries for i in range(NUM_IMAGES)]
    assert pixels[0].shape == (SIDE, SIDE, 3)
    for i, a in enumerate(pixels):
        assert all(np.abs(a - b).max() > 1 for b in pixels[:i])  # also of equal prompts
    pipe = SVGPipeline.from_checkpoint(str(folder / "weights"))
    settings = pipe.settings(num_steps=2)
    ((alone,),) = pipe.stream([Job(ROWS[3]["prompt"], 3, 1)], settings)
    assert np.abs(pixels[3 * NUM_IMAGES + 1] - np.asarray(alone.image)).max() <= 1


def test_shares_give_what_one_run_gives(
    folder: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(arguments(folder, tmp_path, "--shard=1/2", "--batch-size=7"))
    assert sorted(path.name for path in tmp_path.glob("0*")) == ["00001", "00003"]
    assert f"8 of {len(ROWS) * (NUM_IMAGES + 1)} files are in {tmp_path}: the same command" in capsys.readouterr().out
    main(arguments(folder, tmp_path, "--shard=0/2"))
    assert contents(tmp_path) == contents(whole)


def test_two_real_processes_give_what_one_gives(folder: Path, whole: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "svg_jax.evaluate", *arguments(folder, tmp_path / "out")]
    with job(tmp_path / "logs", 2, command, devices=DEVICES, env=environment()) as running:
        assert running.wait(PATIENCE) == 0, (tmp_path / "logs" / "0.log").read_text()
    assert contents(tmp_path / "out") == contents(whole)
    assert f"all {len(ROWS) * (NUM_IMAGES + 1)} files are in" in (tmp_path / "logs" / "0.log").read_text()
    assert "files are in" not in (tmp_path / "logs" / "1.log").read_text()


def test_killed_and_started_again_gives_the_same(
    folder: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    call = arguments(folder, tmp_path)
    killed = subprocess.run([sys.executable, "-c", KILLED, *call], env=environment(), cwd=ROOT, check=False)
    assert killed.returncode == -signal.SIGKILL
    with pytest.raises(SystemExit) as end:
        main([*call, "--check"])
    assert end.value.code == 1
    missing = capsys.readouterr().out.splitlines()
    assert "00002/samples/0001.png" in missing
    assert missing[-1].endswith(f"files are in {tmp_path}: the same command draws the rest")

    drawn: list[str] = []
    save = generate.save
    monkeypatch.setattr(
        generate, "save", lambda folder, entry, *rest: drawn.append(entry.id) or save(folder, entry, *rest)
    )
    main(call)
    assert set(drawn) == {name.split("/")[0] for name in missing[:-1]}
    assert len(set(drawn)) < len(ROWS)
    assert contents(tmp_path) == contents(whole)
    drawn.clear()
    main(call)
    assert drawn == []


def test_a_damaged_picture_is_drawn_again(folder: Path, whole: Path, tmp_path: Path) -> None:
    main(arguments(folder, tmp_path))
    path = tmp_path / "00003" / "samples" / "0002.png"
    path.write_bytes(path.read_bytes()[:-5])
    main(arguments(folder, tmp_path))
    assert contents(tmp_path) == contents(whole)


def test_weights_may_lie_elsewhere_and_the_tokeniser_is_looked_at(folder: Path, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "weights", tmp_path / "weights")
    before = contents(whole)
    main(arguments(folder, whole, f"--checkpoint={tmp_path / 'weights'}"))
    assert contents(whole) == before
    words = tmp_path / "words"
    shutil.move(tmp_path / "weights" / "text_encoder" / "tokenizer", words)
    (words / "tokenizer.json").write_text((words / "tokenizer.json").read_text() + "\n")
    (words / "model.safetensors").write_text("no part of a tokeniser")
    with pytest.raises(SystemExit, match=r"pictures of weights\.tokenizer = \w{16}, and now it is \w{16}: choose"):
        main(arguments(folder, whole, f"--tokenizer={words}"))
    assert generate.tokenizer_digest(None) is None


def test_other_networks_give_another_digest_and_other_folders_do_not() -> None:
    config = tiny_config()
    before = generate.config_digest(config)
    with config.ignore_type():
        config.autoencoder.checkpoint = config.text.tokenizer = "/elsewhere"
        config.data.batch_size = 7
    assert generate.config_digest(config) == before
    config.text.max_tokens += 1
    assert generate.config_digest(config) != before


def test_sigterm_ends_after_a_batch_and_the_next_run_goes_on(
    folder: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "preempted", lambda turn: turn == 0)
    with pytest.raises(SystemExit) as end:
        main(arguments(folder, tmp_path))
    assert end.value.code == distributed.EXIT_PREEMPTED
    assert sorted(path.name for path in tmp_path.glob("0*")) == ["00000", "00001"]  # 8 of 3 each, whole ones
    monkeypatch.undo()
    main(arguments(folder, tmp_path))
    assert contents(tmp_path) == contents(whole)


def test_grids_of_dpg_bench_hold_the_pictures_of_their_prompts(folder: Path, tmp_path: Path) -> None:
    texts = {"b7": "a fox", "007": "two owls"}
    write_table(tmp_path / "dpg.csv", *((item, text) for item, text in texts.items() for _ in range(2)))
    (tmp_path / "prompts.txt").write_text("\n".join(texts.values()))
    more = ("--num-images=4", "--resolution=48x32")
    main(
        arguments(
            tmp_path, tmp_path / "dpg", *more, f"--checkpoint={folder / 'weights'}", prompts="dpg.csv", name="dpg"
        )
    )
    more += (f"--checkpoint={folder / 'weights'}",)
    main(arguments(tmp_path, tmp_path / "all", *more, prompts="prompts.txt", name="prompts"))
    grids, pictures = open_generated(str(tmp_path / "dpg")), open_generated(str(tmp_path / "all"))
    assert sorted(path.name for path in (tmp_path / "dpg" / "images").iterdir()) == ["007.png", "b7.png"]
    for in_grid, alone in zip(grids.entries, pictures.entries, strict=True):
        with Image.open(grids.path(in_grid, 0)) as grid:
            assert grid.size == (96, 64)
        for sample in range(4):
            assert grids.picture(in_grid, sample).tobytes() == pictures.picture(alone, sample).tobytes()


def test_the_help_names_the_command_and_its_flags(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ([], ["generate"]):
        with pytest.raises(SystemExit) as end:
            main([*command, "--help"])
        assert not end.value.code
    text = capsys.readouterr().out
    for flag in ("--set", "--prompts", "--check", "--num-images", "--guidance-scale", "--shard", "--no-ema"):
        assert flag in text


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--set=genevall"], r"unknown prompt set 'genevall': did you mean 'geneval'"),
        (["--prompts=none.jsonl"], r"no file of prompts 'none.jsonl': take prompts/evaluation_metadata"),
        (["--num-images=0"], r"--num-images is 0: it must be at least 1"),
        (["--set=dpg", "--prompts={}/dpg.csv", "--num-images=5"], r"a grid of DPG-Bench holds at most 4"),
        (["--resolution=33x32"], r"width 33 is not a multiple of the patch size 8: choose 32"),
        (["--resolution=large"], r"'large' is not WIDTHxHEIGHT"),
        (["--checkpoint=nowhere"], r"no checkpoint in .*nowhere"),
        (["--shard=2/2"], r"--shard '2/2' is not I/N"),
        (["--last-step=Mean"], r"--last-step is for --solver sde_euler"),
        (["--seed=1", "--out={}/whole"], r"whole holds pictures of seed = 0, and now it is 1: choose another --out"),
        (["--num-images=2", "--out={}/whole"], r"pictures of num_images = 3, and now it is 2"),
        (["--check", "--out=nowhere"], r"there is no folder of pictures 'nowhere'"),
        (["--set=geneval_long"], r"has no prompts of more than 30 words, .*: name it --set geneval"),
        (["--check", "--out={}/whole", "--seed=1"], r"pictures of seed = 0, and now it is 1: choose another --out"),
        (["--check", "--out={}/whole", "--num-images=2"], r"pictures of num_images = 3, and now it is 2"),
        (["--check", "--out={}/whole", "--no-ema"], r"pictures of ema = True, and now it is False"),
        (["--check", "--out={}/whole", "--solver=heun2"], r"pictures of solver = euler, and now it is heun2"),
        (["--check", "--out={}/whole", "--resolution=48x32"], r"pictures of width = 32, and now it is 48"),
        (["--solver=dopri5"], r"the solver dopri5 chooses steps that suit a whole batch, .*: choose another --solver"),
        (["--num-images=100000000"], r"--num-images is 100000000: it must be at least 1 and at most 1,000"),
    ],
)
def test_bad_input_is_one_sentence(folder: Path, whole: Path, tmp_path: Path, more: list[str], message: str) -> None:
    write_table(folder / "dpg.csv", ("1", "a fox"))
    with pytest.raises(SystemExit, match=message) as error:
        main(arguments(folder, tmp_path / "out", *(text.format(folder) for text in more)))
    assert "\n" not in str(error.value)


def test_a_checkpoint_is_needed_to_draw(folder: Path, tmp_path: Path) -> None:
    call = ["--set=geneval", f"--prompts={folder / 'metadata.jsonl'}", f"--out={tmp_path / 'out'}"]
    with pytest.raises(SystemExit, match=r"nothing to draw with: give --checkpoint"):
        main(["generate", *call])
    assert not (tmp_path / "out").exists()
