"""Autoencoder-R against Autoencoder-P on photographs, at equal steps: `python -m benchmarks.residual`.

Both train on the demo's photographs as configs/tiny_autoencoder_photographs.py says, without weights from elsewhere,
and are compared on crops of photographs of which they saw no pixel.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from data_pipelines import images
from data_pipelines.photographs import PHOTOGRAPHS, write_photographs
from data_pipelines.sources import open_source
from svg_jax.autoencoder_steps import reconstruct
from svg_jax.demo import ENVIRONMENT
from svg_jax.loading import find_autoencoder, open_autoencoder
from svg_jax.parallel import make_mesh

SIDE = 64  # pixels of the crops that are judged
HELD_OUT = 4  # one of so many photographs is kept out of training
MATCH = {"p": None, "r": "per_image"}  # how residual latents are matched when judging
LOGITS = ("logits/real", "logits/fake")


def main() -> None:
    """Trains both, prints a table and what the discriminator came to."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.residual", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/residual"))
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()
    photographs = write_photographs(options.out / "photographs")
    lines = photographs.read_text().splitlines()
    held_out = {photograph.name for photograph in PHOTOGRAPHS[::HELD_OUT]}
    parts: dict[str, list[str]] = {"train": [], "test": []}
    for line in lines:
        name, _ = Path(json.loads(line)["path"]).stem.rsplit("_", 1)  # without the view
        parts["test" if name in held_out else "train"].append(line)
    for name, part in parts.items():
        (photographs.parent / f"{name}.jsonl").write_text("\n".join(part) + "\n")
    print(f"{len(parts['train'])} photographs to train on, {len(parts['test'])} to judge by")

    source = open_source(photographs.parent / "test.jsonl")
    crops = np.stack([np.asarray(images.crop(images.read(source[i]), (SIDE, SIDE))) for i in range(len(source))])
    rows, pictures = {}, [crops]
    for kind in ("p", "r"):
        workdir = options.out / kind
        train(kind, workdir, photographs.parent / "train.jsonl", options.steps)
        loaded = open_autoencoder(*find_autoencoder(str(workdir)), make_mesh({"fsdp": -1}), match=MATCH[kind])
        drawn = np.asarray(jax.jit(lambda p, x, n=loaded.network: reconstruct(n, p, x))(loaded.params, crops))
        pictures.append(drawn)
        error = (drawn.astype(np.float64) - crops) / 255.0
        psnr = -10.0 * np.log10(np.mean(np.square(error), axis=(1, 2, 3)))
        rows[kind] = {"psnr": float(psnr.mean()), "l1": float(np.abs(error).mean()), **adversary(workdir)}
    Image.fromarray(np.concatenate([np.concatenate(list(row[:8]), axis=1) for row in pictures])).save(
        options.out / "pictures.png"
    )
    print(f"\n{'':14} {'PSNR, dB':>9} {'L1':>8} {'weight':>8} {'D(real)':>8} {'D(fake)':>8}")
    for kind, row in rows.items():
        print(
            f"Autoencoder-{kind.upper():2} {row['psnr']:9.2f} {row['l1']:8.4f} {row['loss/adaptive_weight']:8.3f} "
            f"{row['logits/real']:8.3f} {row['logits/fake']:8.3f}"
        )
    print("weight and logits: means over the last fifth of the steps, the discriminator plays from half-way on")
    (options.out / "report.json").write_text(json.dumps(rows, indent=2) + "\n")


def train(kind: str, workdir: Path, data: Path, steps: int) -> None:
    """Through the door."""
    config = Path(__file__).parents[1] / "configs" / "tiny_autoencoder_photographs.py"
    command = [sys.executable, "-m", "svg_jax.train_autoencoder", f"--config={config}:{kind}", f"--workdir={workdir}"]
    command += [f"--config.data.path={data}", f"--config.num_train_steps={steps}"]
    command += [f"--config.loss.disc_start={steps // 2}", f"--config.checkpoint.every={steps}"]
    subprocess.run(command, check=True, env={**ENVIRONMENT, **os.environ})


def adversary(workdir: Path) -> dict[str, float]:
    """Means over the last fifth of a run."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    last = lines[-max(len(lines) // 5, 1) :]
    return {name: float(np.mean([line[name] for line in last])) for name in ("loss/adaptive_weight", *LOGITS)}


if __name__ == "__main__":
    main()
