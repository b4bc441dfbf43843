from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from svg_jax.flow.paths import DIFFUSION_FORMS, PATHS, Linear, path
from svg_jax.flow.solvers import LAST_STEPS, SDE_METHODS, sde_interval, solve_ode, solve_sde, time_grid
from tests.flow.solvers.fields import Gaussian, golden_start, golden_velocity, keys, match
from tests.vectors import Case, assert_close

TOLERANCE = 1e-4
SOLVED = re.compile(r"sde\.(?P<path>\w+)\.eps(?P<eps>[\d.]+)\.(?P<method>\w+)\.(?P<form>[\w-]+)\.(?P<last_step>\w+)")
INTERVAL = re.compile(r"sde\.interval\.(?P<path>\w+)\.(?P<form>[\w-]+)\.(?P<last_step>\w+)")
PATTERNS = (SOLVED, INTERVAL)
NORM = 0.8  # the vectors' diffusion_norm where config.json does not say
LAST_STEP = {name: name for name in LAST_STEPS} | {"None": None}


@functools.partial(jax.jit, static_argnames=("name", "method", "form", "last_step"))
def golden_states(times: jax.Array, name: str, method: str, form: str, last_step: str | None) -> jax.Array:
    case = Case.load("sampler")
    noise, settings = jnp.asarray(case.inputs["sde.noise"]), case.config["sde"]
    return solve_sde(
        golden_velocity,
        golden_start(),
        times,
        lambda i: noise[i],
        method=method,
        path=path(name),
        diffusion_form=form,
        diffusion_norm=settings.get("diffusion_norm", NORM),
        last_step=last_step,
        last_step_size=settings["last_step_size"],
        trajectory=True,
    )


@pytest.mark.golden
@pytest.mark.parametrize("key", keys(SOLVED))
def test_samples_match_the_release(key: str) -> None:
    case, found = Case.load("sampler"), match(SOLVED, key)
    expected, last_step = case.outputs[key], LAST_STEP[found["last_step"]]
    start, end = sde_interval(
        path(found["path"]), found["form"], last_step, case.config["sde"]["last_step_size"], float(found["eps"])
    )
    times = start + (end - start) * time_grid(len(case.inputs["sde.noise"]))
    states = golden_states(times, found["path"], found["method"].lower(), found["form"], last_step)
    # Some runs are stored with all states after the start, others as their last one.
    assert_close(states[1:] if expected.ndim == states.ndim else states[-1], expected, TOLERANCE, key)


@pytest.mark.golden
@pytest.mark.parametrize("key", keys(INTERVAL))
def test_intervals_match_the_release(key: str) -> None:
    case, found = Case.load("sampler"), match(INTERVAL, key)
    settings, last_step = case.config["sde"], LAST_STEP[found["last_step"]]
    interval = sde_interval(
        path(found["path"]), found["form"], last_step, settings["last_step_size"], settings["sample_eps"]
    )
    assert_close(interval, case.outputs[key], 1e-6, key)


@pytest.mark.golden
def test_the_vectors_cover_every_choice() -> None:
    found = [match(SOLVED, key) for key in keys(SOLVED)]
    assert {m["path"] for m in found} == set(PATHS)
    assert {m["method"].lower() for m in found} == set(SDE_METHODS)
    assert {m["last_step"] for m in found} == set(LAST_STEP)
    assert len({m["form"] for m in found}) == len(DIFFUSION_FORMS)


@pytest.mark.parametrize("method", SDE_METHODS)
@pytest.mark.parametrize("form", ["sigma", "SBDM"])
def test_samples_are_distributed_like_the_data(method: str, form: str) -> None:
    """Data of one Gaussian: the noise that every step adds is what the score term takes away."""
    flow, batch = Gaussian(), 4096
    start, end = sde_interval(Linear(), form, "Mean", 0.02)
    x = jax.jit(
        lambda key: solve_sde(
            flow.velocity,
            jax.random.normal(key, (batch, 1)),
            start + (end - start) * time_grid(60),
            lambda i: jax.random.normal(jax.random.fold_in(key, i), (batch, 1)),
            method=method,
            diffusion_form=form,
            last_step_size=0.02,
        )
    )(jax.random.key(0))
    assert float(jnp.mean(x)) == pytest.approx(flow.mean, abs=0.03)
    assert float(jnp.std(x)) == pytest.approx(flow.deviation, rel=0.08)


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2)])
def test_error_of_the_drift_falls_with_the_order_of_the_method(method: str, order: int) -> None:
    flow, x = Gaussian(), jnp.asarray([[1.5], [-0.8]])

    def drift(x: jax.Array, t: jax.Array) -> jax.Array:
        v = flow.velocity(x, t)
        return v + Linear().sigma(t)[:, None] * Linear().score_from_velocity(v, x, t)

    @jax.jit
    def run(n: int) -> jax.Array:
        times = 0.9 * time_grid(n, capacity=32)
        silence = jnp.zeros_like(x)
        return solve_sde(flow.velocity, x, times, lambda i: silence, method=method, last_step=None, num_steps=n)

    exact = jax.jit(lambda: solve_ode(drift, x, 0.9 * time_grid(200), "rk4"))()
    coarse, fine = (np.abs(np.asarray(run(n) - exact)).max() for n in (16, 32))
    assert np.log2(coarse / fine) == pytest.approx(order, abs=0.4)


def test_the_tweedie_step_finds_data_that_is_one_point() -> None:
    x, data = jax.random.normal(jax.random.key(0), (2, 2, 3))
    result = solve_sde(
        lambda x, t: (data - x) / (1.0 - t)[:, None],
        x,
        0.5 * time_grid(2),
        lambda i: jnp.ones_like(x),
        last_step="Tweedie",
    )
    assert_close(result, data, 1e-5)


def test_misspelt_names_show_the_nearest() -> None:
    def run(**settings: str) -> jax.Array:
        return solve_sde(lambda x, t: x, jnp.ones((1, 1)), time_grid(2), lambda i: jnp.ones((1, 1)), **settings)

    with pytest.raises(ValueError, match=r"unknown SDE solver 'Huen': did you mean 'heun'"):
        run(method="Huen")
    with pytest.raises(ValueError, match=r"unknown last step 'tweedy': did you mean 'Tweedie'"):
        run(last_step="tweedy")
    with pytest.raises(ValueError, match=r"unknown diffusion form 'sigmaa': did you mean 'sigma'"):
        run(diffusion_form="sigmaa")
