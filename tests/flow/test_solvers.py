from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from svg_jax.flow.solvers import TABLEAUS, solve_ode, time_grid
from svg_jax.flow.times import resolution_shift
from tests.vectors import Case, assert_close

TOLERANCE = 1e-4  # a sampler: a chain of formulas
GRID = re.compile(r"ode\.grid\.n(?P<points>\d+)\.(noshift|shift(?P<shift>[\d.p]+))")
SOLVED = re.compile(r"ode\.(?P<method>\w+)\.n(?P<points>\d+)\.(noshift|shift(?P<shift>[\d.p]+))\.traj")


def grid_of(found: re.Match[str]) -> jax.Array:
    """The release counts points, we count steps."""
    return time_grid(int(found["points"]) - 1, float((found["shift"] or "1").replace("p", ".")))


def solved() -> list[str]:
    """The stored trajectories of the methods that exist here."""
    matches = map(SOLVED.fullmatch, Case.load("sampler").outputs)
    return [found.string for found in matches if found and found["method"] in TABLEAUS]


@pytest.mark.golden
def test_time_grids_match_the_release() -> None:
    case = Case.load("sampler")
    grids = [found for found in map(GRID.fullmatch, case.outputs) if found]
    assert len(grids) == len(case.config["ode"]["num_steps"]) * len(case.config["ode"]["shifts"])
    for found in grids:
        assert_close(grid_of(found), case.outputs[found.string], 1e-5, found.string)


@pytest.mark.golden
@pytest.mark.parametrize("key", solved())
def test_trajectories_match_the_release(key: str) -> None:
    case, found = Case.load("sampler"), SOLVED.fullmatch(key)
    assert found is not None
    matrix, offset, x = (jnp.asarray(case.inputs[f"field.{name}"]) for name in ("A", "b", "x"))

    def velocity(x: jax.Array, t: jax.Array) -> jax.Array:
        turned = jnp.einsum("ij,bjhw->bihw", matrix, x, precision="highest")
        return turned + offset[None, :, None, None] * t[:, None, None, None]

    times, expected = grid_of(found), case.outputs[key]
    states = solve_ode(velocity, x, times, found["method"], trajectory=True)
    # Long runs are stored as their last state alone.
    assert_close(states if len(expected) == len(times) else states[-1:], expected, TOLERANCE, key)
    assert_close(solve_ode(velocity, x, times, found["method"]), expected[-1], TOLERANCE, key)


@pytest.mark.golden
def test_the_flag_that_takes_channels_for_a_sequence_length() -> None:
    """The release's sampler has a flag that shifts by the channel count; the trajectory is that of such a grid."""
    case = Case.load("sampler")
    matrix, offset, x = (jnp.asarray(case.inputs[f"field.{name}"]) for name in ("A", "b", "x"))

    def velocity(x: jax.Array, t: jax.Array) -> jax.Array:
        return jnp.einsum("ij,bjhw->bihw", matrix, x) + offset[None, :, None, None] * t[:, None, None, None]

    expected = case.outputs["ode.euler.do_shift_flag.traj"]
    times = time_grid(len(expected) - 1, resolution_shift(x.shape[1]))
    assert_close(solve_ode(velocity, x, times, "euler", trajectory=True), expected, TOLERANCE)


@pytest.mark.golden
def test_the_vectors_cover_every_method() -> None:
    assert {key.split(".")[1] for key in solved()} == set(TABLEAUS)


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("midpoint", 2)])
def test_error_falls_with_the_order_of_the_method(method: str, order: int) -> None:
    # dx/dt = 2 t - 2 x from x(0) = 1, so x(1) = 3/2 exp(-2) + 1/2: a field that depends on state and time.
    exact = 1.5 * np.exp(-2.0) + 0.5

    def error(steps: int) -> float:
        x = solve_ode(lambda x, t: 2.0 * t[:, None] - 2.0 * x, jnp.ones((1, 1)), time_grid(steps), method)
        return abs(float(x[0, 0]) - exact)

    assert np.log2(error(8) / error(16)) == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize("method", TABLEAUS)
def test_straight_lines_are_exact_forth_and_back(method: str) -> None:
    x0, x1 = jax.random.normal(jax.random.key(0), (2, 2, 4, 3))
    times = time_grid(3, shift=6.0)
    assert_close(solve_ode(lambda x, t: x1 - x0, x0, times, method), x1, 1e-6)
    assert_close(solve_ode(lambda x, t: x1 - x0, x1, times[::-1], method), x0, 1e-6)


@pytest.mark.parametrize("method", TABLEAUS)
def test_the_velocity_is_traced_once_a_stage(method: str) -> None:
    calls, compilations = [], []

    def velocity(x: jax.Array, t: jax.Array) -> jax.Array:
        calls.append(t.shape)
        return -x

    @jax.jit
    def run(x: jax.Array, times: jax.Array) -> jax.Array:
        compilations.append(1)
        return solve_ode(velocity, x, times, method)

    for shift in (1.0, 6.0, 10.0):
        run(jnp.ones((2, 3)), time_grid(20, shift))
    assert len(compilations) == 1
    assert len(calls) <= 2 * len(TABLEAUS[method].a)  # a scan may trace its body twice, never once a step
    assert set(calls) == {(2,)}


def test_state_is_float32_around_a_bfloat16_network() -> None:
    states = solve_ode(
        lambda x, t: -x.astype(jnp.bfloat16), jnp.ones((2, 3), jnp.bfloat16), time_grid(4), trajectory=True
    )
    assert states.dtype == jnp.float32
    assert states.shape == (5, 2, 3)
    assert bool((states[0] == 1).all())


def test_unknown_method_shows_the_nearest() -> None:
    with pytest.raises(
        ValueError, match=r"unknown ODE solver 'eular': did you mean 'euler'\? choose one of euler, midpoint"
    ):
        solve_ode(lambda x, t: x, jnp.ones((1, 1)), time_grid(2), "eular")


@pytest.mark.parametrize("num_steps", [0, -3])
def test_less_than_one_step_is_refused(num_steps: int) -> None:
    with pytest.raises(ValueError, match=rf"num_steps is {num_steps}: .* at least 1 step"):
        time_grid(num_steps)
