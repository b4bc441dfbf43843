"""The two files between DPG-Bench and whatever answers its questions, by which any model can be the judge.

`questions.jsonl`, a row a question about a picture:

    {"key": "3f…", "item_id": "partiprompts97", "sample": 0, "row": 0, "image": "/…/partiprompts97.png",
     "box": [0, 0, 512, 512], "question": "Is there a car?"}

`image` is a file, which may hold several pictures; `box` says where in it this one lies: left, top, right and bottom in
pixels, as Pillow's `crop` takes them. `row` is that of the table. `key` stands for the bytes of the file, the box and
the question (see `key` below), so that whoever answers can tell whether the file is still the one that is asked about.

`answers.jsonl`, a row an answer, in any order and any number of files:

    {"key": "3f…", "answer": "yes", "model": "blip-vqa-base", "weights": "9c…"}

`answer` is `yes` or `no`; `model` and `weights` say who answers, and are the same in all rows: scores carry them.
Further keys are allowed. A key that stands in several rows has one answer.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath
from PIL import Image

from svg_jax.evaluate.dpg.rules import Question
from svg_jax.evaluate.generated import Generated, opened
from svg_jax.evaluate.grids import Box
from svg_jax.evaluate.prompt_sets import PromptEntry
from svg_jax.evaluate.text_files import json_lines

WRITE = "write it with `python -m svg_jax.evaluate dpg questions`"


@dataclasses.dataclass(frozen=True)
class Asked:
    """A row of `questions.jsonl`."""

    key: str
    item_id: str
    sample: int
    row: int
    image: str
    box: Box
    question: str


@dataclasses.dataclass(frozen=True)
class Answers:
    """All rows of `answers.jsonl`.

    Attributes:
      model: who answers.
      weights: which of its weights.
      by_key: the answers.
    """

    model: str
    weights: str
    by_key: Mapping[str, str]


def key(image: str, box: Box, question: str) -> str:
    """16 hexadecimal digits that stand for a question about a part of the image file with this SHA-256."""
    return hashlib.sha256(f"{image} {list(box)} {question}".encode()).hexdigest()[:16]


def ask(generated: Generated, entry: PromptEntry, questions: Sequence[Question]) -> list[Asked]:
    """The questions about a prompt, of each of its pictures.

    Raises:
        FileNotFoundError: A picture is not there.
        ValueError: It cannot be read, or is no grid of so many pictures.
    """
    asked: list[Asked] = []
    digests: dict[epath.Path, str] = {}
    for sample in range(generated.num_images):
        path, box = generated.path(entry, sample), generated.box(entry, sample)
        if path not in digests:
            digests[path] = hashlib.sha256(path.read_bytes()).hexdigest()
        where = os.path.abspath(path) if Path(path).exists() else str(path)
        asked += [
            Asked(key(digests[path], box, each.text), entry.id, sample, each.row, where, box, each.text)
            for each in questions
        ]
    return asked


def lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """JSONL."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_asked(path: str | epath.Path) -> list[Asked]:
    """`questions.jsonl`, local or `gs://`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is of another form, or empty.
    """
    asked = []
    for where, row in _rows(path, WRITE):
        match row:
            case {
                "key": str(found),
                "item_id": str(item_id),
                "sample": int(sample),
                "row": int(number),
                "image": str(image),
                "box": [int(left), int(top), int(right), int(bottom)],
                "question": str(question),
            }:
                asked.append(Asked(found, item_id, sample, number, image, (left, top, right, bottom), question))
            case _:
                raise ValueError(f"{where} is no question: {WRITE}")
    if not asked:
        raise ValueError(f"{path} holds no questions: {WRITE}")
    return asked


def read_settings(folder: str) -> Mapping[str, Any]:
    """What the questions in a folder are about, with at least `csv` and `num_images`.

    Raises:
        FileNotFoundError: `dpg questions` did not write there.
        ValueError: Its settings are damaged.
    """
    file = epath.Path(folder) / "settings.json"
    if not file.exists():
        raise FileNotFoundError(f"there is no {file}: --questions is the folder that `dpg questions` wrote")
    try:
        settings = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}): {WRITE}") from error
    match settings:
        case {"csv": str(), "num_images": int(count)} if count > 0:
            return settings
    raise ValueError(f"{file} does not say which table (csv) and how many pictures a prompt (num_images): {WRITE}")


def read_answers(paths: Sequence[str | epath.Path]) -> Answers:
    """`answers.jsonl`, or several that complete each other.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: One is of another form, all are empty, two models have answered, or a key has two answers.
    """
    by_key: dict[str, str] = {}
    origins: dict[tuple[str, str], str] = {}  # the first line of each
    for path in paths:
        for where, row in _rows(path, "answer the questions with `python -m svg_jax.evaluate dpg answer`"):
            match row:
                case {"key": str(found), "answer": str(answer), "model": str(model), "weights": str(weights)}:
                    origins.setdefault((model, weights), where)
                    if by_key.setdefault(found, answer) != answer:
                        raise ValueError(
                            f"{where} answers question {found} by '{answer}', and before it was '{by_key[found]}': "
                            "keep the answers of one run"
                        )
                case _:
                    raise ValueError(
                        f"{where} is no answer: expected the texts key, answer, model and weights, found "
                        f"{json.dumps(row)[:80]}"
                    )
    if not origins:
        raise ValueError(f"{', '.join(map(str, paths))} holds no answers: answer the questions first")
    if len(origins) > 1:
        each = " and ".join(f"{model} with weights {weights} ({where})" for (model, weights), where in origins.items())
        raise ValueError(f"answers of {len(origins)} models are mixed, {each}: score one model at a time")
    ((model, weights),) = origins
    return Answers(model, weights, by_key)


def _rows(path: str | epath.Path, otherwise: str) -> Iterator[tuple[str, Any]]:
    file = epath.Path(path)
    if not file.exists():
        raise FileNotFoundError(f"there is no {path}: {otherwise}")
    return json_lines(file, f"remove that line, or {otherwise}")


def read_pictures(asked: Iterable[Asked]) -> dict[int, Image.Image]:
    """What questions about one prompt are about: each sample, RGB.

    Raises:
        FileNotFoundError: A file is not there any more.
        ValueError: It is not the one that the questions were written about, or cannot be read as an image.
    """
    pictures: dict[int, Image.Image] = {}
    files: dict[str, tuple[str, Image.Image]] = {}
    for each in asked:
        if each.image not in files:
            files[each.image] = _read(each.image)
        digest, whole = files[each.image]
        if key(digest, each.box, each.question) != each.key:
            raise ValueError(f"{each.image} has changed since `dpg questions` wrote about it: run that again")
        if each.sample not in pictures:
            pictures[each.sample] = whole.crop(each.box)
    return pictures


def _read(path: str) -> tuple[str, Image.Image]:
    """SHA-256 and pixels of a file."""
    file = epath.Path(path)
    if not file.exists():
        raise FileNotFoundError(f"there is no {path}: run `dpg questions` again where the pictures are")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    with opened(file) as image:
        return digest, image.convert("RGB")
