"""DPG-Bench: how much of a long prompt a picture shows, asked of a model that sees, question by question.

In three steps, of which only the second needs a model, and can be done by any program anywhere
(`svg_jax.evaluate.dpg.files` describes the files between them):

    python -m svg_jax.evaluate dpg questions --images DIR --csv FILE --out QUESTIONS
    python -m svg_jax.evaluate dpg answer --questions QUESTIONS/questions.jsonl --vqa FOLDER --out ANSWERS
    python -m svg_jax.evaluate dpg score --questions QUESTIONS --answers ANSWERS/answers.jsonl --csv FILE --out DIR

Published scores are those of mPLUG large in mode `official`: `svg_jax/evaluate/dpg/mplug.py` answers with it, in the
old environment that it needs. Scores of two judges cannot be compared.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from etils import epath
from tqdm import tqdm

from svg_jax import distributed
from svg_jax.evaluate.dpg import vqa
from svg_jax.evaluate.dpg.files import Asked, ask, lines, read_answers, read_asked, read_pictures, read_settings
from svg_jax.evaluate.dpg.rules import MODES, Question, normalised, read_questions
from svg_jax.evaluate.dpg.scores import write_scores
from svg_jax.evaluate.generated import listed, open_generated
from svg_jax.evaluate.grids import GRIDS
from svg_jax.evaluate.prompt_sets import read_prompt_set
from svg_jax.evaluate.results import TOGETHER, work_through
from svg_jax.evaluate.weights import weights_digest
from svg_jax.output_folder import output_folder, write_whole

logger = logging.getLogger("svg_jax")


def add_flags(flags: argparse.ArgumentParser) -> None:
    """What `python -m svg_jax.evaluate dpg` asks for."""
    flags.set_defaults(shard=None)
    steps = flags.add_subparsers(dest="step", required=True, metavar="STEP")

    def step(name: str, summary: str) -> argparse.ArgumentParser:
        return steps.add_parser(name, help=summary, description=summary, allow_abbrev=False)

    table = "dpg_bench.csv of https://github.com/TencentQQGYLab/ELLA"
    add = step("questions", "Writes down what is to be asked about each picture.").add_argument
    add("--images", required=True, help="folder that `generate --set dpg` filled, or of the official grids ITEM_ID.png")
    add("--csv", required=True, help=table)
    add("--grid", choices=GRIDS, help="pictures in a file of another program (default: 2x2)")
    add("--num-images", type=int, help="how many of them are judged, the first ones (default: all)")
    add("--out", required=True, help="folder for questions.jsonl, local or gs://")

    add = step("answer", "Answers questions with a model of transformers.").add_argument
    add("--questions", required=True, metavar="FILE", help="questions.jsonl")
    add("--vqa", required=True, metavar="FOLDER", help="of BLIP's question answering, or of a chat model that sees")
    add("--out", required=True, help="folder for answers.jsonl, local or gs://")
    add("--device", help="as torch names it; by default a GPU where there is one")
    add("--shard", metavar="I/N", help="every N-th prompt from the I-th; by default a share a process of a job")

    add = step("score", "Turns answers into scores; needs neither weights nor torch.").add_argument
    add("--questions", required=True, metavar="FOLDER", help="the one that `questions` wrote")
    add(
        "--answers", required=True, nargs="+", metavar="FILE", help="answers.jsonl, or several that complete each other"
    )
    add("--csv", required=True, help=table)
    add(
        "--mode", choices=(*MODES, "both"), default="both", help="with the official mistakes or without (default: both)"
    )
    add("--out", required=True, help="folder for the results, local or gs://")


def run(options: argparse.Namespace) -> None:
    """Does one step.

    Raises:
        ValueError: Files are of another form, do not belong together, or are incomplete.
        FileNotFoundError: There are no pictures, questions, answers or weights.
        ImportError: A model is to answer, and torch is not installed.
    """
    if options.step == "answer":
        answer(options)
    elif distributed.is_first():
        (write_questions if options.step == "questions" else score)(options)


def write_questions(options: argparse.Namespace) -> None:
    """Writes `questions.jsonl`, about the pictures that are there, and `settings.json`."""
    prompts = read_prompt_set("dpg", options.csv)
    questions: dict[str, list[Question]] = {}
    for question in read_questions(options.csv):
        questions.setdefault(question.item_id, []).append(question)
    generated = open_generated(
        options.images, prompts, num_images=options.num_images, grid=options.grid, complete=False
    )
    place = os.path.abspath(options.images) if Path(options.images).exists() else options.images
    settings = {
        "csv": prompts.digest,
        "num_images": generated.num_images,
        # Of another program's pictures nothing is known but where they lie.
        "pictures": generated.settings or {"folder": place},
    }
    asked: list[Asked] = []
    missing: list[str] = []
    for entry in tqdm(generated.entries, unit="prompt"):
        if generated.holds(entry):
            asked += ask(generated, entry, questions[entry.id])
        else:
            missing.append(entry.id)
    if not asked:
        raise ValueError(f"{options.images} holds no picture of a prompt in {options.csv}: generate them first")
    if missing:
        logger.warning("%s missing or damaged, without which mode corrected refuses to score", listed(missing))
    folder = output_folder(options.out, settings, inside=".", results="questions")
    file = folder / "questions.jsonl"
    write_whole(file, lines(vars(each) for each in asked))
    print(
        f"{len(asked):,} questions about {len(generated.entries) - len(missing):,} prompts are in {file}\n"
        f"answer them by\n  python -m svg_jax.evaluate dpg answer --questions {file} --vqa FOLDER --out DIR\n"
        "or with the official model, in the environment that it needs:\n"
        f"  python {Path(__file__).with_name('mplug.py')} --questions {file} --out answers.jsonl"
    )


def answer(options: argparse.Namespace) -> None:
    """Answers what is not answered yet, a file a prompt; whoever completes the last one writes `answers.jsonl`."""
    prompts: dict[str, list[Asked]] = {}
    for each in read_asked(options.questions):
        prompts.setdefault(each.item_id, []).append(each)
    vqa.check_folder(options.vqa)
    origin = {"model": Path(options.vqa).resolve().name, "weights": weights_digest(options.vqa)}
    settings = {**origin, "instruction": vqa.INSTRUCTION, "max_new_tokens": vqa.MAX_NEW_TOKENS}
    folder = output_folder(options.out, settings, inside="answers", results="answers")
    items = list(prompts.items())
    shard, shards = options.shard
    todo = [number for number in range(len(items))[shard::shards] if not _answered(folder, *items[number])]
    model = functools.cache(lambda: vqa.VQA.load(options.vqa, device=options.device))

    def answer_one(number: int) -> None:
        item_id, asked = items[number]
        rows = [{**origin, **row} for row in answer_prompt(model(), asked)]
        write_whole(_part(folder, item_id), lines(rows))

    work_through(len(items), options.shard, todo, answer_one, unit="prompt")
    distributed.barrier("answered", TOGETHER)
    if distributed.is_first():
        done = [item_id for item_id, asked in prompts.items() if _answered(folder, item_id, asked)]
        if len(done) < len(prompts):
            print(f"{len(done)} of {len(prompts)} prompts are answered: the last shard writes answers.jsonl")
        else:
            file = folder / "answers.jsonl"
            write_whole(file, "".join(_part(folder, item_id).read_text() for item_id in prompts))
            print(f"all questions are answered in {file}")
    distributed.barrier("merged", TOGETHER)


def answer_prompt(model: vqa.VQA, asked: Sequence[Asked]) -> list[dict[str, str]]:
    """Keys and answers of the questions about one prompt's pictures, in their order.

    One question goes to all pictures together, so that no other setting decides what shares a batch. What can be read
    as yes or no is written so, as mPLUG would say it.
    """
    pictures = read_pictures(asked)
    rows: dict[int, list[Asked]] = {}
    for each in asked:
        rows.setdefault(each.row, []).append(each)
    answers: dict[tuple[int, int], str] = {}
    for row, some in rows.items():
        texts = model([pictures[each.sample] for each in some], some[0].question)
        answers |= {(row, each.sample): text for each, text in zip(some, texts, strict=True)}

    def worded(text: str) -> str:
        return plain if (plain := normalised(text)) in ("yes", "no") else text

    return [{"key": each.key, "answer": worded(answers[each.row, each.sample])} for each in asked]


def _part(folder: epath.Path, item_id: str) -> epath.Path:
    return folder / "answers" / f"{item_id}.jsonl"


def _answered(folder: epath.Path, item_id: str, asked: Sequence[Asked]) -> bool:
    """Whether just these questions are answered in a prompt's file: pictures may have been drawn anew."""
    try:
        rows = [json.loads(line) for line in _part(folder, item_id).read_bytes().splitlines()]
        return [row["key"] for row in rows] == [each.key for each in asked]
    except (OSError, ValueError, KeyError, TypeError):
        return False  # not there, or damaged


def score(options: argparse.Namespace) -> None:
    """Writes the report."""
    prompts = read_prompt_set("dpg", options.csv)
    settings = read_settings(options.questions)
    if (taken_from := settings["csv"]) != prompts.digest:
        raise ValueError(
            f"{options.csv} is not the table that the questions in {options.questions} were taken from (its SHA-256 is "
            f"{prompts.digest[:8]}…, not {taken_from[:8]}…): give that one, or run `dpg questions` again"
        )
    asked = read_asked(epath.Path(options.questions) / "questions.jsonl")
    answers = read_answers(options.answers)
    modes = MODES if options.mode == "both" else (options.mode,)
    texts = {entry.id: entry.prompt for entry in prompts.entries}
    print(write_scores(options.out, settings, read_questions(options.csv), texts, asked, answers, modes))
