"""What is compiled: the training steps and the sampler, as pure functions of arrays.

Doors, benchmarks and ahead-of-time compilation jit the very functions made here, so that they run the same program.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from svg_jax.flow.guidance import guided
from svg_jax.flow.losses import batch_mean, loss_by_time, velocity_loss
from svg_jax.flow.paths import Path
from svg_jax.flow.solvers import solve_ode, time_grid
from svg_jax.flow.times import sample_times, times_from_draws
from svg_jax.models.autoencoder import Autoencoder, to_uint8
from svg_jax.models.gemma2 import Gemma2
from svg_jax.models.next_dit import NextDiT
from svg_jax.nn.functional import Network, Params
from svg_jax.nn.patches import token_mask, unpatchify
from svg_jax.state import TrainState

TIME_BINS = 10  # of the loss by timestep


class Batch(TypedDict):
    """A global batch on the devices; see `data_pipelines.batches` for what each array holds."""

    patches: UInt8[Array, "batch image_tokens pixels"]
    grid: Int[Array, "batch 2"]
    tokens: Int[Array, "batch text_tokens"]
    num_tokens: Int[Array, " batch"]


class Frozen(TypedDict):
    """Parameters that a text-to-image step reads and never changes."""

    autoencoder: Params
    text: Params


class Networks(NamedTuple):
    """The three networks of text to image."""

    dit: Network[NextDiT]
    autoencoder: Network[Autoencoder]
    text: Network[Gemma2]


Metrics = dict[str, Array]
TrainStep = Callable[[TrainState, Frozen, Batch], tuple[TrainState, Metrics]]


@dataclasses.dataclass(frozen=True)
class FlowObjective:
    """Which path, and at which times it is trained."""

    path: Path
    times: str = "lognorm"
    mu: float = 0.0
    shift: float = 1.0

    def __post_init__(self) -> None:
        times_from_draws(jnp.zeros(()), self.times, self.mu)  # an unknown distribution is said here, not when compiling


def text_to_image_step(
    networks: Networks,
    objective: FlowObjective,
    optimiser: optax.GradientTransformation,
    *,
    ema_decay: float,
    micro_batches: int = 1,
) -> TrainStep:
    """One update of the diffusion transformer: encode images and captions, match the velocity, AdamW, EMA.

    The batch is cut into `micro_batches` that run one after the other; the gradient is that of the mean over all
    samples that hold an image. Randomness is `fold_in(state.key, state.step)`.
    """

    def losses(params: Params, x1: Array, text: Array, batch: Batch, key: Key[Array, ""]) -> tuple[Array, Metrics]:
        mask = token_mask(batch["grid"], x1.shape[1])
        time_key, noise_key = jax.random.split(key)
        t = sample_times(time_key, x1.shape[0], objective.times, mu=objective.mu, shift=objective.shift)
        x0 = jax.random.normal(noise_key, x1.shape, x1.dtype)
        x_t = objective.path.interpolate(t, x0, x1)
        target = objective.path.target_velocity(t, x0, x1)
        velocity = networks.dit(params)(x_t, t, text, grid=batch["grid"], text_mask=text_mask(batch))
        losses, valid = velocity_loss(velocity, target, mask), mask.any(axis=1)
        sums, counts = loss_by_time(losses, t, valid, TIME_BINS)
        total = jnp.sum(jnp.where(valid, losses, 0.0))
        return total, {
            "loss": total,
            "valid": jnp.sum(valid, dtype=jnp.float32),
            "bin_sums": sums,
            "bin_counts": counts,
        }

    def gradients(params: Params, frozen: Frozen, batch: Batch, key: Key[Array, ""]) -> tuple[Params, Metrics]:
        x1 = networks.autoencoder(frozen["autoencoder"]).encode(batch["patches"], batch["grid"])
        text = networks.text(frozen["text"]).features(batch["tokens"], text_mask(batch))
        return jax.grad(losses, has_aux=True)(params, x1, text, batch, key)

    def step(state: TrainState, frozen: Frozen, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        grads, metrics = accumulate(
            lambda micro, key: gradients(state.params, frozen, micro, key), batch, key, micro_batches
        )
        scale = 1.0 / jnp.maximum(metrics["valid"], 1.0)
        grads = jax.tree.map(lambda g: g * scale, grads)
        by_time = metrics["bin_sums"] / metrics["bin_counts"]  # NaN where no time fell
        metrics = {"loss": metrics["loss"] * scale, "grad_norm": optax.tree.norm(grads), "loss_by_time": by_time}
        return state.apply(grads, optimiser, ema_decay), metrics

    return step


def autoencoder_step(
    network: Network[Autoencoder], optimiser: optax.GradientTransformation, *, ema_decay: float, grid: tuple[int, int]
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """One update of the decoder: mean absolute error between pixels in [-1, 1] and their reconstruction.

    `state.params` are the decoder's, `state.frozen` the encoder's and the latent statistics. Every image has `grid`
    (rows, cols); slots without an image enter no loss.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        pixels = target_pixels(batch["patches"], grid)
        features = features_2d(network, {**state.frozen, **state.params}, batch, grid)
        valid = batch["grid"][:, 0] > 0

        def loss(params: Params) -> Array:
            error = jnp.abs(network({**state.frozen, **params}).decoder(features) - pixels)
            return batch_mean(jnp.mean(error, axis=(1, 2, 3)), valid)

        value, grads = jax.value_and_grad(loss)(state.params)
        return state.apply(grads, optimiser, ema_decay), {"loss": value, "grad_norm": optax.tree.norm(grads)}

    return step


