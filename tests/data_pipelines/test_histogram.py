"""Bars, axes and their words."""

from __future__ import annotations

import pytest

from data_pipelines.histogram import HEIGHT, WIDTH, histogram, powers_of_two, round_ticks


def test_every_value_is_in_one_bar_those_beyond_the_axis_in_the_outermost() -> None:
    figure = histogram("t", "s", [-5, 0, 1, 4.9, 5, 99], ticks=[0, 5, 10], name=str, bins=2, lines=[5, 10, 12])
    assert [bar.label for bar in figure.bars] == ["up to 5.0: 4", "from 5.0: 2"]
    assert [bar.height for bar in figure.bars] == [HEIGHT, HEIGHT / 2]
    assert [(tick.x, tick.label) for tick in figure.ticks] == [(0, "0"), (WIDTH / 2, "5"), (WIDTH, "10")]
    assert [line.label for line in figure.lines] == ["5"]


def test_a_logarithmic_axis_gives_octaves_the_same_width() -> None:
    figure = histogram("t", "s", [64, 65, 500], ticks=[64, 128, 256, 512], name=lambda v: f"{v:.0f}", bins=3, log=True)
    assert [tick.x for tick in figure.ticks] == pytest.approx([0, WIDTH / 3, 2 * WIDTH / 3, WIDTH])
    assert [bar.label for bar in figure.bars] == ["up to 128: 2", "from 256: 1"]


@pytest.mark.parametrize(
    ("values", "ticks"),
    [([64], [64, 128, 256]), ([100, 300], [64, 128, 256, 512]), ([1, 60000], [1, 8, 64, 512, 4096, 32768, 262144])],
)
def test_powers_of_two_enclose_all_values(values: list[float], ticks: list[float]) -> None:
    assert powers_of_two(values) == ticks


@pytest.mark.parametrize(
    ("highest", "ticks"), [(9, [0, 2, 4, 6, 8, 10]), (10, [0, 2, 4, 6, 8, 10]), (180, [0, 50, 100, 150, 200])]
)
def test_round_ticks_reach_the_highest(highest: float, ticks: list[float]) -> None:
    assert round_ticks(highest) == ticks


def test_round_ticks_of_nothing_are_still_an_axis() -> None:
    first, second = round_ticks(0)
    assert first == 0 < second
