"""FID, Inception Score, precision and recall of a set of images, as `pytorch-fid` and ADM's evaluation compute them.

Features of Inception are kept in parts (`svg_jax.evaluate.results`), 8 kB an image and 12 kB with the Inception Score,
so that scoring goes on after an interruption, and once all are there needs no weights (leave --inception out).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import Float

from data_pipelines.images import MAX_RESOLUTION
from data_pipelines.records import BadRecord, Source
from svg_jax.evaluate.fid.features import PRECISION, Extractor, extract, load_extractor, prepared
from svg_jax.evaluate.fid.picture_sources import stamp
from svg_jax.evaluate.fid.report import write_fid_report
from svg_jax.evaluate.fid.sides import (
    METRICS,
    Side,
    check_comparisons,
    compared_resolution,
    described,
    open_sides,
    parse_metrics,
)
from svg_jax.evaluate.images import read_ahead
from svg_jax.evaluate.networks import SOURCES
from svg_jax.evaluate.results import Results, at_least_one, conclude, recorded_settings, work_through
from svg_jax.parallel import make_mesh

logger = logging.getLogger("svg_jax")

Group = tuple[Side, range]  # indices of a part of the results
Read = tuple[str, Float[np.ndarray, "299 299 3"]]  # name and pixels


def add_flags(flags: argparse.ArgumentParser) -> None:
    """What `python -m svg_jax.evaluate fid` asks for."""
    add = flags.add_argument
    add("--images", help="what is judged: a folder of images at any depth, an .npz of arr_0, or one of mu and sigma")
    add("--reference", help="real images: the same, or a list (.jsonl, .json), or tfds:NAME/SPLIT")
    add("--root", help="folder that paths in a list start from, or that holds prepared data sets")
    add("--out", required=True, help="folder for the results, local or gs://")
    add("--inception", help="workdir of the Inception of FID")
    add("--metrics", default="fid,is", help=f"some of {','.join(METRICS)} (default: %(default)s)")
    add("--resolution", type=int, default=0, help="crop all to squares of so many pixels; by default none is cropped")
    add("--save-statistics", metavar="FILE.npz", help="write those of the reference, to be named as --reference later")
    add("--num-threads", type=int, default=os.cpu_count() or 1, help="that read images (default: %(default)s)")
    add("--shard", metavar="I/N", help="take every N-th part from the I-th; by default a share a process of a job")


def run(options: argparse.Namespace) -> None:
    """Computes what is missing; whoever completes the last part writes the report.

    Raises:
        ValueError: An option is out of range, weights are missing, the reference is of another extractor, or the
            results in `--out` are of other settings.
        FileNotFoundError: There are no such images.
    """
    check_numbers(options)
    metrics = parse_metrics(options.metrics, options.images, options.reference, save_statistics=options.save_statistics)
    sides = open_sides(options.images, options.reference, options.root, metrics)
    if metrics == ("is",) and not options.save_statistics and options.reference:
        logger.warning("--metrics is looks at --images alone: --reference is left out")
        sides = sides[:1]
    resolution = compared_resolution(sides, options.resolution)
    num_parts = sum(len(side.parts) for side in sides)
    extractor, origin = None, None
    if num_parts and options.inception is None:
        origin = origin_before(options.out)
    if num_parts and origin is None:
        mesh = make_mesh({"fsdp": -1}, jax.local_devices())
        extractor = load_extractor(options.inception, mesh, logits="is" in metrics)
        origin = extractor.loaded.origin
    warnings = check_comparisons(
        sides,
        fid="fid" in metrics or bool(options.save_statistics),
        channels=extractor.channels if extractor else None,
        weights=origin["weights"] if origin else None,
        resolution=resolution,
    )
    for warning in warnings:
        logger.warning("%s", warning)
    settings = {
        **{side.name: described(side) for side in sides},
        "metrics": list(metrics),
        "resolution": resolution,
        "precision": PRECISION,
        "inception": origin,
    }
    results = Results(options.out, settings)
    groups = [(side, group) for side in sides for group in side.parts]
    compute(results, groups, extractor, options)

    def report() -> str:
        if stale := missing(results, groups, range(num_parts), options.num_threads):
            raise ValueError(
                f"{len(stale)} of {num_parts} parts in {options.out} are of pictures that have changed since: give the "
                "command again, in all shards"
            )
        return write_fid_report(results, sides, warnings, options.save_statistics)

    conclude(results, num_parts, "parts", report)


def origin_before(out: str) -> dict[str, Any] | None:
    """What earlier results say of the network that made their features.

    Raises:
        ValueError: They are damaged.
    """
    match recorded_settings(out).get("inception"):
        case {"weights": str()} | None as origin:
            return origin
    raise ValueError(f"{epath.Path(out) / 'settings.json'} says nothing of weights: choose another --out, or remove it")


def check_numbers(options: argparse.Namespace) -> None:
    """Those of the flags.

    Raises:
        ValueError: One is out of range.
    """
    at_least_one(options, "num_threads")
    if not 0 <= options.resolution <= MAX_RESOLUTION:
        raise ValueError(
            f"--resolution is {options.resolution}: it is a side in pixels up to {MAX_RESOLUTION}, or 0 for images as "
            "they are"
        )


def missing(results: Results, groups: Sequence[Group], numbers: Iterable[int], num_threads: int) -> dict[int, str]:
    """Those parts that are not there, or whose pictures have been drawn anew since; with the stamp of each now."""

    def look(number: int) -> tuple[str, bool]:
        side, group = groups[number]
        assert side.source is not None
        now = stamp(side.source, group)
        return now, results.holds(number) and str(results.load(number).get("stamp")) == now

    with ThreadPoolExecutor(num_threads) as pool:
        looked = zip(numbers, pool.map(look, numbers), strict=True)
        return {number: now for number, (now, current) in looked if not current}


def compute(
    results: Results, groups: Sequence[Group], extractor: Extractor | None, options: argparse.Namespace
) -> None:
    """The parts of this process that are not there.

    Raises:
        ValueError: There are some and no weights, or these give no finite numbers.
    """
    first, shards = options.shard
    todo = missing(results, groups, range(len(groups))[first::shards], options.num_threads)
    if extractor is None:
        if todo:
            raise ValueError(
                f"{len(todo)} of {len(groups)} parts are not in {options.out}, or of pictures that have changed since, "
                f"and FID needs weights for them: {SOURCES['inception']}, and name it with --inception "
                "weights/inception"
            )
        return
    size = extractor.at_once

    def batches_of(number: int) -> list[list[tuple[Side, int]]]:
        side, group = groups[number]
        return [[(side, index) for index in group[first : first + size]] for first in range(0, len(group), size)]

    read = functools.partial(read_image, options.resolution)
    images = read_ahead(read, [batch for number in todo for batch in batches_of(number)], options.num_threads)

    def save(number: int) -> None:
        batches = (next(images) for _ in batches_of(number))
        part = features_of_part(extractor, groups[number][1], batches)
        results.save(number, {**part, "stamp": np.array(todo[number])})

    with contextlib.closing(images):
        work_through(len(groups), options.shard, todo, save, unit="image", size=lambda number: len(groups[number][1]))


def features_of_part(
    extractor: Extractor, indices: range, batches: Iterator[list[Read | BadRecord]]
) -> dict[str, np.ndarray]:
    """Features, names and places of the images of a part, and what was unreadable."""
    found: list[dict[str, np.ndarray]] = []
    read: list[str | BadRecord] = []
    for batch in batches:
        read += [image if isinstance(image, BadRecord) else image[0] for image in batch]
        found.append(extract(extractor, [image[1] for image in batch if not isinstance(image, BadRecord)]))
        del batch  # before others are read
    good = [(index, name) for index, name in zip(indices, read, strict=True) if not isinstance(name, BadRecord)]
    bad = [(index, str(error)) for index, error in zip(indices, read, strict=True) if isinstance(error, BadRecord)]
    if bad:
        logger.warning("%d images of this part cannot be read and are left out, the first: %s", len(bad), bad[0][1])
    return {
        "index": np.array([index for index, _ in good], np.int64),
        "name": np.array([name for _, name in good], np.str_),
        "bad_index": np.array([index for index, _ in bad], np.int64),
        "bad_reason": np.array([reason for _, reason in bad], np.str_),
        **{name: np.concatenate([some[name] for some in found]) for name in found[0]},
    }


def read_image(resolution: int, place: tuple[Side, int]) -> Read:
    """Name, relative to a folder of images, and pixels of one record.

    Raises:
        BadRecord: It cannot be read.
    """
    side, index = place
    source: Source | None = side.source
    assert source is not None
    record = source[index]
    path = Path(record.path)
    name = path.relative_to(source.name).as_posix() if path.is_relative_to(source.name) else record.path
    return name, prepared(record, resolution)
