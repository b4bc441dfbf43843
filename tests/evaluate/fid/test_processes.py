"""FID in real processes, one of which is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from svg_jax.evaluate import networks
from svg_jax.evaluate.__main__ import main
from svg_jax.evaluate.fid import sides
from tests.cluster import PATIENCE, ROOT, job
from tests.evaluate.fid.small_inception import SmallInception, write_inception

COUNT, PART = 22, 4
REPORT = ("results.json", "images.jsonl", "results.md", "index.html", "settings.json")
DOOR = f"""
import os, signal, sys
from svg_jax.evaluate.fid import sides
from svg_jax.evaluate import networks
from svg_jax.evaluate.__main__ import main
from svg_jax.evaluate.results import Results
from tests.evaluate.fid.small_inception import SmallInception

networks.Inception, sides.PART = SmallInception, {PART}
save = Results.save

def save_and_die(results, number, part):
    save(results, number, part)
    os.kill(os.getpid(), signal.SIGKILL)

if os.environ.get("DIES"):
    Results.save = save_and_die
main(sys.argv[1:])
"""


def test_killed_and_taken_up_by_two_processes_it_finds_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_inception(tmp_path / "inception")
    draw = np.random.default_rng(0)
    for name in ("pictures", "real"):
        (tmp_path / name).mkdir()
        for i in range(COUNT):
            Image.fromarray(draw.integers(0, 256, (20 + i, 24, 3)).astype(np.uint8)).save(tmp_path / name / f"{i}.png")
    (tmp_path / "door.py").write_text(DOOR)
    flags = [f"--images={tmp_path / 'pictures'}", f"--reference={tmp_path / 'real'}", "--num-threads=1"]
    flags += [f"--inception={tmp_path / 'inception'}", "--metrics=fid,is,precision_recall"]
    command = [sys.executable, str(tmp_path / "door.py"), "fid", *flags, f"--out={tmp_path / 'out'}"]
    cache = {"JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir)}

    environment = {**os.environ, **cache, "DIES": "1", "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    killed = subprocess.run(command, env=environment, timeout=PATIENCE, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    (part,) = (tmp_path / "out" / "parts").glob("*.npz")
    written = part.stat().st_mtime_ns

    with job(tmp_path / "logs", 2, command, devices=1, env=cache) as running:
        assert running.wait(PATIENCE) == 0, (tmp_path / "logs" / "0.log").read_text()
    assert part.stat().st_mtime_ns == written

    monkeypatch.setattr(networks, "Inception", SmallInception)
    monkeypatch.setattr(sides, "PART", PART)
    main(["fid", *flags, f"--out={tmp_path / 'alone'}"])
    for name in REPORT:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes(), name
