"""Draws the pictures of a benchmark, or of any list of prompts, in the layout that its scorer reads.

The noise of a picture is a function of `--seed`, of the place of its prompt in the file and of its place among the
samples of that prompt. Who draws it, when and beside which others changes no noise; a file is the same to the last byte
where a device draws as many pictures at a time, and else a pixel may be rounded the other way. (`dopri5`, whose steps
are those of a whole batch, is refused.) Started again, the same command draws what is missing; with `--check` it says
what that is.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from etils import epath
from ml_collections import ConfigDict
from tqdm import tqdm

from svg_jax import distributed
from svg_jax.config import flatten
from svg_jax.evaluate.generated import NUM_THREADS, Generated, begin, open_generated
from svg_jax.evaluate.grids import MOST_CELLS
from svg_jax.evaluate.prompt_sets import READERS, PromptEntry, PromptSet, read_prompt_set
from svg_jax.evaluate.results import TOGETHER
from svg_jax.flow.solvers import Solver
from svg_jax.loading import digest
from svg_jax.output_folder import ORIGIN, refuse_others
from svg_jax.pipeline import Drawn, Job, Settings, SVGPipeline
from svg_jax.sampling_flags import add_sampling_flags, parse_size, settings_of, weights_of

NUM_IMAGES = 4  # as the benchmarks have them
MOST_IMAGES = 1000  # which are held until a prompt is done
FOLDERS = ("checkpoint", "autoencoder", "text_encoder", "tokenizer")  # of a pipeline's origin
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt")


def add_flags(flags: argparse.ArgumentParser) -> None:
    """What `python -m svg_jax.evaluate generate` asks for."""
    add = flags.add_argument
    add("--set", required=True, metavar="NAME", help=f"which prompts these are: {', '.join(READERS)}")
    add("--prompts", required=True, metavar="FILE", help="as its authors publish them; a folder of .txt for dpg")
    add("--checkpoint", help="folder that `svg_jax.convert import` made, or the workdir of a training run")
    add("--out", required=True, help="folder for the pictures, local or gs://")
    add("--num-images", type=int, help=f"pictures a prompt (default: {NUM_IMAGES})")
    add("--resolution", metavar="WIDTHxHEIGHT", help="in pixels; by default that of the checkpoint's config")
    add_sampling_flags(flags)
    add(
        "--check",
        action="store_true",
        help="draw nothing: list what is missing in --out, and end with 1 if there is; weights are not compared",
    )
    add("--shard", metavar="I/N", help="draw every N-th prompt from the I-th; by default a share a process of a job")


def run(options: argparse.Namespace) -> None:
    """Draws the pictures that are missing, or lists them.

    Raises:
        ValueError: A prompt or an option is out of range, or the pictures in `--out` are of other settings.
        FileNotFoundError: There are no prompts or no checkpoint.
        SystemExit: Asked to list what is missing, and some is; or told to end.
    """
    prompt_set = read_prompt_set(options.set, options.prompts)
    if options.check:
        check(options, prompt_set)
        return
    if options.checkpoint is None:
        raise ValueError("nothing to draw with: give --checkpoint")
    num_images = NUM_IMAGES if options.num_images is None else options.num_images
    if not 1 <= num_images <= MOST_IMAGES:
        raise ValueError(f"--num-images is {num_images}: it must be at least 1 and at most {MOST_IMAGES:,}")
    if options.set == "dpg" and num_images > MOST_CELLS:
        raise ValueError(f"--num-images is {num_images}: a grid of DPG-Bench holds at most {MOST_CELLS}")
    width, height = parse_size(options.resolution) if options.resolution else (None, None)
    how = settings_of(vars(options))

    pipe = SVGPipeline.from_checkpoint(options.checkpoint, **weights_of(vars(options)))
    settings = pipe.settings(**how, width=width, height=height)
    if settings.as_solver().name == "dopri5":
        raise ValueError(
            "the solver dopri5 chooses steps that suit a whole batch, so that pictures would depend on what is drawn "
            "beside them: choose another --solver"
        )
    generated = begin(options.out, prompt_set, num_images, described(pipe, settings))
    shard, shards = options.shard
    draw(pipe, generated, prompt_set.entries[shard::shards], settings)

    distributed.barrier("generated", TOGETHER)
    if distributed.is_first():
        print(state(generated, generated.missing()))
    distributed.barrier("counted", TOGETHER)


def check(options: argparse.Namespace, prompt_set: PromptSet) -> None:
    """Lists what is missing; of the flags, those that are given must be as the pictures were drawn.

    No weights are loaded, so that those of `--checkpoint` are not compared.

    Raises:
        ValueError: The pictures are of other prompts or settings.
        SystemExit: Some are missing.
    """
    generated = open_generated(options.out, prompt_set, complete=False)
    width, height = parse_size(options.resolution) if options.resolution else (None, None)
    given = {**settings_of(vars(options)), "num_images": options.num_images, "width": width, "height": height}
    given |= {"dtype": options.dtype, "ema": None if options.ema else False, "batch_size": None}
    given = {name: value for name, value in given.items() if value is not None}
    if isinstance(given.get("solver"), Solver):
        given["solver"] = dataclasses.asdict(given["solver"])
    if generated.settings:
        before = {name: generated.settings.get(name) for name in given}
        refuse_others(options.out, before, json.loads(json.dumps(given)), "pictures")
    missing = generated.missing()
    print("\n".join([*missing, state(generated, missing)]))
    if missing:
        raise SystemExit(1)


def described(pipe: SVGPipeline, settings: Settings) -> dict[str, Any]:
    """Everything but the prompts that the pictures depend on, and where it lay."""
    how = dataclasses.asdict(settings)
    del how["batch_size"]
    config = pipe.config
    dtypes = {"dit": config.model.dtype, "decoder": config.autoencoder.decoder.dtype, "text": config.text.encoder.dtype}
    params = {"dit": pipe.params, "autoencoder": pipe.frozen["autoencoder"], "text": pipe.frozen["text"]}
    weights: dict[str, str | None] = {name: digest(part) for name, part in params.items()}
    weights |= {"tokenizer": tokenizer_digest(pipe.origin["tokenizer"]), "config": config_digest(config)}
    origin = {name: pipe.origin[name] for name in FOLDERS}
    rest = {name: value for name, value in pipe.origin.items() if name not in FOLDERS}
    return {**how, **rest, "dtypes": dtypes, "weights": weights, ORIGIN: origin}


def config_digest(config: ConfigDict) -> str:
    """16 hexadecimal digits of the SHA-256 of what describes the networks; where they lie is left out."""
    parts = {key: value for key, value in flatten(config) if key.split(".")[0] in ("model", "autoencoder", "text")}
    described = {key: value for key, value in parts.items() if key.split(".")[-1] not in FOLDERS}
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]


def tokenizer_digest(folder: str | None) -> str | None:
    """16 hexadecimal digits of the SHA-256 of a tokeniser's files; None for the stand-in."""
    if folder is None:
        return None
    files = {file for names in TOKENIZER_FILES for file in epath.Path(folder).glob(names) if file.is_file()}
    total = hashlib.sha256()
    for file in sorted(files, key=lambda file: file.name):
        content = file.read_bytes()
        total.update(f"{file.name} {len(content)} ".encode() + content)
    return total.hexdigest()[:16]


