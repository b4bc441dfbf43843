from __future__ import annotations

import numpy as np
import pytest

from svg_jax.evaluate.fid.distribution import Blocks, in_manifold, inception_score, precision_and_recall, radii


def cut(rows: np.ndarray, *places: int) -> Blocks:
    return lambda: iter(np.split(rows, places))


def test_inception_score_is_that_of_its_formula() -> None:
    logits = 2.0 * np.random.default_rng(0).standard_normal((47, 6))
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    scores = []
    for k in range(10):
        part = p[k * 47 // 10 : (k + 1) * 47 // 10]
        divergence = part * (np.log(part) - np.log(part.mean(axis=0, keepdims=True)))
        scores.append(np.exp(divergence.sum(axis=1).mean()))
    for places in ((), (1, 20, 20, 46)):
        mean, deviation = inception_score(cut(logits, *places)(), 47)
        assert mean == pytest.approx(np.mean(scores), rel=1e-12)
        assert deviation == pytest.approx(np.std(scores), rel=1e-9)


def test_inception_score_of_sure_and_of_unsure_classes() -> None:
    """As many as there are classes where each image is surely of one, all alike often; one where nothing is known."""
    sure = 1000.0 * np.eye(5)[np.arange(50) % 5]
    assert inception_score([sure], 50, 1) == (pytest.approx(5.0), 0.0)
    assert inception_score([sure], 50, 10) == (pytest.approx(5.0), pytest.approx(0.0, abs=1e-12))
    assert inception_score([np.zeros((50, 5))], 50) == (pytest.approx(1.0), pytest.approx(0.0, abs=1e-12))
    sorted_by_class = sure[np.argsort(np.arange(50) % 5)]
    assert inception_score([sorted_by_class], 50, 10)[0] == pytest.approx(1.0)  # splits are taken in the given order
    assert inception_score([sorted_by_class], 50, 1)[0] == pytest.approx(5.0)


def test_too_few_images() -> None:
    with pytest.raises(ValueError, match="over 10 splits needs at least 10 images and has 9"):
        inception_score([np.zeros((9, 2))], 9)
    with pytest.raises(ValueError, match="was told of 12 images and saw 11"):
        inception_score([np.zeros((11, 2))], 12)
    with pytest.raises(ValueError, match="3 nearest neighbours of an image, and one set has only 3 images"):
        radii(cut(np.eye(3)))


def test_precision_and_recall_are_those_of_their_definition() -> None:
    draw = np.random.default_rng(1)
    real, generated = draw.standard_normal((40, 3)), 0.7 + 1.3 * draw.standard_normal((31, 3))

    def manifold(points: np.ndarray, support: np.ndarray) -> np.ndarray:
        between = np.linalg.norm(support[:, None] - support[None], axis=2)
        reach = np.sort(between, axis=1)[:, 3]  # the nearest is the point itself
        return (np.linalg.norm(points[:, None] - support[None], axis=2) <= reach[None]).any(axis=1)

    realistic, covered = manifold(generated, real), manifold(real, generated)
    assert 0.3 < realistic.mean() < 1
    assert 0.3 < covered.mean() < 1
    for places in ((), (5, 6, 30)):
        found = precision_and_recall(cut(generated, *places), cut(real, *places))
        np.testing.assert_array_equal(found[0], realistic)
        np.testing.assert_array_equal(found[1], covered)


def test_near_points_far_from_the_origin_are_told_apart() -> None:
    """Squares of 1e6 beside distances of 1e-3: float32 would see no distance at all."""
    line = np.zeros((6, 2)) + 1000.0
    line[:, 0] += 1e-3 * np.arange(6)
    inside = in_manifold(lambda: iter([np.array([[1000.0085, 1000.0], [1000.0075, 1000.0]])]), cut(line, 2))
    assert inside.tolist() == [False, True]


def test_a_copy_is_precise_and_covers_everything() -> None:
    rows = np.random.default_rng(2).standard_normal((20, 4))
    for found in precision_and_recall(cut(rows), cut(rows[::-1], 7)):
        assert found.all()
    for found in precision_and_recall(cut(rows), cut(rows + 100.0)):
        assert not found.any()
