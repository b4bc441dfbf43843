"""How well an autoencoder reconstructs images: PSNR, SSIM, LPIPS and rFID as the SVG-T2I release defines them.

Batches of 200 images in the order of the data are encoded together, as the latents of Autoencoder-R are matched over a
batch, and judged image by image. Every batch is a part of the results (`svg_jax.evaluate.results`), of which an image
takes 17 kB with rFID, for its features.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float
from PIL import Image

from data_pipelines.records import BadRecord, Source
from data_pipelines.sources import open_source
from svg_jax import assemble
from svg_jax.evaluate import images as files
from svg_jax.evaluate.fid.moments import bias
from svg_jax.evaluate.image_metrics import compared, psnr, ssim, stored
from svg_jax.evaluate.networks import load_inception, load_lpips
from svg_jax.evaluate.reconstruction_report import rank, write_report
from svg_jax.evaluate.results import Results, at_least_one, conclude, parse_metrics, work_through
from svg_jax.loading import Loaded, find_autoencoder, open_autoencoder
from svg_jax.metrics import side_by_side
from svg_jax.models.autoencoder import Autoencoder
from svg_jax.models.inception import Inception
from svg_jax.models.lpips import LPIPS
from svg_jax.nn.functional import Network, Params
from svg_jax.parallel import batch_multiple, batch_sharding, make_mesh

logger = logging.getLogger("svg_jax")

METRICS = ("psnr", "ssim", "lpips", "rfid")
PICTURES = 8  # from each end of a batch that are kept for the page, and shown there
PRECISION = "highest"  # of matrix products and convolutions: float32 on every chip


def add_flags(flags: argparse.ArgumentParser) -> None:
    """What `python -m svg_jax.evaluate reconstruction` asks for."""
    add = flags.add_argument
    add("--checkpoint", required=True, help="workdir of an autoencoder, trained or imported")
    add("--data", required=True, help="folder of images at any depth, or a list: .jsonl, .json, tfds:NAME/SPLIT")
    add("--root", help="folder that paths in a list start from, or that holds prepared data sets")
    add("--out", required=True, help="folder for the results, local or gs://")
    add("--metrics", default=",".join(METRICS), help="some of %(default)s")
    add("--lpips", help="workdir of LPIPS; by default the one in the autoencoder's own checkpoint")
    add("--inception", help="workdir of the Inception of FID")
    add("--no-ema", dest="ema", action="store_false", help="the raw weights instead of their average")
    add("--dtype", help=f"compute type of the autoencoder, of {', '.join(assemble.DTYPES)}; by default as configured")
    add("--match", help="how residual latents are matched: batch, per_image or none; by default as configured")
    add("--resolution", type=int, default=256, help="pixels a side (default: %(default)s)")
    add("--batch-size", type=int, default=200, help="images whose values are averaged first (default: %(default)s)")
    add("--max-images", type=int, help="the first so many only")
    add("--at-once", type=int, help="images decoded at a time; changes no result; by default 8 a device")
    add("--num-threads", type=int, default=os.cpu_count() or 1, help="that read images (default: %(default)s)")
    add("--shard", metavar="I/N", help="evaluate every N-th batch from the I-th; by default a share a process of a job")


def run(options: argparse.Namespace) -> None:
    """Evaluates what is missing; whoever completes the last part writes the report.

    Raises:
        ValueError: An option is out of range, weights are missing, or the results in `--out` are of other settings.
        FileNotFoundError: There is no checkpoint or no data.
    """
    metrics = parse_metrics(options.metrics, METRICS)
    at_least_one(options, "resolution", "batch_size", "max_images", "at_once", "num_threads")
    source = open_source(options.data, options.root)
    count = min(len(source), options.max_images or len(source))
    if "rfid" in metrics and count < 2:
        raise ValueError(f"rFID needs at least 2 images and {options.data} has {count}: give more, or other --metrics")
    if "rfid" in metrics and (text := bias(count)):
        logger.warning("%s", text)

    mesh = make_mesh({"fsdp": -1}, jax.local_devices())
    judge = load(options, metrics, mesh)
    settings = {
        "data": os.path.abspath(options.data) if Path(options.data).exists() else options.data,
        "data_signature": source.signature,
        "num_images": count,
        "resolution": options.resolution,
        "batch_size": options.batch_size,
        "metrics": list(metrics),
        "precision": PRECISION,
        **{name: loaded.origin for name, loaded in judge.networks.items()},
    }
    results = Results(options.out, settings)
    groups = [range(first, min(first + options.batch_size, count)) for first in range(0, count, options.batch_size)]
    shard, shards = options.shard
    todo = [number for number in range(len(groups))[shard::shards] if not results.holds(number)]
    read = functools.partial(read_image, source, options.data, options.resolution)
    batches = files.read_ahead(read, [groups[number] for number in todo], options.num_threads)

    def evaluate(number: int) -> None:
        results.save(number, judge_batch(judge, groups[number], next(batches), options.batch_size, mesh))

    with contextlib.closing(batches):
        work_through(len(groups), options.shard, todo, evaluate, unit="image", size=lambda number: len(groups[number]))
    conclude(results, len(groups), "batches", lambda: write_report(results, len(groups)))


class Judge(NamedTuple):
    """The networks, and the two programs that are compiled of them."""

    networks: Mapping[str, Loaded]
    encode: Callable[..., tuple[Array, ...]]
    score: Callable[..., dict[str, Array]]
    at_once: int


def load(options: argparse.Namespace, metrics: tuple[str, ...], mesh: Mesh) -> Judge:
    """Loads what the metrics need; the autoencoder last, so that what is missing is said at once.

    Raises:
        ValueError: Weights are missing or of something else, or the resolution is no multiple of the patch size.
    """
    workdir, section = find_autoencoder(options.checkpoint)
    patch = assemble.autoencoder_config(section).patch_size
    if options.resolution % patch:
        nearest = max(round(options.resolution / patch), 1) * patch
        raise ValueError(
            f"--resolution {options.resolution} is not a multiple of the patch size {patch}: choose {nearest}"
        )
    judges: dict[str, Loaded] = {}
    if "lpips" in metrics:
        judges["lpips"] = load_lpips(options.lpips, mesh, autoencoder=workdir)
    if "rfid" in metrics:
        judges["inception"] = load_inception(options.inception, mesh)
    choices = {name: getattr(options, name) for name in ("ema", "dtype", "match")}
    autoencoder = open_autoencoder(workdir, section, mesh, **choices)
    multiple = batch_multiple(mesh)
    at_once = -(-min(options.at_once or 8 * multiple, options.batch_size) // multiple) * multiple
    return Judge(
        {"autoencoder": autoencoder, **judges},
        jax.jit(functools.partial(encode, autoencoder.network, at_once=at_once), out_shardings=batch_sharding(mesh)),
        jax.jit(
            functools.partial(
                score,
                autoencoder.network,
                metrics=metrics,
                lpips=judges["lpips"].network if "lpips" in judges else None,
                inception=judges["inception"].network if "inception" in judges else None,
            )
        ),
        at_once,
    )


def encode(
    network: Network[Autoencoder],
    params: Params,
    images: Float[Array, "batch h w 3"],
    valid: Bool[Array, " batch"],
    *,
    at_once: int,
) -> tuple[Float[Array, "at_once rows cols channels"], ...]:
    """Features of a whole batch of images in [-1, 1], cut into those that are decoded at a time.

    Slots that are not valid enter no statistics.
    """
    features = network(params).features_of_images((images + 1.0) * 127.5, valid)
    return tuple(jnp.split(features, len(images) // at_once))


def score(
    network: Network[Autoencoder],
    params: Mapping[str, Params],
    features: Float[Array, "batch rows cols channels"],
    images: Float[Array, "batch h w 3"],
    *,
    metrics: tuple[str, ...],
    lpips: Network[LPIPS] | None = None,
    inception: Network[Inception] | None = None,
) -> dict[str, Array]:
    """Decodes features and compares the result with the images that they are of, one by one.

    PSNR and rFID compare what is stored with 8 bits; SSIM and LPIPS the decoder's output with the image before that.
    """
    decoded = network(params["autoencoder"]).decoder(features)
    before, after = stored(images), stored(decoded)
    values = {"input": before, "reconstruction": after, "finite": jnp.isfinite(decoded).all(axis=(1, 2, 3))}
    values["psnr"] = psnr(after, before)
    if "ssim" in metrics:
        values["ssim"] = ssim(compared(decoded), images)
    if lpips is not None:
        values["lpips"] = lpips(params["lpips"])(compared(decoded), images)
    if inception is not None:
        module = inception(params["inception"])
        values["features_input"], values["features_reconstruction"] = module(before), module(after)
    return values


def judge_batch(
    judge: Judge, indices: range, batch: list[tuple[str, np.ndarray] | BadRecord], size: int, mesh: Mesh
) -> dict[str, np.ndarray]:
    """The part that one batch gives: values an image, features, the pictures of both ends, and what was unreadable."""
    bad = [(index, str(item)) for index, item in zip(indices, batch, strict=True) if isinstance(item, BadRecord)]
    good = [(index, *item) for index, item in zip(indices, batch, strict=True) if not isinstance(item, BadRecord)]
    if bad:
        logger.warning("%d images of this batch cannot be read and are left out, the first: %s", len(bad), bad[0][1])
    part = {
        "index": np.array([index for index, _, _ in good], np.int64),
        "name": np.array([name for _, name, _ in good], np.str_),
        "bad_index": np.array([index for index, _ in bad], np.int64),
        "bad_reason": np.array([reason for _, reason in bad], np.str_),
    }
    if not good:
        return part
    # One shape for all batches, the last and those with bad images too, so that nothing is compiled twice.
    slots = -(-size // judge.at_once) * judge.at_once
    pixels = np.zeros((slots, *good[0][2].shape), np.float32)
    pixels[: len(good)] = [image for _, _, image in good]
    place = batch_sharding(mesh)
    params = {name: loaded.params for name, loaded in judge.networks.items()}
    found = []
    with jax.set_mesh(mesh), jax.default_matmul_precision(PRECISION), jax.transfer_guard("disallow"):
        valid = jax.device_put(np.arange(slots) < len(good), place)
        features = judge.encode(params["autoencoder"], jax.device_put(pixels, place), valid)
        for first, some in zip(range(0, len(good), judge.at_once), features, strict=False):
            images = jax.device_put(pixels[first : first + judge.at_once], place)
            found.append(judge.score(params, some, images))
        found = jax.device_get(found)
    values = {name: np.concatenate([some[name] for some in found])[: len(good)] for name in found[0]}
    before, after = values.pop("input"), values.pop("reconstruction")
    return part | values | pictures(before, after, rank(values))


def pictures(before: np.ndarray, after: np.ndarray, values: Float[np.ndarray, " batch"]) -> dict[str, np.ndarray]:
    """JPEG files of the images with the lowest and the highest values: input, reconstruction, difference in a row."""
    order = np.argsort(values, kind="stable")
    chosen = sorted({*order[:PICTURES].tolist(), *order[-PICTURES:].tolist()})
    rows: dict[str, np.ndarray] = {}
    for i in chosen:
        (row,) = side_by_side([before[i]], [after[i]])
        data = io.BytesIO()
        Image.fromarray(row).save(data, format="JPEG", quality=90)
        rows[f"picture_{i}"] = np.frombuffer(data.getvalue(), np.uint8)
    return rows


def read_image(source: Source, data: str, side: int, index: int) -> tuple[str, np.ndarray]:
    """Name, relative to a folder of data, and centre square of one record.

    Raises:
        BadRecord: It cannot be read.
    """
    record = source[index]
    path = Path(record.path)
    name = path.relative_to(data).as_posix() if path.is_relative_to(data) else record.path
    return name, files.read(record, side)
