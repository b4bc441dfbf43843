"""Every solver by its name, through the one function that the pipeline calls."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from svg_jax.flow.paths import GVP
from svg_jax.flow.solvers import MAX_STEPS, SOLVERS, Solver, check_num_steps, integrate
from tests.flow.solvers.fields import Gaussian
from tests.vectors import assert_close

FLOW = Gaussian()
START = jax.random.normal(jax.random.key(0), (3, 4, 2))


def noise_of(places: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """The noise of each step, a function of a sample's place alone."""

    def draw(place: jax.Array, step: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(1), place), step)
        return jax.random.normal(key, START.shape[1:])

    return lambda step: jax.vmap(lambda place: draw(place, step))(places)


PLACES = jnp.arange(len(START))


@functools.partial(jax.jit, static_argnames="name")
def draw(x: jax.Array, places: jax.Array, num_steps: int, shift: float, *, name: str) -> jax.Array:
    noise = noise_of(places)
    return integrate(FLOW.velocity, x, Solver(name), num_steps=num_steps, shift=shift, noise=noise)


@pytest.mark.parametrize("name", SOLVERS)
def test_one_compilation_whatever_the_steps_and_the_shift(name: str) -> None:
    compilations, calls = [], []

    def velocity(x: jax.Array, t: jax.Array) -> jax.Array:
        calls.append((t.shape, str(t.dtype)))
        return FLOW.velocity(x, t)

    @jax.jit
    def run(x: jax.Array, num_steps: int, shift: float) -> jax.Array:
        compilations.append(1)
        noise = noise_of(PLACES)
        return integrate(velocity, x, Solver(name), num_steps=num_steps, shift=shift, noise=noise)

    few, shifted, many = (run(START, n, shift) for n, shift in [(1, 1.0), (4, 6.0), (MAX_STEPS, 1.0)])
    assert len(compilations) == 1
    # The network is traced once whatever the number of stages, and once more for the last step of an SDE.
    assert calls == (2 if SOLVERS[name].family == "sde" else 1) * [((len(START),), "float32")]
    assert bool(jnp.isfinite(few).all())
    fixed = jax.jit(lambda x: integrate(velocity, x, Solver(name), num_steps=4, shift=6.0, noise=noise_of(PLACES)))
    assert_close(shifted, fixed(START), 1e-5)
    if SOLVERS[name].family != "sde":
        assert_close(many, FLOW.state(np.asarray(START), 1.0), 5e-3)


@pytest.mark.parametrize("name", SOLVERS)
def test_the_number_of_evaluations_is_as_stated(name: str) -> None:
    calls = []

    def velocity(x: jax.Array, t: jax.Array) -> jax.Array:
        jax.debug.callback(lambda: calls.append(1))
        return FLOW.velocity(x, t)

    def count(num_steps: int) -> int:
        calls.clear()
        jax.block_until_ready(run(START, num_steps))
        jax.effects_barrier()
        return len(calls)

    run = jax.jit(lambda x, n: integrate(velocity, x, Solver(name), num_steps=n, noise=noise_of(PLACES)))
    per_step = SOLVERS[name].evaluations
    if per_step is None:
        assert count(3) == count(9)  # it finds its own steps
    else:
        assert count(9) - count(3) == 6 * per_step


@pytest.mark.parametrize("name", SOLVERS)
def test_a_sample_does_not_depend_on_its_neighbours(name: str) -> None:
    alone = draw(START[1:2], PLACES[1:2], 20, 1.0, name=name)
    # The steps of dopri5 are those of the whole batch.
    together = draw(START, PLACES, 20, 1.0, name=name)
    assert_close(alone, together[1:2], 5e-3 if name == "dopri5" else 1e-5)


@pytest.mark.parametrize("name", SOLVERS)
def test_state_is_float32_around_a_bfloat16_network(name: str) -> None:
    def velocity(x: jax.Array, t: jax.Array) -> jax.Array:
        assert x.dtype == t.dtype == jnp.float32
        return FLOW.velocity(x, t).astype(jnp.bfloat16)

    run = jax.jit(lambda x: integrate(velocity, x, Solver(name), num_steps=20, noise=noise_of(PLACES)))
    rounded = run(START.astype(jnp.bfloat16))
    assert rounded.dtype == jnp.float32
    assert_close(rounded, draw(START, PLACES, 20, 1.0, name=name), 3e-2)


def test_every_entry_says_what_it_is() -> None:
    for name, method in SOLVERS.items():
        assert method.description, name
        assert method.reference, name
        assert Solver(name).method is method


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"name": "dpm++2"},
            r"unknown solver 'dpm\+\+2': did you mean 'dpm\+\+2[ms]'\? choose one of euler, .*sde_heun",
        ),
        ({"diffusion_form": "sbdm"}, "unknown diffusion form 'sbdm': did you mean 'SBDM'"),
        ({"last_step": "mean"}, "unknown last step 'mean': did you mean 'Mean'"),
        ({"last_step_size": 0.0}, "last_step_size is 0: it is a time between 0 and 1"),
        ({"last_step_size": 1.5}, "last_step_size is 1.5"),
        ({"rtol": 0.0}, "rtol of a solver is 0: it must be positive and finite"),
        ({"atol": float("nan")}, "atol of a solver is nan"),
        ({"diffusion_norm": -1.0}, "diffusion_norm of a solver is -1"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Solver(**settings)


def test_settings_are_hashable_and_know_the_releases_spelling() -> None:
    assert {Solver(): 1}[Solver()] == 1
    Solver("sde_euler", diffusion_form="inccreasing-decreasing", last_step=None)


@pytest.mark.parametrize("num_steps", [0, -1, MAX_STEPS + 1])
def test_steps_out_of_range_are_refused(num_steps: int) -> None:
    with pytest.raises(ValueError, match=f"num_steps is {num_steps}: choose from 1 to {MAX_STEPS} steps"):
        check_num_steps(num_steps)
    with pytest.raises(ValueError, match="num_steps"):
        integrate(FLOW.velocity, START, Solver("euler"), num_steps=num_steps)


def test_solvers_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="solver 'sde_heun' adds noise in every step: pass noise"):
        integrate(FLOW.velocity, START, Solver("sde_heun"), num_steps=2)
    with pytest.raises(ValueError, match=r"solver 'dpm\+\+2m' is for the path Linear, not GVP"):
        integrate(FLOW.velocity, START, Solver(), num_steps=2, path=GVP())


@pytest.mark.parametrize("form", ["constant", "SBDM", "sigma", "linear", "decreasing", "increasing-decreasing"])
@pytest.mark.parametrize("last_step", ["Mean", "Tweedie", "Euler", None])
def test_every_sde_of_the_front_door_is_finite(form: str, last_step: str | None) -> None:
    solver = Solver("sde_heun", diffusion_form=form, last_step=last_step)
    run = jax.jit(lambda x: integrate(FLOW.velocity, x, solver, num_steps=8, noise=noise_of(PLACES)))
    assert bool(jnp.isfinite(run(START)).all())
