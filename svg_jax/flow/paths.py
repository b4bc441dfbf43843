"""Probability paths between noise and data, and what follows from them.

A path mixes noise x0 (t = 0) and data x1 (t = 1) with two scalar functions of time,

    x_t = α(t) x1 + σ(t) x0,        α(0) = 0, α(1) = 1,  σ(0) = 1, σ(1) = 0,

and a network learns the velocity dx_t/dt. SiT (arXiv 2401.08740) studies the three paths below; it counts time the
other way round. SVG-T2I (arXiv 2512.11749) trains on the linear one. State and velocity are two linear equations in x0
and x1, which turn any of velocity, noise, data and score into any other; their determinant is the Wronskian

    W = α' σ - α σ'.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from svg_jax.flow.names import lookup
from svg_jax.flow.shapes import append_axes

Times = Float[Array, "*batch"]
State = Float[Array, "batch *rest"]


@dataclasses.dataclass(frozen=True)
class Path(abc.ABC):
    """x_t = α(t) x1 + σ(t) x0; a path defines the two coefficients and their derivatives.

    Coefficients take times of any shape and keep it. Methods on states take t as [batch] or scalar; coefficients are
    computed in the dtype of t and only then take the dtype of the states: bfloat16 states do not round the time.
    """

    @abc.abstractmethod
    def alpha(self, t: Times) -> Times:
        """The share of data."""

    @abc.abstractmethod
    def sigma(self, t: Times) -> Times:
        """The share of noise."""

    @abc.abstractmethod
    def d_alpha(self, t: Times) -> Times:
        """α'(t)."""

    @abc.abstractmethod
    def d_sigma(self, t: Times) -> Times:
        """σ'(t)."""

    def d_log_alpha(self, t: Times) -> Times:
        """α'(t) / α(t); infinite at t = 0 where α(0) = 0."""
        return self.d_alpha(t) / self.alpha(t)

    def wronskian(self, t: Times) -> Times:
        """W = α' σ - α σ'; positive."""
        return self.d_alpha(t) * self.sigma(t) - self.alpha(t) * self.d_sigma(t)

    def interpolate(self, t: Times, x0: State, x1: State) -> State:
        """x_t = α x1 + σ x0."""
        return _scale(self.alpha(t), x1) + _scale(self.sigma(t), x0)

    def target_velocity(self, t: Times, x0: State, x1: State) -> State:
        """u_t = dx_t/dt = α' x1 + σ' x0, the regression target (Flow Matching, arXiv 2210.02747)."""
        return _scale(self.d_alpha(t), x1) + _scale(self.d_sigma(t), x0)

    def noise_from_velocity(self, velocity: State, x: State, t: Times) -> State:
        """x0 = (α' x - α v) / W; on the linear path x - t v."""
        w = self.wronskian(t)
        return _scale(self.d_alpha(t) / w, x) - _scale(self.alpha(t) / w, velocity)

    def data_from_velocity(self, velocity: State, x: State, t: Times) -> State:
        """x1 = (σ v - σ' x) / W; on the linear path x + (1 - t) v."""
        w = self.wronskian(t)
        return _scale(self.sigma(t) / w, velocity) - _scale(self.d_sigma(t) / w, x)

    def score_from_velocity(self, velocity: State, x: State, t: Times) -> State:
        """Score ∇ log p_t(x) = -E[x0 | x_t] / σ = (α v - α' x) / (σ W) (SiT); infinite at t = 1."""
        return _scale(-1.0 / self.sigma(t), self.noise_from_velocity(velocity, x, t))

    def velocity_from_noise(self, noise: State, x: State, t: Times) -> State:
        """Velocity v = (α' x - W x0) / α; infinite at t = 0 where α(0) = 0."""
        return _scale(self.d_log_alpha(t), x) - _scale(self.wronskian(t) / self.alpha(t), noise)

    def velocity_from_score(self, score: State, x: State, t: Times) -> State:
        """Velocity v = -f + (g^2 / 2) score: the probability flow (arXiv 2011.13456) of `noising_sde`."""
        drift, variance = self.noising_sde(x, t)
        return _scale(variance, score) - drift

    def noising_sde(self, x: State, t: Times) -> tuple[State, Times]:
        """The diffusion dx = f ds + g dw that runs from data to noise in s = 1 - t and has this path's marginals.

        f = -(α' / α) x,      g^2 / 2 = (α' / α) σ^2 - σ σ' = σ W / α

        (SiT, arXiv 2401.08740; Song et al., arXiv 2011.13456). On Linear and GVP both are infinite at t = 0.

        Returns:
            The drift f, shaped as x, and g^2 / 2, shaped as t.
        """
        return _scale(-self.d_log_alpha(t), x), self.sigma(t) * self.wronskian(t) / self.alpha(t)

    def diffusion(self, t: Times, form: str = "SBDM", norm: float | Float[Array, ""] = 1.0) -> Times:
        """The freely chosen w(t) of the sampling SDE dx = (v + w score) dt + sqrt(2 w) dW, forward in t (SiT).

        The formulas stand in `DIFFUSION_FORMS`; `SBDM` is g^2 / 2 of `noising_sde`.

        Args:
            t: times.
            form: a name in `DIFFUSION_FORMS`, or the release's spelling `inccreasing-decreasing`.
            norm: the strength c.

        Raises:
            ValueError: unknown form.
        """
        return diffusion_form(form)(self, t, norm)


