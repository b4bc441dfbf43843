"""From the features of images to FID, Inception Score, precision and recall, and their report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from svg_jax.evaluate.fid.distribution import SPLITS, Blocks, inception_score, precision_and_recall
from svg_jax.evaluate.fid.moments import Moments, frechet_distance
from svg_jax.evaluate.fid.sides import Side
from svg_jax.evaluate.fid.statistics_file import Statistics, write_statistics
from svg_jax.evaluate.results import Results
from svg_jax.evaluate.scores import Report, Score, write_report

AT_ONCE = 4  # parts whose features are compared with as many others


def write_fid_report(results: Results, sides: Sequence[Side], warnings: Sequence[str], save_as: str | None) -> str:
    """Writes the report, and the statistics of the reference where asked for; returns what is to be printed.

    Args:
        results: With all parts there.
        sides: Which of the parts are of what.
        warnings: That hold whatever the parts say.
        save_as: File for the statistics of the reference.

    Raises:
        ValueError: Too few of the images could be read.
    """
    known = {side.name: measured(results, side) for side in sides}
    printed = []
    if save_as:
        write_statistics(save_as, known["reference"].statistics)
        printed.append(f"{save_as}: statistics of {known['reference'].num_images} images")
    if "images" in known:
        inside: Bool[np.ndarray, " images"] | None = None
        scores = []
        for metric in results.settings["metrics"]:
            if metric == "fid":
                distance = frechet_distance(known["images"].statistics, known["reference"].statistics)
                scores.append(Score("fid", distance, count=known["images"].num_images, title="FID"))
            elif metric == "is":
                scores += inception_scores(results, sides[0], known["images"])
            else:
                generated, real = (blocks_of(results, side) for side in sides)
                inside, covered = precision_and_recall(generated, real)
                scores.append(Score("precision", float(inside.mean()), count=len(inside)))
                scores.append(Score("recall", float(covered.mean()), count=len(covered)))
        report = Report(
            title="FID",
            settings=results.settings,
            scores=scores,
            warnings=[*warnings, *(text for one in known.values() for text in one.warnings)],
            images=rows_of(results, sides, inside),
            more={f"num_{name}": one.num_images for name, one in known.items()},
        )
        printed.append(write_report(results.folder, report))
    return "\n".join(printed)


class Measured(NamedTuple):
    """What the images of a side, or a file, say together."""

    num_images: int | None  # of those that could be read; None where a file of statistics does not say
    statistics: Statistics
    warnings: list[str]


def measured(results: Results, side: Side) -> Measured:
    """Statistics of a side, from a file or from its parts.

    Raises:
        ValueError: Fewer than 2 of its images could be read.
    """
    if side.statistics is not None:
        return Measured(side.statistics.count, side.statistics, [])
    moments: Moments | None = None
    bad: list[str] = []
    for number in side.numbers:
        part = results.load(number)
        new = Moments.of(part["features"])
        moments = new if moments is None else moments.merged(new)
        bad += part["bad_reason"].tolist()
    assert moments is not None  # a source is never empty
    warnings = []
    if bad:
        total = moments.count + len(bad)
        warnings.append(
            f"{len(bad):,} of {total:,} images of --{side.name} could not be read and are left out: {bad[0]}"
        )
    settings = results.settings
    made_with = {"resolution": settings["resolution"], "extractor": settings["inception"]["weights"]}
    return Measured(moments.count, Statistics.of(moments, **made_with), warnings)


def inception_scores(results: Results, side: Side, total: Measured) -> list[Score]:
    """Over ten splits, with their deviation, and over one.

    Raises:
        ValueError: There are fewer images than splits.
    """
    assert total.num_images is not None

    def logits() -> Iterator[Float[np.ndarray, "rows classes"]]:
        return (results.load(number)["logits"] for number in side.numbers)

    mean, deviation = inception_score(logits(), total.num_images, SPLITS)
    whole, _ = inception_score(logits(), total.num_images, 1)
    return [
        Score("is", mean, count=total.num_images, title=f"Inception Score, mean of {SPLITS} splits"),
        Score("is_std", deviation, count=SPLITS, title=f"Inception Score, deviation of {SPLITS} splits"),
        Score("is_one_split", whole, count=total.num_images, title="Inception Score of all images"),
    ]


def blocks_of(results: Results, side: Side) -> Blocks:
    """What gives the features of a side block by block."""

    def blocks() -> Iterator[Float[np.ndarray, "rows channels"]]:
        for first in range(0, len(side.numbers), AT_ONCE):
            yield np.concatenate([results.load(n)["features"] for n in side.numbers[first : first + AT_ONCE]])

    return blocks


def rows_of(
    results: Results, sides: Sequence[Side], inside: Bool[np.ndarray, " images"] | None
) -> Iterator[Mapping[str, Any]]:
    """A row an image that was judged, and one for each unreadable image of either side.

    `in_manifold` says whether an image lies in the manifold of the real ones: their mean is the precision.
    """
    place = 0  # among those that could be read
    for side in sides:
        for number in side.numbers:
            part = results.load(number)
            bad = zip(part["bad_index"].tolist(), part["bad_reason"].tolist(), strict=True)
            rows = [{"set": side.name, "index": index, "error": reason} for index, reason in bad]
            if side.name == "images":
                for index, name in zip(part["index"].tolist(), part["name"].tolist(), strict=True):
                    more = {} if inside is None else {"in_manifold": bool(inside[place])}
                    rows.append({"set": side.name, "index": index, "name": name, **more})
                    place += 1
            yield from sorted(rows, key=lambda row: row["index"])
