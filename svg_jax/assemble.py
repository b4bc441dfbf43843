"""From a config to networks and their frozen parameters, on a mesh."""

from __future__ import annotations

import logging
from typing import Any

import jax
import optax
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from svg_jax.checkpoint import load_params
from svg_jax.config import from_config
from svg_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from svg_jax.models.decoder import DecoderConfig
from svg_jax.models.gemma2 import Gemma2, Gemma2Config
from svg_jax.models.next_dit import NextDiT, NextDiTConfig
from svg_jax.models.stand_in import with_cosine_patches
from svg_jax.models.vit import ViTConfig
from svg_jax.nn.functional import Network, Params
from svg_jax.parallel import param_shardings
from svg_jax.state import TrainState, adamw, learning_rate, state_shardings
from svg_jax.steps import Frozen, Networks

logger = logging.getLogger("svg_jax")


def networks(config: ConfigDict) -> Networks:
    """The three networks of a text-to-image config; nothing is allocated.

    Raises:
        ValueError: Sizes do not fit one another, or a key is unknown.
    """
    model = dit_config(config.model)
    autoencoder = autoencoder_config(config.autoencoder)
    text = from_config(Gemma2Config, config.text.encoder)
    if model.in_channels != autoencoder.encoder.dim:
        raise ValueError(
            f"model.in_channels is {model.in_channels} and the autoencoder's latents have {autoencoder.encoder.dim} "
            "channels: set --config.model.in_channels to that"
        )
    if model.text_dim != text.dim:
        raise ValueError(f"model.text_dim is {model.text_dim} and the text encoder's width {text.dim}: make them equal")
    return Networks(
        Network(lambda rngs: NextDiT(model, rngs=rngs)),
        Network(lambda rngs: Autoencoder(autoencoder, rngs=rngs)),
        Network(lambda rngs: Gemma2(text, rngs=rngs)),
    )


def dit_config(section: ConfigDict) -> NextDiTConfig:
    """From `config.model`."""
    return from_config(NextDiTConfig, section)


def autoencoder_config(section: ConfigDict) -> AutoencoderConfig:
    """From `config.autoencoder`."""
    return AutoencoderConfig(from_config(ViTConfig, section.encoder), from_config(DecoderConfig, section.decoder))


def optimiser(config: ConfigDict) -> optax.GradientTransformation:
    """AdamW as `config.optim` says, over `config.num_train_steps`."""
    values = config.optim.to_dict()
    names = ("lr", "schedule", "warmup_steps")
    schedule = learning_rate(num_train_steps=config.num_train_steps, **{name: values[name] for name in names})
    return adamw(schedule, **{name: values[name] for name in ("b1", "b2", "eps", "weight_decay", "clip")})


def placed(state: TrainState, params: dict[str, NamedSharding], mesh: Mesh) -> tuple[TrainState, TrainState]:
    """The shardings of an abstract state, and the state with them: what jit and a restore are told."""
    at = state_shardings(state, params, mesh)
    return at, jax.tree.map(lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), state, at)


def shardings(network: Network[Any], mesh: Mesh) -> dict[str, NamedSharding]:
    """Where each parameter of a network lives."""
    return param_shardings(network.shapes, network.axes, mesh)


def fresh(network: Network[Any], mesh: Mesh, seed: int) -> Params:
    """New parameters, each made where it lives."""
    return jax.jit(network.init, out_shardings=shardings(network, mesh))(jax.random.key(seed))


def frozen(config: ConfigDict, networks: Networks, mesh: Mesh) -> Frozen:
    """Autoencoder and text encoder from their checkpoints, or the documented stand-ins where none are named."""
    return Frozen(
        autoencoder=load_autoencoder(config.autoencoder, networks.autoencoder, mesh),
        text=_loaded(networks.text, config.text.checkpoint, mesh, "text encoder", "config.text.checkpoint"),
    )


def load_autoencoder(section: ConfigDict, network: Network[Autoencoder], mesh: Mesh) -> Params:
    """Of the checkpoint that `config.autoencoder` names, or the stand-in."""
    params = _loaded(network, section.checkpoint, mesh, "autoencoder", "config.autoencoder.checkpoint")
    if section.checkpoint:
        return params
    params = with_cosine_patches(params, from_config(ViTConfig, section.encoder), "encoder.")
    return jax.device_put(params, shardings(network, mesh))


def _loaded(network: Network[Any], checkpoint: str | None, mesh: Mesh, what: str, key: str) -> Params:
    if checkpoint:
        return load_params(checkpoint, network.shapes, shardings(network, mesh))
    logger.warning("no weights given for the %s: using a random stand-in, for trying things out (--%s)", what, key)
    return fresh(network, mesh, seed=0)
