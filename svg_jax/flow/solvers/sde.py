"""Solvers of the sampling SDE of SiT (arXiv 2401.08740), forward in t from noise to data.

    dx = (v + w ∇ log p_t) dt + sqrt(2 w) dW

Any w(t) ≥ 0 has the marginals of the flow; `Path.diffusion` lists the forms. The score comes from the velocity.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from svg_jax.flow.names import lookup
from svg_jax.flow.paths import VP, Linear, Path
from svg_jax.flow.shapes import Velocity, append_axes
from svg_jax.flow.solvers.loop import Count, iterate
from svg_jax.flow.solvers.ode import TABLEAUS

State = Float[Array, "batch *rest"]
Scalar = float | Float[Array, ""]

# The Runge-Kutta method that takes the drift of a step.
SDE_METHODS = {"euler": TABLEAUS["euler"], "heun": TABLEAUS["heun2"]}

# From (x, v, drift, t, size, path) at the end of the SDE to data.
LAST_STEPS: dict[str, Callable[[State, State, State, Float[Array, ""], Scalar, Path], State]] = {
    "Mean": lambda x, v, drift, t, size, path: x + size * drift,  # a step of the SDE without its noise
    "Tweedie": lambda x, v, drift, t, size, path: path.data_from_velocity(v, x, t),  # E[x1 | x]
    "Euler": lambda x, v, drift, t, size, path: x + size * v,  # a step of the flow
}


def sde_interval(
    path: Path, diffusion_form: str, last_step: str | None, last_step_size: float = 0.04, eps: float = 1e-3
) -> tuple[float, float]:
    """First and last time of the SDE, before its last step.

    It ends one last step short of data, or `eps` short without one: there the score is infinite. It starts at 0, but
    for `SBDM` at `eps` on the paths that hold no data at t = 0, on which that w is infinite.
    """
    start = eps if diffusion_form == "SBDM" and not isinstance(path, VP) else 0.0
    return start, 1.0 - (eps if last_step is None else last_step_size)


def solve_sde(
    velocity: Velocity,
    x: State,
    times: Float[Array, " points"],
    noise: Callable[[Int[Array, ""]], State],
    *,
    method: str = "euler",
    path: Path | None = None,
    diffusion_form: str = "sigma",
    diffusion_norm: Scalar = 1.0,
    last_step: str | None = "Mean",
    last_step_size: Scalar = 0.04,
    num_steps: Count | None = None,
    trajectory: bool = False,
) -> State | Float[Array, "states batch *rest"]:
    """Carries x from times[0] to times[-1], one step an interval, then takes the last step.

        euler    x ← x + h f(x, t) + sqrt(2 w h) ξ_i      (Euler-Maruyama)
        heun     x̂ = x + sqrt(2 w h) ξ_i,      x ← x̂ + h/2 (f(x̂, t) + f(x̂ + h f(x̂, t), t + h))

    with f = v + w ∇ log p_t and w = w(t). One compilation whatever the number of steps, the velocity traced once, and
    once more for the last step. (The release counts points, one more than steps; it takes the Tweedie step of the first
    sample for all.)

    Args:
        velocity: velocity(x, t) with t [batch] float32.
        x: the state at times[0].
        times: rising, within `sde_interval`.
        noise: noise(i) is the standard normal draw of step i, shaped as x. A function, so that what a sample gets need
            not depend on its batch.
        method: a name in `SDE_METHODS`.
        path: of the flow; None for `Linear`.
        diffusion_form: of w, a name in `DIFFUSION_FORMS`.
        diffusion_norm: its strength.
        last_step: a name in `LAST_STEPS`, or None.
        last_step_size: what times[-1] leaves to data; `Tweedie` does not ask.
        num_steps: how many of the intervals are taken; may be traced; None for all. Times beyond have to repeat the
            last.
        trajectory: return all states, the start and the last step included, instead of the last one; those beyond
            `num_steps` are zero.

    Raises:
        ValueError: unknown method, form or last step.
    """
    tableau = lookup("SDE solver", method, SDE_METHODS)
    finish = None if last_step is None else lookup("last step", last_step, LAST_STEPS)
    path = Linear() if path is None else path
    times, points = times.astype(jnp.float32), len(times)

    def diffusion(t: Float[Array, "*n"]) -> Float[Array, "*n"]:
        return path.diffusion(t, diffusion_form, diffusion_norm)

    def terms(x: State, t: Float[Array, " batch"]) -> tuple[State, State]:
        """Velocity and drift."""
        v = velocity(x, t).astype(jnp.float32)
        return v, v + append_axes(diffusion(t), x) * path.score_from_velocity(v, x, t)

    def step(i: Int[Array, ""], x: State, _: None) -> tuple[State, None]:
        t, h = times[i], times[i + 1] - times[i]
        kick = jnp.sqrt(2.0 * diffusion(t) * h) * noise(i).astype(jnp.float32)
        if method == "heun":
            return tableau.step(lambda x, t: terms(x, t)[1], x + kick, t, h), None
        return tableau.step(lambda x, t: terms(x, t)[1], x, t, h) + kick, None

    count = points - 1 if num_steps is None else num_steps
    states = iterate(step, x, count, points=points if trajectory else None)
    if finish is None:
        return states
    x = states[count] if trajectory else states
    last = finish(x, *terms(x, jnp.full(x.shape[0], times[-1])), times[-1], last_step_size, path)
    return jnp.concatenate([states, last[None]]) if trajectory else last
