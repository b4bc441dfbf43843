"""A survey in figures and tables."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from data_pipelines.histogram import Histogram, histogram, powers_of_two, round_ticks
from data_pipelines.images import token_budget
from data_pipelines.records import Cause
from data_pipelines.survey import Broken, Seen, Survey

TEXT_BUDGETS = (256, 512)  # config.text.max_tokens of the released stages


@dataclasses.dataclass(frozen=True)
class CropRow:
    """How many images go to one crop size."""

    width: int
    height: int
    grid: str
    count: int


@dataclasses.dataclass(frozen=True)
class CaptionRow:
    """What a text budget costs: captions that it cuts, slots that stay empty; shares."""

    budget: int
    cut: float
    padding: float


@dataclasses.dataclass(frozen=True)
class CauseRow:
    """Records that cannot be used for one cause, and the messages of some."""

    cause: Cause
    count: int
    examples: Sequence[str]


def figures(seen: Sequence[Seen], resolution: int, patch_size: int, tokens_known: bool) -> list[Histogram]:
    """Histograms of image sizes, aspect ratios, what the crop cuts away, padding and caption lengths.

    Args:
      seen: the records.
      resolution: of the square crop.
      patch_size: side of a patch in pixels.
      tokens_known: whether captions were counted in tokens, rather than bytes.
    """
    if not seen:
        return []
    found = []
    for title, values in (("Width", [each.size[0] for each in seen]), ("Height", [each.size[1] for each in seen])):
        found.append(
            histogram(title, _spread(values, _pixels), values, ticks=powers_of_two(values), name=_number, log=True)
        )
    ratios = [each.size[0] / each.size[1] for each in seen]
    found.append(
        histogram("Aspect ratio", _spread(ratios, _ratio), ratios, ticks=[1 / 4, 1 / 2, 1, 2, 4], name=_ratio, log=True)
    )
    cut = [100 * each.share_cut for each in seen]
    found.append(
        histogram(
            "Cut away by the crop",
            f"{np.mean(cut):.1f}% of an image on average",
            cut,
            ticks=round_ticks(max(cut)),
            name=_percent,
        )
    )
    budget = token_budget(resolution, patch_size)
    padding = [100 * (1 - each.crop[0] * each.crop[1] / patch_size**2 / budget) for each in seen]
    found.append(
        histogram(
            "Padding of the image",
            f"{np.mean(padding):.1f}% of {budget:,} slots stay empty on average",
            padding,
            ticks=round_ticks(max(*padding, 10.0)),
            name=_percent,
        )
    )
    lengths = [length for each in seen for length in each.tokens]
    if lengths:
        found.append(
            histogram(
                f"Caption length in {'tokens' if tokens_known else 'bytes'}",
                _spread(lengths, _number) + "; with the system prompt",
                lengths,
                ticks=round_ticks(float(np.quantile(lengths, 0.99))),
                name=_number,
                lines=TEXT_BUDGETS,
            )
        )
    return found


def crop_table(seen: Sequence[Seen], patch_size: int) -> list[CropRow]:
    """The crops that are taken, the most frequent first."""
    counts = collections.Counter(each.crop for each in seen)
    return [
        CropRow(width, height, f"{height // patch_size} × {width // patch_size}", count)
        for (width, height), count in counts.most_common()
    ]


def caption_table(seen: Sequence[Seen]) -> list[CaptionRow]:
    """What each text budget of the released stages would cost; empty without captions."""
    lengths = np.array([length for each in seen for length in each.tokens])
    if not lengths.size:
        return []
    return [
        CaptionRow(budget, float(np.mean(lengths > budget)), float(1 - np.mean(np.minimum(lengths, budget)) / budget))
        for budget in TEXT_BUDGETS
    ]


def cause_table(broken: Sequence[Broken], examples: int) -> list[CauseRow]:
    """The causes that occur, the most frequent first, with the first messages of each."""
    messages: dict[Cause, list[str]] = collections.defaultdict(list)
    for each in broken:
        messages[each.cause].append(each.message)
    rows = [CauseRow(cause, len(said), said[:examples]) for cause, said in messages.items()]
    return sorted(rows, key=lambda row: -row.count)


def speed(found: Survey) -> list[tuple[str, str]]:
    """How fast records were read here: (what, how much)."""
    count, spent = len(found.seen), found.spent
    if not count:
        return []
    return [
        (f"images/s here, in {found.num_threads} threads", f"{found.num_threads * count / spent.total:.1f}"),
        ("images/s that one core decodes and crops", f"{count / max(spent.computing, 1e-9):.1f}"),
        ("milliseconds that a thread waits for an image's bytes", f"{1000 * spent.waiting / count:.1f}"),
    ]


def _spread(values: Sequence[float], name: Callable[[float], str]) -> str:
    low, middle, high = np.quantile(values, [0.05, 0.5, 0.95])
    return f"half below {name(middle)}, nine in ten from {name(low)} to {name(high)}"


def _number(value: float) -> str:
    return f"{value:,.0f}"


def _pixels(value: float) -> str:
    return f"{value:,.0f} px"


def _percent(value: float) -> str:
    return f"{value:g}%" if value == round(value, 1) else f"{value:.1f}%"


def _ratio(value: float) -> str:
    """Width to height: 2:1, 1:1.5."""
    return f"{value:.3g}:1" if value >= 1 else f"1:{1 / value:.3g}"
