"""From noise to data along a velocity: every solver by name (`SOLVERS`), chosen by a `Solver`, run by `integrate`.

    loop         the loops that all share
    ode          Runge-Kutta methods, adaptive Dormand-Prince; both directions
    dpm          DPM-Solver++, multistep and singlestep
    sde          Euler-Maruyama and Heun for the SDE with the same marginals
    likelihood   the log density of data

One compilation whatever the number of steps and the time shift.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Literal

from jaxtyping import Array, Float, Int

from svg_jax.flow.names import lookup
from svg_jax.flow.paths import Linear, Path, diffusion_form
from svg_jax.flow.shapes import Velocity
from svg_jax.flow.solvers.dpm import noise_levels, predict_data, solve_dpm
from svg_jax.flow.solvers.likelihood import bits_per_dimension, log_likelihood
from svg_jax.flow.solvers.loop import Count
from svg_jax.flow.solvers.ode import ODE_METHODS, TABLEAUS, Tableau, solve_ode, time_grid
from svg_jax.flow.solvers.sde import LAST_STEPS, SDE_METHODS, sde_interval, solve_sde

__all__ = [
    "LAST_STEPS",
    "MAX_STEPS",
    "ODE_METHODS",
    "SDE_METHODS",
    "SOLVERS",
    "TABLEAUS",
    "Method",
    "Solver",
    "Tableau",
    "bits_per_dimension",
    "check_num_steps",
    "integrate",
    "log_likelihood",
    "noise_levels",
    "predict_data",
    "sde_interval",
    "solve_dpm",
    "solve_ode",
    "solve_sde",
    "time_grid",
]

MAX_STEPS = 1000  # the most steps that a traced number may ask of `integrate`


@dataclasses.dataclass(frozen=True)
class Method:
    """What a solver is, for tables and help texts, and which function runs it."""

    description: str
    reference: str
    evaluations: int | None  # of the velocity a step; None where the solver chooses its own steps
    family: Literal["ode", "dpm", "sde"]
    order: int
    singlestep: bool = False


_HAIRER = "Hairer, Nørsett, Wanner, Solving Ordinary Differential Equations I, "
_DPM = "Lu et al., arXiv 2211.01095"
_SIT = "Ma et al., SiT, arXiv 2401.08740"

SOLVERS: dict[str, Method] = {
    "euler": Method("Euler's method", _HAIRER + "I.7", 1, "ode", 1),
    "midpoint": Method("explicit midpoint rule", _HAIRER + "II.1", 2, "ode", 2),
    "heun2": Method("Heun's method, the explicit trapezoidal rule", _HAIRER + "II.1", 2, "ode", 2),
    "heun3": Method("Heun's third-order method", _HAIRER + "II.1", 3, "ode", 3),
    "rk4": Method("Kutta's 3/8 rule, fourth order", _HAIRER + "II.1", 4, "ode", 4),
    "dopri5": Method("Dormand-Prince, steps chosen by rtol and atol", _HAIRER + "II.4-II.5", None, "ode", 5),
    "dpm++1": Method("DPM-Solver++ of first order, equal to euler on its own grid", _DPM, 1, "dpm", 1),
    "dpm++2m": Method("DPM-Solver++(2M), multistep: the released recipe", _DPM + ", algorithm 2", 1, "dpm", 2),
    "dpm++3m": Method("DPM-Solver++ of third order, multistep", _DPM, 1, "dpm", 3),
    "dpm++2s": Method("DPM-Solver++(2S), singlestep", _DPM + ", algorithm 1", 2, "dpm", 2, True),
    "dpm++3s": Method("DPM-Solver++ of third order, singlestep", _DPM, 3, "dpm", 3, True),
    "sde_euler": Method("Euler-Maruyama on the sampling SDE, then a last step", _SIT, 1, "sde", 1),
    "sde_heun": Method("stochastic Heun on the sampling SDE, then a last step", _SIT, 2, "sde", 2),
}


@dataclasses.dataclass(frozen=True)
class Solver:
    """A solver and its options, all of them compiled in; those of other families are ignored.

    Raises:
        ValueError: a name that does not exist, or a number out of range.
    """

    name: str = "dpm++2m"
    diffusion_form: str = "sigma"  # of the SDE: a name in `paths.DIFFUSION_FORMS`
    diffusion_norm: float = 1.0
    last_step: str | None = "Mean"  # of the SDE: a name in `LAST_STEPS`, or None
    last_step_size: float = 0.04
    rtol: float = 1e-3  # of dopri5
    atol: float = 1e-6

    def __post_init__(self) -> None:
        lookup("solver", self.name, SOLVERS)
        diffusion_form(self.diffusion_form)
        if self.last_step is not None:
            lookup("last step", self.last_step, LAST_STEPS)
        if not 0.0 < self.last_step_size < 1.0:
            raise ValueError(f"last_step_size is {self.last_step_size:g}: it is a time between 0 and 1, e.g. 0.04")
        for field in ("diffusion_norm", "rtol", "atol"):
            value = getattr(self, field)
            if not (math.isfinite(value) and value > 0.0):
                raise ValueError(f"{field} of a solver is {value:g}: it must be positive and finite")

    @property
    def method(self) -> Method:
        """Its entry in `SOLVERS`."""
        return SOLVERS[self.name]


def check_num_steps(num_steps: int) -> None:
    """Refuses what `integrate` cannot do, while the number is still known.

    Raises:
        ValueError: not within 1 and `MAX_STEPS`.
    """
    if not 1 <= num_steps <= MAX_STEPS:
        raise ValueError(f"num_steps is {num_steps}: choose from 1 to {MAX_STEPS} steps")


def integrate(
    velocity: Velocity,
    x: Float[Array, "batch *rest"],
    solver: Solver,
    *,
    num_steps: Count,
    shift: float | Float[Array, ""] = 1.0,
    noise: Callable[[Int[Array, ""]], Float[Array, "batch *rest"]] | None = None,
    path: Path | None = None,
) -> Float[Array, "batch *rest"]:
    """Carries noise x to data along velocity(x, t).

    One compilation for all traced `num_steps` and `shift`. The number counts steps, whatever the solver: for ODE and
    SDE the release counts points, one more. The last step of an SDE comes on top. `dopri5` finds its own steps, and
    neither number changes what it returns.

    Args:
        velocity: takes t [batch] float32.
        x: standard normal noise.
        solver: which, and its options.
        num_steps: from 1 to `MAX_STEPS`; of a traced one only `check_num_steps` before can make sure.
        shift: of the time grid toward noise; may be traced.
        noise: noise(i), the standard normal draw of step i; only an SDE needs it.
        path: that the velocity was trained on; None for `Linear`.

    Returns:
        Data, float32.

    Raises:
        ValueError: too few or too many steps, an SDE without noise, or DPM-Solver++ on a path that is not linear.
    """
    capacity: int | None = MAX_STEPS
    if isinstance(num_steps, int):
        check_num_steps(num_steps)
        capacity = None
    path, method = Linear() if path is None else path, solver.method
    if method.family == "ode":
        times = time_grid(num_steps, shift, capacity=capacity)
        return solve_ode(velocity, x, times, solver.name, num_steps=num_steps, rtol=solver.rtol, atol=solver.atol)
    if method.family == "dpm":
        if not isinstance(path, Linear):
            raise ValueError(f"solver '{solver.name}' is for the path Linear, not {type(path).__name__}: choose an ODE")
        levels = noise_levels(num_steps, shift, capacity=capacity)
        return solve_dpm(velocity, x, levels, order=method.order, singlestep=method.singlestep, num_steps=num_steps)
    if noise is None:
        raise ValueError(f"solver '{solver.name}' adds noise in every step: pass noise, a function of the step")
    start, end = sde_interval(path, solver.diffusion_form, solver.last_step, solver.last_step_size)
    return solve_sde(
        velocity,
        x,
        start + (end - start) * time_grid(num_steps, shift, capacity=capacity),
        noise,
        method=solver.name.removeprefix("sde_"),
        path=path,
        diffusion_form=solver.diffusion_form,
        diffusion_norm=solver.diffusion_norm,
        last_step=solver.last_step,
        last_step_size=solver.last_step_size,
        num_steps=num_steps,
    )
