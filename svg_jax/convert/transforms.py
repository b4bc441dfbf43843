"""Rearrangements of one layer's numbers, release -> ours and back. Nothing is computed, so both ways are exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Transform(NamedTuple):
    """An invertible rearrangement of one layer's numbers: release arrays -> our array, and back."""

    to_ours: Callable[..., np.ndarray]
    to_release: Callable[[np.ndarray], tuple[np.ndarray, ...]]


SAME = Transform(lambda a: a, lambda a: (a,))
"""The same array."""

LINEAR = Transform(lambda a: a.T, lambda a: (a.T,))
"""[out, in] <-> [in, out]"""

CONV2D = Transform(lambda a: a.transpose(2, 3, 1, 0), lambda a: (a.transpose(3, 2, 0, 1),))
"""[out, in, rows, cols] <-> [rows, cols, in, out]"""

CONV3D = Transform(lambda a: a.transpose(2, 3, 4, 1, 0), lambda a: (a.transpose(4, 3, 0, 1, 2),))
"""[out, in, frames, rows, cols] <-> [frames, rows, cols, in, out]"""


def _patches_to_conv(kernel: np.ndarray, channels: int = 3) -> tuple[np.ndarray, ...]:
    features, dim = kernel.shape
    patch = round((features / channels) ** 0.5)
    return (kernel.reshape(patch, patch, channels, dim).transpose(3, 2, 0, 1),)


PATCHES = Transform(lambda a: a.transpose(2, 3, 1, 0).reshape(-1, a.shape[0]), _patches_to_conv)
"""A convolution over patches of RGB [dim, 3, p, p] <-> a linear map [p * p * 3, dim], channel fastest."""

FUSED_LINEAR = Transform(
    lambda *parts: np.concatenate([a.T for a in parts], axis=1),
    lambda a: tuple(piece.T for piece in np.split(a, 3, axis=1)),
)
"""Three linear maps of equal size, [out, in] each <-> one, [in, 3 * out]."""

FUSED_BIAS = Transform(lambda *parts: np.concatenate(parts), lambda a: tuple(np.split(a, 3)))
"""Their biases [out] <-> one, [3 * out]."""

FUSED_QV_BIAS = Transform(
    lambda q, v: np.concatenate([q, np.zeros_like(q), v]), lambda a: (np.split(a, 3)[0], np.split(a, 3)[2])
)
"""Biases of queries and values [out] <-> one of queries, keys (zero) and values [3 * out]."""

LEADING_AXIS = Transform(lambda a: a[0], lambda a: (a[None],))
"""[1, ...] <-> [...]"""
