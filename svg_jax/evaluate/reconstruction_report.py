"""From the parts of a reconstruction run to its report, with the worst and the best pictures."""

from __future__ import annotations

import csv
import heapq
import io
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from PIL import Image

from svg_jax.evaluate.fid.moments import Moments, bias, frechet_distance
from svg_jax.evaluate.results import Part, Results
from svg_jax.evaluate.scores import Card, Report, Score, number
from svg_jax.evaluate.scores import write_report as write_files

PICTURES = 8  # of each end on the page
SPREAD = ("mean", "median", "worst", "best")  # of the values an image
SIGNS = {"psnr": 1.0, "ssim": 1.0, "lpips": -1.0}  # of a value an image: 1 where more is better
TITLES = {"rfid": "rFID", "psnr": "PSNR (dB)", "ssim": "SSIM", "lpips": "LPIPS"}
COLUMNS = {"rFID": "rfid", "PSNR": "psnr", "LPIPS": "lpips", "SSIM": "ssim"}  # of the release's `metrics.csv`


def rank(part: Part) -> Float[np.ndarray, " images"]:
    """A number for each image of a part, the larger the better; the lowest of all where there is no number."""
    name = next(name for name in ("lpips", "ssim", "psnr") if name in part)  # what is nearest to what people see
    values = SIGNS[name] * values_of(part, name)
    return np.where(np.isnan(values), -np.inf, values)


def values_of(part: Part, name: str) -> Float[np.ndarray, " images"]:
    """Of one metric; NaN where the reconstruction is not finite, whatever its 8 bits look like."""
    return np.where(part["finite"], np.asarray(part[name], np.float64), np.nan)


class Picture(NamedTuple):
    """A row of pictures; compared by rank, then by place, so that equal ranks come in one order."""

    rank: float
    place: int  # in the data
    name: str
    numbers: str
    jpeg: bytes


class Summary(NamedTuple):
    """All that a report says."""

    scores: dict[str, float]  # of the data set
    per_image: dict[str, dict[str, float]]  # mean, median, worst and best
    images: list[dict[str, Any]]  # a row an image, in the order of the data
    num_bad: int
    warnings: list[str]
    worst: list[Picture]
    best: list[Picture]


def summarise(results: Results, num_parts: int) -> Summary:
    """Reads the parts one after the other; what is kept of each is a few numbers an image.

    Raises:
        ValueError: No image could be read, or rFID has fewer than 2.
    """
    metrics = results.settings["metrics"]
    rows: list[dict[str, Any]] = []
    batches: dict[str, list[float]] = {name: [] for name in ("ssim", "lpips") if name in metrics}
    moments: dict[str, Moments] = {}
    worst: list[Picture] = []
    best: list[Picture] = []
    num_broken = 0
    for part in results.parts(num_parts):
        bad = zip(part["bad_index"].tolist(), part["bad_reason"].tolist(), strict=True)
        rows += [{"index": index, "error": reason} for index, reason in bad]
        if not len(part["index"]):
            continue
        values = {name: values_of(part, name) for name in SIGNS if name in metrics}
        for i, (index, name) in enumerate(zip(part["index"].tolist(), part["name"].tolist(), strict=True)):
            rows.append({"index": index, "name": name, **{key: float(v[i]) for key, v in values.items()}})
        for name, means in batches.items():
            means.append(float(values[name].mean()))
        for side in ("input", "reconstruction") if "rfid" in metrics else ():
            new = Moments.of(part[f"features_{side}"])
            moments[side] = moments[side].merged(new) if side in moments else new
        num_broken += int(np.sum(~part["finite"]))
        shown = _pictures(part, values)
        worst = heapq.nsmallest(PICTURES, worst + shown)
        best = heapq.nlargest(PICTURES, best + shown)
    rows.sort(key=lambda row: row["index"])
    good = [row for row in rows if "error" not in row]
    if not good:
        raise ValueError(
            f"none of the {len(rows)} images of {results.settings['data']} could be read: {rows[0]['error']}"
        )

    scores: dict[str, float] = {}
    if "rfid" in metrics:
        scores["rfid"] = math.nan if num_broken else frechet_distance(moments["input"], moments["reconstruction"])
    if "psnr" in metrics:
        scores["psnr"] = float(np.mean([row["psnr"] for row in good]))
    scores |= {name: float(np.mean(means)) for name, means in batches.items()}
    per_image = {name: _spread(np.array([row[name] for row in good]), SIGNS[name]) for name in SIGNS if name in metrics}
    num_bad = len(rows) - len(good)
    warnings = _warnings(scores, len(good), num_bad, num_broken)
    return Summary(scores, per_image, rows, num_bad, warnings, worst, best)


