"""Everything at once, small: `make demo`, or `python -m svg_jax.demo --out out/demo`.

Renders captioned scenes, trains a decoder and a diffusion transformer on them through the ordinary doors, kills the
training once and resumes it, runs real photographs of every shape through the same trainer, draws scenes that were
never trained on, and judges by their pixels whether they show what was asked.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict
from PIL import Image, ImageDraw

from data_pipelines import scenes
from data_pipelines.batches import TextToImageBatches
from data_pipelines.photographs import write_photographs
from data_pipelines.sources import open_source
from data_pipelines.text import ByteTokenizer, train_word_tokenizer
from svg_jax import assemble
from svg_jax.autoencoder_steps import reconstruct
from svg_jax.checkpoint import load_config
from svg_jax.config import one_sentence
from svg_jax.evaluate.dpg.scenes import write_question_report
from svg_jax.evaluate.geneval.rules import totals
from svg_jax.evaluate.geneval.scenes import score_scenes, write_scene_report
from svg_jax.evaluate.prompt_sets import TASKS
from svg_jax.loading import find_autoencoder, open_autoencoder
from svg_jax.parallel import make_mesh
from svg_jax.pipeline import SVGPipeline

ENVIRONMENT = {
    # glibc gives XLA's buffers back to the system after every step and faults them in again; keeping them halves the
    # time of a step on CPU (see benchmarks/README.md). Without effect elsewhere.
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "8000000000",
    "MALLOC_TOP_PAD_": "268435456",
    "MALLOC_ARENA_MAX": "1",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
JUDGED = 96  # pictures of each set
QUESTIONED = 12  # scenes of which DPG-Bench's 4 pictures each are drawn
GENEVAL = (*TASKS, "overall")
TRAIN_SEED, TEST_SEED, HELD_OUT_SEED = 0, 1, 2


def main(arguments: list[str] | None = None) -> None:
    """Runs the whole demo; each part starts over, the training excepted, which resumes."""
    parser = argparse.ArgumentParser(prog="python -m svg_jax.demo", description=__doc__, allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("out/demo"))
    parser.add_argument("--long", action="store_true", help="train on for up to two hours")
    parser.add_argument("--num-scenes", type=int, default=12_000)
    parser.add_argument("--autoencoder-steps", type=int, default=650)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--long-steps", type=int, default=30_000)
    parser.add_argument("--photograph-steps", type=int, default=60)
    options = parser.parse_args(arguments)
    with one_sentence():
        options.out.mkdir(parents=True, exist_ok=True)
    demo = Demo(options.out)

    demo.data(options.num_scenes)
    demo.train_autoencoder(options.autoencoder_steps)
    demo.train(options.steps)
    model = "dit"
    if options.long:
        demo.train_on(options.long_steps, options.num_scenes)
        model = "dit_long"
    demo.train_on_photographs(options.photograph_steps)
    demo.judge(model)
    demo.write_report(model)


class Demo:
    """The parts of the demo, in the order they run; `report` grows on the way."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.report: dict[str, Any] = {"seconds": {}}
        self.environment = {**ENVIRONMENT, **os.environ, "JAX_COMPILATION_CACHE_DIR": str(out / "compilation_cache")}

    def data(self, num_scenes: int) -> None:
        """Scenes, photographs, and a tokeniser whose words are those of their captions."""
        with self.timed("data"):
            train = scenes.write_scenes(self.out / "scenes" / "train", num_scenes, TRAIN_SEED)
            photographs = write_photographs(self.out / "photographs_data")
            captions = [
                json.loads(line)["prompt"] for file in (train, photographs) for line in file.read_text().splitlines()
            ]
            train_word_tokenizer(captions, self.out / "tokenizer", vocab_size=512)

    def train_autoencoder(self, steps: int) -> None:
        """Decoder and residual branch."""
        with self.timed("train autoencoder"):
            self.run(self.command("train_autoencoder", "tiny_autoencoder", "autoencoder", "scenes/train", steps))

    def train(self, steps: int) -> None:
        """The diffusion transformer; killed after its first checkpoint, and started again with the same command."""
        command = self.command("train", "tiny_scenes", "dit", "scenes/train", steps)
        command += [f"--config.checkpoint.every={max(steps // 3, 1)}", f"--config.sample.every={max(steps // 3, 1)}"]
        with self.timed("train diffusion transformer"):
            killed = self.run(command, kill_after=self.out / "dit" / "checkpoints" / str(max(steps // 3, 1)))
            if killed:
                print("… killed after its first checkpoint; the same command again:", flush=True)
                self.run(command)
        self.report["killed and resumed"] = killed

    def train_on(self, steps: int, num_scenes: int) -> None:
        """From the weights of `train`, on more scenes."""
        with self.timed("train on"):
            scenes.write_scenes(self.out / "scenes" / "long", 4 * num_scenes, TRAIN_SEED + 10)
            command = self.command("train", "tiny_scenes", "dit_long", "scenes/long", steps)
            self.run([*command, f"--config.init_from={self.out / 'dit'}", "--config.optim.lr=1e-3"])

    def train_on_photographs(self, steps: int) -> None:
        """Real pictures of many aspect ratios in each batch."""
        with self.timed("train on photographs"):
            self.run(self.command("train", "tiny_photographs", "photographs", "photographs_data", steps))
        lines = metrics(self.out / "photographs")
        grids = set()
        config = ConfigDict(load_config(str(self.out / "photographs")))
        batches = TextToImageBatches(
            open_source(config.data.path),
            ByteTokenizer(),
            batch_size=config.batch_size,
            resolution=config.data.resolution,
            patch_size=assemble.patch_size(config),
            max_text_tokens=1,
            seed=config.seed,
            max_ratio=config.data.max_ratio,
        )
        for step in range(5):
            grids |= {tuple(map(int, grid)) for grid in batches[step]["grid"]}
        self.report["photographs"] = {
            "grids (rows, cols) in the first five batches": sorted(grids),
            "compilations of the train step": int(lines[-1]["compilations"]),
            **loss_fall(lines),
        }

    def judge(self, model: str) -> None:
        """Scores reconstructions, and pictures drawn from prompts, by their pixels."""
        with self.timed("draw and judge"):
            test = [scenes.sample_scene(TEST_SEED, i) for i in range(JUDGED)]
            single = [scenes.sample_scene(HELD_OUT_SEED, i, held_out=True, kind="one") for i in range(JUDGED)]
            reconstructed = self.reconstruct([scenes.render(scene) for scene in test])
            pipeline = SVGPipeline.from_checkpoint(str(self.out / model))
            drawn_test, drawn_single = (
                [np.asarray(image) for image in pipeline([s.prompt for s in part], seed=3)] for part in (test, single)
            )
            self.report["shares that agree"] = {
                "reconstructions": agreement(reconstructed, test),
                "generated, single things of held-out pairs": agreement(drawn_single, single),
                "chance for these": scenes.chance_levels(single),
                "generated, unseen scenes of all kinds": agreement(drawn_test, test),
                "chance for those": scenes.chance_levels(test),
            }
            self.report["GenEval"] = self.geneval(drawn_test, test)
            some = [scene for scene in test if len(scene.things) > 1 and scenes.dpg_rows(scene)][:QUESTIONED]
            drawn = [np.asarray(image) for image in pipeline([s.prompt for s in some], seed=3, num_images=4)]
            fours = [drawn[i : i + 4] for i in range(0, len(drawn), 4)]
            write_question_report(epath.Path(self.out / "dpg"), fours, some)
        captions = [scene.prompt for scene in single[:8] + test[:16]]
        labelled_grid(drawn_single[:8] + drawn_test[:16], captions).save(self.out / "samples.png")
        pairs = [np.concatenate(pair, axis=1) for pair in zip(map(scenes.render, test), reconstructed, strict=True)]
        labelled_grid(pairs[:8], ["scene | reconstruction"] * 8).save(self.out / "reconstructions.png")

    def geneval(self, drawn: list[np.ndarray], asked: list[scenes.Scene]) -> dict[str, dict[str, float]]:
        """The rules of GenEval on pictures and, for what they make of perfect ones, on the scenes as they are rendered.

        The page `geneval/index.html` shows the former with their verdicts.
        """
        scores = write_scene_report(epath.Path(self.out / "geneval"), drawn, asked)
        perfect = score_scenes([scenes.render(scene) for scene in asked], asked)
        rendered = totals((one.metadata, one.verdict.correct) for one in perfect)
        found = {"scenes as rendered": rendered, "generated, unseen scenes of all kinds": scores}
        return {name: {score.name: score.value for score in some} for name, some in found.items()}

    def reconstruct(self, pictures: list[np.ndarray]) -> list[np.ndarray]:
        """Pictures of one square size through encoder and decoder."""
        mesh = make_mesh({"fsdp": -1})
        loaded = open_autoencoder(*find_autoencoder(str(self.out / "autoencoder")), mesh)
        draw = jax.jit(lambda params, images: reconstruct(loaded.network, params, images))
        return list(np.asarray(draw(loaded.params, np.stack(pictures))))

    def write_report(self, model: str) -> None:
        """`report.json`, `index.html` and the table on the terminal."""
        from jinja2 import Template

        lines = metrics(self.out / model)
        self.report["diffusion transformer"] = loss_fall(lines)
        self.report["autoencoder"] = loss_fall(metrics(self.out / "autoencoder"))
        self.report["peak memory of a process, GiB"] = round(peak_memory() / 2**30, 2)
        self.report["versions"] = {"jax": jax.__version__, "python": sys.version.split()[0]}
        (self.out / "report.json").write_text(json.dumps(self.report, indent=2) + "\n")
        template = Template(resources.files("svg_jax").joinpath("demo.html.j2").read_text(), autoescape=True)
        page = template.render(
            report=self.report,
            aspects=scenes.ASPECTS,
            tasks=GENEVAL,
            samples=data_address(self.out / "samples.png"),
            reconstructions=data_address(self.out / "reconstructions.png"),
            curve=curve([line["loss"] for line in lines]),
            steps=int(lines[-1]["step"]) + 1,
        )
        (self.out / "index.html").write_text(page)
        for title, columns in (("shares that agree", scenes.ASPECTS), ("GenEval", GENEVAL)):
            print(f"\n{table(self.report[title], columns)}")
        photographs = self.report["photographs"]
        print(
            f"\nphotographs: {len(photographs['grids (rows, cols) in the first five batches'])} aspect ratios, "
            f"train step compiled {photographs['compilations of the train step']} time(s), "
            f"loss {photographs['loss at first']:.2f} -> {photographs['loss at last']:.2f}"
        )
        print(
            f"{sum(self.report['seconds'].values()):.0f} s in all, "
            f"{self.report['peak memory of a process, GiB']} GiB at most; "
            f"see {self.out / 'index.html'}"
        )

    def command(self, door: str, config: str, workdir: str, data: str, steps: int) -> list[str]:
        """The command line of a training run."""
        command = [sys.executable, "-m", f"svg_jax.{door}", f"--config={config_file(config)}"]
        command += [f"--workdir={self.out / workdir}", f"--config.num_train_steps={steps}"]
        command += [f"--config.data.path={self.out / data / 'records.jsonl'}"]
        if door == "train":
            command += [f"--config.autoencoder.checkpoint={self.out / 'autoencoder'}"]
            command += [f"--config.text.tokenizer={self.out / 'tokenizer'}"]
        return command

    def run(self, command: Sequence[str], kill_after: Path | None = None) -> bool:
        """Runs a command, ending the demo if it fails; true if it was killed because `kill_after` appeared."""
        print("$ " + " ".join(["python", *command[1:]]), flush=True)
        if kill_after is not None and kill_after.exists():  # from an earlier demo in the same folder
            kill_after = None
        process = subprocess.Popen(command, env=self.environment)
        try:
            while process.poll() is None:
                if kill_after is not None and kill_after.exists():
                    process.send_signal(signal.SIGKILL)
                    process.wait()
                    return True
                time.sleep(0.2)
        finally:
            process.kill()
        if process.returncode != 0:
            raise SystemExit(f"error: the command above ended with status {process.returncode}")
        return False

    def timed(self, name: str) -> Timer:
        """Adds the seconds inside to the report."""
        return Timer(self.report["seconds"], name)


class Timer:
    """Writes how long its block took."""

    def __init__(self, seconds: dict[str, float], name: str) -> None:
        self.seconds, self.name = seconds, name

    def __enter__(self) -> None:
        print(f"\n== {self.name}", flush=True)
        self.start = time.perf_counter()

    def __exit__(self, *exception: object) -> None:
        self.seconds[self.name] = round(time.perf_counter() - self.start, 1)


def config_file(name: str) -> str:
    """The path of a config of the package."""
    return str(resources.files("configs").joinpath(f"{name}.py"))


def agreement(pictures: Sequence[np.ndarray], asked: Sequence[scenes.Scene]) -> dict[str, float]:
    """The share of pictures that show what was asked, by aspect."""
    return scenes.agreement([scenes.find_things(picture) for picture in pictures], asked)


def table(rows: Mapping[str, Mapping[str, float]], columns: Sequence[str]) -> str:
    """Shares in lines, for a terminal; a dash where a row has none."""
    width = max(map(len, rows))
    widths = [max(len(column), 8) for column in columns]
    lines = ["  ".join([" " * width, *(f"{column:>{w}}" for column, w in zip(columns, widths, strict=True))])]
    for name, row in rows.items():
        cells = [f"{row[column]:.2f}" if column in row else "-" for column in columns]
        lines.append("  ".join([f"{name:{width}}", *(f"{cell:>{w}}" for cell, w in zip(cells, widths, strict=True))]))
    return "\n".join(lines)


def metrics(workdir: Path) -> list[dict[str, Any]]:
    """The scalars a run wrote."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def loss_fall(lines: list[dict[str, Any]]) -> dict[str, float]:
    """Mean loss of the first and of the last tenth of a run."""
    losses = [line["loss"] for line in lines]
    part = max(len(losses) // 10, 1)
    return {"loss at first": float(np.mean(losses[:part])), "loss at last": float(np.mean(losses[-part:]))}


def curve(losses: Sequence[float], width: int = 600, height: int = 160) -> str:
    """The points of an SVG polyline: smoothed losses, logarithmic upwards."""
    smooth = np.convolve(losses, np.ones(5) / 5, mode="valid") if len(losses) >= 5 else np.asarray(losses)
    y = np.log(smooth)
    y = (y.max() - y) / max(float(np.ptp(y)), 1e-9) * height
    x = np.linspace(0, width, len(y))
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))


def labelled_grid(
    pictures: Sequence[np.ndarray], captions: Sequence[str], columns: int = 8, zoom: int = 2
) -> Image.Image:
    """Pictures of one size in rows, enlarged, each above its caption."""
    height, width = (zoom * side for side in pictures[0].shape[:2])
    lines = max(len(textwrap.wrap(caption, width // 6)) for caption in captions)
    cell = (width + 8, height + 14 + 11 * lines)
    grid = Image.new("RGB", (columns * cell[0], -(-len(pictures) // columns) * cell[1]), "white")
    pen = ImageDraw.Draw(grid)
    for i, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        left, top = (i % columns) * cell[0] + 4, (i // columns) * cell[1] + 4
        grid.paste(Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST), (left, top))
        pen.multiline_text((left, top + height + 2), "\n".join(textwrap.wrap(caption, width // 6)), "black", spacing=1)
    return grid


def peak_memory() -> int:
    """The largest resident size, in bytes, of this process or one it started."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def data_address(path: Path) -> str:
    """A PNG as a data address, so that the page is one file."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


if __name__ == "__main__":
    main()
