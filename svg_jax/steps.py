"""What is compiled: text-to-image training and sampling, as pure functions of arrays.

Doors, benchmarks and ahead-of-time compilation jit the very functions made here, so that they run the same program.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, TypedDict, TypeVar

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from data_pipelines.records import Cause
from svg_jax.flow.guidance import guided
from svg_jax.flow.losses import loss_by_time, velocity_loss
from svg_jax.flow.paths import Path
from svg_jax.flow.shapes import Velocity
from svg_jax.flow.solvers import Solver, integrate
from svg_jax.flow.times import sample_times, times_from_draws
from svg_jax.models.autoencoder import Autoencoder, to_uint8
from svg_jax.models.gemma2 import Gemma2, greedy
from svg_jax.models.next_dit import NextDiT
from svg_jax.nn.functional import Network, Params
from svg_jax.nn.patches import token_mask
from svg_jax.nn.segments import segments_of
from svg_jax.state import TrainState

TIME_BINS = 10  # of the loss by timestep


class Batch(TypedDict):
    """A global batch on the devices; see `data_pipelines.batches` for what each array holds.

    Where captions share a row of `tokens`, their images share a sequence: `batch / rows` of them, one after another.
    """

    patches: UInt8[Array, "batch image_tokens pixels"]
    grid: Int[Array, "batch 2"]
    tokens: Int[Array, "rows text_tokens"]
    num_tokens: Int[Array, " batch"]
    cause: Int[Array, " batch"]


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

    The images are encoded all at once, so that statistics over the batch are of all of it. Then it is cut into
    `micro_batches` that run one after the other; the gradient is that of the mean over all samples that hold an image.
    Randomness is `fold_in(state.key, state.step)`.
    """

    def losses(params: Params, x1: Array, text: Array, batch: Batch, key: Key[Array, ""]) -> tuple[Array, Metrics]:
        mask = token_mask(batch["grid"], x1.shape[1])
        time_key, noise_key = jax.random.split(key)
        t = sample_times(time_key, x1.shape[0], objective.times, mu=objective.mu, shift=objective.shift)
        x0 = jax.random.normal(noise_key, x1.shape, x1.dtype)
        x_t = objective.path.interpolate(t, x0, x1)
        target = objective.path.target_velocity(t, x0, x1)
        which = {"text_segments": text_segments(batch)} if is_packed(batch) else {"text_mask": text_mask(batch)}
        velocity = networks.dit(params)(x_t, t, text, grid=batch["grid"], **which)
        losses, valid = velocity_loss(velocity, target, mask), mask.any(axis=1)
        sums, counts = loss_by_time(losses, t, valid, TIME_BINS)
        total = jnp.sum(jnp.where(valid, losses, 0.0))
        return total, {
            "loss": total,
            "valid": jnp.sum(valid, dtype=jnp.float32),
            "bin_sums": sums,
            "bin_counts": counts,
        }

    def gradients(
        params: Params, frozen: Frozen, part: tuple[Array, Batch], key: Key[Array, ""]
    ) -> tuple[Params, Metrics]:
        x1, batch = part
        language = networks.text(frozen["text"])
        if is_packed(batch):
            text = language.packed_features(batch["tokens"], text_segments(batch))
        else:
            text = language.features(batch["tokens"], text_mask(batch))
        return jax.grad(losses, has_aux=True)(params, x1, text, batch, key)

    def step(state: TrainState, frozen: Frozen, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        x1 = networks.autoencoder(frozen["autoencoder"]).encode(batch["patches"], batch["grid"])
        grads, metrics = accumulate(
            lambda part, key: gradients(state.params, frozen, part, key), (x1, batch), key, micro_batches
        )
        scale = 1.0 / jnp.maximum(metrics["valid"], 1.0)
        grads = jax.tree.map(lambda g: g * scale, grads)
        by_time = metrics["bin_sums"] / metrics["bin_counts"]  # NaN where no time fell
        state, health = update(state, grads, metrics["loss"] * scale, batch["cause"], optimiser, ema_decay)
        return state, {**health, "loss_by_time": by_time}

    return step


def update(
    state: TrainState,
    grads: Params,
    loss: Float[Array, ""],
    cause: Int[Array, " batch"],
    optimiser: optax.GradientTransformation,
    ema_decay: float,
    frozen: Params | None = None,
) -> tuple[TrainState, Metrics]:
    """Applies the gradient, unless it or the loss is not finite: then the step is skipped.

    `cause` says which slots of the batch hold no image, and why: 0, or 1 + the position in `records.Cause`. `frozen`
    are new values of what is kept without a gradient, such as running statistics. The metrics are what
    `svg_jax.guards` judges, over the global batch and so the same on every process. A finite norm says that every entry
    of the gradient is finite, and its square too; so no parameter, moment or average ever takes a value that is not.
    """
    norm = optax.tree.norm(grads)  # clipping asks for the same, and XLA computes it once
    healthy = jnp.isfinite(loss) & jnp.isfinite(norm)
    state = state.apply(grads, optimiser, ema_decay, healthy=healthy, frozen=frozen)
    return state, {
        "loss": loss,
        "grad_norm": norm,
        "skipped_steps": state.skipped[0],
        "skipped_in_a_row": state.skipped[1],
        "bad_records": count_causes(cause),
    }


def count_causes(cause: Int[Array, " batch"]) -> Int[Array, " causes"]:
    """How many slots of a global batch have each of `records.Cause`."""
    return jnp.sum(cause[:, None] == jnp.arange(1, len(Cause) + 1)[None], axis=0, dtype=jnp.int32)


class Sampling(NamedTuple):
    """Numbers of a sampling run that may change without compiling anew; the defaults are the released recipe."""

    num_steps: int | Array = 50
    guidance_scale: float | Array = 4.0
    renorm: float | Array = 1.0  # limit of the guided norm relative to the conditional one; 0 for none
    guidance_interval: tuple[float | Array, float | Array] = (0.0, 1.0)  # times [from, to) at which guidance acts
    shift: float | Array = 10.0  # of the time grid, toward noise


def encode_prompts(
    network: Network[Gemma2], params: Params, tokens: Int[Array, "batch length"], num_tokens: Int[Array, " batch"]
) -> Float[Array, "batch length dim"]:
    """Features of right-padded prompts; those of padding mean nothing."""
    return network(params).features(tokens, jnp.arange(tokens.shape[1])[None] < num_tokens[:, None])


def draw_latents(
    network: Network[NextDiT],
    params: Params,
    text: Float[Array, "texts text_tokens dim"],
    num_tokens: Int[Array, " texts"],
    places: Int[Array, "batch 2"],
    key: Key[Array, ""],
    sampling: Sampling,
    *,
    grid: tuple[int, int],
    solver: Solver,
    guide: bool = True,
) -> Float[Array, "batch tokens channels"]:
    """Noise -> guided flow -> normalised latents of one grid. One compilation whatever the numbers in `sampling`.

    Args:
        network: The diffusion transformer.
        params: Its parameters.
        text: Features of the prompts, then of as many negative prompts; of the prompts alone without guidance.
        num_tokens: Valid tokens of each.
        places: (place of its prompt, place among the samples of that prompt) of each picture.
        key: Of the run; a picture's noise is a function of this and of its place.
        sampling: Steps, guidance and time shift.
        grid: (rows, cols) of the latents.
        solver: What carries noise to data.
        guide: Whether the unconditional half is computed at all.
    """
    dit = network(params)
    mask = jnp.arange(text.shape[1])[None] < num_tokens[:, None]
    grids = jnp.broadcast_to(jnp.asarray(grid, jnp.int32)[None], (text.shape[0], 2))
    shape = (grid[0] * grid[1], dit.config.in_channels)

    def key_of(place: Int[Array, "2"]) -> Key[Array, ""]:
        return jax.random.fold_in(jax.random.fold_in(key, place[0]), place[1])

    def noise_of_step(step: Int[Array, ""]) -> Float[Array, "batch tokens channels"]:
        return jax.vmap(lambda place: jax.random.normal(jax.random.fold_in(key_of(place), step), shape))(places)

    def network_velocity(x: Array, t: Array) -> Array:
        return dit(x, t, text, grid=grids, text_mask=mask)

    velocity: Velocity = network_velocity
    if guide:
        velocity = guided(
            velocity, sampling.guidance_scale, renorm=sampling.renorm, interval=sampling.guidance_interval
        )
    x0 = jax.vmap(lambda place: jax.random.normal(key_of(place), shape))(places)
    return integrate(velocity, x0, solver, num_steps=sampling.num_steps, shift=sampling.shift, noise=noise_of_step)


def generate_text(
    network: Network[Gemma2],
    params: Params,
    tokens: Int[Array, "batch length"],
    num_tokens: Int[Array, " batch"],
    *,
    max_new_tokens: int,
    eos_id: int,
) -> tuple[Int[Array, "batch new"], Int[Array, " batch"]]:
    """What the language model goes on with, and how many tokens of it; see `models.gemma2.greedy`."""
    return greedy(network(params), tokens, num_tokens, max_new_tokens=max_new_tokens, eos_id=eos_id)


def encode_images(
    network: Network[Autoencoder],
    params: Params,
    patches: UInt8[Array, "batch tokens pixels"],
    grid: Int[Array, "batch 2"],
) -> Float[Array, "batch tokens channels"]:
    """Normalised latents of padded patches."""
    return network(params).encode(patches, grid)


def decode_latents(
    network: Network[Autoencoder],
    params: Params,
    z: Float[Array, "batch tokens channels"],
    *,
    grid: tuple[int, int],
    tile: int | None = None,
) -> UInt8[Array, "batch h w 3"]:
    """Normalised latents of one grid -> pictures; `tile` as for `Autoencoder.decode`."""
    return to_uint8(network(params).decode(z, grid, tile))


def text_mask(batch: Batch) -> Bool[Array, "batch text_tokens"]:
    """Which text tokens are valid."""
    return jnp.arange(batch["tokens"].shape[1])[None] < batch["num_tokens"][:, None]


def is_packed(batch: Batch) -> bool:
    """Whether several images share a sequence."""
    return batch["tokens"].shape[0] < batch["grid"].shape[0]


def text_segments(batch: Batch) -> Int[Array, "rows text_tokens"]:
    """Of which image of its row each text token is, see `nn.segments`."""
    rows, tokens = batch["tokens"].shape
    return segments_of(batch["num_tokens"].reshape(rows, -1), tokens)


Part = TypeVar("Part")


def accumulate(
    function: Callable[[Part, Key[Array, ""]], tuple[Params, Metrics]],
    batch: Part,
    key: Key[Array, ""],
    parts: int,
) -> tuple[Params, Metrics]:
    """Sums `function` over `parts` of the batch, one after the other; each part takes rows from every device.

    Row i of an array with fewer rows than others, of packed captions, goes with those of the others that belong to it.
    """
    if parts == 1:
        return function(batch, key)
    rows = min(x.shape[0] for x in jax.tree.leaves(batch))
    if rows % parts:
        raise ValueError(f"a batch of {rows} cannot be cut into {parts} micro-batches")

    def split(x: Array) -> Array:
        x = x.reshape(rows // parts, parts, x.shape[0] // rows, *x.shape[1:]).swapaxes(0, 1)
        return x.reshape(parts, -1, *x.shape[3:])

    micro = jax.tree.map(split, batch)
    keys = jax.random.split(key, parts)
    shapes = jax.eval_shape(function, jax.tree.map(lambda x: x[0], micro), keys[0])
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def add(total: tuple[Params, Metrics], scanned: tuple[Part, Array]) -> tuple[tuple[Params, Metrics], None]:
        return jax.tree.map(jnp.add, total, function(*scanned)), None

    return jax.lax.scan(add, zeros, (micro, keys))[0]
