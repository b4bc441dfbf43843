"""DPM-Solver++ (arXiv 2211.01095) on the linear path.

With noise level s = 1 - t the path is x_s = (1 - s) x1 + s x0. The solver follows the predicted data

    D(x, s) = x + s v(x, 1 - s)

in half the log signal-to-noise ratio λ = log((1 - s) / s). From level s to s', with h = λ' - λ, the solution is

    x' = (s' / s) x + (1 - s') ∫_λ^λ' exp(u - λ') D du                                        (Proposition 4.1)

and D is taken as a polynomial in u. Its constant part has the weight 1 - s' / s, which needs no λ and so holds at level
0, where λ is infinite: of first order the solver is Euler's method. The derivatives h D' and h^2 D'' have the weights
(1 - s') φ2 and -(1 - s') φ3,

    φ1 = exp(-h) - 1,      φ2 = φ1 / h + 1,      φ3 = φ2 / h - 1/2.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from svg_jax.flow.shapes import Velocity
from svg_jax.flow.solvers.loop import Count, combine, even_grid, explicit_step, iterate
from svg_jax.flow.times import shift_times

State = Float[Array, "batch *rest"]
Scalar = Float[Array, ""]

FIRST_LEVEL = 0.999  # of the release's grid: at level 1 there is no signal and λ is infinite
# Where a singlestep method of each order looks inside a step, as shares of h; the paper's r1, r2.
FRACTIONS = {1: (0.0,), 2: (0.0, 1 / 2), 3: (0.0, 1 / 3, 2 / 3)}


def noise_levels(
    num_steps: Count, shift: float | Float[Array, ""] = 1.0, *, capacity: int | None = None
) -> Float[Array, " points"]:
    """`num_steps` + 1 levels evenly from 0.999 to exactly 0, shifted toward noise: the release's `time_uniform_flow`.

    Arguments are those of `time_grid`.

    Raises:
        ValueError: fewer than one step.
    """
    return 1.0 - shift_times(1.0 - FIRST_LEVEL * (1.0 - even_grid(num_steps, capacity)), shift)


def half_log_snr(level: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """λ = log((1 - s) / s), finite: levels 0 and 1 count as the nearest ones that float32 can tell from them."""
    level = jnp.clip(level, 1e-30, 1.0 - 2.0**-24)
    return jnp.log1p(-level) - jnp.log(level)


def level_of(half_log_snr: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """The inverse of `half_log_snr`, s = 1 / (1 + exp(λ)); the release has exp(-λ), close to it near data alone."""
    return 1.0 / (1.0 + jnp.exp(half_log_snr))


def predict_data(velocity: Velocity, x: State, level: Scalar) -> State:
    """D(x, s) = x + s v(x, 1 - s), float32; at the last level it is the release's `denoise_to_zero`."""
    predicted = velocity(x, jnp.full(x.shape[0], 1.0 - level)).astype(jnp.float32)
    return x.astype(jnp.float32) + level * predicted


def solve_dpm(
    velocity: Velocity,
    x: State,
    levels: Float[Array, " points"],
    *,
    order: int = 2,
    singlestep: bool = False,
    taylor: bool = False,
    num_steps: Count | None = None,
    trajectory: bool = False,
) -> State | Float[Array, "points batch *rest"]:
    """Carries x from levels[0] down to levels[-1].

    A multistep method evaluates once a step and remembers `order` - 1 predictions; the first and the last steps are of
    lower order (step i of n: at most i + 1 and n - i). A singlestep method evaluates `order` times a step and forgets;
    a step that ends at level 0 is of first order and one evaluation. (The release gives NaN for singlestep orders 2
    and 3.) One compilation whatever the number of steps, with the velocity traced once.

    Args:
        velocity: velocity(x, t) with t = 1 - level [batch] float32.
        x: the state at levels[0].
        levels: falling, e.g. `noise_levels(50, shift=10.0)`.
        order: 1, 2 or 3.
        singlestep: which of the two families.
        taylor: φ2 and φ3 as they stand above instead of the paper's simpler weights that agree to the same order.
        num_steps: how many of the intervals are taken; may be traced; None for all.
        trajectory: return the states at all levels, the start included, instead of the last one; those beyond
            `num_steps` are zero.

    Raises:
        ValueError: no such order.
    """
    if order not in FRACTIONS:
        raise ValueError(f"order of DPM-Solver++ is {order}: choose one of {', '.join(map(str, FRACTIONS))}")
    levels = levels.astype(jnp.float32)
    points = len(levels)
    count = points - 1 if num_steps is None else num_steps

    def data(x: State, level: Float[Array, " batch"]) -> State:
        return predict_data(velocity, x, level[0])

    def single(i: Int[Array, ""], x: State, _: None) -> tuple[State, None]:
        stages, keep, weights = _singlestep(levels[i], levels[i + 1], order, taylor)
        return explicit_step(data, x, stages, keep, weights, jnp.where(levels[i + 1] > 0, order, 1)), None

    def multi(i: Int[Array, ""], x: State, history: Float[Array, "order batch *rest"]) -> tuple[State, Array]:
        history = jnp.concatenate([predict_data(velocity, x, levels[i])[None], history[:-1]])
        used = jnp.minimum(order, jnp.minimum(i + 1, count - i))
        weights = _multistep(levels, i, taylor)[used - 1, :order]
        return combine(levels[i + 1] / levels[i], x, weights, history), history

    memory = None if singlestep else jnp.zeros((order, *x.shape), jnp.float32)
    return iterate(single if singlestep else multi, x, count, memory=memory, points=points if trajectory else None)