def reconstruct(
    network: Network[Autoencoder], params: Params, batch: Batch, grid: tuple[int, int]
) -> UInt8[Array, "batch h w 3"]:
    """What the decoder makes of the features of a batch of one grid."""
    return to_uint8(network(params).decoder(features_2d(network, params, batch, grid)))


def features_2d(
    network: Network[Autoencoder], params: Params, batch: Batch, grid: tuple[int, int]
) -> Float[Array, "batch rows cols channels"]:
    """Features of a batch of one grid, as the decoder reads them."""
    rows, cols = grid
    features = network(params).features(batch["patches"], batch["grid"])[:, : rows * cols]
    return features.reshape(features.shape[0], rows, cols, features.shape[-1])


def target_pixels(patches: UInt8[Array, "batch tokens pixels"], grid: tuple[int, int]) -> Float[Array, "batch h w 3"]:
    """The images of a batch of one grid, in [-1, 1]."""
    patch = round((patches.shape[-1] / 3) ** 0.5)
    rows, cols = grid
    return unpatchify(patches[:, : rows * cols], grid, patch).astype(jnp.float32) / 127.5 - 1.0


class Moments(NamedTuple):
    """How many features, their mean and their sum of squared deviations a channel."""

    num_tokens: Float[Array, ""]
    mean: Float[Array, " channels"]
    deviations: Float[Array, " channels"]

    @classmethod
    def zero(cls, channels: int) -> Moments:
        return cls(jnp.zeros(()), jnp.zeros((channels,)), jnp.zeros((channels,)))

    def std(self) -> Float[Array, " channels"]:
        return jnp.sqrt(self.deviations / jnp.maximum(self.num_tokens, 1.0))


def update_moments(network: Network[Autoencoder], params: Params, moments: Moments, batch: Batch) -> Moments:
    """Adds the features of a batch's valid tokens (Chan, Golub and LeVeque 1979, the pairwise form of Welford's)."""
    features = network(params).features(batch["patches"], batch["grid"])
    mask = token_mask(batch["grid"], features.shape[1])[..., None]
    count = jnp.sum(mask, dtype=jnp.float32)
    mean = jnp.sum(jnp.where(mask, features, 0.0), axis=(0, 1)) / jnp.maximum(count, 1.0)
    deviations = jnp.sum(jnp.where(mask, jnp.square(features - mean[None, None]), 0.0), axis=(0, 1))
    total = jnp.maximum(moments.num_tokens + count, 1.0)
    delta = mean - moments.mean
    return Moments(
        moments.num_tokens + count,
        moments.mean + delta * count / total,
        moments.deviations + deviations + jnp.square(delta) * moments.num_tokens * count / total,
    )


