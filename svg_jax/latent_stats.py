"""Measures mean and standard deviation of an autoencoder's latents over a data set.

`python -m svg_jax.latent_stats --checkpoint=WORKDIR --data=PATH --out=stats.pt --to=WORKDIR2`. Diffusion runs in
latents normalised by these numbers. The same command goes on where an interrupted one stopped.
"""

from __future__ import annotations

import argparse
import collections
import functools
import io
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from data_pipelines import images
from data_pipelines.broken import CAUSES, BadRecordCounter, TooManyBadRecords, by_cause
from data_pipelines.grids import GridBatch, GridBatches
from data_pipelines.loader import make_loader
from data_pipelines.records import BadRecord
from data_pipelines.sources import open_source
from svg_jax import assemble, distributed
from svg_jax.autoencoder_steps import Batch, Moments, update_moments
from svg_jax.checkpoint import load_config, open_params, save_params
from svg_jax.config import one_sentence
from svg_jax.convert import formats
from svg_jax.convert.files import check_local, replacing
from svg_jax.loading import Loaded, find_autoencoder, open_autoencoder
from svg_jax.loop import device_batch
from svg_jax.models.autoencoder import AutoencoderConfig
from svg_jax.nn.functional import Network, Params
from svg_jax.parallel import make_mesh, replicated
from svg_jax.programs import check_batch
from svg_jax.steps import count_causes

logger = logging.getLogger("svg_jax")

SUFFIXES = (".pt", ".pth", ".safetensors")  # of --out
WAIT = 3600.0  # seconds that the processes of a job wait for each other


class Totals(NamedTuple):
    """How many features, their mean and their sum of squared deviations a channel, in float64.

    On the devices these are of one batch and float32; over a data set float32 would stop counting at 2^24.
    """

    num_tokens: float
    mean: Float[np.ndarray, " channels"]
    deviations: Float[np.ndarray, " channels"]
    bad: Int[np.ndarray, " causes"] = np.zeros(len(CAUSES), np.int64)  # images that could not be read

    def merged(self, batch: Moments, bad: Int[np.ndarray, " causes"]) -> Totals:
        """Of both sets together (Chan, Golub and LeVeque 1979)."""
        count, mean, deviations = (np.asarray(x, np.float64) for x in batch)
        total = max(self.num_tokens + float(count), 1.0)
        delta = mean - self.mean
        return Totals(
            self.num_tokens + float(count),
            self.mean + delta * (count / total),
            self.deviations + deviations + np.square(delta) * (self.num_tokens * count / total),
            self.bad + bad,
        )

    def statistics(self) -> dict[str, Float[np.ndarray, " channels"]]:
        """Mean and standard deviation of each channel.

        Raises:
            ValueError: A channel is not finite, or does not vary.
        """
        self.check_finite()
        std = np.sqrt(self.deviations / max(self.num_tokens, 1.0))
        if not (std > 0).all():
            raise ValueError(
                f"{np.sum(std == 0)} of {len(std)} latent channels do not vary over {self.num_tokens:.0f} features: "
                "are the images all of one colour?"
            )
        return {"mean": self.mean.astype(np.float32), "std": std.astype(np.float32)}

    def check_finite(self) -> None:
        """Raises ValueError if a channel is not finite."""
        finite = np.isfinite(self.mean) & np.isfinite(self.deviations)
        if not finite.all():
            raise ValueError(
                f"{np.sum(~finite)} of {len(finite)} latent channels hold values that are not finite: the weights are "
                "damaged, or too large for the compute type; compare with --dtype float32"
            )


