"""What a chip sends and holds as their number grows, at a fixed batch a chip: `python -m benchmarks.scaling`.

Compiles the train step ahead of time (`svg_jax.aot`) for each topology whose report is not in `--out` yet, prints the
table and draws `benchmarks/figures/scaling.png`. With P parameters over n chips, f of them along `fsdp`, theory says:

    sent     at most 3 · 2P (n - 1)/n bytes for gathers, gathers for recomputation and scattered gradients in bfloat16,
             and the frozen networks once: flat in n
    state    16 P/f bytes: parameters, average and two moments in float32
"""

from __future__ import annotations

import argparse
import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

from svg_jax.aot import with_batch
from svg_jax.chips import GIB
from svg_jax.collectives import KINDS
from svg_jax.topologies import topology_devices

Report = dict[str, Any]
STATE = ("parameters", "average", "optimiser")
FIGURE = Path(__file__).parent / "figures" / "scaling.png"


def main() -> None:
    """Compiles what is missing, prints the table, draws the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/stage3.py")
    parser.add_argument("--topologies", nargs="+", default=["v5e:2x4", "v5e:8x8", "v5e:16x16"])
    parser.add_argument("--batch", type=int, default=2, help="a device")
    parser.add_argument("--out", default="out/aot", help="folder of reports")
    parser.add_argument("--figure", type=Path, default=FIGURE)
    args = parser.parse_args()
    reports = []
    for topology in args.topologies:
        report = find(args, topology)
        if report is None:
            batch = args.batch * len(topology_devices(topology))
            flags = [f"--config={args.config}", f"--topology={topology}", f"--batch={batch}", f"--out={args.out}"]
            # Its status is not 0 where the step does not fit, which is a result too.
            subprocess.run([sys.executable, "-m", "svg_jax.aot", *flags], check=False)
            report = find(args, topology)
        if report is None or "roofline" not in report:
            raise SystemExit(f"error: {args.config} at {args.batch} a device does not compile for {topology}")
        reports.append(report)
    print(table(reports))
    draw(reports, args.figure)
    print(f"\n{args.figure}")


def find(args: argparse.Namespace, topology: str) -> Report | None:
    """The newest saved report of this config as it stands, at this topology and batch a device."""
    batch = args.batch * len(topology_devices(topology))
    settings = with_batch(runpy.run_path(args.config)["get_config"](), "train", batch).to_json_best_effort()
    wanted = {"topology": topology, "slices": 1, "step": "train", "settings": json.loads(settings)}
    found = None
    for path in sorted(Path(args.out).glob("*.json"), key=lambda path: path.stat().st_mtime):
        report = json.loads(path.read_text())
        found = report if all(report.get(key) == value for key, value in wanted.items()) else found
    return found


def table(reports: list[Report]) -> str:
    """In Markdown; a row each."""
    kinds = [kind for kind in KINDS if any(report["collectives"]["ici"].get(kind, 0) > 5e6 for report in reports)]
    lines = [
        f"| chips | mesh | batch | {' | '.join(f'{kind}, GB' for kind in kinds)} | sent in all, GB | times the ideal "
        "| state, GiB | 16 P/f, GiB | all memory, GiB | MFU at the roofline |",
        "|---" * (9 + len(kinds)) + "|",
    ]
    for report in reports:
        cells = [report["devices"], " x ".join(f"{axis} {size}" for axis, size in report["mesh"].items())]
        cells += [report["images"], *(f"{report['collectives']['ici'].get(kind, 0) / 1e9:.2f}" for kind in kinds)]
        cells += [f"{report['sent_bytes'] / 1e9:.2f}", f"{report['times_ideal']:.2f}"]
        cells += [f"{size:.2f}" for size in (state(report), state_in_theory(report), report["needed_bytes"] / GIB)]
        cells += [f"{report['roofline']['mfu']:.0%}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def state(report: Report) -> float:
    """GiB a device that the optimised state takes."""
    return sum(report["memory"][kind] for kind in STATE) / GIB


def state_in_theory(report: Report) -> float:
    """16 P/f in GiB."""
    return 16 * report["parameters"] / report["mesh"].get("fsdp", 1) / GIB


def draw(reports: list[Report], path: Path) -> None:
    """What is sent by kind, and what is held by kind, over the number of chips; theory as lines."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    places, chips = range(len(reports)), [report["devices"] for report in reports]

    def stack(axes: Any, parts: dict[str, list[float]]) -> None:
        bottom = [0.0] * len(reports)
        for name, values in parts.items():
            axes.bar(places, values, 0.6, bottom=bottom, label=name)
            bottom = [b + v for b, v in zip(bottom, values, strict=True)]

    sent = {kind: [report["collectives"]["ici"].get(kind, 0) / 1e9 for report in reports] for kind in KINDS}
    stack(left, {kind: values for kind, values in sent.items() if max(values) > 5e-3})
    left.plot(places, [sum(report["ideal"].values()) / 1e9 for report in reports], "k_--", ms=40, label="ideal")
    left.set(ylabel="GB sent by a chip in a step", title="Collectives")

    held = {"state": [state(report) for report in reports]}
    for kind in ("frozen", "activations"):
        held[kind] = [report["memory"][kind] / GIB for report in reports]
    held["rest"] = [
        report["needed_bytes"] / GIB - sum(values[i] for values in held.values()) for i, report in enumerate(reports)
    ]
    stack(right, held)
    right.plot(places, [state_in_theory(report) for report in reports], "k_--", ms=40, label="state in theory, 16 P/f")
    right.axhline(reports[0]["available_bytes"] / GIB, color="tab:red", lw=1, label="of a chip")
    right.set(ylabel="GiB on a chip", title="Memory")
    for axes in (left, right):
        axes.set_xticks(places, [str(n) for n in chips])
        axes.set_xlabel(f"{reports[0]['chip']} chips, {reports[0]['images'] // chips[0]} images a chip")
        axes.set_ylim(0, 1.4 * axes.get_ylim()[1])
        axes.legend(fontsize="small", markerscale=0.3, ncols=2, loc="upper center")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
