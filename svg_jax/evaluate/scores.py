"""The form of every evaluation's results: JSON, a line an image, a Markdown table, and one page with the pictures."""

from __future__ import annotations

import base64
import dataclasses
import importlib.metadata
import io
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import resources
from typing import Any

from etils import epath
from PIL import Image

from svg_jax.evaluate.published import PublishedTable
from svg_jax.output_folder import flattened, write_whole

Rows = Sequence[Sequence[str]]  # of a table, its head first
BESIDE = "Beside published scores"  # the title of a table


@dataclasses.dataclass(frozen=True)
class Score:
    """A number of the whole set.

    Attributes:
      name: the key in `results.json`, such as `color_attr`, and the column of published rows.
      value: a fraction, or in the unit of the metric; NaN and infinity are null in JSON.
      low: of the 95% interval, in the same unit.
      high: likewise.
      count: of the images or questions that it is of.
      group: where the same scores come in several forms, such as the modes of DPG-Bench, which one: a row each.
      title: how it is shown; by default its name, with blanks.
    """

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    count: int | None = None
    group: str = ""
    title: str = ""


@dataclasses.dataclass(frozen=True)
class Box:
    """A detection on a picture.

    Attributes:
      x1, y1, x2, y2: edges in pixels of the picture as it was judged, which may lie outside of it.
      label: its class.
      color: the name of the colour that it was given, where it was asked for one.
      score: of the detector, in [0, 1].
      judged: whether the verdict looked at it, or it was only found.
    """

    x1: float
    y1: float
    x2: float
    y2: float
    label: str
    color: str | None = None
    score: float = 1.0
    judged: bool = True


@dataclasses.dataclass(frozen=True)
class Question:
    """A question of DPG-Bench and its answer.

    Attributes:
      id: among those of its prompt.
      parents: ids of the questions that it depends on; () for a root.
      text: the question itself.
      category: such as `entity - whole`.
      answer: as it was given; None where there is none.
      accepted: whether the answer by itself is taken for yes.
      counted: whether it counts as yes once its parents are taken into account.
    """

    id: str
    parents: Sequence[str]
    text: str
    category: str
    answer: str | None
    accepted: bool
    counted: bool


@dataclasses.dataclass(frozen=True)
class Card:
    """A picture on the page.

    Attributes:
      name: of the image, as in `images.jsonl`.
      prompt: what it was drawn for.
      task: one of few words that the page can be filtered by; "" where there are no tasks.
      passed: the verdict; None where there is none.
      reason: why, one line a reason, or numbers; "" where there is nothing to say.
      picture: JPEG, as `thumbnail` makes it.
      size: (width, height) in pixels of the picture as it was judged.
      boxes: detections.
      tree: questions, parents in any order.
    """

    name: str
    prompt: str
    task: str
    passed: bool | None
    reason: str
    picture: bytes
    size: tuple[int, int]
    boxes: Sequence[Box] = ()
    tree: Sequence[Question] = ()


@dataclasses.dataclass(frozen=True)
class Report:
    """All that is to be said of a run.

    Attributes:
      title: such as "GenEval (geneval_long)".
      settings: everything that the scores depend on, as JSON can hold it.
      scores: of the whole set, in the order of the table.
      published: rows of others whose columns are names of scores.
      warnings: sentences without a full stop at the end.
      images: rows of `images.jsonl`, in their order; read once, so that any number fits.
      cards: for the page, in their order; read once.
      shown: where scores come in groups, the one that verdicts and reasons on the cards are of.
      percent: whether scores are fractions to be shown times 100, as DPG-Bench does.
      more: further keys of `results.json`.
      tables: further tables below the scores, by title: the first row is the head.
    """

    title: str
    settings: Mapping[str, Any]
    scores: Sequence[Score]
    published: PublishedTable | None = None
    warnings: Sequence[str] = ()
    images: Iterable[Mapping[str, Any]] = ()
    cards: Iterable[Card] = ()
    shown: str = ""
    percent: bool = False
    more: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tables: Mapping[str, Rows] = dataclasses.field(default_factory=dict)


