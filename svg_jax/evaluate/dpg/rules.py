"""The rules of DPG-Bench (arXiv 2403.05135, section 4): its questions, and what answers to them are worth.

A prompt is split into propositions, each with a question that is answered by yes or no, and with the propositions that
it depends on (a Davidsonian scene graph, arXiv 2310.18235). Two modes:

- `official` scores as the authors' program does, its mistakes included, to be compared with what others report.
- `corrected` mends them.

Mistakes of the program: it never asks the first question of the table, so that the prompt it belongs to fails wherever
another question depends on it (https://github.com/TencentQQGYLab/ELLA/issues/61); prompts that fail or have no picture
are left out in silence; and scores of categories are those of the last picture alone, before dependencies. `corrected`
asks every question, wants every picture, and counts categories over all pictures, after dependencies.

Where the table or an answer is odd, it also differs: `Yes.` is read as yes; a question that depends on one which its
prompt does not have is judged without that one, and does not fail the prompt; and a prompt in several places of the
table has the questions of all of them, and not of the last place alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from svg_jax.evaluate.text_files import csv_rows

Mode = Literal["official", "corrected"]
MODES: tuple[Mode, ...] = ("official", "corrected")
COLUMNS = ("item_id", "proposition_id", "dependency", "tuple", "question_natural_language")
SOURCE = "give the table of DPG-Bench, dpg_bench.csv"
NONE = 0  # in place of a parent: depends on no other proposition
DRAWS = 1000  # of the bootstrap


@dataclasses.dataclass(frozen=True)
class Question:
    """A row of the table.

    Attributes:
      row: its place there, from 0.
      item_id: the prompt that it is about.
      id: among those of its prompt.
      parents: ids that it depends on, without 0.
      meaning: the proposition, as in `entity - whole (motorcycle)`.
      text: the question.
    """

    row: int
    item_id: str
    id: int
    parents: tuple[int, ...]
    meaning: str
    text: str

    @property
    def category(self) -> str:
        """One of the detailed ones (L2), as in `entity - whole`."""
        return self.meaning.split("(")[0].strip()

    @property
    def broad_category(self) -> str:
        """One of the broad ones (L1): global, entity, attribute, relation, other."""
        return self.category.split("-")[0].strip()


@dataclasses.dataclass(frozen=True)
class Judged:
    """A prompt whose pictures have been judged; `answers`, `raw` and `counted` are [picture][question].

    Attributes:
      questions: those of the prompt.
      answers: as they were given.
      raw: whether each is yes.
      counted: whether it is, and so are the questions that it depends on.
    """

    questions: Sequence[Question]
    answers: Sequence[Sequence[str]]
    raw: Sequence[Sequence[bool]]
    counted: Sequence[Sequence[bool]]

    @property
    def pictures(self) -> list[float]:
        """The score of each picture: the share of its questions that count."""
        return [sum(row) / len(row) for row in self.counted]

    @property
    def score(self) -> float:
        """The mean over pictures."""
        return sum(self.pictures) / len(self.pictures)


@dataclasses.dataclass(frozen=True)
class Total:
    """A fraction over all prompts, the 95% interval of it, and how many prompts or answers it is the mean of."""

    value: float
    low: float
    high: float
    count: int


@dataclasses.dataclass(frozen=True)
class Totals:
    """Of all prompts, and of the categories by name."""

    overall: Total
    broad: Mapping[str, Total]
    detailed: Mapping[str, Total]


def read_questions(path: str | Path) -> list[Question]:
    """All rows of `dpg_bench.csv`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A column is missing, or a row says what cannot be understood.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"there is no {path}: --csv is dpg_bench.csv, as github.com/TencentQQGYLab/ELLA has it")
    rows = enumerate(csv_rows(file, COLUMNS))
    questions = [_question(row, values, f"{path}, line {line}") for row, (line, values) in rows]
    if not questions:
        raise ValueError(f"{path} has no rows: {SOURCE}")
    return questions


def _question(row: int, values: Mapping[str, str], where: str) -> Question:
    found = {name: values[name] for name in COLUMNS}
    for name, value in found.items():
        if not value.strip():
            raise ValueError(f"{where} has nothing in column {name}: {SOURCE}")
    try:
        number = int(found["proposition_id"])
        parents = [int(parent) for parent in found["dependency"].split(",")]
    except ValueError as error:
        raise ValueError(
            f"{where} has proposition_id '{found['proposition_id']}' and dependency '{found['dependency']}', "
            f"which are to be a whole number and some with commas between: {SOURCE}"
        ) from error
    parents = [parent for parent in parents if parent != NONE]
    text = found["question_natural_language"]
    return Question(row, found["item_id"].strip(), number, tuple(parents), found["tuple"], text)


