"""Draws pictures: `python -m svg_jax.sample --checkpoint=weights --prompt="a red fox in snow" --out=samples`."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import re
from typing import Any

from tqdm import tqdm

from data_pipelines.prompts import read_prompts
from data_pipelines.text import SYSTEM_PROMPTS
from svg_jax.assemble import DTYPES
from svg_jax.config import one_sentence, parse_shard
from svg_jax.flow.solvers import LAST_STEPS, SOLVERS, Solver
from svg_jax.pipeline import Job, Settings, SVGPipeline
from svg_jax.samples import SampleFolder

NOT_OF_THE_PICTURE = ("batch_size", "width", "height")  # settings that a folder's pictures need not share


def main(arguments: list[str] | None = None) -> None:
    """Parses, draws what is not there yet, and lists it."""
    options = vars(parser().parse_args(arguments))
    logging.getLogger("svg_jax").setLevel(logging.INFO)
    with one_sentence():
        prompts = options.pop("prompt")
        for file in options.pop("prompts"):
            prompts = prompts + read_prompts(file)
        if not prompts:
            raise ValueError("nothing to draw: give --prompt or --prompts")
        if (num_images := options.pop("num_images")) < 1:
            raise ValueError(f"--num-images is {num_images}: it must be at least 1")
        shard, of = parse_shard(options.pop("shard"))
        sizes: list[tuple[int | None, int | None]] = [parse_size(size) for size in options.pop("resolution")]
        out = options.pop("out")
        checkpoint = options.pop("checkpoint")
        loading = {name: options.pop(name) for name in ("autoencoder", "text_encoder", "tokenizer", "ema", "dtype")}
        options["solver"] = solver_of(options)

        pipe = SVGPipeline.from_checkpoint(checkpoint, **loading)
        every = [pipe.settings(**options, width=width, height=height) for width, height in sizes or [(None, None)]]
        folder = SampleFolder(out, {**shared(every[0]), **pipe.origin})
        wanted = [Job(prompt, i, j) for i, prompt in enumerate(prompts) for j in range(num_images)][shard::of]
        for settings in every:
            draw(pipe, wanted, settings, folder)
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
    add("--autoencoder", help="workdir of another autoencoder")
    add("--text-encoder", help="workdir of another text encoder")
    add("--tokenizer", help="folder of another tokeniser")
    add("--no-ema", dest="ema", action="store_false", help="the raw weights instead of their average")
    add("--dtype", help=f"compute type, of {', '.join(DTYPES)}; by default as configured")
    add("--prompt", action="append", default=[], help="what to draw; may be given many times")
    add("--prompts", action="append", default=[], metavar="FILE", help=".txt, .json or .jsonl")
    add("--out", default="samples", help="folder for the pictures, local or gs://")
    add("--num-images", type=int, default=1, help="pictures a prompt")
    add("--resolution", action="append", default=[], metavar="WIDTHxHEIGHT", help="in pixels; may be given many times")
    add("--num-steps", type=int)
    add("--solver", metavar="NAME", help=f"{', '.join(SOLVERS)}")
    add("--diffusion-form", help="of the sde_ solvers")
    add("--last-step", help=f"of the sde_ solvers: {', '.join(LAST_STEPS)}, none")
    add("--guidance-scale", type=float, help="1 is none")
    add("--renorm", type=float, help="limit of the guided norm relative to the conditional one; 0 for none")
    add("--guidance-interval", type=float, nargs=2, metavar=("FROM", "TO"), help="times at which guidance acts")
    add("--shift", type=float, help="of the time grid, toward noise; 1 is none")
    add("--system-prompt", metavar="NAME", help=f"{', '.join(SYSTEM_PROMPTS)}; enhance rewrites the prompts first")
    add("--negative-prompt", help="what guidance leads away from")
    add("--seed", type=int)
    add("--batch-size", type=int, help="pictures at a time")
    add("--tile", type=int, help="side in pixels of the squares that are decoded one by one; saves memory")
    add(
        "--shard",
        metavar="I/N",
        help="draw every N-th picture from the I-th (from 0); by default one share a process of a jax.distributed job",
    )
    return flags


def solver_of(options: dict[str, Any]) -> str | Solver | None:
    """The solver of the flags, with options where some are given."""
    extra = {name: options.pop(name) for name in ("diffusion_form", "last_step")}
    given: dict[str, Any] = {
        name: None if value == "none" else value for name, value in extra.items() if value is not None
    }
    if given and not (options["solver"] or "").startswith("sde_"):
        raise ValueError(f"--{next(iter(given)).replace('_', '-')} is for --solver sde_euler and sde_heun")
    return Solver(options["solver"], **given) if given else options["solver"]


def parse_size(text: str) -> tuple[int, int]:
    """(width, height) of `1440x720`, or of the release's `1024:1440x720`."""
    found = re.fullmatch(r"(?:\d+:)?(\d+)x(\d+)", text.strip())
    if not found:
        raise ValueError(f"--resolution '{text}' is not WIDTHxHEIGHT, as in 1440x720")
    return int(found[1]), int(found[2])


def shared(settings: Settings) -> dict[str, Any]:
    """What all pictures of a folder have in common."""
    return {name: value for name, value in dataclasses.asdict(settings).items() if name not in NOT_OF_THE_PICTURE}


if __name__ == "__main__":
    main()
