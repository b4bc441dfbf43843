from __future__ import annotations

import numpy as np
import pytest

from svg_jax.evaluate.fid.moments import Moments, bias, frechet_distance
from tests.evaluate.vectors import arrays, facts


@pytest.mark.golden
def test_distances_of_features() -> None:
    given = arrays("fid_features")
    cases = facts("fid_cases")["cases"]
    assert cases
    for case in cases:
        a, b = (Moments.of(given[f"{name}{case['index']}"]) for name in "ab")
        assert [a.count, b.count] == case["n"]
        expected = case["frechet_distance"]
        assert frechet_distance(a, b) == pytest.approx(expected, rel=case["rtol"], abs=1e-4), case["name"]


def test_moments_of_parts_are_those_of_all() -> None:
    features = (100.0 + np.random.default_rng(0).standard_normal((57, 5))).astype(np.float32)
    merged = Moments.of(features[:0])
    for first, last in ((0, 1), (1, 20), (20, 20), (20, 57)):
        merged = merged.merged(Moments.of(features[first:last]))
    whole = features.astype(np.float64)
    assert merged.count == 57
    np.testing.assert_allclose(merged.mean, whole.mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(merged.covariance(), np.cov(whole, rowvar=False), rtol=1e-12)


def test_distance_of_gaussians_along_axes() -> None:
    """Of diagonal covariances it is |m_a - m_b|^2 + sum (s_a - s_b)^2, and it is symmetric."""
    a = Moments(3, np.array([1.0, 2.0]), 2.0 * np.diag([4.0, 9.0]))
    b = Moments(2, np.array([0.0, 4.0]), 1.0 * np.diag([1.0, 0.0]))
    assert frechet_distance(a, b) == pytest.approx(1 + 4 + (2 - 1) ** 2 + 3**2)
    assert frechet_distance(b, a) == pytest.approx(frechet_distance(a, b))


def test_too_few_or_other_features() -> None:
    one, many = Moments.of(np.ones((1, 4))), Moments.of(np.eye(4))
    with pytest.raises(ValueError, match="at least 2 images and has 1"):
        frechet_distance(many, one)
    with pytest.raises(ValueError, match="features of 4 and of 3 channels"):
        frechet_distance(many, Moments.of(np.eye(3)))


def test_few_images_are_told() -> None:
    assert "FID of 9,999 images is biased upward" in str(bias(9_999))
    assert bias(10_000) is None
