"""From the answers to DPG-Bench's questions to its report."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from PIL import Image

from svg_jax.evaluate import scores
from svg_jax.evaluate.dpg.files import Answers, Asked, read_pictures
from svg_jax.evaluate.dpg.rules import (
    Judged,
    Mode,
    Question,
    Totals,
    by_prompt,
    is_yes,
    judge,
    normalised,
    oddities,
    totals,
)
from svg_jax.evaluate.generated import listed
from svg_jax.evaluate.prompt_sets import warn_of_count
from svg_jax.evaluate.published import DPG, PublishedTable
from svg_jax.output_folder import output_folder

logger = logging.getLogger("svg_jax")

MOST_OTHERS = 0.05  # of all answers; a judge with more that are neither yes nor no has not understood
SHOWN = 5  # answers in a message
SIDE = 160  # pixels of a thumbnail: of 4,260 pictures, 256 would make a page of 60 MB
GREY = (128, 128, 128)
OFFICIAL_JUDGE = "mplug_visual-question-answering_coco_large_en"  # at modelscope; damo's


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a mode makes of the answers.

    Attributes:
      mode: which.
      judged: by prompt, in the order of the table.
      totals: of these.
      left_out: the other prompts, by reason.
      warnings: sentences without a full stop at the end.
    """

    mode: Mode
    judged: Mapping[str, Judged]
    totals: Totals
    left_out: Mapping[str, Sequence[str]]
    warnings: Sequence[str]


def evaluate(
    questions: Sequence[Question], asked: Sequence[Asked], answers: Answers, num_images: int, mode: Mode
) -> Outcome:
    """Judges every prompt of the table.

    Args:
        questions: The table.
        asked: Questions about the pictures that there were.
        answers: To these.
        num_images: Pictures a prompt.
        mode: `official` leaves out what it cannot judge, as the official program does, and warns.

    Raises:
        ValueError: In `corrected`, pictures or answers are missing, or too many answers are neither yes nor no; in
            `official`, nothing is left.
    """
    keys = {(each.row, each.sample): each.key for each in asked}
    judged: dict[str, Judged] = {}
    left_out: dict[str, list[str]] = {"questions": [], "pictures": [], "answers": [], "questions they depend on": []}
    prompts = by_prompt(questions, mode)
    for item_id in dict.fromkeys(question.item_id for question in questions):
        some = prompts.get(item_id, [])
        places = [(question.row, sample) for sample in range(num_images) for question in some]
        if not some:  # its only one is the first of the table
            left_out["questions"].append(item_id)
        elif any(place not in keys for place in places):
            left_out["pictures"].append(item_id)
        elif any(keys[place] not in answers.by_key for place in places):
            left_out["answers"].append(item_id)
        else:
            texts = [[answers.by_key[keys[q.row, sample]] for q in some] for sample in range(num_images)]
            try:
                judged[item_id] = judge(some, texts, mode)
            except KeyError:
                left_out["questions they depend on"].append(item_id)
    warnings = _unclear(judged, mode)
    if mode == "corrected":
        remedies = {"pictures": "draw them and run `dpg questions` again", "answers": "have the rest answered"}
        for what, remedy in remedies.items():
            if lost := left_out[what]:
                raise ValueError(
                    f"{listed(lost)} incomplete, with {what} missing: {remedy}, or score with --mode official, which "
                    "leaves such prompts out"
                )
        warnings += oddities(questions)
    for what, lost in left_out.items():
        if lost:
            warnings.append(f"{listed(lost)} left out for want of {what}, as by the official program")
    return Outcome(mode, judged, totals(list(judged.values()), mode), left_out, warnings)


def _unclear(judged: Mapping[str, Judged], mode: Mode) -> list[str]:
    """What is to be said of answers that are not plainly yes or no."""
    answers = [answer for prompt in judged.values() for row in prompt.answers for answer in row]
    neither = [answer for answer in answers if normalised(answer) not in ("yes", "no")]
    shouted = [answer for answer in answers if normalised(answer) == "yes" and not is_yes(answer, mode)]
    warnings = []
    if neither:
        text = f"{len(neither):,} of {len(answers):,} answers are neither yes nor no ({_shown(neither)})"
        if mode == "corrected" and len(neither) > MOST_OTHERS * len(answers):
            raise ValueError(f"{text}: have the model answer by one of the two")
        warnings.append(f"{text} and taken for no")
    if shouted:
        warnings.append(
            f"{len(shouted):,} of {len(answers):,} answers say yes in other letters ({_shown(shouted)}), which the "
            "official program takes for no"
        )
    return warnings


def _shown(answers: Sequence[str]) -> str:
    return ", ".join(f"'{answer[:40]}'" for answer in sorted(set(answers))[:SHOWN])


