"""GenEval (arXiv 2310.11513): how many images show what was asked, as a detector and CLIP see them.

Every prompt is a part of the results (`svg_jax.evaluate.results`): what was detected in its images and counts, the
colour logits of the objects whose colour is asked for, and small pictures for the page. Scores are formed from the
parts alone, so that the same command forms them again where weights, torch and images are gone.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import os
import socket
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import jax
from etils import epath
from PIL import ImageColor

from svg_jax import distributed
from svg_jax.evaluate.generated import Generated, listed, open_generated
from svg_jax.evaluate.geneval import clip, detector, parts
from svg_jax.evaluate.geneval.parts import Job, Task, look, scored, task_of
from svg_jax.evaluate.geneval.report import Scored, unlike_official, write
from svg_jax.evaluate.geneval.rules import CLASSES, Options
from svg_jax.evaluate.results import TOGETHER, Results, at_least_one, conclude, recorded_settings, work_through
from svg_jax.evaluate.torch_networks import import_torch, read_config
from svg_jax.evaluate.weights import weights_digest
from svg_jax.flow.names import unknown
from svg_jax.output_folder import ORIGIN

SOURCES = {"detector": detector.SOURCE, "clip": clip.SOURCE}  # how to get the weights of the networks
# How the SHA-256 of the file of mmdet begins, as its name says: the one that GenEval fetches, and that of mmdet 2.
OFFICIAL_DETECTORS = ("c9d0c4f2", "743b7d99")
CPU_WORKERS = 8  # at most, where none are asked for: each takes some 3 GB of memory, and one core
READERS = 16  # threads that read image files to see whether they are those that were judged


def add_flags(flags: argparse.ArgumentParser) -> None:
    """What `python -m svg_jax.evaluate geneval` asks for."""
    add = flags.add_argument
    add("--images", required=True, help="folder that `generate` made, or one in the layout of the official scripts")
    add(
        "--detector",
        metavar="FOLDER_OR_PTH",
        help="Mask2Former: the official file of mmdet, or a folder of transformers",
    )
    add("--clip", metavar="FOLDER", help="CLIP ViT-L/14 of OpenAI, a folder of transformers")
    add("--out", required=True, help="folder for the results, local or gs://")
    add(
        "--num-workers",
        type=int,
        help="processes with networks of their own; by default one a GPU, or one a core of a CPU, at most 8",
    )
    add("--batch-size", type=int, default=4, help="images of a prompt that are detected in at a time")
    add("--device", help="of torch: cpu or cuda; by default a GPU where there is one")
    add("--shard", metavar="I/N", help="score every N-th prompt from the I-th; by default a share a process of a job")
    rules = flags.add_argument_group("rules", "as the official evaluator has them; other values are other scores")
    for field in dataclasses.fields(Options):
        name, default = f"--{field.name.replace('_', '-')}", field.default
        if isinstance(default, bool):
            text = "judge colours in the whole picture, not in the object's box"
            rules.add_argument(f"--no-{field.name}", dest=field.name, action="store_false", help=text)
        else:
            rules.add_argument(name, type=type(default), default=default, help="(default: %(default)s)")


def run(options: argparse.Namespace) -> None:
    """Looks at the images that are not judged yet; whoever completes the last part writes the report.

    Raises:
        FileNotFoundError: There are no images, some are missing, or there are no weights where some are needed.
        ValueError: An option is out of range, weights are not named, a prompt asks for what no rule knows, an image
            cannot be read, or the results in `--out` are of other settings.
        ImportError: torch is needed and not there.
    """
    at_least_one(options, "num_workers", "batch_size", "max_objects")
    rules = rules_of(options)
    here = neighbours()
    recorded = recorded_settings(options.out)
    generated = None
    if "num_prompts" not in recorded or epath.Path(options.images).exists():
        generated = open_generated(options.images, complete=False)
        check(generated)
    settings = settings_of(options, rules, generated, recorded)
    if not recorded:  # whatever cannot be loaded must not leave a folder that then refuses the whole weights
        try_networks(options, here)
    results = Results(options.out, settings)
    count = results.settings["num_prompts"]
    shard, shards = options.shard
    todo = changed(results, generated, range(count)[shard::shards])
    if todo and generated is None:
        raise FileNotFoundError(
            f"{options.out} lacks {len(todo)} of {count} prompts and there are no images at {options.images}: bring "
            "them back, or choose another --out"
        )
    if todo and generated is not None:
        asked = dataclasses.replace(generated, entries=tuple(generated.entries[number] for number in todo))
        if missing := asked.missing(quick=True):
            raise ValueError(
                f"{options.images} is not complete: {listed(missing)} missing or damaged: draw what is missing with "
                "the command that drew the rest"
            )
    tasks = [task_of(generated, number) for number in todo] if generated else []
    with contextlib.closing(look_at(results, tasks, options, rules, here)) as looking:
        # Whichever is done next, as workers end in any order.
        work_through(count, options.shard, todo, lambda _: next(looking), unit="prompt")
    conclude(results, count, "prompts", lambda: write_results(results))


def rules_of(options: argparse.Namespace) -> Options:
    """The rules that the flags name.

    Raises:
        ValueError: A value is out of range.
    """
    rules = Options(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Options)})
    for name in ("threshold", "counting_threshold", "max_overlap", "position_threshold"):
        if not 0 <= (value := getattr(rules, name)) <= 1:  # NaN is not either
            raise ValueError(f"--{name.replace('_', '-')} is {value}: it must be from 0 to 1")
    if rules.background != "original":
        try:
            ImageColor.getcolor(rules.background, "RGB")
        except ValueError as error:
            raise ValueError(
                f"--background is {rules.background}: it must be a colour, as #999 or grey, or original"
            ) from error
    return rules


def neighbours() -> tuple[int, int]:
    """This process's number among those of the job on this host, and how many they are; a barrier."""
    hosts = distributed.everyone("hosts", socket.gethostname(), TOGETHER)
    place = jax.process_index() if len(hosts) > 1 else 0
    return hosts[:place].count(hosts[place]), hosts.count(hosts[place])


