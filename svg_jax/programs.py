"""What a config and a mesh make of the functions in `steps`: one jitted program each, and the arrays it takes.

Nothing is allocated here. Training jits exactly these, and `svg_jax.aot` compiles them for chips that are not there.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jaxtyping import PyTree
from ml_collections import ConfigDict

from data_pipelines.images import token_budget
from svg_jax import assemble, loading
from svg_jax.adversarial import LossConfig
from svg_jax.autoencoder_steps import AutoencoderNetworks, autoencoder_step, is_trained_in_run
from svg_jax.chips import compiler_options
from svg_jax.config import from_config
from svg_jax.flow.paths import path
from svg_jax.flow.solvers import Solver
from svg_jax.flow.times import resolution_shift
from svg_jax.models import flops
from svg_jax.models.autoencoder import AutoencoderConfig
from svg_jax.models.gemma2 import Gemma2Config
from svg_jax.models.next_dit import NextDiTConfig
from svg_jax.nn.functional import Network, Params
from svg_jax.parallel import batch_multiple, batch_sharding, replicated, shardings_of
from svg_jax.state import TrainState
from svg_jax.steps import (
    FlowObjective,
    Frozen,
    Networks,
    Sampling,
    decode_latents,
    draw_latents,
    encode_prompts,
    text_to_image_step,
)

Trained = TypeVar("Trained", Networks, AutoencoderNetworks)


@dataclasses.dataclass(frozen=True)
class Program:
    """A function and the abstract arrays, with shardings, that it takes and gives."""

    function: Callable[..., Any]
    arguments: tuple[PyTree, ...]
    out_shardings: PyTree
    images: int  # a call
    tokens: int  # a call, of image and text
    flops: float  # a call: of the model, forward and backward, without recomputation
    donates: bool = True  # the first argument
    compiler_options: dict[str, Any] = dataclasses.field(default_factory=dict)  # of these chips

    def jit(self, function: Callable[..., Any] | None = None) -> Any:
        """The function, or one that wraps it, jitted; call and lower it under `jax.set_mesh`."""
        return jax.jit(
            function or self.function,
            in_shardings=shardings_of(self.arguments),
            out_shardings=self.out_shardings,
            donate_argnums=0 if self.donates else (),
            compiler_options=self.compiler_options or None,
        )


@dataclasses.dataclass(frozen=True)
class Training(Program, Generic[Trained]):
    """The program of a training run, and what makes its first state."""

    networks: Trained = dataclasses.field(kw_only=True)
    create: Callable[[Params], TrainState] = dataclasses.field(kw_only=True)

    @property
    def state(self) -> TrainState:
        """The abstract train state."""
        return self.arguments[0]


def train_program(config: ConfigDict, mesh: Mesh) -> Training[Networks]:
    """One update of the diffusion transformer: (state, frozen, batch) -> (state, metrics).

    Raises:
        ValueError: The config is inconsistent, or its batch does not divide over the mesh.
    """
    pack = config.data.pack
    check_batch(config.batch_size, config.micro_batches, mesh, pack)
    networks = assemble.networks(config)
    patch_size = assemble.patch_size(config)
    image_tokens = token_budget(config.data.resolution, patch_size)
    text_tokens = config.text.max_tokens if pack == 1 else config.text.max_tokens_packed
    optimiser = assemble.optimiser(config)
    shift = resolution_shift(image_tokens) if config.flow.shift else 1.0
    objective = FlowObjective(path(config.flow.path), config.flow.times, config.flow.mu, shift)
    step = text_to_image_step(
        networks, objective, optimiser, ema_decay=config.optim.ema, micro_batches=config.micro_batches
    )
    train_key = jax.random.split(jax.random.key(config.seed))[1]
    create = functools.partial(TrainState.create, optimiser=optimiser, key=train_key)
    params_at = loading.shardings(networks.dit, mesh)
    state = loading.placed(
        jax.eval_shape(create, networks.dit.shapes), params_at, mesh, ema_on_host=config.optim.ema_on_host
    )
    batch = abstract_batch(config.batch_size, image_tokens, text_tokens, 3 * patch_size**2, pack)
    model, autoencoder, text = sizes_of(config)
    sequences = config.batch_size // pack
    sequence_flops = flops.text_to_image_step(model, autoencoder, text, image_tokens, text_tokens, pack)
    return Training(
        step,
        (state, abstract_frozen(config, networks, mesh), _placed(batch, batch_sharding(mesh))),
        (shardings_of(state), replicated(mesh)),
        images=config.batch_size,
        tokens=config.batch_size * image_tokens + sequences * text_tokens,
        flops=sequence_flops * sequences,
        compiler_options=compiler_options(mesh.devices.flat[0].device_kind),
        networks=networks,
        create=create,
    )


def autoencoder_program(config: ConfigDict, mesh: Mesh) -> Training[AutoencoderNetworks]:
    """One update of the autoencoder and of its discriminator: (state, batch) -> (state, metrics).

    The batch holds square images of `config.data.resolution`; other sizes are the same function, compiled anew.

    Raises:
        ValueError: The config is inconsistent, or its batch does not divide over the mesh.
    """
    check_batch(config.batch_size, 1, mesh)
    networks, side = assemble.autoencoder_networks(config), config.data.resolution
    sizes, loss = assemble.autoencoder_config(config.autoencoder), assemble.loss_config(config.loss)
    tokens = token_budget(side, sizes.patch_size)
    if (smallest := min(assemble.crop_sides(config))) < loss.smallest_side:
        raise ValueError(
            f"crops of config.data.resolution={side} have sides of {smallest} pixels, and the networks of the loss "
            f"need {loss.smallest_side}: choose a larger resolution, a smaller data.max_ratio, fewer "
            "loss.disc_num_layers, or loss.perceptual_weight=0"
        )
    optimiser = assemble.optimiser(config)
    create = functools.partial(_autoencoder_state, sizes=sizes, loss=loss, optimiser=optimiser, seed=config.seed)
    params_at = loading.shardings(networks, mesh)
    state = loading.placed(
        jax.eval_shape(create, networks.shapes), params_at, mesh, ema_on_host=config.optim.ema_on_host
    )
    batch = {
        "images": jax.ShapeDtypeStruct((config.batch_size, side, side, 3), jnp.uint8),
        "valid": jax.ShapeDtypeStruct((config.batch_size,), jnp.bool_),
        "cause": jax.ShapeDtypeStruct((config.batch_size,), jnp.int32),
    }
    grid = (side // sizes.patch_size,) * 2
    return Training(
        autoencoder_step(networks, loss, optimiser, ema_decay=config.optim.ema, dtype=sizes.decoder.dtype),
        (state, _placed(batch, batch_sharding(mesh))),
        (shardings_of(state), replicated(mesh)),
        images=config.batch_size,
        tokens=config.batch_size * tokens,
        flops=flops.autoencoder_step(sizes, loss.perceptual, loss.discriminator, grid) * config.batch_size,
        compiler_options=compiler_options(mesh.devices.flat[0].device_kind),
        networks=networks,
        create=create,
    )


def sample_program(config: ConfigDict, mesh: Mesh) -> Program:
    """Prompts to pictures of `config.data.resolution`: (transformer, frozen, tokens, num_tokens, places, key) -> uint8.

    `tokens` holds `config.sample.batch_size` prompts, then as many negative ones. All networks in their compute type.

    Raises:
        ValueError: The config is inconsistent, or its batch does not divide over the mesh.
    """
    batch, length = config.sample.batch_size, config.text.max_tokens
    check_batch(batch, 1, mesh)
    networks = assemble.networks(config)
    side = config.data.resolution // assemble.patch_size(config)
    grid, solver, sampling = (side, side), Solver(config.sample.solver), Sampling(num_steps=config.sample.num_steps)

    def draw(dit: Params, frozen: Frozen, tokens: Any, num_tokens: Any, places: Any, key: Any) -> Any:
        text = encode_prompts(networks.text, frozen["text"], tokens, num_tokens)
        z = draw_latents(networks.dit, dit, text, num_tokens, places, key, sampling, grid=grid, solver=solver)
        return decode_latents(networks.autoencoder, frozen["autoencoder"], z, grid=grid)

    rows = batch_sharding(mesh)
    held = loading.in_compute_type(networks.dit, {"": config.model.dtype})
    integers = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32, sharding=rows)
    key = jax.eval_shape(lambda: jax.random.key(0))
    model, autoencoder, text = sizes_of(config)
    evaluations = config.sample.num_steps * (solver.method.evaluations or 1)  # of a solver that chooses: of one step
    both_halves = evaluations * flops.next_dit(model, side * side, length) + flops.gemma2_features(text, length)
    return Program(
        draw,
        (
            _placed(held, loading.shardings(networks.dit, mesh)),
            abstract_frozen(config, networks, mesh, decodes=True),
            integers((2 * batch, length)),
            integers((2 * batch,)),
            integers((batch, 2)),
            jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=replicated(mesh)),
        ),
        rows,
        images=batch,
        tokens=batch * (side * side + length),
        flops=(2 * both_halves + flops.decode(autoencoder.decoder, grid)) * batch,
        donates=False,
        compiler_options=compiler_options(mesh.devices.flat[0].device_kind),
    )


def sizes_of(config: ConfigDict) -> tuple[NextDiTConfig, AutoencoderConfig, Gemma2Config]:
    """Of the three networks of a text-to-image config."""
    text = from_config(Gemma2Config, config.text.encoder)
    return assemble.dit_config(config.model), assemble.autoencoder_config(config.autoencoder), text


def check_batch(batch_size: int, micro_batches: int, mesh: Mesh, pack: int = 1) -> None:
    """A batch must divide into sequences of `pack` images, these into micro-batches, and each of these over the mesh.

    Raises:
        ValueError: It does not; the message says of what it must be a multiple.
    """
    multiple = micro_batches * batch_multiple(mesh) * pack
    if batch_size % multiple:
        parts = f" in sequences of {pack} images" if pack > 1 else ""
        parts += f" in {micro_batches} micro-batches" if micro_batches > 1 else ""
        raise ValueError(
            f"batch_size {batch_size}{parts} does not divide over {batch_multiple(mesh)} devices: "
            f"choose a multiple of {multiple}"
        )


def abstract_batch(
    size: int, image_tokens: int, text_tokens: int, pixels: int, pack: int = 1
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a global `steps.Batch`; `text_tokens` are those of a row, which `pack` captions share."""
    return {
        "patches": jax.ShapeDtypeStruct((size, image_tokens, pixels), jnp.uint8),
        "grid": jax.ShapeDtypeStruct((size, 2), jnp.int32),
        "tokens": jax.ShapeDtypeStruct((size // pack, text_tokens), jnp.int32),
        "num_tokens": jax.ShapeDtypeStruct((size,), jnp.int32),
        "cause": jax.ShapeDtypeStruct((size,), jnp.int32),
    }


def abstract_frozen(config: ConfigDict, networks: Networks, mesh: Mesh, *, decodes: bool = False) -> Frozen:
    """The frozen networks as `loading.frozen` loads them from checkpoints.

    Args:
        config: The config.
        networks: Its networks.
        mesh: Where they lie.
        decodes: Whether the decoder is held in its compute type too, as for drawing.
    """
    parts = ("encoder", "residual", "decoder") if decodes else ("encoder", "residual")
    autoencoder = loading.compute_types(config.autoencoder, parts)

    def shapes(network: Network[Any], dtypes: dict[str, str]) -> Params:
        return _placed(loading.in_compute_type(network, dtypes), loading.shardings(network, mesh))

    return Frozen(
        autoencoder=shapes(networks.autoencoder, autoencoder),
        text=shapes(networks.text, {"": config.text.encoder.dtype}),
    )


def _autoencoder_state(
    params: Params, *, sizes: AutoencoderConfig, loss: LossConfig, optimiser: Any, seed: int
) -> TrainState:
    """What is trained; the encoder, the latent statistics, LPIPS and running statistics are carried along."""
    trained = {name: value for name, value in params.items() if is_trained_in_run(name, sizes, loss)}
    frozen = {name: value for name, value in params.items() if name not in trained}
    return TrainState.create(trained, optimiser, jax.random.key(seed), frozen)


def _placed(shapes: Any, at: NamedSharding | dict[str, NamedSharding]) -> Any:
    places = jax.tree.map(lambda _: at, shapes) if isinstance(at, NamedSharding) else at
    return jax.tree.map(lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes, places)
