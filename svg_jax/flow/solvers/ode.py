"""Solvers of dx/dt = velocity(x, t): explicit Runge-Kutta methods on a grid of times, and adaptive Dormand-Prince."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import ode
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int

from svg_jax.flow.names import lookup
from svg_jax.flow.solvers.loop import Count, Field, State, even_grid, explicit_step, iterate
from svg_jax.flow.times import shift_times


@dataclasses.dataclass(frozen=True)
class Tableau:
    """An explicit Runge-Kutta method (Hairer, Nørsett and Wanner, Solving Ordinary Differential Equations I, II.1).

    k_i = v(x + h Σ_{j<i} a_ij k_j, t + c_i h),      x ← x + h Σ_i b_i k_i

    `a` holds the rows below the diagonal, so the first is empty; c_i is the sum of row i.
    """

    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]

    def step(self, field: Field, x: State, t: Float[Array, ""], h: Float[Array, ""]) -> State:
        """Carries x from t to t + h."""
        # The result of a stage is the argument of the next one, that of the last stage the new state.
        rows = [*self.a[1:], self.b]
        weights = jnp.asarray([(*row, *[0.0] * (len(rows) - len(row))) for row in rows], jnp.float32)
        c = jnp.asarray([sum(row) for row in self.a], jnp.float32)
        return explicit_step(field, x, t + c * h, jnp.ones(len(rows), jnp.float32), weights * h)


TABLEAUS: dict[str, Tableau] = {
    "euler": Tableau(a=((),), b=(1.0,)),
    "midpoint": Tableau(a=((), (1 / 2,)), b=(0.0, 1.0)),
    "heun2": Tableau(a=((), (1.0,)), b=(1 / 2, 1 / 2)),
    "heun3": Tableau(a=((), (1 / 3,), (0.0, 2 / 3)), b=(1 / 4, 0.0, 3 / 4)),
    # The 3/8 rule, not the method most often called by that name.
    "rk4": Tableau(a=((), (1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)), b=(1 / 8, 3 / 8, 3 / 8, 1 / 8)),
}
ODE_METHODS = (*TABLEAUS, "dopri5")


def time_grid(
    num_steps: Count, shift: float | Float[Array, ""] = 1.0, *, reverse: bool = False, capacity: int | None = None
) -> Float[Array, " points"]:
    """`num_steps` + 1 times from noise (0) to data (1), evenly spaced, then shifted toward noise by `shift_times`.

    The release counts points: its `num_steps` is ours plus one.

    Args:
        num_steps: how many intervals; may be traced if `capacity` is given.
        shift: 1 leaves the times even; may be traced.
        reverse: the same times falling from data to noise.
        capacity: the number of intervals that fit: the array has this many plus one, and those beyond `num_steps`
            repeat the last time. None for `num_steps`.

    Raises:
        ValueError: fewer than one step.
    """
    even = even_grid(num_steps, capacity)
    return shift_times(1.0 - even if reverse else even, shift)


def solve_ode(
    velocity: Field,
    x: State,
    times: Float[Array, " points"],
    method: str = "euler",
    *,
    num_steps: Count | None = None,
    trajectory: bool = False,
    rtol: float = 1e-3,
    atol: float = 1e-6,
) -> State:
    """Carries x from times[0] to times[-1], one step an interval; the times may also fall (data to noise).

    One compilation whatever the number of steps, with the velocity traced once whatever the method. The state is
    float32 whatever the dtype of x and of the velocity.

    `dopri5` (Hairer, Nørsett and Wanner, II.4 and II.5) chooses its own steps, so that the times only say where it
    starts, ends and reports; like the release it may look at the velocity a little beyond the last one. All samples
    take the same steps: one depends on its neighbours in the batch as far as `rtol` allows.

    Args:
        velocity: velocity(x, t) with t [batch] float32.
        x: the state at times[0], an array [batch, ...] or a tree of them.
        times: e.g. `time_grid(50, shift=6.0)`.
        method: a name in `ODE_METHODS`.
        num_steps: how many of the intervals are taken; may be traced; None for all. Not for `dopri5`, for which times
            beyond the last step have to repeat it.
        trajectory: return the states [points, batch, ...] at all times, the start included, instead of the last one;
            those beyond `num_steps` are zero. `dopri5` needs distinct times for it.
        rtol: relative error that `dopri5` accepts a step.
        atol: absolute one.

    Raises:
        ValueError: unknown method.
    """
    lookup("ODE solver", method, dict.fromkeys(ODE_METHODS))
    times = times.astype(jnp.float32)
    if method == "dopri5":
        states = _adaptive(velocity, x, times if trajectory else times[jnp.asarray([0, -1])], rtol, atol)
        return states if trajectory else jax.tree.map(lambda leaf: leaf[-1], states)
    tableau = TABLEAUS[method]

    def step(i: Int[Array, ""], x: State, _: None) -> tuple[State, None]:
        return tableau.step(velocity, x, times[i], times[i + 1] - times[i]), None

    points = len(times)
    return iterate(step, x, points - 1 if num_steps is None else num_steps, points=points if trajectory else None)


class _Walk(NamedTuple):
    """Where `dopri5` is: after the step from `before` to `now`, with `h` to try next."""

    y: Float[Array, " size"]
    k: Float[Array, " size"]  # slope at y
    now: Float[Array, ""]
    before: Float[Array, ""]
    curve: Float[Array, "5 size"]  # the polynomial of that step, in shares of it
    h: Float[Array, ""]


def _adaptive(velocity: Field, x: State, times: Float[Array, " points"], rtol: float, atol: float) -> State:
    """States [points, batch, ...] of `dopri5`, which only knows rising times: falling ones are integrated in s = -t.

    The pieces of `jax.experimental.ode`, but not its `odeint`: that chooses the first step by the norm of the whole
    state where Hairer, Nørsett and Wanner (II.4) take the root mean square, so it shrinks as the state grows.
    """
    sign = jnp.where(times[-1] < times[0], -1.0, 1.0)
    times = sign * times
    batch = jax.tree.leaves(x)[0].shape[0]
    y, unravel = ravel_pytree(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), x))

    def slope(y: Float[Array, " size"], s: Float[Array, ""]) -> Float[Array, " size"]:
        slopes = velocity(unravel(y), jnp.full(batch, sign * s))
        return sign * ravel_pytree(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), slopes))[0]

    # Traced here, once, and at the caller's precision: only the sums of the method itself need the highest.
    slope, constants = jax.closure_convert(slope, y, times[0])

    def field(y: Float[Array, " size"], s: Float[Array, ""]) -> Float[Array, " size"]:
        return slope(y, s, *constants)

    def attempt(walk: _Walk) -> _Walk:
        y, k, error, slopes = ode.runge_kutta_step(field, walk.y, walk.k, walk.now, walk.h)
        ratio = ode.mean_error_ratio(error, rtol, atol, walk.y, y)
        curve = ode.interp_fit_dopri(walk.y, y, slopes, walk.h)
        accepted = _Walk(y, k, walk.now + walk.h, walk.now, curve, walk.h)
        walk = jax.tree.map(lambda new, old: jnp.where(ratio <= 1.0, new, old), accepted, walk)
        return walk._replace(h=ode.optimal_step_size(walk.h, ratio))

    def advance(walk: _Walk, target: Float[Array, ""]) -> tuple[_Walk, Array]:
        # A velocity that is not finite drives h to 0 or NaN, which ends the loop.
        walk = jax.lax.while_loop(lambda walk: (walk.now < target) & (walk.h > 0.0), attempt, walk)
        return walk, jnp.polyval(walk.curve, (target - walk.before) / (walk.now - walk.before))

    with jax.default_matmul_precision("highest"):
        k0 = field(y, times[0])
        root = math.sqrt(y.size)  # norm = root * root mean square
        h = ode.initial_step_size(field, times[0], y, 4, rtol * root, atol * root, k0)
        _, states = jax.lax.scan(advance, _Walk(y, k0, times[0], times[0], jnp.stack([y] * 5), h), times[1:])
    return jax.vmap(unravel)(jnp.concatenate([y[None], states]))
