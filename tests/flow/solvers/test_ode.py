from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from svg_jax.flow.solvers import ODE_METHODS, TABLEAUS, solve_ode, time_grid
from svg_jax.flow.times import resolution_shift
from tests.flow.solvers.fields import Gaussian, golden_start, golden_velocity, keys, match, number
from tests.vectors import Case, assert_close

TOLERANCE = 1e-4  # a sampler: a chain of formulas
SHIFT = r"(noshift|shift(?P<shift>[\dp.]+))"
GRID = re.compile(rf"ode\.grid\.n(?P<points>\d+)\.{SHIFT}")
SOLVED = re.compile(rf"ode\.(?P<method>\w+)\.n(?P<points>\d+)\.{SHIFT}\.traj")
FLAG = re.compile(r"ode\.(?P<method>\w+)\.do_shift_flag\.traj")
PATTERNS = (GRID, SOLVED, FLAG)


def grid_of(found: re.Match[str]) -> jax.Array:
    """The release counts points, we count steps."""
    return time_grid(int(found["points"]) - 1, number(found["shift"]))


@functools.partial(jax.jit, static_argnames="method")
def golden_states(times: jax.Array, method: str) -> jax.Array:
    settings = Case.load("sampler").config["ode"]
    tolerances = {name: settings[name] for name in ("rtol", "atol")}
    return solve_ode(golden_velocity, golden_start(), times, method, trajectory=True, **tolerances)


@pytest.mark.golden
@pytest.mark.parametrize("key", keys(GRID))
def test_time_grids_match_the_release(key: str) -> None:
    assert_close(grid_of(match(GRID, key)), Case.load("sampler").outputs[key], 1e-5, key)


@pytest.mark.golden
@pytest.mark.parametrize("key", keys(SOLVED))
def test_trajectories_match_the_release(key: str) -> None:
    found, expected = match(SOLVED, key), Case.load("sampler").outputs[key]
    states = golden_states(grid_of(found), found["method"])
    # Long runs are stored as their last state alone.
    assert_close(states if len(expected) > 1 else states[-1:], expected, TOLERANCE, key)


@pytest.mark.golden
@pytest.mark.parametrize("key", keys(FLAG))
def test_the_flag_that_takes_channels_for_a_sequence_length(key: str) -> None:
    """The release's sampler has a flag that shifts by the channel count; the trajectory is that of such a grid."""
    expected = Case.load("sampler").outputs[key]
    times = time_grid(len(expected) - 1, resolution_shift(golden_start().shape[1]))
    assert_close(golden_states(times, match(FLAG, key)["method"]), expected, TOLERANCE)


@pytest.mark.golden
def test_the_vectors_cover_every_method() -> None:
    assert {match(SOLVED, key)["method"] for key in keys(SOLVED)} == set(ODE_METHODS)


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("midpoint", 2), ("heun2", 2), ("heun3", 3), ("rk4", 4)])
@pytest.mark.parametrize("reverse", [False, True])
def test_error_falls_with_the_order_of_the_method(method: str, order: int, reverse: bool) -> None:
    # dx/dt = 2 t - 2 x from x(0) = 1, so x(1) = 3/2 exp(-2) + 1/2: a field that depends on state and time.
    start, end = (1.0, 1.5 * np.exp(-2.0) + 0.5)[:: -1 if reverse else 1]

    @jax.jit
    def run(num_steps: int) -> jax.Array:
        times = time_grid(num_steps, reverse=reverse, capacity=16)
        x = jnp.full((1, 1), start, jnp.float32)
        return solve_ode(lambda x, t: 2.0 * t[:, None] - 2.0 * x, x, times, method, num_steps=num_steps)

    steps = 4 if order > 3 else 8
    coarse, fine = (abs(float(run(n)[0, 0]) - end) for n in (steps, 2 * steps))
    assert np.log2(coarse / fine) == pytest.approx(order, abs=0.4)