@dataclasses.dataclass(frozen=True)
class Linear(Path):
    """α = t, σ = 1 - t: the conditional optimal-transport path of Flow Matching (arXiv 2210.02747)."""

    def alpha(self, t: Times) -> Times:
        """α = t."""
        return t

    def sigma(self, t: Times) -> Times:
        """σ = 1 - t."""
        return 1.0 - t

    def d_alpha(self, t: Times) -> Times:
        """α' = 1."""
        return jnp.ones_like(t)

    def d_sigma(self, t: Times) -> Times:
        """σ' = -1."""
        return -jnp.ones_like(t)


@dataclasses.dataclass(frozen=True)
class GVP(Path):
    """α = sin(π t / 2), σ = cos(π t / 2): generalised variance preserving, α^2 + σ^2 = 1 (SiT)."""

    def alpha(self, t: Times) -> Times:
        """α = sin(π t / 2)."""
        return jnp.sin(0.5 * math.pi * t)

    def sigma(self, t: Times) -> Times:
        """σ = cos(π t / 2)."""
        return jnp.cos(0.5 * math.pi * t)

    def d_alpha(self, t: Times) -> Times:
        """α' = π/2 cos(π t / 2)."""
        return 0.5 * math.pi * jnp.cos(0.5 * math.pi * t)

    def d_sigma(self, t: Times) -> Times:
        """σ' = -π/2 sin(π t / 2)."""
        return -0.5 * math.pi * jnp.sin(0.5 * math.pi * t)


@dataclasses.dataclass(frozen=True)
class VP(Path):
    """The variance-preserving diffusion of Song et al. (arXiv 2011.13456) with linear β, in s = 1 - t.

    β(s) = β_min + s (β_max - β_min),      α = exp(-1/2 ∫_0^s β),      σ = sqrt(1 - α^2).

    α(0) is small but not zero. At t = 1, where σ = 0, σ' is infinite: keep away from it.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def log_alpha(self, t: Times) -> Times:
        """Exponent log α = -s^2 (β_max - β_min) / 4 - s β_min / 2 with s = 1 - t."""
        s = 1.0 - t
        return -0.25 * s**2 * (self.beta_max - self.beta_min) - 0.5 * s * self.beta_min

    def d_log_alpha(self, t: Times) -> Times:
        """(log α)' = β(1 - t) / 2."""
        return 0.5 * (self.beta_min + (1.0 - t) * (self.beta_max - self.beta_min))

    def alpha(self, t: Times) -> Times:
        """α = exp(log α)."""
        return jnp.exp(self.log_alpha(t))

    def sigma(self, t: Times) -> Times:
        """σ = sqrt(1 - α^2)."""
        # expm1 keeps the digits near data, where α is almost 1.
        return jnp.sqrt(-jnp.expm1(2.0 * self.log_alpha(t)))

    def d_alpha(self, t: Times) -> Times:
        """α' = α (log α)'."""
        return self.alpha(t) * self.d_log_alpha(t)

    def d_sigma(self, t: Times) -> Times:
        """σ' = -α α' / σ, from α^2 + σ^2 = 1."""
        return -self.alpha(t) * self.d_alpha(t) / self.sigma(t)


PATHS: dict[str, type[Path]] = {"Linear": Linear, "GVP": GVP, "VP": VP}


def path(name: str) -> Path:
    """The path of that name, with its default constants.

    Raises:
        ValueError: no path has that name.
    """
    return lookup("path", name, PATHS)()


# w(t) of `Path.diffusion` with c = norm: the choices of SiT (arXiv 2401.08740) and its code.
DIFFUSION_FORMS: dict[str, Callable[[Path, Times, float | Float[Array, ""]], Times]] = {
    "constant": lambda path, t, c: c * jnp.ones_like(t),
    "SBDM": lambda path, t, c: c * path.sigma(t) * path.wronskian(t) / path.alpha(t),
    "sigma": lambda path, t, c: c * path.sigma(t),
    "linear": lambda path, t, c: c * (1.0 - t),
    "decreasing": lambda path, t, c: 0.25 * (c * jnp.cos(math.pi * t) + 1.0) ** 2,
    "increasing-decreasing": lambda path, t, c: c * jnp.sin(math.pi * t) ** 2,
}
_RELEASE_SPELLING = {"inccreasing-decreasing": "increasing-decreasing"}


def diffusion_form(name: str) -> Callable[[Path, Times, float | Float[Array, ""]], Times]:
    """The formula of that name; the release's spelling is understood.

    Raises:
        ValueError: no form has that name.
    """
    return lookup("diffusion form", _RELEASE_SPELLING.get(name, name), DIFFUSION_FORMS)


def _scale(coefficient: Times, x: State) -> State:
    """coefficient(t) * x for times [batch] or scalar."""
    return append_axes(coefficient, x).astype(x.dtype) * x
