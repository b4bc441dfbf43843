"""Packs a source of training data into ArrayRecord shards, its images cropped as training crops them.

`python -m data_pipelines.pack SOURCE OUT --resolution=256` reads each record once, and OUT is a source that trains like
SOURCE, but reads fewer and smaller files. Broken records are left out and listed in OUT/report.jsonl, counted by cause
in OUT/report.json. The same command goes on where an interrupted one stopped, and the result is the same to the byte.

It runs on Apache Beam: on this machine, or with --runner=DataflowRunner and the options of that runner (FlinkRunner,
SparkRunner, …) on many. SOURCE may be an address, and OUT one at gs:// or s3://; but training copies shards from there
to each host, whole: where that is too much, mount the bucket and name its path.

With --quality=lossless OUT gives the very crops of SOURCE; at the default quality, photographs differ from them by at
most 2 of 255 on average, at 38 dB and more. Crops are centred: a stage that trains on random crops reads SOURCE itself.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from absl import logging
from etils import epath

from data_pipelines import cache, files, images
from data_pipelines.arrayrecords import BEGUN, FINISHED
from data_pipelines.doors import add_crop_flags, add_source_flags, one_sentence, positive
from data_pipelines.mixture import Mixture
from data_pipelines.pack_shard import LOSSLESS, REPORTS, Settings, finished, pack_shard, writing
from data_pipelines.prepared import PREFIX
from data_pipelines.records import Cause
from data_pipelines.sources import open_source

# Beam's own name for it, "DirectRunner", first tries to download and start a runner that is written in Go.
LOCAL_RUNNER = "FnApiRunner"


def main(arguments: list[str] | None = None) -> None:
    """Parses, packs what is not yet there, and prints the report."""
    options, of_runner = parser().parse_known_args(arguments)
    if of_runner and options.runner == LOCAL_RUNNER:
        parser().error(f"unknown flags {' '.join(of_runner)}; options of a runner go with --runner")
    logging.set_verbosity(logging.INFO)
    with one_sentence():
        images.crop_sizes(options.resolution, options.patch_size, options.max_ratio)
        out = writable(options.out)
        path, root = absolute(options.source), options.root and absolute(options.root)
        source = open_source(path, root)
        if isinstance(source, Mixture) and source.shares is not None:
            raise ValueError(
                f"{path} is a mixture with weights, which shards cannot keep: pack each of its lists, and name the "
                "packs with these weights in another mixture"
            )
        settings = Settings(
            source=path,
            root=root,
            signature=source.signature,
            num_records=len(source),
            resolution=options.resolution,
            patch_size=options.patch_size,
            max_ratio=options.max_ratio,
            quality=options.quality,
            shard_size=options.shard_size,
        )
        begin(out, settings)
        missing = [shard for shard, report in enumerate(reports(out, settings)) if report is None]
        if missing:
            logging.info("%d of %d shards are to be made", len(missing), settings.num_shards)
            (epath.Path(out) / FINISHED).unlink(missing_ok=True)  # some may have been lost since
            run(missing, out, settings, runner_flags(options.runner, options.workers, of_runner))
        print(finish(out, settings))


def parser() -> argparse.ArgumentParser:
    """The flags."""
    flags = argparse.ArgumentParser(
        prog="python -m data_pipelines.pack",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_source_flags(flags)
    add = flags.add_argument
    add("out", metavar="OUT", help="folder or address of the shards")
    add("--resolution", type=positive, required=True, help="side in pixels of the square crop, as in training")
    add_crop_flags(flags)
    add("--quality", type=_quality, default=95, help="of JPEG, 1 to 100, or 'lossless' for WebP (default: %(default)s)")
    add("--shard-size", type=positive, default=4096, help="records a shard (default: %(default)s)")
    add(
        "--workers",
        type=functools.partial(positive, most=1024),
        default=os.cpu_count() or 1,
        help="shards made at a time, here (default: %(default)s)",
    )
    add("--runner", default=LOCAL_RUNNER, help="of Apache Beam; flags that are not listed here are passed to it")
    return flags


def absolute(path: str) -> str:
    """A path as other machines and later runs have it; an address, or the name of a data set, as it is."""
    if not path or files.is_remote(path) or path.startswith(PREFIX):
        return path
    return os.path.abspath(path.removeprefix("file://"))


def writable(out: str) -> str:
    """OUT as a path or address that can be written to.

    Raises:
      ValueError: an address of another kind.
      ImportError: an address that needs a library which is not installed.
    """
    if not files.is_remote(out):
        return absolute(out)
    if not out.startswith(("gs://", "s3://")):
        raise ValueError(f"OUT {out} is no place to write to: expected a folder, or an address at gs:// or s3://")
    try:
        epath.Path(out).exists()
    except ImportError as error:
        raise ImportError(f'OUT {out} is remote: run `pip install "svg_jax[remote]"` ({error})') from error
    return out


def begin(out: str, settings: Settings) -> None:
    """Makes the folder and writes down the settings.

    Raises:
      ValueError: shards of other settings stand there, or other files.
      OSError: it cannot be written.
    """
    folder = epath.Path(out)
    file = folder / BEGUN
    if file.exists():
        before, now = _read_settings(file), dataclasses.asdict(settings)
        differing = [key for key in now if before.get(key) != now[key]]
        if differing:
            said = ", ".join(f"{key}={before.get(key)} and now {now[key]}" for key in differing)
            raise ValueError(f"{out} was begun with {said}: choose another OUT, or remove it to pack anew")
    else:
        if folder.exists() and any(not other.name.endswith(".partial") for other in folder.iterdir()):
            raise ValueError(f"{out} holds other files than those of a pack: choose an empty folder")
        folder.mkdir(parents=True, exist_ok=True)
        with writing(file) as local:
            local.write_text(json.dumps(dataclasses.asdict(settings), indent=2), encoding="utf-8")
    (folder / REPORTS).mkdir(parents=True, exist_ok=True)


def _read_settings(file: epath.Path) -> dict[str, Any]:
    try:
        settings = json.loads(file.read_text())
        if not isinstance(settings, dict):
            raise ValueError(f"it holds a {type(settings).__name__}")
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}): choose another OUT, or remove it whole to pack anew") from error
    return settings


def reports(out: str, settings: Settings) -> Iterator[dict[str, Any] | None]:
    """The report of every shard that is finished, None for the others; not all in memory at a time."""
    with ThreadPoolExecutor(32) as pool:
        for start in range(0, settings.num_shards, 256):
            shards = range(start, min(start + 256, settings.num_shards))
            yield from pool.map(lambda shard: finished(shard, out, settings), shards)


def runner_flags(runner: str, workers: int, more: Sequence[str]) -> list[str]:
    """Flags for Beam. Here it works in threads: a process of its own that dies it would wait for without end."""
    flags = [f"--runner={runner}", *more]
    if runner == LOCAL_RUNNER and workers > 1:
        flags += [f"--direct_num_workers={workers}", "--direct_running_mode=multi_threading"]
    return flags


def run(shards: Sequence[int], out: str, settings: Settings, flags: Sequence[str]) -> None:
    """Makes shards, on Beam.

    Raises:
      ImportError: Beam is not installed.
    """
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise ImportError(
            f'packing runs on Apache Beam: run `pip install "svg_jax[pack]"` ({error.name} is missing)'
        ) from error
    with beam.Pipeline(options=PipelineOptions(list(flags))) as pipeline:
        numbers = pipeline | "shards" >> beam.Create(shards) | "spread" >> beam.Reshuffle()
        _ = numbers | "pack" >> beam.Map(pack_shard, out, settings)


def finish(out: str, settings: Settings) -> str:
    """Writes `report.json` and `report.jsonl` from the reports of all shards; returns the former as text.

    Raises:
      ValueError: not one record could be used.
      RuntimeError: shards are missing, which the runner did not say.
    """
    folder = epath.Path(out)
    causes: collections.Counter[str] = collections.Counter()
    first, written, shards, size = "", 0, 0, 0
    with writing(folder / "report.jsonl") as file, file.open("w", encoding="utf-8") as lines:
        for shard, report in enumerate(reports(out, settings)):
            if report is None:
                raise RuntimeError(f"shard {shard} of {out} was not made, and the runner did not say why: run again")
            written, shards, size = (
                written + report["written"],
                shards + (report["written"] > 0),
                size + report["bytes"],
            )
            for entry in report["broken"]:
                first = first or entry["message"]
                causes[entry["cause"]] += 1
                lines.write(json.dumps(entry, ensure_ascii=False) + "\n")
    broken = {cause.value: causes[cause] for cause in Cause if causes[cause]}
    summary = {"records": settings.num_records, "written": written, "shards": shards, "bytes": size, "broken": broken}
    text = json.dumps(summary, indent=2)
    with writing(folder / FINISHED) as file:
        file.write_text(text + "\n", encoding="utf-8")
    if not files.is_remote(out):
        for written_to in (folder, folder / REPORTS):
            cache.remove_abandoned(Path(written_to))
    if not written:
        raise ValueError(f"not one of the {settings.num_records} records could be used: {first}")
    return text


def _quality(text: str) -> int | str:
    if text == LOSSLESS:
        return text
    if not text.isdecimal() or not 1 <= int(text) <= 100:
        raise argparse.ArgumentTypeError(f"'{text}' is neither a number from 1 to 100 nor '{LOSSLESS}'")
    return int(text)


if __name__ == "__main__":
    main()