class Progress:
    """What is measured so far. The first process alone keeps it, in a file that a later run goes on from."""

    def __init__(self, file: epath.Path, settings: Mapping[str, Any], channels: int) -> None:
        """Takes up what the file holds.

        Raises:
            ValueError: It is of other settings.
        """
        self.file, self.settings = file, json.loads(json.dumps(settings))
        self.done, self.totals = 0, Totals(0.0, np.zeros(channels), np.zeros(channels))
        if distributed.is_first() and file.exists():
            self._read()
        self.done = int(distributed.everyone("batches measured", str(self.done), WAIT)[0])

    def _read(self) -> None:
        try:
            with np.load(io.BytesIO(self.file.read_bytes()), allow_pickle=False) as arrays:
                before = json.loads(str(arrays["settings"]))
                done = int(arrays["done"])
                totals = Totals(float(arrays["num_tokens"]), arrays["mean"], arrays["deviations"], arrays["bad"])
        except Exception as error:  # whatever NumPy says about a damaged file
            raise ValueError(f"{self.file} cannot be read ({error}): remove it to measure from the start") from error
        for key in sorted({*before, *self.settings}):
            if before.get(key) != self.settings.get(key):
                raise ValueError(
                    f"{self.file} was begun with {key} = {before.get(key)}, and now it is {self.settings.get(key)}: "
                    "set it back, or remove that file to measure from the start"
                )
        self.done, self.totals = done, totals
        logger.info("going on after %d batches", done)

    def save(self) -> None:
        """Whole or not at all."""
        data = io.BytesIO()
        np.savez(data, **self.totals._asdict(), done=self.done, settings=json.dumps(self.settings))
        part = self.file.parent / f"{self.file.name}.part"
        part.write_bytes(data.getvalue())
        part.replace(self.file)


