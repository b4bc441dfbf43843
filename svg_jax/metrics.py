"""What a run writes down about itself: scalars, picture grids and progress.

A workdir gets `metrics.jsonl` (one JSON object a line), TensorBoard event files of the same scalars in `events/`,
picture grids in `samples/`, and `spikes.jsonl` with the steps whose loss jumped. The device waits for none of it:
values are handed over as JAX arrays, and a background thread reads them once they are computed.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np
from etils import epath
from jax.typing import ArrayLike
from jaxtyping import UInt8
from PIL import Image
from tensorboardX import SummaryWriter
from tqdm import tqdm

from svg_jax import chips

Pictures = Sequence[UInt8[np.ndarray, "height width 3"]]


def peak_flops(devices: Sequence[jax.Device]) -> float | None:
    """Peak bfloat16 FLOPs per second of `devices`, all of one kind; None for a kind that `chips` lacks, as a CPU."""
    peak = chips.peak_flops(devices[0].device_kind)
    return None if peak is None else peak * len(devices)


def image_grid(images: Pictures, columns: int, padding: int = 2) -> UInt8[np.ndarray, "height width 3"]:
    """Lays pictures out in rows of `columns`, each centred in a cell as large as the largest of them, on white.

    A ValueError says which one is not uint8 [height, width, 3], or that there is none.
    """
    if len(images) == 0 or columns < 1:
        raise ValueError(f"a picture grid needs at least one picture and one column, found {len(images)} and {columns}")
    for index, image in enumerate(images):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"picture {index} is {image.dtype} {image.shape}, expected uint8 [height, width, 3]")
    columns = min(columns, len(images))
    height = max(image.shape[0] for image in images) + padding
    width = max(image.shape[1] for image in images) + padding
    grid = np.full((math.ceil(len(images) / columns) * height + padding, columns * width + padding, 3), 255, np.uint8)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        top = padding + row * height + (height - padding - image.shape[0]) // 2
        left = padding + column * width + (width - padding - image.shape[1]) // 2
        grid[top : top + image.shape[0], left : left + image.shape[1]] = image
    return grid


def side_by_side(before: Pictures, after: Pictures, gain: int = 4) -> list[UInt8[np.ndarray, "height 3*width 3"]]:
    """Rows of a picture, its reconstruction, and how they differ, `gain` times so that an eye sees it."""
    rows = []
    for one, other in zip(before, after, strict=True):
        difference = gain * np.abs(one.astype(np.int16) - other.astype(np.int16))
        rows.append(np.concatenate([one, other, np.minimum(difference, 255).astype(np.uint8)], axis=1))
    return rows


class MetricWriter:
    """Writes the scalars, pictures and progress of one run; a context manager.

    A step's number is its index, from 0; a run that resumes at `start_step` takes that step next. What was written at
    or after it is dropped from the `.jsonl` files and hidden from TensorBoard, so that both read as one run never
    interrupted. Call `flush` before each checkpoint: no later process rewrites a line lost before it.

    Progress goes to stderr: a bar if that is a terminal, else a line each time scalars are written.
    The `.jsonl` files are strict JSON: a value that is not finite is the string "NaN", "Infinity" or "-Infinity", which
    `float()` reads. To the given scalars each line but a process's first (which would count compilation) adds

      images_per_second = images in the steps since the line before / seconds from its values' being ready to this one's
      tokens_per_second = the same of tokens, if `tokens_per_step` is given
      mfu               = flops_per_step / seconds per step / peak_flops(all devices), if that is known

    Args:
      workdir: the run's folder (a ValueError if it cannot be written); `gs://...` gets a copy each minute and `flush`.
      total_steps: the step at which the run ends.
      items_per_step: images in one global batch.
      start_step: the first step of this process.
      flops_per_step: model FLOPs of one step on the global batch, see `svg_jax.models.flops`.
      tokens_per_step: image and text tokens of one global batch.
      enabled: false on every process but the first; then every method returns at once.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        *,
        total_steps: int,
        items_per_step: int,
        start_step: int = 0,
        flops_per_step: float | None = None,
        tokens_per_step: int | None = None,
        enabled: bool = True,
    ) -> None:
        self.total_steps = total_steps
        self.items_per_step = items_per_step
        self.tokens_per_step = tokens_per_step
        self.enabled = enabled
        if not enabled:
            return
        peak = peak_flops(jax.devices())
        self._ideal_seconds_per_step = flops_per_step / peak if flops_per_step and peak else None
        self._last: tuple[int, float] | None = None  # the last step written, and when its values were ready
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="metrics")
        self._pending: Future[None] = self._worker.submit(lambda: None)
        # Buckets cannot append: files for a remote workdir are written to a local folder, and copied.
        self._remote = epath.Path(workdir) if "://" in str(workdir) else None
        self._synced = time.time()
        self._folder = Path(tempfile.mkdtemp()) if self._remote else Path(workdir)
        try:
            (self._folder / "samples").mkdir(parents=True, exist_ok=True)
            self._jsonl = _open_jsonl(self._folder, "metrics.jsonl", self._remote or self._folder, start_step)
            self._spikes = _open_jsonl(self._folder, "spikes.jsonl", self._remote or self._folder, start_step)
            unique = f".{time.time_ns()}"  # the name's own time is in seconds, and a file of the same name is replaced
            self._events = SummaryWriter(str(self._folder / "events"), purge_step=start_step, filename_suffix=unique)
            self._sync()
        except OSError as error:
            what_to_do = f"({error.strerror or error}); choose a folder that you may write to"
            raise ValueError(f"workdir '{workdir}' cannot be written {what_to_do}") from error
        bar = "{n_fmt}/{total_fmt} |{bar}| {postfix}"  # disable=None: no bar where stderr is no terminal
        self._bar = tqdm(total=total_steps, initial=start_step, bar_format=bar, disable=None)

    def scalars(self, step: int, values: Mapping[str, ArrayLike]) -> None:
        """Hands over the scalars of `step`, computed or not.

        A vector `name` is written as `name/0`, `name/1`, ...; its NaN entries stand for nothing and are left out.
        Waits only for those of the call before: the host runs ahead of the device by at most one log interval.
        A ValueError names the value that is neither.
        """
        for name, value in values.items():
            if len(np.shape(value)) > 1:
                raise ValueError(
                    f"metric {name!r} at step {step} has shape {np.shape(value)}, expected a scalar or vector"
                )
        if self.enabled:
            self._submit(self._write_scalars, step, dict(values))

    def pictures(self, step: int, name: str, images: Pictures, columns: int = 4) -> None:
        """Writes a grid of pictures, of any sizes, to TensorBoard and to `samples/{step}_{name}.png`."""
        if self.enabled:
            self._submit(self._write_pictures, step, name, image_grid(images, columns))

    def spike(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes a line of `spikes.jsonl`: numbers, and lists of them."""
        if self.enabled:
            self._submit(_write_line, self._spikes, step, dict(values))

    @contextlib.contextmanager
    def untimed(self) -> Iterator[None]:
        """Keeps what happens inside (saving, sampling) out of the throughput; the step's scalars come before it."""
        self.flush()
        start = time.perf_counter()
        yield
        if self.enabled and self._last is not None:
            self._last = self._last[0], self._last[1] + time.perf_counter() - start

    def flush(self) -> None:
        """Returns when everything handed over is on disk (and uploaded). Call it before each checkpoint."""
        if self.enabled:
            self._pending.result()
            self._sync()

    def close(self) -> None:
        """Writes what is left and closes the files."""
        if not self.enabled:
            return
        try:
            self.flush()
        finally:
            self._worker.shutdown()
            self._jsonl.close()
            self._spikes.close()
            self._events.close()
            self._bar.close()
            if self._remote is not None:
                shutil.rmtree(self._folder)

    def __enter__(self) -> MetricWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _submit(self, task: Callable[..., None], *args: Any) -> None:
        self._pending.result()  # raises what the task before raised
        self._pending = self._worker.submit(task, *args)

    def _write_scalars(self, step: int, values: dict[str, ArrayLike]) -> None:
        # Explicit, so that a transfer guard lets it pass; it returns when the device has computed the values.
        record = dict(_flatten(jax.device_get(values)))
        ready = time.perf_counter()
        if self._last is not None and step > self._last[0]:
            seconds_per_step = (ready - self._last[1]) / (step - self._last[0])
            record["images_per_second"] = self.items_per_step / seconds_per_step
            if self.tokens_per_step is not None:
                record["tokens_per_second"] = self.tokens_per_step / seconds_per_step
            if self._ideal_seconds_per_step is not None:
                record["mfu"] = self._ideal_seconds_per_step / seconds_per_step
        self._last = step, ready
        for name, value in record.items():
            self._events.add_scalar(name, value, step)
        _write_line(self._jsonl, step, record)
        self._show_progress(step + 1, record)
        if time.time() - self._synced > 60:
            self._sync()

    def _write_pictures(self, step: int, name: str, grid: UInt8[np.ndarray, "height width 3"]) -> None:
        Image.fromarray(grid).save(self._folder / "samples" / f"{step:08d}_{name}.png")
        self._events.add_image(name, grid, step, dataformats="HWC")

    def _show_progress(self, steps_done: int, record: Mapping[str, float]) -> None:
        formats = {
            "loss": "loss {:.4f}",
            "images_per_second": "{:.1f} images/s",
            "mfu": "MFU {:.1%}",
            "eval/fid": "FID {:.2f}",
        }
        parts = [text.format(record[name]) for name, text in formats.items() if name in record]
        if "images_per_second" in record:
            seconds = (self.total_steps - steps_done) * self.items_per_step / record["images_per_second"]
            parts.append(f"ETA {datetime.timedelta(seconds=round(seconds))}")
        if self._bar.disable:
            print(f"step {steps_done}/{self.total_steps}", *parts, sep="  ", file=sys.stderr, flush=True)
        else:
            self._bar.n = steps_done
            self._bar.set_postfix_str("  ".join(parts))

    def _sync(self) -> None:
        self._events.flush()
        since, self._synced = self._synced, time.time()
        if self._remote is None:
            return
        for file in self._folder.rglob("*"):
            if file.is_file() and file.stat().st_mtime >= since - 1:  # a second for coarse file clocks
                target = self._remote / file.relative_to(self._folder).as_posix()
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read_bytes())


def _flatten(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if np.ndim(value) == 0:
            yield name, float(value)
        else:
            yield from ((f"{name}/{i}", float(entry)) for i, entry in enumerate(value) if not np.isnan(entry))


def _write_line(file: TextIO, step: int, values: Mapping[str, Any]) -> None:
    """One object of strict JSON, which knows no NaN."""
    strict = {k: json.dumps(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
    file.write(json.dumps({"step": step, **strict}) + "\n")


def _open_jsonl(folder: Path, name: str, before: Path | epath.Path, start_step: int) -> TextIO:
    """Begins a file with those lines of the one in `before` that are of steps before `start_step`; opens it to append.

    The old file is replaced in one move.
    """
    path, old, kept = folder / name, before / name, []
    for line in old.read_bytes().decode(errors="replace").splitlines() if old.exists() else []:
        with contextlib.suppress(ValueError, TypeError, KeyError):  # the last line of a killed process may be cut off
            if json.loads(line)["step"] < start_step:
                kept.append(line + "\n")
    partial = path.with_suffix(".partial")
    partial.write_text("".join(kept))
    partial.replace(path)
    return path.open("a", buffering=1)  # by the line, so that a kill loses none that was written