def _multistep(levels: Float[Array, " points"], i: Int[Array, ""], taylor: bool) -> Float[Array, "orders 3"]:
    """Weights of the last three predictions, newest first, in step i at orders 1, 2 and 3."""
    now, end = levels[i], levels[i + 1]
    before = [half_log_snr(levels[jnp.maximum(i - k, 0)]) for k in range(3)]
    h = half_log_snr(end) - before[0]
    # Steps that have not been taken count 1: the first two steps do not use them, but must not divide by 0.
    r0 = jnp.where(i >= 1, before[0] - before[1], 1.0) / h
    r1 = jnp.where(i >= 2, before[1] - before[2], 1.0) / h
    phi2, phi3 = _phi(h)

    newest, newer, older = jnp.eye(3, dtype=jnp.float32)
    slope = (newest - newer) / r0  # about h D' half a step back
    slope_before = (newer - older) / r1
    bend = (slope - slope_before) / (r0 + r1)  # about h^2 D'' / 2
    first = (1.0 - end / now) * newest
    second = first + ((1.0 - end) * phi2 if taylor else (1.0 - end / now) / 2) * slope
    # `bend` stands where h^2 D'' belongs, here as in the authors' code: the error falls with h^2, though it is smaller.
    third = first + (1.0 - end) * (phi2 * (slope + r0 * bend) - phi3 * bend)
    return jnp.stack([first, second, third])


def _singlestep(
    now: Scalar, end: Scalar, order: int, taylor: bool
) -> tuple[Float[Array, " order"], Float[Array, " order"], Float[Array, "order order"]]:
    """Levels of the evaluations, shares of x and weights of the predictions of a step as `explicit_step` takes them."""
    fractions, start = FRACTIONS[order], half_log_snr(now)
    h = half_log_snr(end) - start
    levels = [now, *(level_of(start + r * h) for r in fractions[1:])]
    # A step to level 0 ends after its first stage.
    targets = [jnp.where(end > 0, level, 0.0) for level in levels[1:]] + [end]
    keep = jnp.stack(targets) / now
    rows = list((1.0 - keep)[:, None] * jnp.eye(1, order, dtype=jnp.float32))
    phi2, phi3 = _phi(h)
    if order == 2:
        slope = jnp.asarray([-1.0, 1.0], jnp.float32) / fractions[1]  # about h D'
        rows[1] += ((1.0 - end) * phi2 if taylor else (1.0 - keep[1]) / 2) * slope
    if order == 3:
        _, r1, r2 = fractions
        near, far = jnp.asarray([[-1.0, 1.0, 0.0], [-1.0, 0.0, 1.0]], jnp.float32)
        slope, far = near / r1, far / r2
        rows[1] += (1.0 - targets[1]) * _phi(r2 * h)[0] * r2 * slope
        bend = 2.0 * (far - slope) / (r2 - r1)  # about h^2 D''
        rows[2] += (1.0 - end) * (phi2 * (slope - r1 / 2 * bend) - phi3 * bend if taylor else phi2 * far)
    return jnp.stack(levels), keep, jnp.stack(rows)


def _phi(h: Scalar) -> tuple[Scalar, Scalar]:
    """φ2 and φ3."""
    phi2 = jnp.expm1(-h) / h + 1.0
    return phi2, phi2 / h - 0.5
