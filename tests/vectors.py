"""Reads the parity vectors that the golden tests compare against.

A case is a folder with `config.json` (sizes and seeds), `io.npz` (`in.*` and `out.*` arrays) and, where it has
parameters, `weights.safetensors` in the naming of the PyTorch release. Every size a test needs comes from the case
itself, so that another set of vectors, named by `SVG_GOLDEN_DIR`, runs through the same tests.

Our own copy has one `packed.npz` in the place of both, a sixth smaller: numbers as planes of bytes, the first bytes of
all numbers, then the second ones, and so on. Of the temporal taps of the second decoder, which no image sees, it has
zeros, and of two encoders the square image only. `python -m tests.vectors SOURCE` makes it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from safetensors.numpy import load_file

FOLDER = Path(os.environ.get("SVG_GOLDEN_DIR") or Path(__file__).parent / "golden")
WEIGHTS = "weights."
SQUARE_ONLY = ("mae_hf", "siglip2_hf")  # in our copy; `test_vit_learnt` compares other sizes with transformers itself


@dataclasses.dataclass(frozen=True)
class Case:
    """One folder of vectors: `inputs` and `outputs` are keyed without their `in.` / `out.` prefix."""

    name: str
    config: dict[str, Any]
    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]

    @classmethod
    def load(cls, name: str) -> Case:
        values = _arrays(name)
        return cls(
            name=name,
            config=json.loads((FOLDER / name / "config.json").read_text()),
            inputs={key[3:]: value for key, value in values.items() if key.startswith("in.")},
            outputs={key[4:]: value for key, value in values.items() if key.startswith("out.")},
        )

    def weights(self) -> dict[str, np.ndarray]:
        """The module's state dict, release names and layouts."""
        found = {key: value for key, value in _arrays(self.name).items() if key.startswith(WEIGHTS)}
        return {key.removeprefix(WEIGHTS): value for key, value in found.items()}


def _arrays(name: str, folder: Path = FOLDER) -> dict[str, np.ndarray]:
    """Everything of a case, its weights too."""
    packed = folder / name / "packed.npz"
    if packed.exists():
        with np.load(packed) as planes:
            return dict(_whole(key, planes[key]) for key in planes.files)
    with np.load(folder / name / "io.npz") as arrays:
        values = {key: arrays[key] for key in arrays.files}
    if (folder / name / "weights.safetensors").exists():
        values |= {WEIGHTS + key: value for key, value in load_file(folder / name / "weights.safetensors").items()}
    return values


def _planes(key: str, array: np.ndarray) -> tuple[str, np.ndarray]:
    """A name that tells dtype and shape, and bytes [item size, count]."""
    shape = ",".join(map(str, array.shape))
    numbers = np.frombuffer(array.tobytes(), np.uint8).reshape(array.size, -1)
    return f"{array.dtype.name}|{shape}|{key}", np.ascontiguousarray(numbers.T)


def _whole(key: str, planes: np.ndarray) -> tuple[str, np.ndarray]:
    """The inverse of `_planes`."""
    dtype, shape, key = key.split("|", 2)
    sizes = [int(size) for size in shape.split(",") if size]
    return key, np.frombuffer(planes.T.tobytes(), np.dtype(dtype)).reshape(sizes)


def pack(source: Path) -> None:
    """Copies every case of `source` to `tests/golden`, packed."""
    target = Path(__file__).parent / "golden"
    for case in sorted(path for path in source.iterdir() if (path / "io.npz").exists()):
        values = _arrays(case.name, source)
        if case.name in SQUARE_ONLY:
            values = {key: value for key, value in values.items() if "96x64" not in key}
        for key, value in values.items():
            if key.startswith(WEIGHTS) and value.ndim == 5 and value.shape[2] > 1:
                values[key] = value * (np.arange(value.shape[2]) == value.shape[2] // 2)[:, None, None].astype("f4")
        (target / case.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(case / "config.json", target / case.name)
        with zipfile.ZipFile(target / case.name / "packed.npz", "w", zipfile.ZIP_LZMA) as file:
            for key, value in values.items():
                name, planes = _planes(key, np.asarray(value))
                with file.open(f"{name}.npy", "w") as entry:
                    np.save(entry, planes)


def cases(prefix: str) -> list[str]:
    """Names of the cases that start with `prefix`; a golden test parametrised over none of them fails."""
    names = sorted(path.name for path in FOLDER.glob(f"{prefix}*") if path.is_dir())
    if not names:
        raise FileNotFoundError(f"no golden case '{prefix}*' in {FOLDER}; set SVG_GOLDEN_DIR to a folder of vectors")
    return names


def assert_close(actual: ArrayLike, expected: ArrayLike, tolerance: float, what: str = "") -> None:
    """max|actual - expected| <= tolerance * max|expected|, shapes equal, everything finite."""
    a, b = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert a.shape == b.shape, f"{what}: shape {a.shape}, expected {b.shape}"
    assert np.isfinite(a).all(), f"{what}: not finite"
    error, scale = np.abs(a - b).max(initial=0.0), np.abs(b).max(initial=0.0)
    assert error <= tolerance * scale, f"{what}: error {error:.3g} exceeds {tolerance:g} x {scale:.3g}"


if __name__ == "__main__":
    pack(Path(sys.argv[1]))
