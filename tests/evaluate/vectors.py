"""The vectors of `tests/golden_eval`, or of the folder that `SVG_GOLDEN_EVAL_DIR` names, and networks of a formula.

They were computed with the official evaluators. Our copy leaves out, for its size, four of eight pairs of FID features,
two of four images of Inception and one of three pairs of SSIM; all of GenEval and DPG-Bench is there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

FOLDER = Path(os.environ.get("SVG_GOLDEN_EVAL_DIR") or Path(__file__).parents[1] / "golden_eval")


def facts(name: str) -> dict[str, Any]:
    """A JSON file."""
    return json.loads((FOLDER / f"{name}.json").read_text())


def arrays(name: str) -> dict[str, np.ndarray]:
    """An NPZ file."""
    with np.load(FOLDER / f"{name}.npz") as found:
        return {key: found[key] for key in found.files}


def formula(number: int, shape: tuple[int, ...]) -> np.ndarray:
    """Values in [-1, 1) from a hash of their place, float64."""
    h = np.arange(np.prod(shape), dtype=np.uint64) * 2654435761 + (number * 40503 + 12345)
    h = h.astype(np.uint32)
    for _ in range(2):
        h ^= h >> np.uint32(16)
        h *= np.uint32(0x45D9F3B)
    h ^= h >> np.uint32(16)
    return (h / 2.0**32 * 2.0 - 1.0).reshape(shape)


def formula_convolution(number: int, shape: tuple[int, ...]) -> np.ndarray:
    """A kernel [h, w, in, out] whose numbers lie in the order of PyTorch, [out, in, h, w]."""
    height, width, inputs, outputs = shape
    scale = np.sqrt(6.0 / (inputs * height * width))
    return (formula(number, (outputs, inputs, height, width)) * scale).transpose(2, 3, 1, 0).astype(np.float32)


def inception_weights(shapes: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, np.ndarray]:
    """The Inception of the formula, under our names."""
    given = facts("networks_formula")
    weights = {}
    for number, key in enumerate(given["inception_keys"], start=given["inception_seed"]):
        if key.endswith("num_batches_tracked"):
            continue
        module, word = key.rsplit(".", 1)
        name = f"{module}.{({'bn': 'scale'}.get(module[-2:], 'kernel')) if word == 'weight' else word}"
        shape = shapes[name].shape
        if key == "fc.weight":
            value = formula(number, shape[::-1]).T * np.sqrt(3.0 / shape[0])
        elif len(shape) == 4:
            value = formula_convolution(number, shape)
        elif word in ("weight", "running_var"):
            value = 1.0 + {"weight": 0.2, "running_var": 0.5}[word] * formula(number, shape)
        else:
            value = 0.1 * formula(number, shape)
        weights[name] = value.astype(np.float32)
    return weights


def lpips_weights(shapes: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, np.ndarray]:
    """The LPIPS of the formula, under our names."""
    seed = facts("networks_formula")["seed"]
    weights = {}
    kernels = [name for name in shapes if name.startswith("net.") and name.endswith(".kernel")]
    for k, name in enumerate(sorted(kernels, key=lambda name: int(name.split(".")[-2]))):
        bias = name.removesuffix("kernel") + "bias"
        weights[name] = formula_convolution(seed + 2 * k, shapes[name].shape)
        weights[bias] = (0.1 * formula(seed + 2 * k + 1, shapes[bias].shape)).astype(np.float32)
    for k in range(5):
        name = f"lin{k}.model.1.kernel"
        weights[name] = (0.5 + 0.5 * formula(seed + 100 + k, shapes[name].shape)).astype(np.float32)
    return weights
