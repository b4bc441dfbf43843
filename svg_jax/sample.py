"""Draws pictures: `python -m svg_jax.sample --checkpoint=weights --prompt="a red fox in snow" --out=samples`."""

from __future__ import annotations

import argparse
import dataclasses
import logging
from typing import Any

from tqdm import tqdm

from data_pipelines.prompts import read_prompts
from svg_jax.config import one_sentence, parse_shard
from svg_jax.pipeline import Job, Settings, SVGPipeline
from svg_jax.samples import SampleFolder
from svg_jax.sampling_flags import add_sampling_flags, parse_size, settings_of, weights_of

NOT_OF_THE_PICTURE = ("batch_size", "width", "height")  # settings that a folder's pictures need not share


def main(arguments: list[str] | None = None) -> None:
    """Parses, draws what is not there yet, and lists it."""
    options = parser().parse_args(arguments)
    logging.getLogger("svg_jax").setLevel(logging.INFO)
    with one_sentence():
        prompts = options.prompt + [prompt for file in options.prompts for prompt in read_prompts(file)]
        if not prompts:
            raise ValueError("nothing to draw: give --prompt or --prompts")
        if options.num_images < 1:
            raise ValueError(f"--num-images is {options.num_images}: it must be at least 1")
        shard, of = parse_shard(options.shard)
        sizes: list[tuple[int | None, int | None]] = [parse_size(size) for size in options.resolution]
        how = settings_of(vars(options))

        pipe = SVGPipeline.from_checkpoint(options.checkpoint, **weights_of(vars(options)))
        every = [pipe.settings(**how, width=width, height=height) for width, height in sizes or [(None, None)]]
        folder = SampleFolder(options.out, {**shared(every[0]), **pipe.origin})
        places = [Job(prompt, i, j) for i, prompt in enumerate(prompts) for j in range(options.num_images)]
        for settings in every:
            draw(pipe, places[shard::of], settings, folder)
        folder.finish()
    print(f"{folder.folder / 'index.html'}")


def draw(pipe: SVGPipeline, wanted: list[Job], settings: Settings, folder: SampleFolder) -> None:
    """Draws the pictures of one size that are not there."""
    width, height = settings.width, settings.height
    names = {job: folder.name(job.index, job.sample, width, height) for job in wanted}
    jobs = [job for job in wanted if not folder.holds(names[job], job.prompt)]
    with tqdm(total=len(wanted), initial=len(wanted) - len(jobs), unit="image", desc=f"{width}x{height}") as progress:
        for batch in pipe.stream(jobs, settings):
            for picture in batch:
                job = picture.job
                more: dict[str, int | str] = {"width": width, "height": height}
                if picture.prompt != job.prompt:
                    more["enhanced_prompt"] = picture.prompt
                more |= {"index": job.index, "sample": job.sample}
                folder.save(names[job], picture.image, job.prompt, **more)
            progress.update(len(batch))


def parser() -> argparse.ArgumentParser:
    """The flags; what is not given is as the checkpoint's config has it."""
    flags = argparse.ArgumentParser(prog="python -m svg_jax.sample", description=__doc__, allow_abbrev=False)
    add = flags.add_argument
    add(
        "--checkpoint",
        required=True,
        help="folder that `svg_jax.convert import` made, or the workdir of a training run",
    )
    add("--prompt", action="append", default=[], help="what to draw; may be given many times")
    add("--prompts", action="append", default=[], metavar="FILE", help=".txt, .json or .jsonl")
    add("--out", default="samples", help="folder for the pictures, local or gs://")
    add("--num-images", type=int, default=1, help="pictures a prompt")
    add("--resolution", action="append", default=[], metavar="WIDTHxHEIGHT", help="in pixels; may be given many times")
    add_sampling_flags(flags)
    add(
        "--shard",
        metavar="I/N",
        help="draw every N-th picture from the I-th (from 0); by default one share a process of a jax.distributed job",
    )
    return flags


def shared(settings: Settings) -> dict[str, Any]:
    """What all pictures of a folder have in common."""
    return {name: value for name, value in dataclasses.asdict(settings).items() if name not in NOT_OF_THE_PICTURE}


if __name__ == "__main__":
    main()
