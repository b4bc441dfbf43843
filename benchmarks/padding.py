"""How much of the token budget is padding, on the release's list of crop sizes: `python -m benchmarks.padding`.

Every image takes as many slots as a square one has patches; those that its crop does not fill are masked. The table
takes images of every aspect ratio from 1:4 to 4:1, as many of each (of width over height, and of its logarithm, which
treats wide and tall alike), and each size of the list once.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable

import numpy as np

from data_pipelines import images

PATCH_SIZE, MAX_RATIO = 16, 4.0
NUM_RATIOS = 10_001
HEIGHT = 1e6  # of the images; the width follows the ratio closely
GOAL = 0.08


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resolutions", type=int, nargs="+", default=[256, 512, 1024])
    print(table(parser.parse_args().resolutions))


def table(resolutions: Iterable[int]) -> str:
    """In Markdown."""
    lines = [
        "| resolution | sizes | token budget | padding, uniform ratios | uniform in log | uniform sizes | worst size |",
        "|---|---|---|---|---|---|---|",
    ]
    for resolution in resolutions:
        sizes = images.crop_sizes(resolution, PATCH_SIZE, MAX_RATIO)
        of_list = np.array([padding(size, resolution) for size in sizes])
        by_ratio = [mean_padding(ratios, sizes, resolution) for ratios in uniform_ratios()]
        shares = " | ".join(f"{share:.1%}" for share in (*by_ratio, of_list.mean(), of_list.max()))
        lines.append(f"| {resolution} | {len(sizes)} | {images.token_budget(resolution, PATCH_SIZE)} | {shares} |")
    return "\n".join([*lines, "", f"Goal: {GOAL:.0%} at most."])


def uniform_ratios() -> tuple[np.ndarray, np.ndarray]:
    """Ratios of width to height up to MAX_RATIO, uniform, and uniform in their logarithm."""
    log = np.log(MAX_RATIO)
    return np.linspace(1 / MAX_RATIO, MAX_RATIO, NUM_RATIOS), np.exp(np.linspace(-log, log, NUM_RATIOS))


def mean_padding(ratios: np.ndarray, sizes: list[images.Size], resolution: int) -> float:
    """Over images of these ratios of width to height."""
    nearest = [images.nearest_size((round(HEIGHT * ratio), round(HEIGHT)), sizes) for ratio in ratios]
    return float(np.mean([padding(size, resolution) for size in nearest]))


def padding(size: images.Size, resolution: int) -> float:
    """The share of the slots that a crop leaves empty."""
    return 1 - size[0] * size[1] / resolution**2


if __name__ == "__main__":
    main()