def write_scores(
    out: str,
    settings: Mapping[str, Any],
    questions: Sequence[Question],
    prompts: Mapping[str, str],
    asked: Sequence[Asked],
    answers: Answers,
    modes: Sequence[Mode],
    *,
    title: str = "DPG-Bench",
    published: PublishedTable | None = DPG,
    warnings: Sequence[str] = (),
) -> str:
    """Writes the report; returns its tables.

    Args:
        out: Folder for it, local or `gs://`.
        settings: Of the questions.
        questions: The table.
        prompts: Texts by item.
        asked: All rows of `questions.jsonl`.
        answers: To them.
        modes: Which to report; the page shows what counts in the last one.
        title: Of the report.
        published: Scores of others that stand below; None where these cannot be compared with any.
        warnings: Sentences without a full stop.

    Raises:
        ValueError: As `evaluate`; or none of the answers is to one of these questions, or the folder holds scores of
            other settings.
    """
    known = {each.key for each in asked}
    if not known & answers.by_key.keys():
        raise ValueError("none of the answers is to one of these questions: give those that belong together")
    warnings = list(warnings)
    if strangers := len(answers.by_key.keys() - known):
        warnings.append(f"{strangers:,} answers are to other questions or to pictures drawn before, and left aside")
    outcomes = [evaluate(questions, asked, answers, settings["num_images"], mode) for mode in modes]
    if published and (text := warn_of_count("dpg", len(prompts), "the table")):
        warnings.append(text)
    if published and answers.model.rstrip("/").rsplit("/", 1)[-1] != OFFICIAL_JUDGE:
        warnings.append(
            f"{answers.model} answered, and published scores are those of mPLUG large ({OFFICIAL_JUDGE}): do not "
            "compare them"
        )
    for outcome in outcomes:
        warnings += [f"{outcome.mode}: {text}" for text in outcome.warnings]
    origin = {**settings, "judge": {"model": answers.model, "weights": answers.weights}}
    folder = output_folder(out, origin, inside=".", results="scores")
    by_item: dict[str, list[Asked]] = {}
    for each in asked:
        by_item.setdefault(each.item_id, []).append(each)
    report = scores.Report(
        title=title,
        settings={**origin, "modes": list(modes)},
        scores=[score for outcome in outcomes for score in _scores(outcome)],
        published=published,
        warnings=warnings,
        images=_images(prompts, outcomes),
        cards=_cards(prompts, outcomes[-1], by_item),
        shown=outcomes[-1].mode,
        percent=True,
        more={
            "left_out": {outcome.mode: outcome.left_out for outcome in outcomes},
            "categories": {
                outcome.mode: {name: total.value for name, total in outcome.totals.detailed.items()}
                for outcome in outcomes
            },
        },
        tables={"Categories in detail": _detailed(outcomes)},
    )
    return scores.write_report(folder, report)


def _scores(outcome: Outcome) -> list[scores.Score]:
    """Broad categories in the order of published tables, and the overall score."""
    found = {**outcome.totals.broad, "overall": outcome.totals.overall}
    columns = list(DPG.columns)
    names = sorted(found, key=lambda name: (columns.index(name) if name in columns else len(columns), name))
    return [scores.Score(name, **dataclasses.asdict(found[name]), group=outcome.mode) for name in names]


def _detailed(outcomes: Sequence[Outcome]) -> list[list[str]]:
    rows = [["category"]]
    for outcome in outcomes:
        rows[0] += [outcome.mode, "answers"]
    for name in sorted({name for outcome in outcomes for name in outcome.totals.detailed}):
        rows.append([name])
        for outcome in outcomes:
            total = outcome.totals.detailed.get(name)
            rows[-1] += [scores.number(total.value, percent=True), f"{total.count:,}"] if total else ["", ""]
    return rows


def _images(prompts: Mapping[str, str], outcomes: Sequence[Outcome]) -> Iterator[dict[str, Any]]:
    """A row a picture: its score in each mode, and the answers by question."""
    for item_id, prompt in prompts.items():
        found = {outcome.mode: outcome.judged[item_id] for outcome in outcomes if item_id in outcome.judged}
        for sample in range(max((len(judged.answers) for judged in found.values()), default=0)):
            row: dict[str, Any] = {"name": f"{item_id}/{sample}", "item_id": item_id, "sample": sample}
            row |= {"prompt": prompt} | {mode: judged.pictures[sample] for mode, judged in found.items()}
            *_, last = found.values()
            each = zip(last.questions, last.answers[sample], strict=True)
            yield row | {"answers": {str(question.id): answer for question, answer in each}}


def _cards(prompts: Mapping[str, str], outcome: Outcome, asked: Mapping[str, Sequence[Asked]]) -> Iterator[scores.Card]:
    """A card a picture with the tree of its questions; grey where the picture is not on this machine."""
    told = False
    for item_id, judged in outcome.judged.items():
        try:
            pictures = read_pictures(asked[item_id])
        except (FileNotFoundError, ValueError) as error:
            if not told:
                logger.warning("the page goes without some pictures: %s", error)
            told, pictures = True, {}
        boxes = {each.sample: each.box for each in asked[item_id]}
        for sample, counted in enumerate(judged.counted):
            left, top, right, bottom = boxes[sample]
            size = (right - left, bottom - top)
            rows = zip(judged.questions, judged.answers[sample], judged.raw[sample], counted, strict=True)
            yield scores.Card(
                name=f"{item_id}/{sample}",
                prompt=prompts[item_id],
                task="",
                passed=all(counted),
                reason=f"{sum(counted)} of {len(counted)} questions count",
                picture=scores.thumbnail(pictures.get(sample) or Image.new("RGB", size, GREY), SIDE),
                size=size,
                tree=[
                    scores.Question(str(q.id), list(map(str, q.parents)), q.text, q.category, answer, accepted, counts)
                    for q, answer, accepted, counts in rows
                ],
            )
