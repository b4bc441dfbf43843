"""Histograms for a page: counts in bins, in the units of the drawing."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

WIDTH, HEIGHT = 320.0, 96.0  # of the drawing, without its labels
_GAP = 1.0  # between bars


@dataclasses.dataclass(frozen=True)
class Bar:
    """One bin: where it is drawn, and what it says when it is pointed at."""

    x: float
    width: float
    height: float
    label: str


@dataclasses.dataclass(frozen=True)
class Tick:
    """A place on the axis, with its name."""

    x: float
    label: str


@dataclasses.dataclass(frozen=True)
class Histogram:
    """A figure: what it shows, its bars, its axis, and lines at values that matter."""

    title: str
    summary: str
    bars: tuple[Bar, ...]
    ticks: tuple[Tick, ...]
    lines: tuple[Tick, ...] = ()


def histogram(
    title: str,
    summary: str,
    values: Sequence[float],
    *,
    ticks: Sequence[float],
    name: Callable[[float], str],
    bins: int = 40,
    log: bool = False,
    lines: Sequence[float] = (),
) -> Histogram:
    """Counts values between the first and the last tick; those beyond go to the outermost bins.

    Args:
      title: what is counted.
      summary: one sentence on it.
      values: finite; above zero where `log`.
      ticks: rising; what the axis names.
      name: a value in words.
      bins: how many.
      log: whether the axis is logarithmic.
      lines: values that are marked inside the drawing, where they lie between the ticks.
    """
    scale: Callable[[float], float] = math.log2 if log else float
    low, high = scale(ticks[0]), scale(ticks[-1])

    def x_of(value: float) -> float:
        return WIDTH * (scale(value) - low) / (high - low)

    edges = np.linspace(low, high, bins + 1)
    counts, _ = np.histogram(np.clip([scale(value) for value in values], low, high), edges)
    highest = max(int(counts.max()), 1)
    unscaled = np.exp2(edges) if log else edges
    bars = [
        Bar(
            x=WIDTH * i / bins + _GAP / 2,
            width=WIDTH / bins - _GAP,
            height=max(HEIGHT * int(count) / highest, 2.0),  # one of a million is still to be seen
            label=f"{_range(name(float(unscaled[i])), name(float(unscaled[i + 1])), i, bins)}: {int(count):,}",
        )
        for i, count in enumerate(counts)
        if count
    ]
    return Histogram(
        title=title,
        summary=summary,
        bars=tuple(bars),
        ticks=tuple(Tick(x_of(value), name(value)) for value in ticks),
        lines=tuple(Tick(x_of(value), name(value)) for value in lines if ticks[0] < value < ticks[-1]),
    )


def _range(low: str, high: str, place: int, bins: int) -> str:
    if place == 0:
        return f"up to {high}"
    return f"from {low}" if place == bins - 1 else f"{low} to {high}"


def powers_of_two(values: Sequence[float], at_least: int = 2) -> list[float]:
    """Powers of two around all values, `at_least` octaves; every second or third one where there are many."""
    low, high = math.floor(math.log2(min(values))), math.ceil(math.log2(max(values)))
    high = max(high, low + at_least)
    step = max(1, math.ceil((high - low) / 6))
    high += -(high - low) % step
    return [2.0**k for k in range(low, high + 1, step)]


def round_ticks(highest: float) -> list[float]:
    """From zero in up to 5 equal steps of 1, 2 or 5 times a power of ten to at least `highest`."""
    step = 10.0 ** math.floor(math.log10(max(highest, 1e-9)) - 1)
    factors = (1, 2, 5, 10, 20, 50, 100)
    step *= next(factor for factor in factors if factor * step * 5 >= highest)
    return [step * i for i in range(math.ceil(highest / step) + 1)] if highest > 0 else [0.0, step]
