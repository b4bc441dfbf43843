"""Draws pictures: `python -m svg_jax.sample --workdir=DIR --prompt="a red fox in snow" --out=samples`."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from PIL import Image

from svg_jax.config import one_sentence
from svg_jax.metrics import image_grid
from svg_jax.pipeline import Pipeline


def main(arguments: list[str] | None = None) -> None:
    """Parses, draws, writes one PNG a picture, and a grid of them."""
    parser = argparse.ArgumentParser(prog="python -m svg_jax.sample", description=__doc__, allow_abbrev=False)
    parser.add_argument("--workdir", required=True, help="a training run")
    parser.add_argument("--prompt", action="append", default=[], help="what to draw; may be given many times")
    parser.add_argument("--prompts", type=Path, help="a text file, one prompt a line")
    parser.add_argument("--out", type=Path, default=Path("samples"), help="folder for the PNGs")
    parser.add_argument("--negative-prompt", default="")
    parser.add_argument("--samples-per-prompt", type=int, default=1)
    parser.add_argument("--height", type=int, help="pixels; the training resolution by default")
    parser.add_argument("--width", type=int)
    parser.add_argument("--num-steps", type=int)
    parser.add_argument("--method", help="ODE solver")
    parser.add_argument("--guidance-scale", type=float)
    parser.add_argument("--renorm", type=float)
    parser.add_argument("--truncate", type=float)
    parser.add_argument("--shift", type=float)
    parser.add_argument("--system-prompt")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--no-ema", dest="ema", action="store_false", help="the raw weights instead of their average")
    options = vars(parser.parse_args(arguments))
    workdir, out, ema, file = (options.pop(name) for name in ("workdir", "out", "ema", "prompts"))
    prompts = options.pop("prompt")

    with one_sentence():
        if file is not None:
            prompts = prompts + file.read_text().splitlines()
        if not prompts:
            raise ValueError("nothing to draw: give --prompt or --prompts")
        out.mkdir(parents=True, exist_ok=True)
        images = Pipeline.from_workdir(workdir, ema=ema)(prompts, **options)

    for i, image in enumerate(images):
        prompt, sample = divmod(i, options["samples_per_prompt"])
        name = re.sub(r"[^a-z0-9]+", "-", prompts[prompt].lower()).strip("-")[:60]
        path = out / f"{prompt:04d}_{sample}_{name}.png"
        Image.fromarray(image).save(path)
        print(path)
    if len(images) > 1:
        Image.fromarray(image_grid(images, columns=min(len(images), 8))).save(out / "grid.png")
        print(out / "grid.png")


if __name__ == "__main__":
    main()
