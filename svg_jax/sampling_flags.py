"""The flags that say how pictures are drawn, for all doors that draw; what is not given is as configured."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from typing import Any

from data_pipelines.text import SYSTEM_PROMPTS
from svg_jax.assemble import DTYPES
from svg_jax.flow.solvers import LAST_STEPS, SOLVERS, Solver

WEIGHTS = ("autoencoder", "text_encoder", "tokenizer", "ema", "dtype")  # of `SVGPipeline.from_checkpoint`
SETTINGS = (  # of `SVGPipeline.settings`, beside the solver and the size
    "num_steps", "guidance_scale", "renorm", "guidance_interval", "shift", "system_prompt", "negative_prompt", "seed",
    "batch_size", "tile",
)  # fmt: skip


def add_sampling_flags(flags: argparse.ArgumentParser) -> None:
    """Weights and settings, all but the size; what is not given is as the checkpoint's config has it."""
    add = flags.add_argument
    add("--autoencoder", help="workdir of another autoencoder")
    add("--text-encoder", help="workdir of another text encoder")
    add("--tokenizer", help="folder of another tokeniser")
    add("--no-ema", dest="ema", action="store_false", help="the raw weights instead of their average")
    add("--dtype", help=f"compute type, of {', '.join(DTYPES)}; by default as configured")
    add("--num-steps", type=int, help="of the solver")
    add("--solver", metavar="NAME", help=f"{', '.join(SOLVERS)}")
    add("--diffusion-form", help="of the sde_ solvers")
    add("--last-step", help=f"of the sde_ solvers: {', '.join(LAST_STEPS)}, none")
    add("--guidance-scale", type=float, help="1 is none")
    add("--renorm", type=float, help="limit of the guided norm relative to the conditional one; 0 for none")
    add("--guidance-interval", type=float, nargs=2, metavar=("FROM", "TO"), help="times at which guidance acts")
    add("--shift", type=float, help="of the time grid, toward noise; 1 is none")
    add("--system-prompt", metavar="NAME", help=f"{', '.join(SYSTEM_PROMPTS)}; enhance rewrites the prompts first")
    add("--negative-prompt", help="what guidance leads away from")
    add("--seed", type=int, help="of the noise")
    add("--batch-size", type=int, help="pictures at a time")
    add("--tile", type=int, help="side in pixels of the squares that are decoded one by one; saves memory")


def weights_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """What `SVGPipeline.from_checkpoint` takes of the flags."""
    return {name: options[name] for name in WEIGHTS}


def settings_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """What `SVGPipeline.settings` takes of the flags.

    Raises:
        ValueError: An option is not for this solver, or out of range.
    """
    return {**{name: options[name] for name in SETTINGS}, "solver": solver_of(options)}


def solver_of(options: Mapping[str, Any]) -> str | Solver | None:
    """The solver of the flags, with options where some are given."""
    given: dict[str, Any] = {
        name: None if options[name] == "none" else options[name]
        for name in ("diffusion_form", "last_step")
        if options[name] is not None
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
