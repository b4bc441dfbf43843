"""Jobs of several real processes over loopback, started as a user would: by `launch/local_cluster.sh`."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
PATIENCE = 600  # seconds for what takes a few where nothing is broken


@contextmanager
def job(
    logs: Path, processes: int, command: Sequence[str], *, devices: int = 1, env: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Runs the command in so many processes; each writes to `logs`/NUMBER.log, the first with what the launcher says.

    All are killed at the end, should they still be there.
    """
    logs.mkdir(exist_ok=True)
    launcher = ["bash", str(ROOT / "launch" / "local_cluster.sh"), "--devices", str(devices), "--logs", str(logs)]
    environment = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT)} | dict(env or {})
    with (logs / "0.log").open("ab") as log:
        started = subprocess.Popen(
            [*launcher, str(processes), "--", *command], env=environment, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            yield started
        finally:
            while started.poll() is None:  # the second time kills
                started.terminate()
                time.sleep(1)
