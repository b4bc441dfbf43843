"""Inception Score, and precision and recall of features; both read what they are of block by block.

All is float64 on the host, so that numbers do not depend on the devices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
from jaxtyping import Bool, Float

SPLITS = 10
NEIGHBOURS = 3

# What gives all rows of a set, some at a time, and may be asked again.
Blocks = Callable[[], Iterator[Float[np.ndarray, "rows channels"]]]


def inception_score(
    logits: Iterable[Float[np.ndarray, "rows classes"]], count: int, splits: int = SPLITS
) -> tuple[float, float]:
    """exp(mean_x KL(p(y | x) || p(y))), its mean and standard deviation over `splits` of the images.

    Salimans et al. 2016 (arXiv 1606.03498), section 4, in the form of their code: split k of n holds the images
    [k N / n, (k + 1) N / n) in the order in which they come, p(y) is that of the split, and the deviation is divided
    by n. With one split no order matters.

    Args:
        logits: Of all images, some at a time.
        count: How many images these are, N.
        splits: How many parts, n.

    Raises:
        ValueError: There are fewer images than splits.
    """
    if count < splits:
        raise ValueError(f"the Inception Score over {splits} splits needs at least {splits} images and has {count}")
    bounds = np.array([k * count // splits for k in range(splits + 1)])
    probabilities: list[np.ndarray | float] = [0.0] * splits  # summed over the images of a split
    negentropy = np.zeros(splits)
    first = 0
    for block in logits:
        rows = np.asarray(block, np.float64)
        log_p = rows - rows.max(axis=1, keepdims=True)
        log_p -= np.log(np.exp(log_p).sum(axis=1, keepdims=True))
        p = np.exp(log_p)
        split = np.searchsorted(bounds, np.arange(first, first + len(rows)), side="right") - 1
        for k in np.unique(split):
            mine = split == k
            probabilities[k] = probabilities[k] + p[mine].sum(axis=0)
            negentropy[k] += np.sum(p[mine] * log_p[mine])
        first += len(rows)
    if first != count:
        raise ValueError(f"the Inception Score was told of {count} images and saw {first}")
    sizes = np.diff(bounds)
    scores = []
    for total, known, size in zip(probabilities, negentropy, sizes, strict=True):
        marginal = np.asarray(total) / size
        seen = marginal[marginal > 0]
        scores.append(np.exp(known / size - np.sum(seen * np.log(seen))))
    return float(np.mean(scores)), float(np.std(scores))


def precision_and_recall(
    generated: Blocks, real: Blocks, neighbours: int = NEIGHBOURS
) -> tuple[Bool[np.ndarray, " generated"], Bool[np.ndarray, " real"]]:
    """For each generated point whether it is realistic, and for each real one whether it is covered; means are scores.

    Kynkäänniemi et al. 2019 (arXiv 1904.06991), eq. 1 and 2: a point lies in the manifold of a set if it is at most as
    far from some point of that set as the `neighbours`-th nearest other one of the set is from that point. They take
    features of VGG-16; those of Inception, as in ADM's evaluation (arXiv 2105.05233), give other numbers.

    Raises:
        ValueError: A set has no more points than neighbours.
    """
    return in_manifold(generated, real, neighbours), in_manifold(real, generated, neighbours)


def in_manifold(points: Blocks, support: Blocks, neighbours: int = NEIGHBOURS) -> Bool[np.ndarray, " points"]:
    """Which points lie in the manifold of `support`."""
    reach = radii(support, neighbours)
    inside = []
    for rows in points():
        found, first = np.zeros(len(rows), bool), 0
        for columns in support():
            found |= (squared_distances(rows, columns) <= reach[first : first + len(columns)]).any(axis=1)
            first += len(columns)
        inside.append(found)
    return np.concatenate(inside)


def radii(support: Blocks, neighbours: int = NEIGHBOURS) -> Float[np.ndarray, " points"]:
    """Squared distance of each point to the `neighbours`-th nearest other one.

    Raises:
        ValueError: There are no more points than neighbours.
    """
    found = []
    for rows in support():
        nearest = np.full((len(rows), neighbours + 1), np.inf)  # of which one is the point itself
        for columns in support():
            both = np.concatenate([nearest, squared_distances(rows, columns)], axis=1)
            nearest = np.partition(both, neighbours, axis=1)[:, : neighbours + 1]
        found.append(nearest.max(axis=1))
    reach = np.concatenate(found)
    if len(reach) <= neighbours:
        raise ValueError(
            f"precision and recall look at the {neighbours} nearest neighbours of an image, and one set has only "
            f"{len(reach)} images: give more"
        )
    return reach


def squared_distances(
    a: Float[np.ndarray, "rows channels"], b: Float[np.ndarray, "columns channels"]
) -> Float[np.ndarray, "rows columns"]:
    """|a_i - b_j|^2. The sum below loses all digits of near points in float32."""
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    squares = np.sum(x * x, axis=1)[:, None] + np.sum(y * y, axis=1)[None, :] - 2.0 * (x @ y.T)
    return np.maximum(squares, 0.0)
