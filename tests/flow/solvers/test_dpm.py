from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from svg_jax.flow.solvers import noise_levels, predict_data, solve_dpm
from svg_jax.flow.solvers.dpm import half_log_snr, level_of
from tests.flow.solvers.fields import Gaussian, golden_start, golden_velocity, keys, match, number
from tests.vectors import Case, assert_close

TOLERANCE = 1e-4
GRID = re.compile(r"dpm\.grid\.n(?P<steps>\d+)\.shift(?P<shift>[\dp.]+)")
MULTISTEP = re.compile(
    r"dpm\.multistep(?P<variant>_taylor|_denoise_to_zero|)\.o(?P<order>\d)\.n(?P<steps>\d+)\.shift(?P<shift>[\d.p]+?)"
    r"(?P<what>\.inter|\.model_t|)"
)
OTHER_GRID = re.compile(r"dpm\.grid\.(?P<grid>[a-zA-Z_]+)\.n(?P<steps>\d+)\.t(?P<first>[\d.]+)-(?P<last>[\d.]+)")
ON_OTHER_GRID = re.compile(
    r"dpm\.(?P<method>\w+)\.(?P<grid>\w+)\.o(?P<order>\d)\.(?P<rest>n(?P<steps>\d+)\.t[\d.]+-[\d.]+)"
)
DEFAULTS = re.compile(r"dpm\.(?P<method>\w+)\.time_uniform_flow\.o(?P<order>\d)\.n(?P<steps>\d+)\.defaults")
PATTERNS = (GRID, MULTISTEP, OTHER_GRID, ON_OTHER_GRID, DEFAULTS)
EVERY = [(order, singlestep, taylor) for order in (1, 2, 3) for singlestep in (False, True) for taylor in (False, True)]


@functools.partial(jax.jit, static_argnames=("order", "singlestep", "taylor"))
def golden_states(
    levels: jax.Array, num_steps: int, *, order: int, singlestep: bool = False, taylor: bool = False
) -> jax.Array:
    """All states, on levels padded to one length: one compilation for all numbers of steps."""
    return solve_dpm(
        golden_velocity,
        golden_start(),
        levels,
        order=order,
        singlestep=singlestep,
        taylor=taylor,
        num_steps=num_steps,
        trajectory=True,
    )


heard: list[np.ndarray] = []  # times that `golden_times` has seen so far


@functools.partial(jax.jit, static_argnames=("order", "taylor"))
def listen(levels: jax.Array, num_steps: int, *, order: int, taylor: bool) -> jax.Array:
    def velocity(x: jax.Array, t: jax.Array) -> jax.Array:
        jax.debug.callback(heard.append, t)
        return golden_velocity(x, t)

    return solve_dpm(velocity, golden_start(), levels, order=order, taylor=taylor, num_steps=num_steps)


def golden_times(levels: jax.Array, num_steps: int, *, order: int, taylor: bool) -> np.ndarray:
    """The times at which the velocity is asked for, one a step."""
    heard.clear()
    jax.block_until_ready(listen(levels, num_steps, order=order, taylor=taylor))
    jax.effects_barrier()
    times = np.stack(heard)
    assert (times == times[:, :1]).all()  # all samples at the same time
    return times[:, 0]


def pad(levels: jax.Array) -> jax.Array:
    capacity = max(Case.load("sampler").config["dpm"]["steps"])
    return jnp.pad(levels, (0, max(0, capacity + 1 - len(levels))), mode="edge")


@pytest.mark.golden
@pytest.mark.parametrize("key", keys(GRID))
def test_levels_match_the_release(key: str) -> None:
    found = match(GRID, key)
    levels = noise_levels(int(found["steps"]), number(found["shift"]))
    assert_close(levels, Case.load("sampler").outputs[key], 1e-5, key)
    assert levels[-1] == 0.0


@pytest.mark.golden
@pytest.mark.parametrize("key", keys(MULTISTEP))
def test_multistep_matches_the_release(key: str) -> None:
    found, expected = match(MULTISTEP, key), Case.load("sampler").outputs[key]
    order, steps, taylor = int(found["order"]), int(found["steps"]), found["variant"] == "_taylor"
    levels = noise_levels(steps, number(found["shift"]))
    if found["what"] == ".model_t":
        assert_close(golden_times(pad(levels), steps, order=order, taylor=taylor), expected, TOLERANCE, key)
        return
    states = golden_states(pad(levels), steps, order=order, taylor=taylor)[: steps + 1]
    if found["variant"] == "_denoise_to_zero":
        # The release predicts the data once more, at 1/1000 though it has arrived at 0.
        states = predict_data(golden_velocity, states[-1], jnp.float32(1e-3))[None]
    assert_close(states if found["what"] == ".inter" else states[-1], expected, TOLERANCE, key)


@pytest.mark.golden
@pytest.mark.parametrize("key", keys(OTHER_GRID))
def test_other_grids_are_what_they_say(key: str) -> None:
    found, expected = match(OTHER_GRID, key), Case.load("sampler").outputs[key]
    first, last, points = float(found["first"]), float(found["last"]), int(found["steps"]) + 1
    if found["grid"] == "logSNR":
        # The release takes exp(-λ) for the level: s / (1 - s), which passes 1.
        levels = level_of(jnp.linspace(*half_log_snr(jnp.asarray([first, last])), points))
        assert_close(levels / (1.0 - levels), expected, TOLERANCE, key)
        return
    power = {"time_uniform": 1, "time_quadratic": 2}[found["grid"]]
    assert_close(np.linspace(first ** (1 / power), last ** (1 / power), points) ** power, expected, 1e-5, key)


