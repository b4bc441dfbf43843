"""Our side: what `svg_jax.train` and the pipeline compile, given features instead of pixels and captions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from benchmarks import shape as settings
from benchmarks.shape import Shape
from svg_jax.flow.paths import path
from svg_jax.flow.solvers import Solver
from svg_jax.models.next_dit import NextDiT, NextDiTConfig
from svg_jax.nn.functional import Network, Params
from svg_jax.state import TrainState, adamw, learning_rate
from svg_jax.steps import FlowObjective, Networks, Sampling, draw_latents, text_to_image_step

VERSIONS = {"jax": jax.__version__}


class Given:
    """Stands where a frozen encoder does: what it is given are features already."""

    def __call__(self, params: Any) -> Given:
        return self

    def encode(self, features: Array, grid: Array) -> Array:
        return features

    def features(self, features: Array, mask: Array) -> Array:
        return features


def network(shape: Shape, **changes: Any) -> Network[NextDiT]:
    """Next-DiT at this shape."""
    return Network(lambda rngs: NextDiT(config_of(shape, **changes), rngs=rngs))


def config_of(shape: Shape, **changes: Any) -> NextDiTConfig:
    """The sizes as the network takes them."""
    return NextDiTConfig(
        in_channels=shape.in_channels,
        text_dim=shape.text_dim,
        dim=shape.dim,
        num_layers=shape.num_layers,
        num_refiner_layers=shape.num_refiner_layers,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        axes_dims=shape.axes_dims,
        dtype=shape.dtype,
        **changes,
    )


def jitted_step(shape: Shape, **changes: Any) -> tuple[Any, Callable[[Array], TrainState], Any]:
    """The compiled-on-first-call step, what makes its state from a key, and its (frozen parameters, batch).

    On a CPU to keep matrix products only is both faster and smaller than to keep everything.
    """
    dit = network(shape, **{"remat": "dots", **changes})
    optimiser = adamw(
        learning_rate(lr=settings.LEARNING_RATE, schedule="constant", warmup_steps=0, num_train_steps=1),
        b1=settings.BETAS[0],
        b2=settings.BETAS[1],
        eps=settings.EPS,
        weight_decay=settings.WEIGHT_DECAY,
        clip=settings.CLIP,
    )
    networks: Any = Networks(dit, Given(), Given())
    step = text_to_image_step(networks, FlowObjective(path("Linear")), optimiser, ema_decay=settings.EMA_DECAY)

    def create(key: Array) -> TrainState:
        return TrainState.create(dit.init(key), optimiser, key)

    image_key, text_key = jax.random.split(jax.random.key(1))
    batch = {
        "patches": jax.random.normal(image_key, (shape.batch, shape.image_tokens, shape.in_channels)),
        "grid": jnp.tile(jnp.array([[shape.rows, shape.cols]], jnp.int32), (shape.batch, 1)),
        "tokens": jax.random.normal(text_key, (shape.batch, shape.text_tokens, shape.text_dim)),
        "num_tokens": jnp.full((shape.batch,), shape.text_tokens, jnp.int32),
        "cause": jnp.zeros((shape.batch,), jnp.int32),
    }
    return jax.jit(step, donate_argnums=0), create, ({"autoencoder": {}, "text": {}}, batch)


def train_step(shape: Shape) -> tuple[Callable[[], Any], int]:
    """A function that makes one update, and the number of parameters."""
    step, create, inputs = jitted_step(shape)
    state = jax.jit(create)(jax.random.key(0))

    def update() -> None:
        nonlocal state
        state, metrics = step(state, *inputs)
        jax.block_until_ready((state, metrics))

    return update, sum(p.size for p in state.params.values())


def jitted_draw(shape: Shape, dit: Network[NextDiT]) -> Callable[[Params, Array, Array], Array]:
    """The sampler, compiled on its first call: (parameters, text of both halves, key) -> latents; picture i is the
    first sample of prompt i.
    """
    grid = (shape.rows, shape.cols)
    draw = jax.jit(functools.partial(draw_latents, dit, grid=grid, solver=Solver("euler")))
    num_tokens = jnp.full((2 * shape.batch,), shape.text_tokens, jnp.int32)
    places = jnp.stack([jnp.arange(shape.batch), jnp.zeros(shape.batch, jnp.int32)], axis=1)
    recipe = Sampling(num_steps=settings.NUM_STEPS, guidance_scale=settings.GUIDANCE_SCALE, shift=1.0)
    return lambda params, text, key: draw(params, text, num_tokens, places, key, recipe)


def sampling(shape: Shape) -> tuple[Callable[[], Any], int]:
    """A function that draws one batch of latents, and the number of parameters."""
    dit = network(shape)
    params = jax.jit(dit.init)(jax.random.key(0))
    draw = jitted_draw(shape, dit)
    text = jax.random.normal(jax.random.key(1), (2 * shape.batch, shape.text_tokens, shape.text_dim))
    return lambda: draw(params, text, jax.random.key(2)).block_until_ready(), sum(p.size for p in params.values())
