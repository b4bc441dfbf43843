from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from svg_jax.flow import times
from tests.vectors import Case, assert_close

TOLERANCE = 1e-5


@pytest.mark.golden
def test_resolution_shift_matches_the_release() -> None:
    case = Case.load("transport")
    for seq_len in case.config["seq_lens"]:
        expected = np.exp(np.float64(case.outputs[f"shift.mu.{seq_len}"]))
        assert_close(times.resolution_shift(seq_len), expected, TOLERANCE, f"{seq_len} tokens")


@pytest.mark.golden
def test_shift_matches_the_release() -> None:
    case = Case.load("transport")
    t = jnp.asarray(case.inputs["uniform_draws"])
    for seq_len in case.config["seq_lens"]:
        shifted = times.shift_times(t, times.resolution_shift(seq_len))
        assert_close(shifted, case.outputs[f"shift.time_shift_of_u.{seq_len}"], TOLERANCE, f"{seq_len} tokens")
    squared = times.shift_times(t, math.exp(1.0), power=2)
    assert_close(squared, case.outputs["shift.time_shift_mu1_sigma2_of_u"], TOLERANCE, "mu 1, power 2")


@pytest.mark.golden
def test_time_samples_match_the_release() -> None:
    case = Case.load("transport")
    uniform, normal = jnp.asarray(case.inputs["uniform_draws"]), jnp.asarray(case.inputs["normal_draws"])
    low, high = case.config["uniform_range"]
    unshifted = {
        "uniform": times.times_from_draws(uniform, "uniform"),
        "uniform_range": times.times_from_draws(uniform, f"uniform_{low}_{high}"),
    } | {f"lognorm.mu{mu}": times.times_from_draws(normal, "lognorm", mu) for mu in case.config["lognorm_mu"]}
    compared = 0
    for name, t in unshifted.items():
        shifts = {"noshift": 1.0} | {f"shift{n}": times.resolution_shift(n) for n in case.config["seq_lens"]}
        for label, factor in shifts.items():
            expected = case.outputs[f"sample_t.{name}.{label}"]
            assert_close(times.shift_times(t, factor), expected, TOLERANCE, f"{name} {label}")
            compared += 1
    assert compared == sum(key.startswith("sample_t.") for key in case.outputs)


def test_shift_keeps_the_ends_and_the_order_and_moves_toward_noise() -> None:
    t = jnp.linspace(0.0, 1.0, 33)
    for power in (1, 2):
        shifted = times.shift_times(t, 6.0, power)
        assert shifted[0] == 0.0
        assert shifted[-1] == 1.0
        assert bool((jnp.diff(shifted) > 0).all())
    assert bool((times.shift_times(t, 6.0) <= t).all())
    assert_close(times.shift_times(times.shift_times(t, 6.0), 1 / 6), t, 1e-5)


@pytest.mark.parametrize("distribution", ["uniform", "uniform_0.1_0.7", "lognorm"])
def test_samples_follow_their_distribution(distribution: str) -> None:
    t = times.sample_times(jax.random.key(1), 4096, distribution, mu=0.7)
    low, high = {"uniform": (0, 1), "uniform_0.1_0.7": (0.1, 0.7), "lognorm": (0, 1)}[distribution]
    median = {"uniform": 0.5, "uniform_0.1_0.7": 0.4, "lognorm": 1 / (1 + np.exp(-0.7))}[distribution]
    assert t.shape == (4096,)
    assert t.dtype == jnp.float32
    assert bool(((low <= t) & (t <= high)).all())
    assert abs(float(jnp.median(t)) - median) < 0.03


def test_samples_depend_on_the_key_alone() -> None:
    a, b = (times.sample_times(jax.random.key(seed), 8, shift=3.0) for seed in (0, 1))
    assert bool((a == times.sample_times(jax.random.key(0), 8, shift=3.0)).all())
    assert bool((a != b).all())


@pytest.mark.parametrize("distribution", ["uniformly", "lognrom", "uniform_0.1", "uniform_a_b", "log_0.1_0.7", ""])
def test_unknown_distribution_names_the_choices(distribution: str) -> None:
    with pytest.raises(
        ValueError, match=r"unknown time distribution .* choose one of lognorm, uniform, uniform_LOW_HIGH"
    ):
        times.sample_times(jax.random.key(0), 2, distribution)


@pytest.mark.parametrize("distribution", ["uniform_0.7_0.1", "uniform_-0.1_0.5", "uniform_0.5_1.5", "uniform_nan_1"])
def test_interval_outside_of_time_is_refused(distribution: str) -> None:
    with pytest.raises(ValueError, match="need 0 <= LOW < HIGH <= 1"):
        times.sample_times(jax.random.key(0), 2, distribution)


@pytest.mark.parametrize("factor", [0, -1.0, float("nan")])
def test_shift_that_is_not_positive_is_refused(factor: float) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        times.shift_times(jnp.ones(2), factor)
