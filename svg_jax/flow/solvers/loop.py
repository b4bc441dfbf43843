"""What all solvers share: an even grid, the loop over steps, and the loop over the stages of one explicit step.

The velocity is a network of billions of parameters, so it is traced once whatever the method and the number of steps:
both loops are `lax.fori_loop`s, and a step's stages are rows of arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from svg_jax.flow.shapes import append_axes

State: TypeAlias = Any  # an array [batch, ...] or a tree of them
Count = int | Int[Array, ""]
# field(x, t): a state and its times [batch] to something shaped as the state.
Field = Callable[[State, Float[Array, " batch"]], State]


def even_grid(num_steps: Count, capacity: int | None = None) -> Float[Array, " points"]:
    """min(i / num_steps, 1) for i = 0 … capacity.

    Args:
        num_steps: may be traced if `capacity` is given.
        capacity: the length is this plus one, so that it does not depend on `num_steps`; None for `num_steps` itself.

    Raises:
        ValueError: fewer than one step.
    """
    if isinstance(num_steps, int) and num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}: a grid of times needs at least 1 step")
    points = (int(num_steps) if capacity is None else capacity) + 1
    return jnp.minimum(jnp.arange(points, dtype=jnp.float32) / jnp.asarray(num_steps, jnp.float32), 1.0)


def iterate(
    step: Callable[[Int[Array, ""], Any, Any], tuple[Any, Any]],
    x: State,
    num_steps: Count,
    *,
    memory: Any = None,
    points: int | None = None,
) -> State:
    """Runs `x, memory = step(i, x, memory)` for i < num_steps on a float32 state.

    With a Python int it is differentiable in both modes; a traced number of steps leaves only forward mode.

    Args:
        step: one step of a solver.
        x: the state before the first step.
        num_steps: how many.
        memory: what a step hands to the next one besides the state.
        points: None for the last state; else a buffer of so many points, of which those up to `num_steps` are filled,
            the start first.
    """
    x = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), x)
    states = None
    if points is not None:
        states = jax.tree.map(lambda leaf: jnp.zeros((points, *leaf.shape), leaf.dtype).at[0].set(leaf), x)

    def body(i: Int[Array, ""], carry: Any) -> Any:
        x, memory, states = carry
        x, memory = step(i, x, memory)
        if states is not None:
            states = jax.tree.map(lambda buffer, leaf: buffer.at[i + 1].set(leaf), states, x)
        return x, memory, states

    x, _, states = jax.lax.fori_loop(0, num_steps, body, (x, memory, states))
    return x if states is None else states


def explicit_step(
    field: Field,
    x: State,
    times: Float[Array, " stages"],
    keep: Float[Array, " stages"],
    weights: Float[Array, "stages stages"],
    num_stages: Count | None = None,
) -> State:
    """One step of an explicit one-step method, given as arrays.

        y_0 = x,      k_j = field(y_j, times_j),      y_{j+1} = keep_j x + Σ_{i≤j} weights_ji k_i

    Args:
        field: what is evaluated.
        x: the state.
        times: when, one a stage.
        keep: share of x in each stage's result.
        weights: shares of the evaluations in it; zero above the diagonal.
        num_stages: how many rows are used, None for all; may be traced.

    Returns:
        The result of the last stage.
    """
    batch = jax.tree.leaves(x)[0].shape[0]

    def stage(j: Int[Array, ""], carry: Any) -> Any:
        y, slopes = carry
        slope = field(y, jnp.full(batch, times[j]))
        slopes = jax.tree.map(lambda buffer, leaf: buffer.at[j].set(leaf.astype(jnp.float32)), slopes, slope)
        return jax.tree.map(lambda leaf, buffer: combine(keep[j], leaf, weights[j], buffer), x, slopes), slopes

    slopes = jax.tree.map(lambda leaf: jnp.zeros((len(times), *leaf.shape), leaf.dtype), x)
    y, _ = jax.lax.fori_loop(0, len(times) if num_stages is None else num_stages, stage, (x, slopes))
    return y


def combine(
    keep: Float[Array, ""], x: Float[Array, "*shape"], weights: Float[Array, " terms"], terms: Float[Array, "terms ..."]
) -> Float[Array, "*shape"]:
    """keep x + Σ_i weights_i terms_i."""
    # A sum of products and not a dot: matrix units would round float32 to bfloat16.
    return keep * x + jnp.sum(append_axes(weights, terms) * terms, axis=0)