def by_prompt(questions: Sequence[Question], mode: Mode) -> dict[str, list[Question]]:
    """The questions of each prompt, in the order of the table.

    Of several with one id the last stands, in the place of the first. `official` leaves out the first row, and of a
    prompt in several places of the table keeps the last.
    """
    prompts: dict[str, dict[int, Question]] = {}
    before = None
    for question in questions[1:] if mode == "official" else questions:
        if mode == "official" and question.item_id != before:
            prompts[question.item_id] = {}
        prompts.setdefault(question.item_id, {})[question.id] = question
        before = question.item_id
    return {item_id: list(found.values()) for item_id, found in prompts.items()}


def oddities(questions: Sequence[Question]) -> list[str]:
    """What a table says that `corrected` has to pass over, a sentence each."""
    found = []
    ids = {(question.item_id, question.id) for question in questions}
    if again := len(questions) - len(ids):
        found.append(f"{again:,} propositions have an id that another of their prompt has: the last one is asked")
    lost = [q for q in questions if any((q.item_id, parent) not in ids for parent in q.parents)]
    if lost:
        found.append(
            f"{len(lost):,} propositions depend on one that their prompt does not have, the first: {lost[0].id} of "
            f"{lost[0].item_id}: they are judged without"
        )
    return found


def normalised(answer: str) -> str:
    """Without capitals, full stops and space around it."""
    return answer.strip().rstrip(".").rstrip().lower()


def is_yes(answer: str, mode: Mode) -> bool:
    """`official` takes exactly `yes`."""
    return (answer if mode == "official" else normalised(answer)) == "yes"


def counted(questions: Sequence[Question], raw: Sequence[bool], mode: Mode) -> list[bool]:
    """What counts of one picture: no question with a parent that does not.

    In one pass in the order of the table, so that a parent lost in this pass takes along the questions behind it, and
    not those before.

    Raises:
        KeyError: In `official`, a question depends on one that the prompt does not have, and on none before it in its
            list that is answered by no. The prompt fails.
    """
    values = {question.id: value for question, value in zip(questions, raw, strict=True)}
    for question in questions:
        for parent in question.parents:
            if not (values[parent] if mode == "official" else values.get(parent, True)):
                values[question.id] = False
                break
    return list(values.values())


def judge(questions: Sequence[Question], answers: Sequence[Sequence[str]], mode: Mode) -> Judged:
    """Judges a prompt by the answers [picture][question].

    Raises:
        KeyError: As `counted`.
    """
    raw = [[is_yes(answer, mode) for answer in row] for row in answers]
    return Judged(questions, answers, raw, [counted(questions, row, mode) for row in raw])


def totals(judged: Sequence[Judged], mode: Mode) -> Totals:
    """The mean over prompts, and the share of yes in each category; of `official`, in the last pictures' raw answers.

    Intervals are those of a bootstrap: of 1,000 times as many prompts, drawn with replacement, the middle 95%.

    Raises:
        ValueError: There are no prompts.
    """
    if not judged:
        raise ValueError("none of the prompts could be judged: pictures or answers are missing for every one of them")
    sums: dict[tuple[str, str], np.ndarray] = {("overall", ""): np.array([prompt.score for prompt in judged])}
    counts: dict[tuple[str, str], np.ndarray] = {("overall", ""): np.ones(len(judged))}
    for i, prompt in enumerate(judged):
        for row in prompt.raw[-1:] if mode == "official" else prompt.counted:
            for question, value in zip(prompt.questions, row, strict=True):
                for key in (("broad", question.broad_category), ("detailed", question.category)):
                    sums.setdefault(key, np.zeros(len(judged)))[i] += value
                    counts.setdefault(key, np.zeros(len(judged)))[i] += 1
    # How often each draw takes each prompt, [draws, prompts].
    taken = np.random.default_rng(0).multinomial(len(judged), np.full(len(judged), 1 / len(judged)), DRAWS)
    found = {key: _total(sums[key], counts[key], taken) for key in sums}
    broad, detailed = (
        {name: total for (kind, name), total in sorted(found.items()) if kind == level}
        for level in ("broad", "detailed")
    )
    return Totals(found["overall", ""], broad, detailed)


def _total(
    sums: Float[np.ndarray, " prompts"], counts: Float[np.ndarray, " prompts"], taken: Int[np.ndarray, "draws prompts"]
) -> Total:
    drawn = taken @ counts
    shares = (taken @ sums)[drawn > 0] / drawn[drawn > 0]  # of a rare category, a draw may hold nothing
    low, high = np.quantile(shares, (0.025, 0.975))
    return Total(float(sums.sum() / counts.sum()), float(low), float(high), int(counts.sum()))
