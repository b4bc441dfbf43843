"""Solvers of dx/dt = velocity(x, t): explicit Runge-Kutta methods on a fixed grid of times."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from svg_jax.flow.names import lookup
from svg_jax.flow.shapes import Velocity
from svg_jax.flow.times import shift_times


@dataclasses.dataclass(frozen=True)
class Tableau:
    """An explicit Runge-Kutta method (Hairer, Nørsett and Wanner, Solving Ordinary Differential Equations I, II.1).

    k_i = v(x + h Σ_{j<i} a_ij k_j, t + c_i h),      x ← x + h Σ_i b_i k_i

    `a` holds the rows below the diagonal, so the first is empty; c_i is the sum of row i.
    """

    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]


TABLEAUS: dict[str, Tableau] = {
    "euler": Tableau(a=((),), b=(1.0,)),
    "midpoint": Tableau(a=((), (1 / 2,)), b=(0.0, 1.0)),
}


def time_grid(num_steps: int, shift: float | Float[Array, ""] = 1.0) -> Float[Array, " points"]:
    """`num_steps` + 1 times from noise (0) to data (1), evenly spaced, then shifted toward noise by `shift_times`.

    The release counts points: its `num_steps` is ours plus one.

    Raises:
        ValueError: fewer than one step.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}: a grid of times needs at least 1 step")
    return shift_times(jnp.linspace(0.0, 1.0, num_steps + 1, dtype=jnp.float32), shift)


def solve_ode(
    velocity: Velocity,
    x: Float[Array, "batch *rest"],
    times: Float[Array, " points"],
    method: str = "euler",
    *,
    trajectory: bool = False,
) -> Float[Array, "batch *rest"] | Float[Array, "points batch *rest"]:
    """Carries x from times[0] to times[-1], one step an interval; the times may also fall (data to noise).

    One scan: the velocity is compiled once a stage, whatever the number of steps. The state is float32 whatever the
    dtype of x and of the velocity.

    Args:
        velocity: velocity(x, t) with t [batch] float32.
        x: the state at times[0].
        times: e.g. `time_grid(50, shift=6.0)`.
        method: a name in `TABLEAUS`.
        trajectory: return the states at all times, the start included, instead of the last one.

    Raises:
        ValueError: unknown method.
    """
    tableau = lookup("ODE solver", method, TABLEAUS)

    def step(
        x: Float[Array, "batch *rest"], interval: tuple[Float[Array, ""], Float[Array, ""]]
    ) -> tuple[Float[Array, "batch *rest"], Float[Array, "batch *rest"] | None]:
        t, h = interval
        slopes: list[Array] = []
        for row in tableau.a:
            stage = jnp.full(x.shape[:1], t + sum(row) * h)
            slopes.append(velocity(_advance(x, h, row, slopes), stage).astype(jnp.float32))
        x = _advance(x, h, tableau.b, slopes)
        return x, (x if trajectory else None)

    x, times = x.astype(jnp.float32), times.astype(jnp.float32)
    last, states = jax.lax.scan(step, x, (times[:-1], jnp.diff(times)))
    return last if states is None else jnp.concatenate([x[None], states])


def _advance(x: Array, h: Array, weights: tuple[float, ...], slopes: list[Array]) -> Array:
    """Moves x to x + h Σ_i w_i k_i."""
    for weight, slope in zip(weights, slopes, strict=True):
        if weight:
            x = x + (weight * h) * slope
    return x
