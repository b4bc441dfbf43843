"""A released diffusion transformer of full size, there and back: `python -m benchmarks.conversion`.

Random float32 weights of that size are written as the release's `.pth`, imported, exported again and compared bit for
bit. Import and export each run in a process of their own, whose peak memory is set against the size of the file. The
full size needs about 35 GB of disk at --folder while it runs.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from svg_jax.convert.formats import open_file, raw, torch_writer
from svg_jax.convert.kinds import restored
from svg_jax.convert.rules import release_shapes
from svg_jax.models.next_dit import NextDiTConfig

SIZES = {
    "tiny": NextDiTConfig(dim=96, num_layers=3, num_heads=4, num_kv_heads=2, axes_dims=(8, 8, 8), text_dim=64),
    "0p8b": NextDiTConfig.next_dit_0p8b(),
    "2p6b": NextDiTConfig.next_dit_2p6b(),
}
GOAL = 1.3  # peak memory, as a multiple of the file


def main() -> None:
    """Prints a row of a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="2p6b")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where there is room")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="conversion_", dir=args.folder))
    try:
        before, workdir, after = folder / "before.pth", folder / "in", folder / "after.pth"
        write_random(before, SIZES[args.size])
        there = measured("import", before, "--to", workdir)
        back = measured("export", workdir / "dit", "--to", after)
        check_same(before, after)
        size = before.stat().st_size
        print(
            "| size | file | import | peak / file | export | peak / file | bit for bit |\n|---|---|---|---|---|---|---|"
        )
        columns = " | ".join(f"{seconds:.0f} s | {peak / size:.2f}" for seconds, peak in (there, back))
        print(f"| {args.size} | {size / 1e9:.2f} GB | {columns} | yes |")
        print(f"\nGoal: a peak of at most {GOAL} times the file. float32, {os.cpu_count()} CPU cores.")
    finally:
        shutil.rmtree(folder)


def write_random(path: Path, config: NextDiTConfig) -> None:
    """Weights of that size under the release's names, one tensor at a time."""
    model = restored({"model": vars(config)})
    structs = release_shapes(model.shapes, model.table)
    rng = np.random.default_rng(0)
    with torch_writer(path, structs) as write:
        for name, struct in structs.items():
            write(name, rng.standard_normal(struct.shape, np.float32) * np.float32(0.02))


def measured(*arguments: object) -> tuple[float, int]:
    """Seconds and peak memory, in bytes, of one command of `svg_jax.convert`."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "svg_jax.convert", *map(str, arguments)])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"`{' '.join(map(str, arguments))}` failed")
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def check_same(one: Path, other: Path) -> None:
    """Both files hold the same tensors."""
    a, b = open_file(one).weights, open_file(other).weights
    if a.structs != b.structs:
        raise SystemExit(f"{other} has other tensors than {one}")
    for name in a:
        if raw(a[name]) != raw(b[name]):
            raise SystemExit(f"'{name}' is not the same in {one} and {other}")


if __name__ == "__main__":
    main()