@pytest.mark.parametrize("rtol", [1e-3, 1e-5])
def test_dopri5_keeps_its_tolerance_forth_and_back(rtol: float) -> None:
    flow, noise = Gaussian(), np.asarray(jax.random.normal(jax.random.key(0), (3, 4, 2)))
    run = jax.jit(lambda x, times: solve_ode(flow.velocity, x, times, "dopri5", rtol=rtol))
    data = run(jnp.asarray(noise), time_grid(1))
    assert_close(data, flow.state(noise, 1.0), 10 * rtol)  # rtol bounds the error of one step
    assert_close(run(data, time_grid(1, reverse=True)), noise, 10 * rtol)


def test_dopri5_ends_on_a_velocity_that_is_not_finite() -> None:
    x = jax.jit(lambda x: solve_ode(lambda x, t: x * jnp.nan, x, time_grid(2), "dopri5"))(jnp.ones((1, 2)))
    assert not bool(jnp.isfinite(x).any())


@pytest.mark.parametrize("method", ODE_METHODS)
def test_straight_lines_are_exact_forth_and_back(method: str) -> None:
    x0, x1 = jax.random.normal(jax.random.key(0), (2, 2, 4, 3))
    run = jax.jit(lambda x, times: solve_ode(lambda x, t: x1 - x0, x, times, method))
    assert_close(run(x0, time_grid(3, shift=6.0)), x1, 2e-6)
    assert_close(run(x1, time_grid(3, shift=6.0, reverse=True)), x0, 2e-6)


@pytest.mark.parametrize("method", ODE_METHODS)
def test_trees_are_carried_like_arrays(method: str) -> None:
    x = jax.random.normal(jax.random.key(0), (2, 3))

    def velocity(state: dict[str, jax.Array], t: jax.Array) -> dict[str, jax.Array]:
        return {"decays": -state["decays"], "adds": state["decays"].sum(axis=1) * t}

    times = time_grid(5)
    states = jax.jit(lambda x: solve_ode(velocity, {"decays": x, "adds": x[:, 0]}, times, method, trajectory=True))(x)
    alone = jax.jit(lambda x: solve_ode(lambda x, t: -x, x, times, method, trajectory=True))(x)
    assert_close(states["decays"], alone, 1e-3)  # another state, other steps of dopri5
    assert states["adds"].shape == (6, 2)
    assert bool((states["adds"][0] == x[:, 0]).all())


@pytest.mark.parametrize("method", TABLEAUS)
def test_gradients_pass_through_a_fixed_number_of_steps(method: str) -> None:
    def last(x: jax.Array) -> jax.Array:
        return solve_ode(lambda x, t: -x, x, time_grid(4), method).sum()

    gradient = jax.jit(jax.grad(last))(jnp.ones((1, 1)))
    assert_close(gradient[0, 0], last(jnp.ones((1, 1))), 1e-6)  # linear in x


def test_reversed_and_padded_grids_hold_the_same_times() -> None:
    for shift in (1.0, 6.0):
        times = time_grid(5, shift)
        padded = jax.jit(lambda n, shift: time_grid(n, shift, capacity=8))(5, shift)
        assert_close(time_grid(5, shift, reverse=True), times[::-1], 1e-6)
        assert padded.shape == (9,)
        assert_close(padded[:6], times, 1e-6)
        assert bool((padded[5:] == 1.0).all())


def test_a_traced_number_of_steps_leaves_the_rest_of_the_trajectory_empty() -> None:
    times = time_grid(3, capacity=5)
    states = solve_ode(lambda x, t: -x, jnp.ones((1, 2)), times, trajectory=True, num_steps=jnp.int32(3))
    assert_close(states[:4], solve_ode(lambda x, t: -x, jnp.ones((1, 2)), times[:4], trajectory=True), 1e-6)
    assert bool((states[4:] == 0.0).all())


def test_unknown_method_shows_the_nearest() -> None:
    with pytest.raises(
        ValueError, match=r"unknown ODE solver 'eular': did you mean 'euler'\? choose one of euler, midpoint"
    ):
        solve_ode(lambda x, t: x, jnp.ones((1, 1)), time_grid(2), "eular")


@pytest.mark.parametrize("num_steps", [0, -3])
def test_less_than_one_step_is_refused(num_steps: int) -> None:
    with pytest.raises(ValueError, match=rf"num_steps is {num_steps}: .* at least 1 step"):
        time_grid(num_steps)