def _pictures(part: Part, values: Mapping[str, np.ndarray]) -> list[Picture]:
    found = []
    for key in part:
        if key.startswith("picture_"):
            i = int(key.removeprefix("picture_"))
            numbers = ", ".join(f"{TITLES[name]} {number(v[i])}" for name, v in values.items())
            name, jpeg = str(part["name"][i]), part[key].tobytes()
            found.append(Picture(float(rank(part)[i]), int(part["index"][i]), name, numbers, jpeg))
    return found


def _spread(values: Float[np.ndarray, " images"], sign: float) -> dict[str, float]:
    ordered = values[np.argsort(np.where(np.isnan(values), -np.inf, sign * values), kind="stable")]
    middle = ordered[(len(ordered) - 1) // 2 : len(ordered) // 2 + 1].mean()
    return {name: float(v) for name, v in zip(SPREAD, (values.mean(), middle, ordered[0], ordered[-1]), strict=True)}


def _warnings(scores: Mapping[str, float], num_images: int, num_bad: int, num_broken: int) -> list[str]:
    found = []
    if "rfid" in scores and (text := bias(num_images)):
        found.append(text)
    if num_bad:
        found.append(f"{num_bad:,} of {num_bad + num_images:,} images could not be read and are left out")
    if num_broken:
        found.append(
            f"{num_broken:,} of {num_images:,} reconstructions hold values that are not finite, so there is no score: "
            "the weights are damaged, or too large for the compute type"
        )
    if math.isinf(scores.get("psnr", 0.0)):
        found.append("PSNR is infinite: at least one image is reconstructed exactly")
    return found


def write_report(results: Results, num_parts: int) -> str:
    """Writes `metrics.csv` and the files of `scores.write_report`; returns the tables and the page's address.

    Raises:
        ValueError: No image could be read, or rFID has fewer than 2.
    """
    summary = summarise(results, num_parts)
    results.write("metrics.csv", release_row(summary.scores))
    num_images = len(summary.images) - summary.num_bad
    spread = [[TITLES[name], *(number(values[key]) for key in SPREAD)] for name, values in summary.per_image.items()]
    report = Report(
        title=f"Reconstruction of {num_images:,} images",
        settings=results.settings,
        scores=[Score(name, value, count=num_images, title=TITLES[name]) for name, value in summary.scores.items()],
        warnings=summary.warnings,
        images=summary.images,
        cards=[_card("worst", picture) for picture in summary.worst]
        + [_card("best", picture) for picture in summary.best],
        more={"per_image": summary.per_image, "num_images": num_images, "num_bad": summary.num_bad},
        tables={"Over images": [["", *SPREAD], *spread]} if spread else {},
    )
    return write_files(results.folder, report)


def _card(end: str, picture: Picture) -> Card:
    with Image.open(io.BytesIO(picture.jpeg)) as image:
        size = image.size
    shown = "input, reconstruction, difference (four times enlarged)"
    return Card(picture.name, shown, end, None, picture.numbers, picture.jpeg, size)


def release_row(scores: Mapping[str, float]) -> str:
    """`metrics.csv` as the release writes it, with nothing where a metric was not asked for."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    writer.writerow(round(scores[name], 3) if name in scores else "" for name in COLUMNS.values())
    return text.getvalue()