class Sampling(NamedTuple):
    """Numbers of a sampling run that may change without compiling anew."""

    guidance_scale: float | Array = 4.0
    renorm: float | Array = 1.0  # limit of the guided norm relative to the conditional one; 0 for none
    truncate: float | Array = 1.0  # first time without guidance
    shift: float | Array = 1.0  # of the time grid, toward noise


def sample_images(
    networks: Networks,
    params: Params,
    frozen: Frozen,
    tokens: Int[Array, "two_batch text_tokens"],
    num_tokens: Int[Array, " two_batch"],
    places: Int[Array, "batch 2"],
    key: Key[Array, ""],
    sampling: Sampling,
    *,
    grid: tuple[int, int],
    num_steps: int,
    method: str,
) -> UInt8[Array, "batch h w 3"]:
    """Pictures from prompts: noise -> guided ODE -> latents -> decoder.

    Args:
        networks: The three networks.
        params: Of the diffusion transformer.
        frozen: Of the others.
        tokens: Prompts, then as many negative prompts.
        num_tokens: Valid tokens of each.
        places: (place of its prompt, place among the samples of that prompt) of each picture.
        key: Of the run; a picture's noise is a function of this and of its place.
        sampling: Guidance and time shift.
        grid: (rows, cols) of the latents.
        num_steps: Steps of the solver.
        method: A solver of `flow.solvers`.
    """
    batch, length = places.shape[0], grid[0] * grid[1]
    mask = jnp.arange(tokens.shape[1])[None] < num_tokens[:, None]
    text = networks.text(frozen["text"]).features(tokens, mask)
    dit, autoencoder = networks.dit(params), networks.autoencoder(frozen["autoencoder"])
    channels = autoencoder.config.encoder.dim

    def noise(place: Int[Array, "2"]) -> Float[Array, "tokens channels"]:
        mine = jax.random.fold_in(jax.random.fold_in(key, place[0]), place[1])
        return jax.random.normal(mine, (length, channels), jnp.float32)

    grids = jnp.broadcast_to(jnp.asarray(grid, jnp.int32)[None], (2 * batch, 2))

    def both_halves(x: Array, t: Array) -> Array:
        return dit(x, t, text, grid=grids, text_mask=mask)

    velocity = guided(both_halves, sampling.guidance_scale, renorm=sampling.renorm, truncate=sampling.truncate)
    z = solve_ode(velocity, jax.vmap(noise)(places), time_grid(num_steps, sampling.shift), method)
    return to_uint8(autoencoder.decode(z, grid))


def text_mask(batch: Batch) -> Bool[Array, "batch text_tokens"]:
    """Which text tokens are valid."""
    return jnp.arange(batch["tokens"].shape[1])[None] < batch["num_tokens"][:, None]


def accumulate(
    function: Callable[[Batch, Key[Array, ""]], tuple[Params, Metrics]],
    batch: Batch,
    key: Key[Array, ""],
    parts: int,
) -> tuple[Params, Metrics]:
    """Sums `function` over `parts` of the batch, one after the other; each part takes rows from every device."""
    if parts == 1:
        return function(batch, key)

    def split(x: Array) -> Array:
        if x.shape[0] % parts:
            raise ValueError(f"a batch of {x.shape[0]} cannot be cut into {parts} micro-batches")
        return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)

    micro = jax.tree.map(split, batch)
    keys = jax.random.split(key, parts)
    shapes = jax.eval_shape(function, jax.tree.map(lambda x: x[0], micro), keys[0])
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def add(total: tuple[Params, Metrics], scanned: tuple[Batch, Array]) -> tuple[tuple[Params, Metrics], None]:
        return jax.tree.map(jnp.add, total, function(*scanned)), None

    return jax.lax.scan(add, zeros, (micro, keys))[0]
