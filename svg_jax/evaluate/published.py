"""Scores that others have published, to stand below ours: orientation, not measurements of this code."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class PublishedRow:
    """What is said of one model.

    Attributes:
      model: its name.
      values: one a column, as printed; None where nothing is said.
      source: who says so.
    """

    model: str
    values: Sequence[float | None]
    source: str


@dataclasses.dataclass(frozen=True)
class PublishedTable:
    """Models below which our own row is to be read.

    Attributes:
      columns: names of scores, those of `scores.Score.name`.
      rows: the models.
      note: what is to be known of all rows.
    """

    columns: Sequence[str]
    rows: Sequence[PublishedRow]
    note: str


RELEASE = "README of the SVG-T2I release"
SD3 = "Stable Diffusion 3 paper, arXiv 2403.03206"
JANUS_PRO = "Janus-Pro paper, arXiv 2501.17811"
QWEN_IMAGE = "Qwen-Image report, arXiv 2508.02324"
COPIES = "The rows but SVG-T2I's were read in copies of these tables in later papers, not in the sources themselves"

GENEVAL = PublishedTable(
    ("single_object", "two_object", "counting", "colors", "position", "color_attr", "overall"),
    (
        PublishedRow("Qwen-Image", (0.99, 0.92, 0.89, 0.88, 0.76, 0.77, 0.87), QWEN_IMAGE),
        PublishedRow("BAGEL", (0.99, 0.94, 0.81, 0.88, 0.64, 0.63, 0.82), "BAGEL paper, arXiv 2505.14683"),
        PublishedRow("Janus-Pro-7B", (0.99, 0.89, 0.59, 0.90, 0.79, 0.66, 0.80), JANUS_PRO),
        PublishedRow("SVG-T2I", (None, None, None, None, None, None, 0.75), RELEASE),
        PublishedRow("SANA-1.5 4.8B", (0.99, 0.85, 0.77, 0.87, 0.34, 0.54, 0.72), "SANA-1.5 paper, arXiv 2501.18427"),
        PublishedRow("DALL-E 3", (0.96, 0.87, 0.47, 0.83, 0.43, 0.45, 0.67), SD3),
        PublishedRow("FLUX.1-dev", (0.98, 0.81, 0.74, 0.79, 0.22, 0.45, 0.66), QWEN_IMAGE),
        PublishedRow("SD3-Medium", (0.98, 0.74, 0.63, 0.67, 0.34, 0.36, 0.62), SD3),
        PublishedRow("SDXL", (0.98, 0.74, 0.39, 0.85, 0.15, 0.23, 0.55), "GenEval paper, arXiv 2310.11513"),
    ),
    f"{COPIES}. Of SD3-Medium another row is in circulation, with 0.74 overall, and of BAGEL one with rewritten "
    "prompts, with 0.88.",
)

DPG = PublishedTable(
    ("global", "entity", "attribute", "relation", "other", "overall"),
    (
        PublishedRow("Qwen-Image", (91.32, 91.56, 92.02, 94.31, 92.73, 88.32), QWEN_IMAGE),
        PublishedRow("SVG-T2I", (None, None, None, None, None, 85.78), RELEASE),
        PublishedRow("BAGEL", (88.94, 90.37, 91.29, 90.82, 88.67, 85.07), "tables of later papers"),
        PublishedRow("Janus-Pro-7B", (86.90, 88.90, 89.40, 89.32, 89.48, 84.19), JANUS_PRO),
        PublishedRow("SD3-Medium", (87.90, 91.01, 88.83, 80.70, 88.68, 84.08), JANUS_PRO),
        PublishedRow("FLUX.1-dev", (74.35, 90.00, 88.96, 90.87, 88.33, 83.84), QWEN_IMAGE),
        PublishedRow("DALL-E 3", (90.97, 89.61, 88.39, 90.58, 89.83, 83.50), JANUS_PRO),
        PublishedRow("SDXL", (83.27, 82.43, 80.91, 86.76, 80.41, 74.65), "ELLA paper, arXiv 2403.05135"),
    ),
    f"{COPIES}. Compare with the mode official, and only the answers of mPLUG large.",
)
