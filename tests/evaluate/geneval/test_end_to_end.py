"""From weights to scores, with networks of tiny size: one process, two real ones, and one that is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from svg_jax.evaluate.__main__ import main
from tests.cluster import PATIENCE, ROOT, job
from tests.evaluate.tiny_networks import tiny_clip, tiny_detector
from tests.tiny import write_tiny_weights

ROWS = [
    {"tag": "single_object", "include": [{"class": "cat", "count": 1}], "prompt": "a photo of a cat"},
    {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}], "prompt": "a photo of a red dog"},
    {
        "tag": "counting",
        "include": [{"class": "bird", "count": 2}],
        "exclude": [{"class": "bird", "count": 3}],
        "prompt": "a photo of two birds",
    },
    {"tag": "two_object", "include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1}], "prompt": "both"},
]

# As `python -m svg_jax.evaluate`, and killed before the last byte of a part is written.
KILLED = """
import os, signal, sys
from svg_jax.evaluate import __main__
from svg_jax.evaluate import results
whole = results.write_whole

def killed(file, content):
    if file.name == "000002.npz":
        (file.parent / f".{file.name}.part").write_bytes(content[:-1])
        os.kill(os.getpid(), signal.SIGKILL)
    whole(file, content)

results.write_whole = killed
__main__.main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Networks, and the `images` that one of them drew."""
    folder = tmp_path_factory.mktemp("geneval")
    write_tiny_weights(folder / "weights")
    tiny_detector(folder / "detector")
    tiny_clip(folder / "clip")
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    drawn = [f"--checkpoint={folder / 'weights'}", "--num-steps=2", "--num-images=2", f"--out={folder / 'images'}"]
    main(["generate", "--set=geneval", f"--prompts={folder / 'metadata.jsonl'}", *drawn])
    return folder


def arguments(folder: Path, out: str) -> list[str]:
    """Of the same command for every way to run it."""
    networks = [f"--detector={folder / 'detector'}", f"--clip={folder / 'clip'}", "--device=cpu", "--num-workers=1"]
    return ["geneval", f"--images={folder / 'images'}", *networks, f"--out={folder / out}"]


def contents(folder: Path) -> dict[str, bytes]:
    """All files but those that a killed process had begun."""
    paths = (path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(".part"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def whole(folder: Path) -> dict[str, bytes]:
    """What one process writes that nothing interrupts."""
    main(arguments(folder, "whole"))
    return contents(folder / "whole")


def test_scores_say_how_the_images_were_made(whole: dict[str, bytes]) -> None:
    results = json.loads(whole["results.json"])
    made = results["settings"]["generation"]
    assert (made["num_steps"], made["ema"], made["num_images"]) == (2, True, 2)
    assert made["weights"]["dit"]
    assert results["counts"] == {
        **dict.fromkeys(("single_object", "two_object", "counting", "colors"), 2),
        **{"overall": 8, "image_accuracy": 8, "prompt_accuracy": 4},
    }
    rows = [json.loads(line) for line in whole["images.jsonl"].decode().splitlines()]
    assert [row["filename"] for row in rows][-1] == "00003/samples/0001.png"
    assert any(json.loads(row["details"]) for row in rows)
    assert all(row["correct"] or row["reason"] for row in rows)


def test_two_real_processes_give_what_one_gives(folder: Path, whole: dict[str, bytes]) -> None:
    command = [sys.executable, "-m", "svg_jax.evaluate", *arguments(folder, "two")]
    with job(folder / "logs", 2, command) as running:
        assert running.wait(PATIENCE) == 0, (folder / "logs" / "0.log").read_text()
    assert contents(folder / "two") == whole
    assert "overall" in (folder / "logs" / "0.log").read_text()
    assert "overall" not in (folder / "logs" / "1.log").read_text()


def test_killed_and_started_again_gives_the_same(folder: Path, whole: dict[str, bytes]) -> None:
    command = [sys.executable, "-c", KILLED, *arguments(folder, "killed")]
    killed = subprocess.run(command, env=os.environ | {"XLA_FLAGS": ""}, cwd=ROOT, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert sorted(path.name for path in (folder / "killed" / "parts").glob("0*")) == ["000000.npz", "000001.npz"]
    main(arguments(folder, "killed"))
    assert contents(folder / "killed") == whole
