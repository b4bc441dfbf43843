"""FID while a model trains: pictures of the averaged weights against statistics from a file.

Text, noise, pictures and features stay on the devices, over all processes of the run; only features come to the hosts.
The pictures are those that `svg_jax.sample` would draw, up to the compute type, so that
`python -m svg_jax.evaluate fid` finds the same number.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8
from ml_collections import ConfigDict

from data_pipelines.prompts import read_prompts
from data_pipelines.records import BadRecord, Cause, Source
from svg_jax import distributed
from svg_jax.evaluate.fid.features import PRECISION, channels_of, check_finite
from svg_jax.evaluate.fid.moments import Moments, bias, frechet_distance
from svg_jax.evaluate.fid.statistics_file import Statistics, check_comparable, read_statistics
from svg_jax.evaluate.networks import load_inception
from svg_jax.loading import Loaded
from svg_jax.models.inception import Inception
from svg_jax.nn.functional import Network, Params
from svg_jax.parallel import batch_multiple, on_host, replicated
from svg_jax.pipeline import Job, SVGPipeline, explained_out_of_memory

logger = logging.getLogger("svg_jax")

BLOCK = 1024  # features whose moments are summed at a time
AT_ONCE = 4  # pictures a device


class Plan(NamedTuple):
    """What is drawn, and what it is compared with."""

    jobs: list[Job]
    batch_size: int
    inception: Loaded
    statistics: Statistics


def plan_fid(config: ConfigDict, mesh: Mesh, data: Source) -> Plan:
    """Reads what `config.eval` names; nothing is compiled. All processes call it together.

    Picture k of K is of prompt k mod P of P: its noise is a function of the prompt's place, of its place among the
    samples of that prompt, and of nothing else.

    Raises:
        FileNotFoundError: There is no such reference, or no such file of prompts.
        ValueError: A key is missing, the reference is of another extractor, or there are no captions.
        BadRecord: A store does not answer that has the captions.
    """
    section = config.eval
    count, reference = section.fid_samples, section.fid_reference
    if count < 2:
        raise ValueError(f"config.eval.fid_samples is {count}: FID needs at least 2 pictures, better 10,000")
    if reference is None:
        raise ValueError(
            "config.eval.fid_every is above 0 and there is nothing to compare with: make statistics with `python -m "
            "svg_jax.evaluate fid --reference IMAGES --inception W --save-statistics FILE.npz`, and name FILE.npz with "
            "--config.eval.fid_reference"
        )
    statistics = read_statistics(reference)
    prompts = read_prompts(section.fid_prompts) if section.fid_prompts else captions(data, count)
    check_agreed(prompts, config.cluster.start_timeout)
    loaded = load_inception(section.fid_inception, mesh, metric="FID", flag="--config.eval.fid_inception")
    warnings = check_comparable(
        reference,
        statistics,
        channels=channels_of(loaded),
        extractor=loaded.origin["weights"],
        resolutions=(config.data.resolution, 0),  # of a square picture, the centre crop is the picture
    )
    if text := bias(count):
        warnings.append(text)
    for warning in warnings:
        logger.warning("%s", warning)
    jobs = [Job(prompts[k % len(prompts)], k % len(prompts), k // len(prompts)) for k in range(count)]
    return Plan(jobs, section.fid_batch_size or AT_ONCE * batch_multiple(mesh), loaded, statistics)


def online_fid(plan: Plan, pipeline: SVGPipeline) -> Callable[[Params], dict[str, float]]:
    """What computes `eval/fid` of weights; all processes call it together.

    That raises `MemoryError` where the devices have too little, and `ValueError` where features are not finite.
    """
    mesh, settings = pipeline.mesh, pipeline.settings(batch_size=plan.batch_size)
    compute = jax.jit(functools.partial(features, plan.inception.network), out_shardings=replicated(mesh))

    def rows(params: Params) -> Iterator[Float[np.ndarray, "images channels"]]:
        for batch in pipeline.with_params(params).on_devices(plan.jobs, settings):
            with jax.set_mesh(mesh), jax.default_matmul_precision(PRECISION), explained_out_of_memory():
                found = on_host(compute(plan.inception.params, batch.pixels))[: len(batch.jobs)]
            check_finite(found, plan.inception)
            yield found

    def evaluate(params: Params) -> dict[str, float]:
        try:
            return {"eval/fid": frechet_distance(moments_of(rows(params)), plan.statistics)}
        except MemoryError as error:
            raise MemoryError(
                f"out of device memory while {plan.batch_size} pictures at a time were drawn for FID: lower "
                "--config.eval.fid_batch_size"
            ) from error

    return evaluate


def check_agreed(prompts: Sequence[str], timeout: float) -> None:
    """All processes must draw the same.

    Args:
        prompts: That this process has read.
        timeout: Seconds to wait for the others.

    Raises:
        ValueError: Another has read other ones.
    """
    digest = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()
    first, *others = distributed.everyone("the prompts of FID", digest, timeout)
    if differing := [process for process, other in enumerate(others, start=1) if other != first]:
        raise ValueError(
            f"process {differing[0]} has read other prompts for FID than process 0: give all of them the same files, "
            "or name prompts with --config.eval.fid_prompts"
        )


def features(
    network: Network[Inception], params: Params, images: UInt8[Array, "batch h w 3"]
) -> Float[Array, "batch 2048"]:
    """Of 8-bit images of any one size."""
    return network(params)(images)


def moments_of(batches: Iterable[Float[np.ndarray, "images channels"]]) -> Moments:
    """Summed block by block: a batch is too small for that, all rows are too many to be kept."""
    total: Moments | None = None
    block: list[np.ndarray] = []

    def merged() -> Moments:
        new = Moments.of(np.concatenate(block))
        return new if total is None else total.merged(new)

    for rows in batches:
        block.append(rows)
        if sum(map(len, block)) >= BLOCK:
            total, block = merged(), []
    return merged() if block or total is None else total


def captions(data: Source, count: int) -> list[str]:
    """The first caption of each of at most `count` records, evenly spread over the data.

    Records that have none, or are damaged, are left out.

    Raises:
        ValueError: None has a caption.
        BadRecord: A store does not answer: left out here alone, its caption would still be drawn by other processes.
    """
    found, wanted = [], min(count, len(data))
    for k in range(wanted):
        try:
            record = data[k * len(data) // wanted]
        except BadRecord as error:
            if error.cause in (Cause.REMOTE, Cause.TIMEOUT):
                raise
            continue
        if record.captions:
            found.append(record.captions[0].text)
    if not found:
        raise ValueError(f"{data.name} has no captions to draw for FID: name prompts with --config.eval.fid_prompts")
    return found
