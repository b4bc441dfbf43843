"""Compiles a step for TPUs that are not there, and says what it needs:
`python -m svg_jax.aot --config=configs/stage3.py --topology=v5e:16x16`.

`--step=sample` and `--step=autoencoder` compile the other programs, `--batch` and `--mesh=data=16,fsdp=16` change the
config's, `--slices` joins so many of the topology by the data centre network, `--largest` looks for the largest batch
that fits. Memory is the compiler's estimate; time is a bound, see `svg_jax.roofline`. The report is printed and saved.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import re
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags

from svg_jax import assemble
from svg_jax import config as doors
from svg_jax.chips import CHIPS, GIB, Chip
from svg_jax.collectives import KINDS, by_kind, collectives
from svg_jax.flow.solvers import SOLVERS
from svg_jax.parallel import batch_multiple, make_mesh
from svg_jax.programs import Program, autoencoder_program, sample_program, train_program
from svg_jax.roofline import device_bytes, executed_flops, ideal_bytes, read_arguments, roofline
from svg_jax.topologies import topology_devices

# Name of a step -> what makes its program, and the section that its configs have.
STEPS: dict[str, tuple[Callable[[ConfigDict, Mesh], Program], str]] = {
    "train": (train_program, "model"),
    "sample": (sample_program, "model"),
    "autoencoder": (autoencoder_program, "statistics"),
}

STATE = ("parameters", "average", "optimiser")
DOES_NOT_FIT = 3  # exit status; 1 is an error
Report = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Target:
    """What to compile for."""

    topology: str
    slices: int = 1
    step: str = "train"


def main(config: ConfigDict, target: Target, *, name: str, find_largest: bool = False, out: str = "out/aot") -> Report:
    """Compiles one step, prints what it needs, and saves that as JSON and Markdown in `out`.

    Raises:
        ValueError: The topology or the config is not possible; the message says what is.
        ImportError: There is no libtpu.
    """
    check(config, target.step)
    devices = topology_devices(target.topology, target.slices)
    chip = CHIPS[devices[0].device_kind]
    mesh = make_mesh(config.mesh, devices)
    report: Report = {
        "config": name,
        **dataclasses.asdict(target),
        "chip": chip.name,
        "devices": len(devices),
        "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1},
        "settings": json.loads(config.to_json_best_effort()),
        "versions": {package: importlib.metadata.version(package) for package in ("jax", "jaxlib", "libtpu")},
    }
    report |= compile_step(config, target.step, mesh, chip)
    if find_largest:
        report |= largest_batch(config, target.step, mesh, chip, report)
    report["host_peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    text = table(report)
    print(text)
    axes = "_".join(f"{axis}{size}" for axis, size in report["mesh"].items())
    stem = f"{name}-{target.step}-{target.slices}x{target.topology.replace(':', '_')}-{axes}-batch{report['images']}"
    stem += "-" + hashlib.sha256(json.dumps(report["settings"]).encode()).hexdigest()[:6]  # other settings, other file
    folder = epath.Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{stem}.json").write_text(json.dumps(report, indent=2) + "\n")
    (folder / f"{stem}.md").write_text(text + "\n")
    print(f"\nsaved as {folder / stem}.json and .md")
    return report


def check(config: ConfigDict, step: str) -> None:
    """Of the config, what can be known before compiling; data need not be there.

    Raises:
        ValueError: See `assemble.check`.
    """
    if step not in STEPS:
        raise ValueError(f"--step={step}: choose {', '.join(STEPS)}")
    config = ConfigDict(config.to_dict())
    if "data" in config:
        config.data.path = config.data.path or "not read here"
    assemble.check(config, needs=STEPS[step][1])
    if step == "sample" and (
        SOLVERS[config.sample.solver].evaluations is None or SOLVERS[config.sample.solver].singlestep
    ):
        raise ValueError(
            f"--step=sample cannot count the loops of the solver '{config.sample.solver}': choose another, such as "
            "--config.sample.solver=dpm++2m"
        )


def compile_step(config: ConfigDict, step: str, mesh: Mesh, chip: Chip) -> Report:
    """What the compiler says of a step; of one that does not fit, only how much memory it would need."""
    program = STEPS[step][0](config, mesh)
    trips = config.sample.num_steps if step == "sample" else 1
    with jax.set_mesh(mesh):
        start = time.perf_counter()
        traced = program.jit().trace(*program.arguments)
        lowered = traced.lower()
        lowered_at = time.perf_counter()
        report: Report = {
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(by_use(step, program.arguments)["parameters"])),
            "images": program.images,
            "tokens": program.tokens,
            "flops": {
                "model": program.flops,
                "executed": executed_flops(traced.jaxpr.jaxpr, unknown_trips=trips),
            },
            "available_bytes": chip.usable_memory,
            "memory": {kind: device_bytes(tree) for kind, tree in by_use(step, program.arguments).items()},
            "lower_seconds": lowered_at - start,
        }
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            seconds = time.perf_counter() - lowered_at
            return report | {"fits": False, "needed_bytes": needed_bytes(str(error)), "compile_seconds": seconds}
        report["compile_seconds"] = time.perf_counter() - lowered_at

    read = read_arguments(traced.jaxpr.jaxpr, program.arguments)
    found = compiled.memory_analysis()
    report["memory"] |= {
        "layout": found.argument_size_in_bytes - device_bytes(read),
        "activations": found.temp_size_in_bytes,
        "outputs": found.output_size_in_bytes - found.alias_size_in_bytes,
        "program": found.generated_code_size_in_bytes,
    }
    total = sum(report["memory"].values())
    sent = collectives(
        compiled.as_text(), [getattr(d, "slice_index", 0) or 0 for d in mesh.devices.flat], unknown_trips=trips
    )
    sent_bytes = sum(one.total for one in sent)
    line = roofline(
        chip,
        sent,
        executed_flops=report["flops"]["executed"] / mesh.size,
        model_flops=program.flops / mesh.size,
        state_bytes=sum(report["memory"].get(kind, 0) for kind in STATE) if program.donates else 0,
    )
    report |= {
        "fits": max(total, found.peak_memory_in_bytes) <= chip.usable_memory,  # the peak is less, but for toys
        "needed_bytes": total,
        "peak_bytes": found.peak_memory_in_bytes,
        "host_bytes": found.host_argument_size_in_bytes + found.host_temp_size_in_bytes,
        "collectives": by_kind(sent),
        "sent_bytes": sent_bytes,
        "asynchronous_bytes": sum(one.total for one in sent if one.asynchronous),
        "uncounted_bytes": sum(one.total for one in sent if not one.counted),
        "roofline": dataclasses.asdict(line) | {"bound": line.bound, "mfu": line.mfu},
    }
    if step != "sample" and mesh.size > 1:
        ideal = ideal_of(config, step, read, mesh)
        report |= {"ideal": ideal, "times_ideal": sent_bytes / sum(ideal.values())}
    return report


def by_use(step: str, arguments: Sequence[Any]) -> dict[str, Any]:
    """The arguments of a program, by what they are."""
    if step == "sample":
        params, frozen, *rest = arguments
        return {"parameters": params, "frozen": frozen, "batch": rest}
    state, *frozen, batch = arguments
    return {
        "parameters": state.params,
        "average": state.ema,
        "optimiser": state.opt_state,
        "frozen": (state.frozen, frozen),
        "batch": (batch, state.step, state.key, state.skipped),
    }


def ideal_of(config: ConfigDict, step: str, read: Any, mesh: Mesh) -> dict[str, float]:
    """`roofline.ideal_bytes` of a training step; tables of embeddings are looked up and not gathered.

    The language model's last layer is in it, though its features do without: 1/26 of that model too much.
    """
    kinds, train = by_use(step, read), step == "train"
    named = jax.tree_util.tree_leaves_with_path(kinds["frozen"])
    dtype = config.model.dtype if train else config.autoencoder.decoder.dtype
    return ideal_bytes(
        sum(leaf.size for leaf in jax.tree.leaves(kinds["parameters"])),
        sum(leaf.size * leaf.dtype.itemsize for path, leaf in named if ".embedding" not in jax.tree_util.keystr(path)),
        item=jnp.dtype(dtype).itemsize,
        devices=mesh.size,
        tensor=mesh.shape["tensor"],
        recomputed=train and config.model.remat != "none",
        micro_batches=config.micro_batches if train else 1,
    )


def needed_bytes(message: str) -> int | None:
    """What the compiler says that a program needs which does not fit; None if it gives no number."""
    found = re.search(r"Used ([\d.]+)([KMGT]) of|\(([\d.]+)([KMGT])\) exceeds", message)
    if not found:
        return None
    number, unit = (found[1], found[2]) if found[1] else (found[3], found[4])
    return round(float(number) * 1024 ** (1 + "KMGT".index(unit)))


def largest_batch(config: ConfigDict, step: str, mesh: Mesh, chip: Chip, first: Report) -> Report:
    """The largest batch that fits, and every batch that was tried for it, each a compilation."""
    multiple = batch_multiple(mesh) * (config.micro_batches if step == "train" else 1)
    reports = {first["images"]: first}

    def fits(size: int) -> bool:
        if size not in reports:
            reports[size] = compile_step(with_batch(config, step, size), step, mesh, chip)
        one = reports[size]
        needed = f"{one['needed_bytes'] / GIB:.2f}" if one["needed_bytes"] else "more"
        print(
            f"batch {size}: {needed} of {chip.usable_memory / GIB:.2f} GiB, {one['compile_seconds']:.0f} s", flush=True
        )
        return one["fits"]

    found = largest(fits, first["images"], multiple)
    tried = [
        {"batch": size} | {key: one.get(key) for key in ("fits", "needed_bytes", "compile_seconds")}
        for size, one in sorted(reports.items())
    ]
    return {"largest_batch": found, "tried": tried}


def largest(fits: Callable[[int], bool], start: int, multiple: int) -> int:
    """The largest multiple that fits, 0 if none does: doubled from `start` as long as it fits, then bisected."""
    fitting, failing = 0, start
    while fits(failing):
        fitting, failing = failing, 2 * failing
    while failing - fitting > multiple:
        middle = (fitting + failing) // 2 // multiple * multiple
        fitting, failing = (middle, failing) if fits(middle) else (fitting, middle)
    return fitting


def with_batch(config: ConfigDict, step: str, size: int) -> ConfigDict:
    """The config with another batch size, of the section that the step reads."""
    config = config.copy_and_resolve_references()
    (config.sample if step == "sample" else config).batch_size = size
    return config


def table(report: Report) -> str:
    """In Markdown."""
    chips = f"{report['devices']} x {report['chip']}"
    mesh = " x ".join(f"{axis} {size}" for axis, size in report["mesh"].items())
    needed = report["needed_bytes"]
    verdict = f"{'fits' if report['fits'] else 'does not fit'}, {f'{needed / GIB:.2f}' if needed else 'more'}"
    lines = [
        f"{report['config']}, {report['step']}, {report['slices']} x {report['topology']} ({chips}), "
        f"mesh {mesh or '1'}, batch {report['images']}: {verdict} of {report['available_bytes'] / GIB:.2f} GiB",
        "",
        "| memory a device | GiB |",
        "|---|---|",
        *(f"| {kind} | {size / GIB:.3f} |" for kind, size in report["memory"].items()),
    ]
    if "roofline" in report:
        line, flops, total = report["roofline"], report["flops"], report["sent_bytes"]
        dcn = "not published" if line["dcn"] is None else f"{line['dcn']:.4f}"
        lines += [
            f"| **total** | **{needed / GIB:.3f}** |",
            f"| peak, as the compiler says | {report['peak_bytes'] / GIB:.3f} |",
            f"| on the host | {report['host_bytes'] / GIB:.3f} |",
            "",
            "| sent a step by a device | within a slice, GB | between slices, GB |",
            "|---|---|---|",
        ]
        for kind in KINDS:
            sizes = [report["collectives"][network].get(kind, 0) for network in ("ici", "dcn")]
            lines += [f"| {kind} | {sizes[0] / 1e9:.4f} | {sizes[1] / 1e9:.4f} |"] if any(sizes) else []
        share = report["asynchronous_bytes"] / total if total else 0.0
        lines += ["", f"{total / 1e9:.3f} GB in all, {share:.0%} of it asynchronous"]
        if report["uncounted_bytes"]:
            lines[-1] += (
                f", {report['uncounted_bytes'] / 1e9:.3f} GB of it in loops whose length the program does not tell"
            )
        if "ideal" in report:
            ideal = ", ".join(f"{part} {size / 1e9:.3f}" for part, size in report["ideal"].items())
            lines[-1] += f"; {report['times_ideal']:.2f} times the ideal ({ideal})"
        lines += [
            "",
            "| a step | |",
            "|---|---|",
            f"| FLOPs of the model | {flops['model']:.3e} |",
            f"| FLOPs executed | {flops['executed']:.3e} |",
            f"| seconds at least | {line['bound']:.4f} |",
            f"| compute | {line['compute']:.4f} |",
            f"| collectives that overlap with it | {line['overlapped']:.4f} |",
            f"| collectives that do not | {line['exposed']:.4f} |",
            f"| collectives between slices | {dcn} |",
            f"| state | {line['state']:.4f} |",
            f"| model FLOPs utilisation at the roofline | {line['mfu']:.1%} |",
        ]
    lines += ["", f"lowered in {report['lower_seconds']:.1f} s, compiled in {report['compile_seconds']:.1f} s"]
    lines[-1] += f", host memory {report['host_peak_bytes'] / GIB:.1f} GiB"
    if "largest_batch" in report:
        lines += ["", f"largest batch that fits: {report['largest_batch']}"]
    return "\n".join(lines)


def parse_mesh(text: str) -> dict[str, int]:
    """{"data": 16, "fsdp": 16} of `data=16,fsdp=16`."""
    pairs = [pair.partition("=") for pair in text.split(",") if pair]
    if not all(re.fullmatch(r"-1|[1-9]\d*", size) for _, _, size in pairs):
        raise ValueError(f"--mesh={text} is not AXIS=SIZE,AXIS=SIZE, as in data=16,fsdp=16")
    return {axis: int(size) for axis, _, size in pairs}


def run() -> None:
    """Parses the flags and calls `main`; the exit status is `DOES_NOT_FIT` where the step does not."""
    config = config_flags.DEFINE_config_file("config", None, "File with get_config(), for example configs/stage3.py.")
    topology = flags.DEFINE_string("topology", None, "Of one slice, as v5e:16x16.")
    step = flags.DEFINE_string("step", "train", f"What to compile: {', '.join(STEPS)}.")
    mesh = flags.DEFINE_string("mesh", "", "Sizes of axes, as data=16,fsdp=16, in place of the config's.")
    batch = flags.DEFINE_integer("batch", None, "Global batch, in place of the config's.", lower_bound=1)
    slices = flags.DEFINE_integer("slices", 1, "How many of the topology.", lower_bound=1)
    find = flags.DEFINE_boolean("largest", False, "Look for the largest batch that fits; each try is a compilation.")
    out = flags.DEFINE_string("out", "out/aot", "Folder for the report.")
    flags.mark_flags_as_required(["config", "topology"])

    def parsed(_: list[str]) -> None:
        with doors.one_sentence():
            jax.config.update("jax_platforms", "cpu")
            jax.config.update("jax_enable_compilation_cache", False)  # its time is part of the report
            values = config.value
            if mesh.value:
                values.mesh = ConfigDict({**values.mesh, **parse_mesh(mesh.value)})
            if batch.value:
                values = with_batch(values, str(step.value), batch.value)
            name = Path(config_flags.get_config_filename(flags.FLAGS["config"]).split(":")[0]).stem
            target = Target(str(topology.value), slices.value, str(step.value))
            report = main(values, target, name=name, find_largest=find.value, out=str(out.value))
        sys.exit(0 if report["fits"] else DOES_NOT_FIT)

    app.run(parsed, flags_parser=doors.parse)


if __name__ == "__main__":
    run()