def settings_of(
    options: argparse.Namespace, rules: Options, generated: Generated | None, recorded: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything that the scores depend on; what is gone, images and weights, as it was recorded."""
    settings = dict(recorded)
    places = dict(recorded.get(ORIGIN, {}))
    places["images"] = options.images if "://" in options.images else os.path.abspath(options.images)
    if generated is not None:
        metadata = [entry.metadata for entry in generated.entries]
        settings |= {
            "prompt_set": generated.prompt_set_name,
            "prompts": hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()[:16],
            "num_prompts": len(metadata),
            "num_images": generated.num_images,
            "generation": dict(generated.settings),
        }
    settings["rules"] = dataclasses.asdict(rules)
    for name in SOURCES:
        path = getattr(options, name)
        if path is not None and Path(path).exists():
            settings[name], places[name] = described(name, path), Path(path).resolve().name
        elif name not in recorded:
            raise without_weights(name, path)
    return settings | {ORIGIN: places}


def described(name: str, path: str) -> dict[str, Any]:
    """What is recorded of a network, wherever its files lie.

    Raises:
        FileNotFoundError: There are no weights.
        ValueError: A folder is of another network, or damaged.
    """
    found: dict[str, Any] = {"dtype": "float32"}
    if name == "clip":
        found |= clip.vision_sizes(path)
    elif Path(path).is_dir() and (source := read_config(path, "mask2former", detector.SOURCE).get("svg_jax_source")):
        found["converted_from"] = source
    return found | {"weights": weights_digest(path)}


def without_weights(name: str, path: str | None) -> Exception:
    """What is to be done about weights that are not named, or not where they should be."""
    if path is None:
        return ValueError(f"GenEval needs a {name}: {SOURCES[name]}")
    return FileNotFoundError(f"--{name} {path}: there is nothing: {SOURCES[name]}")


def check(generated: Generated) -> None:
    """Whether the rules can judge these images.

    Raises:
        ValueError: They are of other prompts, or of a class that the detector does not know.
    """
    if not all(entry.metadata for entry in generated.entries):
        raise ValueError(
            f"{generated.folder} holds images of the set {generated.prompt_set_name}, which does not say what must be "
            "seen: GenEval scores those of geneval and geneval_long"
        )
    for entry in generated.entries:
        for clause in (*entry.metadata.get("include", ()), *entry.metadata.get("exclude", ())):
            if clause["class"] not in CLASSES:
                raise ValueError(
                    f"prompt {entry.id} of {generated.folder}: {unknown('class', clause['class'], CLASSES)}"
                )


def changed(results: Results, generated: Generated | None, numbers: Sequence[int]) -> list[int]:
    """Those parts that are not there, or are of other images than lie there now; images may be gone."""

    def is_current(number: int) -> bool:
        if not results.holds(number):
            return False
        if generated is None:
            return True
        judged = results.load(number)["digest"].tolist()
        files = map(epath.Path, task_of(generated, number).files)
        return all(
            hashlib.sha256(file.read_bytes()).hexdigest() == digest
            for file, digest in zip(files, judged, strict=True)
            if file.exists()
        )

    with ThreadPoolExecutor(READERS) as pool:
        return [number for number, current in zip(numbers, pool.map(is_current, numbers), strict=True) if not current]


def devices(asked: str | None, num_workers: int | None, here: tuple[int, int] = (0, 1)) -> list[str]:
    """The device of each worker of this process.

    Args:
        asked: `--device`.
        num_workers: `--num-workers`.
        here: As `neighbours` tells; the processes of a job on a host share its GPUs and cores.

    Raises:
        ImportError: torch is not installed.
    """
    torch = import_torch()
    place, processes = here
    found = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if not found or asked not in (None, "cuda"):
        found = [asked or "cpu"]
    found = found[place::processes] or [found[place % len(found)]]  # more processes than GPUs share them
    default = len(found)
    if found == ["cpu"]:
        default = max(min(os.cpu_count() or 1, CPU_WORKERS) // processes, 1)
    return [found[i % len(found)] for i in range(num_workers or default)]


def try_networks(options: argparse.Namespace, here: tuple[int, int]) -> None:
    """Loads them once; where this process is the only worker, it keeps them.

    Raises:
        ValueError: One is damaged or another network, or there is no such device.
        ImportError: torch is not installed.
    """
    places = devices(options.device, options.num_workers, here)
    parts.load(options.detector, options.clip, places[0] if len(places) == 1 else "cpu")
    if len(places) > 1:
        parts.load.cache_clear()


def look_at(
    results: Results, tasks: Sequence[Task], options: argparse.Namespace, rules: Options, here: tuple[int, int]
) -> Generator[None, None, None]:
    """Looks at all of them and saves the parts; tells, by yielding, that one more is done."""
    if not tasks:
        return
    for name in SOURCES:
        if not (path := getattr(options, name)) or not Path(path).exists():
            raise without_weights(name, path)
    places = devices(options.device, options.num_workers, here)[: len(tasks)]
    jobs = [Job(results, options.detector, options.clip, place, rules, options.batch_size) for place in places]
    if len(jobs) == 1:
        for task in tasks:
            look(jobs[0], task)
            yield
        return
    # A process forked from one that runs JAX may hang, so they are spawned; each pool is one process with its device.
    context = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:
        pools = [stack.enter_context(ProcessPoolExecutor(1, context)) for _ in jobs]
        futures = [pools[i % len(pools)].submit(look, jobs[i % len(jobs)], task) for i, task in enumerate(tasks)]
        for pool in pools:
            stack.callback(pool.shutdown, wait=False, cancel_futures=True)
        for future in as_completed(futures):
            try:
                future.result()
            except BrokenProcessPool as error:
                raise ChildProcessError(
                    "a worker was killed, for want of memory perhaps: start again with fewer --num-workers (what is "
                    "done is kept)"
                ) from error
            yield


def write_results(results: Results) -> str:
    """The report of parts that are all there; returns its table."""
    settings = results.settings
    count, rules = settings["num_prompts"], Options(**settings["rules"])
    metadata: list[dict[str, Any]] = []
    machines: set[str] = set()
    for part in results.parts(count):
        metadata.append(json.loads(str(part["metadata"])))
        machines.add(str(part["runs_on"]))
    warnings = unlike_official(metadata, settings["num_images"])
    if settings["prompt_set"] != "geneval":
        warnings.append("the prompts are the longer ones of geneval_long: most published scores are of the short ones")
    if rules != Options():
        warnings.append("the rules are not those of the official evaluator")
    known = settings["detector"].get("converted_from", settings["detector"]["weights"])
    if not known.startswith(OFFICIAL_DETECTORS):
        warnings.append(
            f"the detector is not known to be the official one, whose file has a SHA-256 that begins with "
            f"{' or '.join(OFFICIAL_DETECTORS)}: published scores are of that one"
        )
    if {name: settings["clip"][name] for name in clip.VIT_L_14} != clip.VIT_L_14:
        warnings.append("CLIP is not of the size of ViT-L/14, with which the official evaluator tells colours")
    warnings.append(
        "CLIP runs in float32 here, and in float16 on a GPU in the official evaluator: colours may differ; that its "
        "weights are OpenAI's is not verified"
    )
    if len(machines) > 1:
        warnings.append(f"the networks did not run on the same everywhere: {'; '.join(sorted(machines))}")
    settings = settings | {"runs_on": sorted(machines)}

    def every() -> Iterator[Scored]:
        for part in results.parts(count):
            yield from scored(part, rules)

    _, table = write(results.folder, f"GenEval ({settings['prompt_set']})", settings, every, warnings=warnings)
    return table
