"""How likely data is under a flow: the instantaneous change of variables (arXiv 1810.01367, arXiv 2011.13456, 4.3).

Along a solution of dx/dt = v(x, t) the log density changes by d log p_t(x_t) / dt = -div v(x_t, t), so that

    log p_1(x_1) = log N(x_0; 0, I) - ∫_0^1 div v(x_t, t) dt.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from svg_jax.flow.shapes import Velocity, append_axes
from svg_jax.flow.solvers.ode import solve_ode

State = Float[Array, "batch *rest"]


def rademacher_probes(
    keys: Key[Array, " batch"], like: State, num_probes: int = 1
) -> Float[Array, "probes batch *rest"]:
    """Signs ε with E[ε εᵀ] = I, each sample's from its own key: they do not depend on the batch."""
    draws = jax.vmap(lambda key: jax.random.rademacher(key, (num_probes, *like.shape[1:]), jnp.float32))(keys)
    return jnp.swapaxes(draws, 0, 1)


def basis_probes(like: State) -> Float[Array, "dims batch *rest"]:
    """The unit vectors of one sample's space, the same for each: with them the divergence is exact."""
    rest = like.shape[1:]
    vectors = jnp.eye(math.prod(rest), dtype=jnp.float32).reshape(-1, 1, *rest)
    return jnp.broadcast_to(vectors, (len(vectors), *like.shape))


def log_likelihood(
    velocity: Velocity,
    x1: State,
    times: Float[Array, " points"],
    keys: Key[Array, " batch"] | None = None,
    *,
    num_probes: int = 1,
    method: str = "rk4",
    mask: Bool[Array, "batch tokens"] | None = None,
) -> Float[Array, " batch"]:
    """The log density, in nats, of each sample under the flow that carries standard normal noise along `velocity`.

    The divergence is Hutchinson's estimate, the mean of εᵀ (∂v/∂x) ε over probes that stay the same during the
    integration: without bias, and one backward pass each. Without keys it is exact, at one backward
    pass a dimension: for a few dimensions only.

    Args:
        velocity: velocity(x, t); samples must not see one another.
        x1: data.
        times: from data to noise, e.g. `time_grid(50, reverse=True)`.
        keys: one a sample, for the probes; None for the exact divergence.
        num_probes: how many probes a sample.
        method: a name in `ODE_METHODS`.
        mask: the valid tokens, None if all are; what the others hold does not count.
    """
    probes = basis_probes(x1) if keys is None else rademacher_probes(keys, x1, num_probes)
    valid = jnp.ones(x1.shape, bool) if mask is None else jnp.broadcast_to(append_axes(mask, x1), x1.shape)
    probes = jnp.where(valid[None], probes, 0.0)
    # Unit vectors add up to the trace, random probes average to it.
    share = 1.0 if keys is None else 1.0 / num_probes

    def slope(state: tuple[State, Array], t: Float[Array, " batch"]) -> tuple[State, Float[Array, " batch"]]:
        def field(x: State) -> State:
            return jnp.where(valid, velocity(x, t).astype(jnp.float32), 0.0)

        def along(probe: State) -> tuple[State, Float[Array, " batch"]]:
            v, pull_back = jax.vjp(field, state[0])  # fused attention can be differentiated in this direction only
            (derivative,) = pull_back(probe)
            return v, _sum(probe * derivative)

        velocities, divergences = jax.lax.map(along, probes)
        return velocities[0], -share * jnp.sum(divergences, axis=0)

    x0, gained = solve_ode(slope, (x1, jnp.zeros(x1.shape[0], jnp.float32)), times, method)
    prior = -0.5 * _sum(jnp.where(valid, x0**2 + math.log(2.0 * math.pi), 0.0))
    return prior - gained  # the gain from data to noise


def bits_per_dimension(
    log_likelihood: Float[Array, " batch"], num_dimensions: int | Float[Array, " batch"]
) -> Float[Array, " batch"]:
    """-log2 p / D with D values (valid tokens times channels) a sample; of densities, so it may be negative."""
    return -log_likelihood / (math.log(2.0) * num_dimensions)


def _sum(x: State) -> Float[Array, " batch"]:
    return jnp.sum(x, axis=tuple(range(1, x.ndim)))