@pytest.mark.golden
@pytest.mark.parametrize("key", keys(ON_OTHER_GRID, DEFAULTS))
def test_any_falling_levels_match_the_release(key: str) -> None:
    case = Case.load("sampler")
    if found := DEFAULTS.fullmatch(key):
        levels = noise_levels(int(found["steps"]))
    else:
        found = match(ON_OTHER_GRID, key)
        levels = jnp.asarray(case.outputs[f"dpm.grid.{found['grid']}.{found['rest']}"])
    singlestep = found["method"].startswith("singlestep")
    steps = int(found["steps"])
    states = golden_states(pad(levels), steps, order=int(found["order"]), singlestep=singlestep)
    assert_close(states[steps], case.outputs[key], TOLERANCE, key)


@pytest.mark.golden
def test_the_vectors_cover_both_families() -> None:
    assert {match(MULTISTEP, key)["order"] for key in keys(MULTISTEP)} == {"1", "2", "3"}
    assert {match(MULTISTEP, key)["variant"] for key in keys(MULTISTEP)} == {"", "_taylor", "_denoise_to_zero"}
    assert {match(DEFAULTS, key)["method"] for key in keys(DEFAULTS)} >= {"singlestep"}


@pytest.mark.parametrize(("order", "singlestep", "taylor"), EVERY)
def test_error_falls_with_the_order_of_the_method(order: int, singlestep: bool, taylor: bool) -> None:
    flow, noise = Gaussian(deviation=0.8), np.asarray([[1.5], [-0.8]])
    first, last = 0.9, 0.1
    run = jax.jit(
        lambda levels, n: solve_dpm(
            flow.velocity,
            jnp.asarray(flow.state(noise, 1 - first), jnp.float32),
            levels,
            order=order,
            singlestep=singlestep,
            taylor=taylor,
            num_steps=n,
        )
    )
    ends = half_log_snr(jnp.asarray([first, last]))

    def error(n: int) -> float:
        levels = jnp.pad(level_of(jnp.linspace(*ends, n + 1)), (0, 128 - n), mode="edge")
        return float(np.abs(run(levels, n) - flow.state(noise, 1 - last)).max())

    n = 64 if not singlestep else 16 if order == 3 else 8
    # A multistep method starts and ends with a step of first order, whose errors are of second order.
    expected = order if singlestep else min(order, 2)
    assert np.log2(error(n) / error(2 * n)) == pytest.approx(expected, abs=0.3)


@pytest.mark.parametrize(("order", "singlestep", "taylor"), EVERY)
def test_data_that_is_one_point_is_reached_exactly(order: int, singlestep: bool, taylor: bool) -> None:
    """The predicted data is the same at all levels, the last of which has no finite λ."""
    x, data = jax.random.normal(jax.random.key(0), (2, 2, 4, 3))

    @jax.jit
    def run(n: int, shift: float) -> jax.Array:
        return solve_dpm(
            lambda x, t: (data - x) / (1.0 - t)[:, None, None],  # infinite at level 0
            x,
            noise_levels(n, shift, capacity=7),
            order=order,
            singlestep=singlestep,
            taylor=taylor,
            num_steps=n,
        )

    for n in (1, 2, 3, 7):
        for shift in (1.0, 10.0):
            assert_close(run(n, shift), data, 2e-5, f"{n} steps, shift {shift:g}")


@pytest.mark.parametrize(("order", "singlestep", "taylor"), EVERY)
def test_levels_may_begin_at_pure_noise(order: int, singlestep: bool, taylor: bool) -> None:
    flow, noise = Gaussian(), np.asarray(jax.random.normal(jax.random.key(0), (2, 3)))
    x = jax.jit(
        lambda x: solve_dpm(
            flow.velocity, x, jnp.linspace(1.0, 0.0, 41), order=order, singlestep=singlestep, taylor=taylor
        )
    )(jnp.asarray(noise))
    assert_close(x, flow.state(noise, 1.0), 5e-2)


def test_higher_orders_are_closer_on_the_released_grid() -> None:
    flow, noise = Gaussian(), np.asarray(jax.random.normal(jax.random.key(0), (4, 8)))

    def error(order: int, singlestep: bool) -> float:
        levels = noise_levels(12, 3.0)
        run = jax.jit(lambda x: solve_dpm(flow.velocity, x, levels, order=order, singlestep=singlestep))
        return float(np.abs(run(jnp.asarray(noise)) - flow.state(noise, 1.0)).max())

    assert error(3, True) < error(2, True) < error(1, True)
    assert max(error(2, False), error(3, False)) < error(1, False)


def test_half_log_snr_and_its_inverse() -> None:
    levels = jnp.linspace(0.01, 0.99, 9)
    assert_close(level_of(half_log_snr(levels)), levels, 1e-6)
    assert bool(jnp.isfinite(half_log_snr(jnp.asarray([0.0, 1.0]))).all())


@pytest.mark.parametrize("order", [0, 4])
def test_unknown_order_is_refused(order: int) -> None:
    with pytest.raises(ValueError, match=rf"order of DPM-Solver\+\+ is {order}: choose one of 1, 2, 3"):
        solve_dpm(lambda x, t: x, jnp.ones((1, 1)), noise_levels(2), order=order)