def write_report(folder: epath.Path, report: Report) -> str:
    """Writes `images.jsonl`, `index.html`, `results.md` and, last, `results.json`.

    In `results.json`, `scores` holds values by name, and `intervals` ([low, high]) and `counts` those that are known;
    by group first where scores have one; `versions` are those of the programs that counted. Numbers that JSON cannot
    hold are null.

    Returns:
        The tables in Markdown, and the address of the page.
    """
    found = {
        "title": report.title,
        "scores": _by_name(report.scores, lambda score: score.value),
        "intervals": _by_name(report.scores, lambda score: None if score.low is None else [score.low, score.high]),
        "counts": _by_name(report.scores, lambda score: score.count),
        **report.more,
        "warnings": list(report.warnings),
        "settings": report.settings,
        "versions": {name: importlib.metadata.version(name) for name in ("svg_jax", "jax", "numpy", "pillow")},
    }
    text = markdown(report)
    listed = "".join(f"- {key}: {value}\n" for key, value in flattened(report.settings).items())
    rows = (json.dumps(_plain(row), ensure_ascii=False) + "\n" for row in report.images)
    write_whole(folder / "images.jsonl", rows)
    write_whole(folder / "index.html", page(report))
    write_whole(folder / "results.md", f"# {report.title}\n\n{text}\n## Settings\n\n{listed}")
    write_whole(folder / "results.json", json.dumps(_plain(found), indent=2, ensure_ascii=False))
    return f"{text}\n{folder / 'index.html'}"


def markdown(report: Report) -> str:
    """The tables, each but the first below its title, and the warnings."""
    lines: list[str] = []
    for title, (head, *rows) in tables(report).items():
        lines += ["", f"## {title}", ""] if lines else []
        lines += [_line(head), "|" + "---|" * len(head), *map(_line, rows)]
        if title == BESIDE and report.published:
            lines += ["", report.published.note]
    for text in report.warnings:
        lines += ["", f"Warning: {text}."]
    return "\n".join(lines) + "\n"


def page(report: Report) -> Iterator[str]:
    """The report as one HTML file that loads nothing from elsewhere, in pieces: no more than a card is held."""
    from jinja2 import Environment

    template = resources.files("svg_jax.evaluate").joinpath("gallery.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).generate(
        title=report.title,
        tables=tables(report),
        words=("score", "source", "category"),  # columns that hold words
        notes={BESIDE: report.published.note} if report.published else {},
        warnings=report.warnings,
        settings=flattened(report.settings),
        cards=map(_embedded, report.cards),
        shown=report.shown,
    )


def tables(report: Report) -> dict[str, Rows]:
    """Tables by title: the scores, ours beside the published ones, and the further ones."""
    found: dict[str, Rows] = {"Scores": _score_table(report)}
    if report.published:
        found[BESIDE] = _comparison(report, report.published)
    return found | dict(report.tables)


def number(value: float, percent: bool = False) -> str:
    """As tables show it."""
    if percent:
        return f"{100 * value:.2f}"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.3f}"


def thumbnail(image: Image.Image, side: int = 256) -> bytes:
    """A JPEG of the picture, its longer side at most `side` pixels."""
    small = image.convert("RGB")
    small.thumbnail((side, side))
    data = io.BytesIO()
    small.save(data, format="JPEG", quality=85)
    return data.getvalue()


def _score_table(report: Report) -> Rows:
    """With no column that would be empty."""
    columns: dict[str, Callable[[Score], str]] = {
        "": lambda score: score.group,
        "score": lambda score: score.title or _words(score.name),
        "value": lambda score: number(score.value, report.percent),
        "95% interval": lambda score: (
            f"{number(score.low, report.percent)} to {number(score.high, report.percent)}"
            if score.low is not None and score.high is not None
            else ""
        ),
        "count": lambda score: "" if score.count is None else f"{score.count:,}",
    }
    filled = {head: cells for head, of in columns.items() if any(cells := [of(score) for score in report.scores])}
    return [list(filled), *map(list, zip(*filled.values(), strict=True))]


def _comparison(report: Report, published: PublishedTable) -> Rows:
    """Ours first, a row a group."""
    rows = [["", *map(_words, published.columns), "source"]]
    for group in dict.fromkeys(score.group for score in report.scores):
        ours = {score.name: number(score.value, report.percent) for score in report.scores if score.group == group}
        name = f"this run, {group}" if group else "this run"
        rows.append([name, *(ours.get(column, "") for column in published.columns), ""])
    for row in published.rows:
        rows.append([row.model, *("" if value is None else f"{value:.2f}" for value in row.values), row.source])
    return rows


def _words(name: str) -> str:
    return name.replace("_", " ")


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _by_name(scores: Iterable[Score], of: Callable[[Score], Any]) -> dict[str, Any]:
    named: dict[str, Any] = {}
    for score in scores:
        if (value := of(score)) is not None:
            (named.setdefault(score.group, {}) if score.group else named)[score.name] = value
    return named


def _embedded(card: Card) -> str:
    """A line of JSON and one of base64, in which no `<` can end the element that holds them."""
    about = dataclasses.asdict(card)
    picture = base64.b64encode(about.pop("picture")).decode()
    return json.dumps(_plain(about)).replace("<", "\\u003c") + "\n" + picture


def _plain(value: Any) -> Any:
    """With null for numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