def main(arguments: list[str] | None = None) -> None:
    """Parses, measures and writes."""
    options = parser().parse_args(arguments)
    logging.getLogger("svg_jax").setLevel(logging.INFO)
    with one_sentence(ValueError, OSError, ImportError, MemoryError, TooManyBadRecords):
        distributed.initialise()
        target = check_targets(options)
        mesh = make_mesh({"data": -1})
        check_batch(options.batch_size, 1, mesh)
        source = open_source(options.data, options.root)
        workdir, section = find_autoencoder(options.checkpoint)
        loaded = open_autoencoder(workdir, section, mesh, ema=options.ema, dtype=options.dtype, match=options.match)
        sizes = assemble.autoencoder_config(section)
        batches = GridBatches(
            source,
            batch_size=options.batch_size,
            resolution=options.resolution,
            patch_size=sizes.patch_size,
            seed=options.seed,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        total = min(len(source), options.num_images or len(source))
        names = ("data", "resolution", "batch_size", "seed")
        settings = {name: getattr(options, name) for name in names} | {"signature": source.signature}
        settings |= {"num_images": total, **{name: loaded.origin[name] for name in ("match", "dtype", "weights")}}
        progress = Progress(target.parent / f".{target.name}.measuring.npz", settings, sizes.latent_channels)
        measure(loaded, batches, progress, total, mesh, options)
        statistics = finish(progress, batches, total, options) if distributed.is_first() else {}
        for line in write(statistics, workdir, sizes, options):
            if distributed.is_first():
                print(line)
        if distributed.is_first():
            progress.file.unlink(missing_ok=True)


def parser() -> argparse.ArgumentParser:
    """The flags."""
    flags = argparse.ArgumentParser(prog="python -m svg_jax.latent_stats", description=__doc__, allow_abbrev=False)
    add = flags.add_argument
    add("--checkpoint", required=True, help="workdir of an autoencoder, trained or imported")
    add("--data", required=True, help="folder of images at any depth, or a list: .jsonl, .json, tfds:NAME/SPLIT")
    add("--root", help="folder that paths in a list start from, or that holds prepared data sets")
    add("--out", metavar="FILE", help="as the release has them: .pt or .safetensors with mean and std, [1, channels]")
    add("--to", metavar="WORKDIR", help="a new workdir of the same autoencoder with these statistics, for training")
    add("--overwrite", action="store_true", help="replace the file of --out")
    add("--num-images", type=int, help="so many, drawn at random; by default all")
    add("--resolution", type=int, default=256, help="pixels a side of the centre squares (default: %(default)s)")
    add("--batch-size", type=int, default=64, help="images at a time, on all devices (default: %(default)s)")
    add("--no-ema", dest="ema", action="store_false", help="the raw weights instead of their average")
    add("--dtype", help=f"compute type, of {', '.join(assemble.DTYPES)}; by default as configured")
    add("--match", help="how residual latents are matched: batch, per_image or none; by default as configured")
    add("--seed", type=int, default=0, help="of the order of the images")
    add("--max-bad-fraction", type=float, default=0.01, help="stop above this share of broken images")
    add("--save-every", type=int, default=50, help="batches between saves (default: %(default)s)")
    add("--num-threads", type=int, default=8, help="that read images (default: %(default)s)")
    return flags


def check_targets(options: argparse.Namespace) -> epath.Path:
    """What is to be written, first of all, so that nothing is measured in vain; the one beside which progress is kept.

    Raises:
        ValueError: Nothing is to be written, or not so.
        FileExistsError: It is there already.
        PermissionError: The folder that it belongs in cannot be made.
    """
    for name in ("num_images", "resolution", "save_every", "batch_size"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}: it must be at least 1")
    if not 0 <= options.max_bad_fraction <= 1:
        raise ValueError(f"--max-bad-fraction is {options.max_bad_fraction:g}: it must lie between 0 and 1")
    if options.out is None and options.to is None:
        raise ValueError("nothing to write: give --out FILE, --to WORKDIR or both")
    if options.to is not None and epath.Path(options.to).exists():
        raise FileExistsError(f"there is {options.to} already: choose another --to")
    if options.out is not None:
        check_file(Path(options.out), options.overwrite)
    for flag in ("to", "out"):
        if (name := getattr(options, flag)) is not None:
            target = epath.Path(name).absolute()
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise PermissionError(f"cannot write {name} ({error}): choose another --{flag}") from error
    return target


def check_file(out: Path, overwrite: bool) -> None:
    """Whether --out can become a file of statistics; raises as `check_targets` says."""
    check_local(out)
    if out.suffix not in SUFFIXES:
        raise ValueError(f"{out}: the name of statistics must end in {', '.join(SUFFIXES)}")
    if out.suffix != ".safetensors":
        formats.import_torch()
    if out.is_dir():
        raise FileExistsError(f"{out} is a folder: choose another --out")
    if out.exists() and not overwrite:
        raise FileExistsError(f"there is {out} already: choose another --out, or replace it with --overwrite")


def measure(
    loaded: Loaded,
    batches: GridBatches,
    progress: Progress,
    total: int,
    mesh: Mesh,
    options: argparse.Namespace,
) -> None:
    """Adds what is missing of `total` images to `progress`, and saves it every so often.

    Saved is only what `--max-bad-fraction` allows, so that a run after the data were mended does not begin with images
    that could not be read before.

    Raises:
        ValueError: Features are not finite.
        TooManyBadRecords: More images than `--max-bad-fraction` cannot be read, of 1000 or more.
    """
    steps = -(-total // options.batch_size)
    of_batch = jax.jit(functools.partial(moments_of, loaded.network), out_shardings=replicated(mesh))

    def add(step: int, found: tuple[Moments, Any]) -> None:
        progress.totals = progress.totals.merged(*jax.device_get(found))
        progress.totals.check_finite()
        progress.done = step + 1
        if distributed.is_first() and progress.done < steps and progress.done % options.save_every == 0:
            save()

    def save() -> None:
        if count_bad(progress, total, options).fraction <= options.max_bad_fraction:
            progress.save()

    reader = make_loader(batches, start_step=progress.done, num_threads=options.num_threads, prefetch=8)
    shown = tqdm(
        range(progress.done, steps),
        initial=progress.done,
        total=steps,
        unit="batch",
        disable=not distributed.is_first(),
    )
    try:
        with jax.set_mesh(mesh):
            # What one batch gave is fetched while the next one is measured.
            pending: tuple[int, tuple[Moments, Any]] | None = None
            for step in shown:
                batch = device_batch(within(total, next(reader), step, options.batch_size), mesh)
                with jax.transfer_guard("disallow"):
                    found = of_batch(loaded.params, batch)
                if pending is not None:
                    add(*pending)
                pending = step, found
                if distributed.preempted(step + 1):
                    add(*pending)
                    if distributed.is_first():
                        save()
                    raise SystemExit(distributed.EXIT_PREEMPTED)
            if pending is not None:
                add(*pending)
    finally:
        reader.close()


def count_bad(
    progress: Progress, total: int, options: argparse.Namespace, *, min_records: int = 1000
) -> BadRecordCounter:
    """How many of the images so far could not be read, by cause.

    Raises:
        TooManyBadRecords: More than `--max-bad-fraction`, of at least `min_records`.
    """
    bad = BadRecordCounter(options.max_bad_fraction, min_records)
    bad.update(by_cause(progress.totals.bad), min(progress.done * options.batch_size, total))
    return bad


def finish(
    progress: Progress, batches: GridBatches, total: int, options: argparse.Namespace
) -> dict[str, Float[np.ndarray, " channels"]]:
    """The statistics. Only where there are some is the finished progress saved, in case they cannot be written.

    Raises:
        ValueError: A channel is not finite, or does not vary.
        TooManyBadRecords: No image can be read, or more than `--max-bad-fraction` cannot.
    """
    if not progress.totals.num_tokens:
        try:
            images.read(batches.source[batches.records(0)[0]])
            reason = "the warnings above name some of them with the cause"
        except BadRecord as error:
            reason = str(error)
        raise TooManyBadRecords(f"none of the {total} images of {batches.source.name} could be read: {reason}")
    bad = count_bad(progress, total, options, min_records=1)
    if bad.num_bad:
        logger.warning("%s", bad)
    statistics = progress.totals.statistics()
    progress.save()
    return statistics


def moments_of(network: Network[Any], params: Params, batch: Batch) -> tuple[Moments, Int[Array, " causes"]]:
    """Of the features of one batch; and how many of its images could not be read, by cause."""
    moments = update_moments(network, params, Moments.zero(network.shapes["latents.mean"].shape[0]), batch)
    return moments, count_causes(batch["cause"])


def within(total: int, batch: GridBatch, step: int, batch_size: int) -> GridBatch:
    """The batch without what the last one has beyond the images wanted."""
    slots = np.arange(len(batch["valid"])) + step * batch_size + jax.process_index() * len(batch["valid"])
    wanted = slots < total
    return {**batch, "valid": batch["valid"] & wanted, "cause": np.where(wanted, batch["cause"], 0)}


def write(
    statistics: Mapping[str, np.ndarray], workdir: str, sizes: AutoencoderConfig, options: argparse.Namespace
) -> Iterable[str]:
    """The files; one line on each."""
    if options.out is not None and distributed.is_first():
        arrays = {name: row[None, : sizes.encoder.dim] for name, row in statistics.items()}
        write_release(Path(options.out), arrays)
        yield f"{options.out}: " + ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())
        if sizes.residual is not None:
            yield (
                f"  without the {sizes.residual.out_channels} channels of the residual branch, to which the release "
                "itself extends them: --to keeps all as measured"
            )
    if options.to is not None:
        saved = open_params(workdir)
        measured = {f"latents.{name}": row for name, row in statistics.items()}
        frozen = collections.ChainMap(measured, cast(Any, saved["frozen"]))
        save_params(options.to, {**saved, "frozen": frozen}, load_config(workdir))
        yield f"{options.to}: the autoencoder of {workdir} with the statistics of {sizes.latent_channels} channels"


def write_release(target: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """`mean` and `std`, each a row a layer of the vision model, of which the release takes the last."""
    structs = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in arrays.items()}
    writer: Callable[..., Any] = formats.safetensors_writer
    if target.suffix != ".safetensors":
        writer = formats.torch_writer
    with replacing(target) as path, writer(path, structs) as put:
        for name, array in arrays.items():
            put(name, array)


if __name__ == "__main__":
    main()