def draw(pipe: SVGPipeline, generated: Generated, entries: Sequence[PromptEntry], settings: Settings) -> None:
    """Draws the prompts that are not there; one of which a picture is missing is drawn whole.

    Raises:
        SystemExit: Told to end; what is drawn is saved.
    """
    drawn: list[Drawn] = []  # of one prompt
    saving: list[Future[None]] = []  # while the next batch is drawn
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        there = list(pool.map(generated.holds, entries))
        todo = {entry.index: entry for entry, is_there in zip(entries, there, strict=True) if not is_there}
        jobs = [Job(entry.prompt, index, i) for index, entry in todo.items() for i in range(generated.num_images)]
        # Filled up to one batch at least: a program for fewer pictures may round a pixel the other way.
        batches = pipe.stream(jobs + jobs[-1:] * (settings.batch_size - len(jobs)), settings)
        # As many turns in every process, which ask together whether to end.
        turns = max(map(int, distributed.everyone("turns", str(-(-len(jobs) // settings.batch_size)), TOGETHER)))
        total = len(entries) * generated.num_images
        with tqdm(total=total, initial=total - len(jobs), unit="image") as progress:
            for turn in range(turns):
                batch = next(batches, [])[: len(jobs)]
                for done in saving:
                    done.result()
                saving = []
                for picture in batch:
                    drawn.append(picture)
                    if len(drawn) == generated.num_images:
                        saving.append(pool.submit(save, generated, todo[picture.job.index], drawn))
                        drawn = []
                progress.update(len(batch))
                if distributed.preempted(turn):
                    raise SystemExit(distributed.EXIT_PREEMPTED)
        for done in saving:
            done.result()


def save(generated: Generated, entry: PromptEntry, drawn: Sequence[Drawn]) -> None:
    """Writes the pictures of a prompt."""
    enhanced = drawn[0].prompt
    generated.save(entry, [picture.image for picture in drawn], enhanced if enhanced != entry.prompt else None)


def state(generated: Generated, missing: Sequence[str]) -> str:
    """How much is there."""
    total = sum(len(generated.files(entry)) for entry in generated.entries)
    if missing:
        there = total - len(missing)
        return f"{there:,} of {total:,} files are in {generated.folder}: the same command draws the rest"
    return f"all {total:,} files are in {generated.folder}"
