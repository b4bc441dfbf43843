"""Autoencoder-R against Autoencoder-P on photographs, at equal steps: `python -m benchmarks.residual`.

Both train on windows of the demo's photographs as configs/tiny_autoencoder_photographs.py says, without weights from
elsewhere, and are judged on windows of those and of photographs of which they saw no pixel.
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

from data_pipelines.photographs import PHOTOGRAPHS, write_photographs
from svg_jax.autoencoder_steps import reconstruct
from svg_jax.demo import ENVIRONMENT
from svg_jax.loading import find_autoencoder, open_autoencoder
from svg_jax.parallel import make_mesh

SIDE = 64  # pixels of a window
HELD_OUT = 4  # one of so many photographs is kept out of training
WINDOWS = {"train": 16, "test": 4}  # of each view of a photograph
MATCHED = {"p": (None,), "r": ("batch", "per_image")}  # how residual latents are matched when judging
COLUMNS = {
    "psnr/train": "PSNR, seen, dB",
    "psnr/test": "PSNR, unseen, dB",
    "l1/train": "L1, seen",
    "l1/test": "L1, unseen",
    "loss/adaptive_weight": "adaptive weight",
    "logits/real": "D(real)",
    "logits/fake": "D(fake)",
}


def main() -> None:
    """Trains both with each seed, and prints a table: how close they come, and what the discriminator came to."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.residual", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/residual"))
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    windows = write_windows(write_photographs(options.out / "photographs"), options.out / "windows")
    print(", ".join(f"{len(pictures)} windows to {part}" for part, pictures in windows.items()))

    rows, drawn = {}, [windows["test"][:: len(windows["test"]) // 8]]
    for seed in range(options.seeds):
        for kind in ("p", "r"):
            workdir = options.out / f"{kind}{seed}"
            train(kind, workdir, options.out / "windows" / "train.jsonl", options.steps, seed)
            row = adversary(workdir)
            for match in MATCHED[kind]:
                for part, pictures in windows.items():
                    after = reconstructions(workdir, pictures, match)
                    error = (after.astype(np.float64) - pictures) / 255.0
                    psnr = -10.0 * np.log10(np.mean(np.square(error), axis=(1, 2, 3)))
                    row |= {f"psnr/{part}": float(psnr.mean()), f"l1/{part}": float(np.abs(error).mean())}
                how = ", images matched alone" if match == "per_image" else ""
                rows[f"Autoencoder-{kind.upper()}, seed {seed}{how}"] = dict(row)
            drawn.append(after[:: len(after) // 8])
    Image.fromarray(np.concatenate([np.concatenate(list(row), axis=1) for row in drawn])).save(
        options.out / "pictures.png"
    )
    print(f"\n| | {' | '.join(COLUMNS.values())} |\n|---|{'---|' * len(COLUMNS)}")
    for name, row in rows.items():
        print(f"| {name} | {' | '.join(f'{row[column]:.4g}' for column in COLUMNS)} |")
    print("weight and logits: means over the last fifth of the steps; the discriminator plays in the last quarter")
    (options.out / "report.json").write_text(json.dumps(rows, indent=2) + "\n")


def write_windows(photographs: Path, out: Path) -> dict[str, np.ndarray]:
    """Square windows at random places, a third of the shorter side to all of it: uint8 [windows, SIDE, SIDE, 3] a part.

    Args:
        photographs: The list that `write_photographs` wrote; every view of a photograph is of the same part.
        out: Gets the windows as files, and a list a part.
    """
    held_out = {photograph.name for photograph in PHOTOGRAPHS[::HELD_OUT]}
    rng = np.random.default_rng(0)
    parts: dict[str, list[np.ndarray]] = {part: [] for part in WINDOWS}
    out.mkdir(parents=True, exist_ok=True)
    for line in photographs.read_text().splitlines():
        path = photographs.parent / json.loads(line)["path"]
        part = "test" if path.stem.rpartition("_")[0] in held_out else "train"
        with Image.open(path) as file:
            image = file.convert("RGB")
        for _ in range(WINDOWS[part]):
            side = int(min(image.size) * rng.uniform(1 / 3, 1))
            left, top = (int(rng.integers(0, extent - side + 1)) for extent in image.size)
            window = image.crop((left, top, left + side, top + side)).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
            parts[part].append(np.asarray(window))
            window.save(out / f"{part}{len(parts[part]):04d}.png")
    for part, windows in parts.items():
        records = ({"path": f"{part}{i + 1:04d}.png", "prompt": ""} for i in range(len(windows)))
        (out / f"{part}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return {part: np.stack(windows) for part, windows in parts.items()}


def train(kind: str, workdir: Path, data: Path, steps: int, seed: int) -> None:
    """Through the door."""
    config = Path(__file__).parents[1] / "configs" / "tiny_autoencoder_photographs.py"
    command = [sys.executable, "-m", "svg_jax.train_autoencoder", f"--config={config}:{kind}", f"--workdir={workdir}"]
    command += [f"--config.data.path={data}", f"--config.num_train_steps={steps}", f"--config.seed={seed}"]
    command += [f"--config.loss.disc_start={steps * 3 // 4}", f"--config.checkpoint.every={steps}"]
    subprocess.run(command, check=True, env={**ENVIRONMENT, **os.environ})


def reconstructions(workdir: Path, images: np.ndarray, match: str | None) -> np.ndarray:
    """By the averaged weights of a run, in batches of 72: uint8 [images, SIDE, SIDE, 3]."""
    loaded = open_autoencoder(*find_autoencoder(str(workdir)), make_mesh({"fsdp": -1}), match=match)
    step = jax.jit(lambda params, images: reconstruct(loaded.network, params, images))
    batches = np.array_split(images, max(len(images) // 72, 1))
    return np.concatenate([np.asarray(step(loaded.params, batch)) for batch in batches])


def adversary(workdir: Path) -> dict[str, float]:
    """Means over the last fifth of a run."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    last = lines[-max(len(lines) // 5, 1) :]
    return {
        name: float(np.mean([line[name] for line in last]))
        for name in ("loss/adaptive_weight", "logits/real", "logits/fake")
    }


if __name__ == "__main__":
    main()
