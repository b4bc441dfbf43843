"""Reads the parity vectors that the golden tests compare against.

A case is a folder with `config.json` (sizes and seeds), `io.npz` (`in.*` and `out.*` arrays) and, where it has
parameters, `weights.safetensors` in the naming of the PyTorch release. Every size a test needs comes from the case
itself, so that another set of vectors, named by `SVG_GOLDEN_DIR`, runs through the same tests.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

FOLDER = Path(os.environ.get("SVG_GOLDEN_DIR") or Path(__file__).parent / "golden")


@dataclasses.dataclass(frozen=True)
class Case:
    """One folder of vectors: `inputs` and `outputs` are keyed without their `in.` / `out.` prefix."""

    name: str
    config: dict[str, Any]
    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]

    @classmethod
    def load(cls, name: str) -> Case:
        folder = FOLDER / name
        with np.load(folder / "io.npz") as arrays:
            values = {key: arrays[key] for key in arrays.files}
        return cls(
            name=name,
            config=json.loads((folder / "config.json").read_text()),
            inputs={key[3:]: value for key, value in values.items() if key.startswith("in.")},
            outputs={key[4:]: value for key, value in values.items() if key.startswith("out.")},
        )

    def weights(self) -> dict[str, np.ndarray]:
        """The module's state dict, release names and layouts."""
        from safetensors.numpy import load_file

        return load_file(FOLDER / self.name / "weights.safetensors")


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
