"""The Fréchet distance between two sets of features (FID, arXiv 1706.08500), from moments summed batch by batch.

Everything is float64 on the host: the difference of two covariances of 2048 channels has no digits left in float32.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

ENOUGH = 10_000  # images; with fewer, the estimate is biased upward by more than models differ


def bias(count: int) -> str | None:
    """What is to be said of the FID of so few images, if they are few."""
    if count >= ENOUGH:
        return None
    return f"FID of {count:,} images is biased upward: compare it with others of as many; 50,000 are usual"


class Gaussian(Protocol):
    """What the distance looks at: Moments, or statistics from a file."""

    @property
    def mean(self) -> NDArray[np.float64]: ...

    def covariance(self) -> NDArray[np.float64]: ...


@dataclasses.dataclass(frozen=True)
class Moments:
    """Number of feature vectors, their mean and the sum of (f - mean)(f - mean)^T."""

    count: int
    mean: NDArray[np.float64]
    scatter: NDArray[np.float64]

    @classmethod
    def of(cls, features: NDArray[np.floating]) -> Moments:
        """Of one batch [N, channels]; a batch of none is allowed."""
        rows = np.asarray(features, np.float64)
        mean = rows.mean(axis=0) if len(rows) else np.zeros(rows.shape[1])
        return cls(len(rows), mean, (rows - mean).T @ (rows - mean))

    def merged(self, other: Moments) -> Moments:
        """Of both sets together (Chan, Golub and LeVeque 1979); exact up to the rounding of float64."""
        count = max(self.count + other.count, 1)
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        between = np.outer(delta, delta) * (self.count * other.count / count)
        return Moments(self.count + other.count, mean, self.scatter + other.scatter + between)

    def covariance(self) -> NDArray[np.float64]:
        """Unbiased, [channels, channels].

        Raises:
            ValueError: There are fewer than 2 vectors.
        """
        if self.count < 2:
            raise ValueError(f"FID needs the features of at least 2 images and has {self.count}: give more images")
        return self.scatter / (self.count - 1)


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) for means m and covariances C.

    The trace of (C_a C_b)^(1/2) is the sum of the square roots of the eigenvalues of C_a^(1/2) C_b C_a^(1/2), which is
    symmetric: unlike the root of C_a C_b itself it needs no complex numbers, and no guess where C_a is singular.

    Raises:
        ValueError: One of them has fewer than 2 vectors, or the channels differ.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"features of {a.mean.size} and of {b.mean.size} channels cannot be compared: take one network for both"
        )
    covariance_a, covariance_b = a.covariance(), b.covariance()
    values, vectors = np.linalg.eigh(covariance_a)
    root = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    product = np.linalg.eigvalsh(root @ covariance_b @ root)
    trace = np.trace(covariance_a) + np.trace(covariance_b) - 2.0 * np.sum(np.sqrt(np.maximum(product, 0.0)))
    return float(np.sum((a.mean - b.mean) ** 2) + trace)
