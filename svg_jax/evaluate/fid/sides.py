"""The two sides of FID: what is judged and what it is compared with, each images or statistics of them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_pipelines.records import Source
from data_pipelines.sources import open_source
from svg_jax.evaluate import results
from svg_jax.evaluate.fid.distribution import NEIGHBOURS, SPLITS
from svg_jax.evaluate.fid.moments import bias
from svg_jax.evaluate.fid.picture_sources import MEMBER, GeneratedPictures, ImageArray
from svg_jax.evaluate.fid.statistics_file import (
    MOMENTS,
    SUFFIX,
    Statistics,
    check_comparable,
    check_writable,
    cropped,
    members,
    read_statistics,
)
from svg_jax.evaluate.generated import PROMPTS, SETTINGS
from svg_jax.output_folder import ORIGIN

METRICS = ("fid", "is", "precision_recall")
NEEDED = {"fid": 2, "is": SPLITS, "precision_recall": NEIGHBOURS + 1}  # images
PART = 512  # images whose features make a part of the results


class Side(NamedTuple):
    """Images, or statistics of them."""

    name: str  # "images" or "reference"
    path: str
    source: Source | None
    statistics: Statistics | None
    parts: Sequence[range]  # indices in the source, a part of the results each
    numbers: range  # of these parts


def parse_metrics(
    text: str, images: str | None, reference: str | None, *, save_statistics: str | None
) -> tuple[str, ...]:
    """The metrics of a list with commas, in the order of `METRICS`; () where only statistics are to be made.

    Raises:
        ValueError: One has no such name, or needs what is not given; or there is nothing to do.
    """
    if save_statistics:
        if not reference:
            raise ValueError("--save-statistics writes the statistics of the reference: name that with --reference")
        check_writable(save_statistics)
    if not images:
        if not save_statistics:
            raise ValueError(
                "nothing to judge: name --images; or make statistics with --reference and --save-statistics"
            )
        return ()
    names = results.parse_metrics(text, METRICS)
    for name in names:
        if name != "is" and not reference:
            raise ValueError(f"{name} compares with real images: name them with --reference, or choose --metrics is")
    return names


def open_sides(images: str | None, reference: str | None, root: str | None, metrics: Sequence[str]) -> list[Side]:
    """Opens what the flags name; nothing of it is read but lists of names, and statistics.

    Raises:
        FileNotFoundError: There is nothing of that name.
        ValueError: There are too few images, or statistics where images are needed.
    """
    sides: list[Side] = []
    for name, path in (("images", images), ("reference", reference)):
        if path is None:
            continue
        needing = metrics if name == "images" else [metric for metric in metrics if metric != "is"]
        source: Source | None = None
        statistics: Statistics | None = None
        parts: list[range] = []
        found = members(path)
        singly = [metric for metric in needing if metric != "fid"]
        if found.issuperset(MOMENTS) and not (singly and MEMBER in found):
            if singly:
                raise ValueError(
                    f"{singly[0]} looks at single images and --{name} {path} holds statistics of them: name the images "
                    "themselves, or other --metrics"
                )
            statistics = read_statistics(path)
        else:
            source = open_images(path, root)
            count, least = len(source), max(NEEDED[metric] for metric in ("fid", *needing))
            if count < least:
                what = ", ".join(needing) or "fid"
                raise ValueError(f"--{name} {path} has {count} images, and {what} needs at least {least}: give more")
            parts = [range(first, min(first + PART, count)) for first in range(0, count, PART)]
        before = sum(len(side.parts) for side in sides)
        sides.append(Side(name, path, source, statistics, parts, range(before, before + len(parts))))
    return sides


def open_images(path: str, root: str | None) -> Source:
    """Images of any kind that a flag may name.

    Raises:
        FileNotFoundError: There is nothing of that name.
        ValueError: There are no images, or a generated folder is not complete.
    """
    if path.endswith(SUFFIX):
        return ImageArray(path)
    folder = Path(path).absolute()
    if (folder / PROMPTS).exists() or drawn_here(folder):
        return GeneratedPictures(path)
    if folder.name == "images" and drawn_here(folder.parent):
        return GeneratedPictures(str(folder.parent))  # which says whether all of them are there
    return open_source(path, root)


def drawn_here(folder: Path) -> bool:
    """Whether `python -m svg_jax.evaluate generate` drew into a folder."""
    try:
        return "prompts_jsonl" in json.loads((folder / SETTINGS).read_text())
    except (OSError, ValueError, TypeError):
        return False


def compared_resolution(sides: Sequence[Side], asked: int) -> int:
    """To which images are cropped, or were where statistics are all that there is; 0 for not at all.

    Raises:
        ValueError: Statistics of crops of two sizes are all that there is.
    """
    files = [side.statistics for side in sides if side.statistics is not None]
    known = [statistics.resolution for statistics in files if statistics.resolution is not None]
    if asked or len(files) < len(sides) or not known:
        return asked
    if len(set(known)) > 1:
        raise ValueError(
            f"--images {sides[0].path} and --reference {sides[1].path} hold statistics of "
            f"{' and of '.join(map(cropped, known))}: make one of them anew from its images, at the --resolution of "
            "the other"
        )
    return known[0]


def check_comparisons(
    sides: Sequence[Side], *, fid: bool, channels: int | None, weights: str | None, resolution: int
) -> list[str]:
    """What is to be said of few images and of statistics whose extractor is not known.

    Args:
        sides: Both.
        fid: Whether FID is asked for, now or of the statistics to be written.
        channels: Of a feature; None where no features are computed.
        weights: Digest of the network that makes the features; None where all is from files.
        resolution: To which images are cropped; 0 for none.

    Raises:
        ValueError: Statistics are of another extractor or resolution.
    """
    warnings = []
    for side in sides:
        if side.statistics is not None:
            warnings += check_comparable(
                side.path, side.statistics, channels=channels, extractor=weights, resolutions=(resolution,)
            )
            weights = weights or side.statistics.extractor  # then the other side must agree with this one
        elif fid and side.source is not None and (text := bias(len(side.source))):
            warnings.append(f"--{side.name}: {text}")
    return warnings


def described(side: Side) -> dict[str, Any]:
    """What results depend on, as JSON can hold it; of pictures drawn by this package, how they were drawn.

    Raises:
        ValueError: That cannot be read.
    """
    origin = {ORIGIN: {"path": os.path.abspath(side.path) if os.path.exists(side.path) else side.path}}
    if side.statistics is not None:
        data = np.concatenate([side.statistics.mean, side.statistics.sigma.ravel()]).tobytes()
        return {"statistics": hashlib.sha256(data).hexdigest()[:16], "num_images": side.statistics.count, **origin}
    assert side.source is not None
    about = {"signature": side.source.signature, "num_images": len(side.source), **origin}
    if isinstance(side.source, GeneratedPictures):
        return {**about, "drawn_with": side.source.settings}
    manifest = Path(side.path) / SETTINGS
    if not manifest.is_file():
        return about
    try:
        return {**about, "drawn_with": json.loads(manifest.read_text())}
    except ValueError as error:
        raise ValueError(f"{manifest} does not say how the pictures were drawn ({error}): remove it") from error
