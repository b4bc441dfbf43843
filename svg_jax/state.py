"""What training carries from step to step: parameters, their moving average, the optimiser's moments, a key."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Int, PRNGKeyArray

from svg_jax.nn.functional import Params
from svg_jax.parallel import replicated

SCHEDULES = ("constant", "linear", "cosine")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """`step` counts finished updates; the randomness of a step is `fold_in(key, step)`.

    `frozen` is what belongs to the model without being trained, such as the encoder of an autoencoder.
    """

    step: Int[Array, ""]
    params: Params
    ema: Params
    opt_state: optax.OptState
    key: PRNGKeyArray
    frozen: Params

    @classmethod
    def create(
        cls,
        params: Params,
        optimiser: optax.GradientTransformation,
        key: PRNGKeyArray,
        frozen: Params | None = None,
    ) -> TrainState:
        """Before the first step; the average starts at the parameters."""
        ema = jax.tree.map(jnp.copy, params)
        return cls(jnp.zeros((), jnp.int32), params, ema, optimiser.init(params), key, frozen or {})

    def apply(self, grads: Params, optimiser: optax.GradientTransformation, ema_decay: float) -> TrainState:
        """One update: p <- p + optimiser(grads); ema <- d ema + (1 - d) p."""
        with jax.numpy_dtype_promotion("standard"):  # Optax raises floats to the power of integer counts
            updates, opt_state = optimiser.update(grads, self.opt_state, self.params)
        params = optax.apply_updates(self.params, updates)
        ema = jax.tree.map(lambda e, p: ema_decay * e + (1.0 - ema_decay) * p, self.ema, params)
        return TrainState(self.step + 1, params, ema, opt_state, self.key, self.frozen)


def learning_rate(*, lr: float, schedule: str, warmup_steps: int, num_train_steps: int) -> optax.Schedule:
    """Linear warm-up to `lr`, then constant, or linear or cosine decay to zero at the last step."""
    decay_steps = max(num_train_steps - warmup_steps, 1)
    after = {
        "constant": optax.constant_schedule(lr),
        "linear": optax.linear_schedule(lr, 0.0, decay_steps),
        "cosine": optax.cosine_decay_schedule(lr, decay_steps),
    }
    if schedule not in after:
        raise ValueError(f"unknown schedule '{schedule}': choose one of {', '.join(SCHEDULES)}")
    if warmup_steps == 0:
        return after[schedule]
    return optax.join_schedules([optax.linear_schedule(0.0, lr, warmup_steps), after[schedule]], [warmup_steps])


def adamw(
    schedule: optax.Schedule, *, b1: float, b2: float, eps: float, weight_decay: float, clip: float
) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101) on gradients whose global norm is clipped."""
    return optax.chain(
        optax.clip_by_global_norm(clip), optax.adamw(schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
    )


def state_shardings(state: TrainState, params: Mapping[str, NamedSharding], mesh: Mesh) -> TrainState:
    """Where an (abstract) state lives: whatever has a parameter's name lives with it, the rest everywhere."""

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        return params[names[-1]] if names and names[-1] in params and leaf.ndim else replicated(mesh)

    return jax.tree_util.tree_map_with_path(place, state)
