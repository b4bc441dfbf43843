"""From prompts to DPG-Bench's scores, on random weights: at a stretch, and with two processes after one was killed."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import pytest

from svg_jax.evaluate import generated
from svg_jax.evaluate.__main__ import main
from svg_jax.evaluate.dpg import vqa
from tests.cluster import PATIENCE, job
from tests.evaluate.dpg.tiny_vqa import tiny_blip
from tests.tiny import write_tiny_weights

pytest.importorskip("torch")

DEVICES = 8  # in every process, as here
PROMPTS = {"b7": "a red car", "007": "a big picture", "fox": "no car"}
QUESTIONS = ("Is there a car?", "Is the car red?", "Is the picture big?")
TABLE = "item_id,text,proposition_id,dependency,tuple,question_natural_language\n" + "".join(
    f"{item_id},{text},{number},0,entity - whole (car),{question}\n"
    for item_id, text in PROMPTS.items()
    for number, question in enumerate(QUESTIONS, start=1)
)
# As `python -m svg_jax.evaluate`, with answers of one word.
COMMAND = """
from svg_jax.evaluate import __main__
from svg_jax.evaluate.dpg import vqa

vqa.MAX_NEW_TOKENS = 1
__main__.main()
"""
RESULTS = ("results.json", "images.jsonl", "results.md", "index.html")

Run = Callable[[list[str]], None]


class Killed(BaseException):
    """Stands for a signal; `test_generate` sends one."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """`weights`, `blip` and `table.csv`; what is loaded and compiled once serves all runs in this process."""
    from svg_jax.pipeline import SVGPipeline

    folder = tmp_path_factory.mktemp("dpg")
    write_tiny_weights(folder / "weights")
    tiny_blip(folder / "blip", says=("yes", "no"))
    (folder / "table.csv").write_text(TABLE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SVGPipeline, "from_checkpoint", functools.cache(SVGPipeline.from_checkpoint))
        patch.setattr(vqa, "MAX_NEW_TOKENS", 1)
        yield folder


def chain(folder: Path, out: Path, run: Run = main) -> dict[str, bytes]:
    """All files of the report; `run` does the two steps that processes share."""
    how = [f"--checkpoint={folder / 'weights'}", "--num-steps=1", "--batch-size=4"]
    run(["generate", "--set=dpg", f"--prompts={folder / 'table.csv'}", *how, f"--out={out / 'drawn'}"])
    table = f"--csv={folder / 'table.csv'}"
    main(["dpg", "questions", f"--images={out / 'drawn'}", table, f"--out={out / 'questions'}"])
    questions = f"--questions={out / 'questions' / 'questions.jsonl'}"
    run(["dpg", "answer", questions, f"--vqa={folder / 'blip'}", f"--out={out / 'answers'}", "--device=cpu"])
    answers = f"--answers={out / 'answers' / 'answers.jsonl'}"
    main(["dpg", "score", f"--questions={out / 'questions'}", answers, table, f"--out={out / 'scores'}"])
    return {name: (out / "scores" / name).read_bytes() for name in RESULTS}


def test_the_same_results_by_two_processes_after_one_was_killed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(file: Path, content: bytes) -> None:
        if file.name == "007.png":
            raise Killed
        write_whole(file, content)

    def killed_too(model: vqa.VQA, *asked: object) -> list[str]:
        calls.append(asked)
        if len(calls) > len(QUESTIONS) + 1:  # in the middle of the second prompt
            raise Killed
        return answer(model, *asked)

    calls: list[object] = []
    write_whole, answer = generated.write_whole, vqa.VQA.__call__

    def killed_then_two(arguments: list[str]) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(generated, "write_whole", killed)
            patch.setattr(vqa.VQA, "__call__", killed_too)
            with pytest.raises(Killed):
                main(arguments)
        logs = tmp_path / arguments[0]
        cache = {"JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", COMMAND, *arguments]
        with job(logs, 2, command, devices=DEVICES, env=os.environ | cache) as started:
            assert started.wait(PATIENCE) == 0, (logs / "0.log").read_text()

    whole = chain(folder, tmp_path / "whole")
    assert chain(folder, tmp_path / "split", killed_then_two) == whole
    answers = [row["answers"] for row in map(json.loads, whole["images.jsonl"].splitlines())]
    assert len(answers) == 4 * len(PROMPTS)
    assert len({tuple(row.values()) for row in answers}) > 2  # pictures are looked at
    assert 0 < json.loads(whole["results.json"])["scores"]["corrected"]["overall"] < 1
