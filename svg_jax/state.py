"""What training carries from step to step: parameters, their moving average, the optimiser's moments, a key."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Int, PRNGKeyArray

from svg_jax.nn.functional import Params
from svg_jax.parallel import replicated

SCHEDULES = ("constant", "linear", "cosine")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """`step` counts finished steps; the randomness of a step is `fold_in(key, step)`.

    `frozen` is what belongs to the model without a gradient, such as the encoder of an autoencoder. `skipped` counts
    the steps that changed nothing because they were not healthy: in all, and in a row up to now.
    """

    step: Int[Array, ""]
    params: Params
    ema: Params
    opt_state: optax.OptState
    key: PRNGKeyArray
    frozen: Params
    skipped: Int[Array, "2"]

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
        zero = jnp.zeros((), jnp.int32)
        return cls(zero, params, ema, optimiser.init(params), key, frozen or {}, jnp.zeros((2,), jnp.int32))

    def apply(
        self,
        grads: Params,
        optimiser: optax.GradientTransformation,
        ema_decay: float,
        *,
        healthy: Bool[Array, ""] | bool = True,
        frozen: Params | None = None,
    ) -> TrainState:
        """One update: p <- p + optimiser(grads); ema <- d ema + (1 - d) p.

        Unless it is `healthy`: then parameters, average and moments (the count of Adam's bias correction too) stay as
        they are, bit for bit, and only `step` goes on, so that the next step has other data and other randomness. So do
        the entries of `frozen` that have new values, such as running statistics.
        """
        healthy = jnp.asarray(healthy)
        with jax.numpy_dtype_promotion("standard"):  # Optax raises floats to the power of integer counts
            updates, opt_state = optimiser.update(grads, self.opt_state, self.params)
        params = optax.apply_updates(self.params, updates)
        # A select and not a branch: it fuses into the update, and costs no pass over memory of its own.
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(healthy, new, old), (params, opt_state), (self.params, self.opt_state)
        )
        ema = jax.tree.map(functools.partial(_averaged, decay=ema_decay, healthy=healthy), self.ema, params)
        total, in_a_row = self.skipped[0], self.skipped[1]
        skipped = jnp.where(healthy, jnp.stack([total, jnp.zeros_like(in_a_row)]), self.skipped + 1)
        new = {name: jnp.where(healthy, value, self.frozen[name]) for name, value in (frozen or {}).items()}
        return TrainState(self.step + 1, params, ema, opt_state, self.key, {**self.frozen, **new}, skipped)


def _averaged(old: Array, param: Array, *, decay: float, healthy: Bool[Array, ""]) -> Array:
    """The average after a step, in the memory where it was: from the host it comes to the device a layer at a time.

    All at once, the compiler would keep room on the device for all of it.
    """

    def mixed(old: Array, param: Array) -> Array:
        return jnp.where(healthy, decay * old + (1.0 - decay) * param, old)

    space = jax.typeof(old).memory_space
    if space == jax.memory.Space.Device:
        return mixed(old, param)

    def through_device(old: Array, param: Array) -> Array:
        return jax.device_put(mixed(jax.device_put(old, jax.memory.Space.Device), param), space)

    def layer(i: Array, average: Array) -> Array:
        piece = jax.lax.dynamic_index_in_dim(average, i, keepdims=False)
        piece = through_device(piece, jax.lax.dynamic_index_in_dim(param, i, keepdims=False))
        return jax.lax.dynamic_update_index_in_dim(average, piece, i, 0)

    stacked = old.ndim > 2  # the first axis is then that of the layers, or of a convolution's window: not sharded
    return jax.lax.fori_loop(0, len(old), layer, old) if stacked else through_device(old, param)


def on_device(params: Params) -> Params:
    """Parameters in the memory of their devices, where arithmetic happens; those already there stay as they are."""
    return jax.tree.map(lambda p: jax.device_put(p, jax.memory.Space.Device), params)


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
    schedule: optax.Schedule,
    *,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    clip: float,
    mu_dtype: str | None = None,
) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101) on gradients whose global norm is clipped.

    Args:
        schedule: Learning rate by update.
        b1: Decay of the first moment.
        b2: Decay of the second moment.
        eps: Added to the root of the second moment.
        weight_decay: Multiplied by the learning rate.
        clip: Largest global norm.
        mu_dtype: In which the first moment is kept, such as "bfloat16"; by default that of the parameters. The second
            one, with its range of squares and its slow decay, stays as the parameters are.
    """
    return optax.chain(
        optax.clip_by_global_norm(clip),
        optax.adamw(schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mu_dtype=mu_dtype),
    )


def state_shardings(
    state: TrainState,
    params: Mapping[str, NamedSharding],
    mesh: Mesh,
    *,
    ema_memory_kind: str | None = None,
) -> TrainState:
    """Where an (abstract) state lives: whatever has a parameter's name lives with it, the rest everywhere.

    Args:
        state: Shapes.
        params: Where each parameter lives.
        mesh: Of the devices.
        ema_memory_kind: "pinned_host" keeps the average in the memory of the hosts, sharded as the parameters are: 4
            bytes a parameter less on the devices, for sending it there and back each step, a layer at a time.
    """

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        at = params[names[-1]] if names and names[-1] in params and leaf.ndim else replicated(mesh)
        return at.with_memory_kind(ema_memory_kind) if ema_memory_kind and path[0].name == "ema" else at

    return jax.tree_util.tree_map_with_path(place, state)
