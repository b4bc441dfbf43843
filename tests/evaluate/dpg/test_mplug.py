"""The script as it is run: in another process, with a `modelscope` that answers by a rule and knows no svg_jax."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from svg_jax.evaluate.dpg import mplug
from svg_jax.evaluate.dpg.files import key, lines, read_answers

SCRIPT = Path(mplug.__file__)
COLORS = ("red", "blue")
QUESTIONS = ("Is it red?", "Is it there?", "Is it a café?")
MODEL = """
import rules  # a module of the environment, and not the one beside the script
assert rules.OURS is False


def pipeline(task, model, device):
    assert (task, device) == ("visual-question-answering", "cpu"), (task, device)
    calls = []

    def answer(inputs):
        calls.append(inputs)
        if "FAIL" in __import__("os").environ and len(calls) == 2:
            raise RuntimeError("out of memory")
        assert inputs["image"].mode == "RGB" and inputs["image"].size == (8, 8), inputs
        red = inputs["image"].getpixel((0, 0)) == (255, 0, 0)
        return {"text": "yes" if red or "red" not in inputs["question"] else "no"}

    return answer
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An environment with modelscope, weights, and questions about two pictures of one file."""
    weights = str(tmp_path / "weights")
    for name, text in {
        "modelscope/__init__.py": "",
        "modelscope/hub/__init__.py": "",
        "modelscope/hub/snapshot_download.py": f"def snapshot_download(name):\n    return {weights!r}",
        "modelscope/pipelines/__init__.py": MODEL,
        "modelscope/utils/__init__.py": "",
        "modelscope/utils/constant.py": "class Tasks:\n    visual_question_answering = 'visual-question-answering'",
        "rules.py": "OURS = False",
    }.items():
        file = tmp_path / "environment" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "pytorch_model.bin").write_bytes(b"weights")
    (tmp_path / "weights" / "config.json").write_text("{}")
    image = Image.new("RGBA", (16, 8))
    rows = []
    for sample, color in enumerate(COLORS):
        image.paste(color, (8 * sample, 0, 8 * sample + 8, 8))
    image.save(tmp_path / "grid.png")
    digest = hashlib.sha256((tmp_path / "grid.png").read_bytes()).hexdigest()
    for sample in range(len(COLORS)):
        box = (8 * sample, 0, 8 * sample + 8, 8)
        for row, question in enumerate(QUESTIONS):
            asked = {"item_id": "a", "sample": sample, "row": row, "box": box, "question": question}
            rows.append({"key": key(digest, box, question), **asked, "image": str(tmp_path / "grid.png")})
    (tmp_path / "questions.jsonl").write_text(lines(rows))
    return tmp_path


def run(folder: Path, *more: str, **environment: str) -> subprocess.CompletedProcess[str]:
    arguments = [f"--questions={folder / 'questions.jsonl'}", f"--out={folder / 'answers.jsonl'}", "--device=cpu"]
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments, *more],
        env={**os.environ, "PYTHONPATH": str(folder / "environment"), **environment},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def expected(folder: Path) -> dict[str, str]:
    keys = [json.loads(line)["key"] for line in (folder / "questions.jsonl").read_text().splitlines()]
    return dict(zip(keys, ["yes", "yes", "yes", "no", "yes", "yes"], strict=True))


def test_the_protocol_is_kept(folder: Path) -> None:
    done = run(folder)
    assert done.returncode == 0, done.stderr
    answers = read_answers([folder / "answers.jsonl"])
    assert answers.by_key == expected(folder)
    assert answers.model == "mplug_visual-question-answering_coco_large_en"
    assert answers.weights == hashlib.sha256(b"weights").hexdigest()[:16]


def test_a_run_goes_on_where_it_was_killed(folder: Path) -> None:
    assert run(folder).returncode == 0
    file = folder / "answers.jsonl"
    whole = file.read_text()
    file.write_text(whole[: len(whole) // 2])  # in the middle of a line
    assert run(folder).returncode == 0
    assert file.read_text() == whole
    assert run(folder).returncode == 0
    assert file.read_text() == whole


def test_a_question_that_fails_is_asked_again(folder: Path) -> None:
    failed = run(folder, FAIL="1")
    assert failed.returncode == 1
    assert "grid.png: Is it there?: out of memory" in failed.stderr
    assert "error: 1 questions could not be answered: run the same again" in failed.stderr
    assert len(read_answers([folder / "answers.jsonl"]).by_key) == 5
    assert run(folder).returncode == 0
    assert read_answers([folder / "answers.jsonl"]).by_key == expected(folder)


def test_a_picture_that_is_not_the_one_asked_about(folder: Path) -> None:
    Image.new("RGBA", (16, 8)).save(folder / "grid.png")
    done = run(folder)
    assert done.returncode == 1
    assert (
        done.stderr
        == f"error: {folder / 'grid.png'} has changed since `dpg questions` wrote about it: run that again\n"
    )
    assert not (folder / "answers.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"thesis, the only copy", "ends with what is no answer: choose another --out"),
        (b'{"seed": 1}', "ends with what is no answer: choose another --out"),
        (b"a\nb\n", "line 1 is not a JSON object"),
        (
            b'{"model": "other", "weights": "9c", "key": "a", "answer": "yes"}\n{"mod',
            "holds answers of other (9c), and",
        ),
    ],
)
def test_a_file_that_it_did_not_write_is_left_alone(folder: Path, content: bytes, message: str) -> None:
    (folder / "answers.jsonl").write_bytes(content)
    done = run(folder)
    assert done.returncode == 1
    assert message in done.stderr
    assert (folder / "answers.jsonl").read_bytes() == content


def test_shards_complete_each_other(folder: Path) -> None:
    files = [folder / f"{shard}.jsonl" for shard in range(2)]
    for shard, file in enumerate(files):
        assert run(folder, f"--out={file}", f"--shard={shard}/2", f"--model={folder / 'weights'}").returncode == 0
    answers = read_answers(files)
    assert answers.by_key == expected(folder)
    assert answers.model == "weights"


def test_what_it_refuses(folder: Path) -> None:
    def refused(message: str, *more: str, **environment: str) -> None:
        done = run(folder, *more, **environment)
        assert done.returncode == 1
        assert done.stderr.startswith("error: "), done.stderr
        assert message in done.stderr
        assert done.stderr.count("\n") == 1

    refused("--shard '2/2' is not I/N", "--shard=2/2")
    refused("No such file", "--questions=none.jsonl")
    assert run(folder).returncode == 0
    (folder / "weights" / "pytorch_model.bin").write_bytes(b"others")
    refused("holds answers of mplug_visual-question-answering_coco_large_en")
    (folder / "weights" / "pytorch_model.bin").unlink()
    refused("holds no weights")
    refused("mPLUG needs modelscope", PYTHONPATH="")
    (folder / "questions.jsonl").write_text('{"key": "a"}\n')
    refused("line 1 has no image, box, question")
    (folder / "questions.jsonl").write_text("[\n")
    refused("line 1 is not a JSON object")


def test_it_stands_alone_and_is_python_3_8() -> None:
    tree = ast.parse(SCRIPT.read_text(), feature_version=(3, 8))
    imported = {
        name.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names
    }
    imported |= {str(node.module).split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported - set(sys.stdlib_module_names) == {"PIL", "modelscope"}
    called = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not called & {
        "removeprefix",
        "removesuffix",
        "file_digest",
        "is_relative_to",
        "with_stem",
    }  # of 3.9 and later
