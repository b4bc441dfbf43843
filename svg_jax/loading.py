"""From checkpoints to parameters, each array where it belongs on a mesh."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Key
from ml_collections import ConfigDict

from svg_jax.adversarial import check_perceptual_weights
from svg_jax.assemble import DTYPES, autoencoder_config, loss_config
from svg_jax.autoencoder_steps import LOSS, AutoencoderNetworks
from svg_jax.checkpoint import load_config, load_params, newest_step, open_params
from svg_jax.config import from_config
from svg_jax.flow.names import lookup
from svg_jax.models.autoencoder import Autoencoder
from svg_jax.models.encoders import make_encoder
from svg_jax.models.lpips import LPIPS
from svg_jax.models.stand_in import with_cosine_patches
from svg_jax.models.vit import ViTConfig
from svg_jax.nn.functional import Network, Params
from svg_jax.parallel import on_host, param_shardings
from svg_jax.state import TrainState, state_shardings
from svg_jax.steps import Frozen, Networks

logger = logging.getLogger("svg_jax")

OWN_LPIPS, DISCRIMINATOR = LOSS + "perceptual_loss.", LOSS + "discriminator."  # of a run, beside its autoencoder


def in_compute_type(network: Network[Any], dtypes: dict[str, str]) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a network that is not trained: kernels are held in the type that each use would cast them to.

    Args:
        network: The network.
        dtypes: Compute type by the beginning of a parameter's name.
    """

    def held(name: str, shape: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        cast = [dtype for prefix, dtype in dtypes.items() if name.startswith(prefix)]
        kernel = name.endswith((".kernel", ".embedding"))
        return jax.ShapeDtypeStruct(shape.shape, jnp.dtype(cast[0]) if cast and kernel else shape.dtype)

    return {name: held(name, shape) for name, shape in network.shapes.items()}


def placed(state: TrainState, params: dict[str, NamedSharding], mesh: Mesh, *, ema_on_host: bool) -> TrainState:
    """An abstract state with the shardings that jit and a restore are told."""
    at = state_shardings(state, params, mesh, ema_memory_kind="pinned_host" if ema_on_host else None)
    return jax.tree.map(lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), state, at)


def shardings(network: Network[Any] | AutoencoderNetworks, mesh: Mesh) -> dict[str, NamedSharding]:
    """Where each parameter of a network lives."""
    return param_shardings(network.shapes, network.axes, mesh)


def fresh(network: Network[Any], mesh: Mesh, key: Key[Array, ""]) -> Params:
    """New parameters, each made where it lives."""
    return jax.jit(network.init, out_shardings=shardings(network, mesh))(key)


def frozen(config: ConfigDict, networks: Networks, mesh: Mesh) -> Frozen:
    """Autoencoder and text encoder from their checkpoints, or the documented stand-ins where none are named."""
    dtypes = {"": config.text.encoder.dtype}
    return Frozen(
        autoencoder=load_autoencoder(config.autoencoder, networks.autoencoder, mesh),
        text=_loaded(networks.text, config.text.checkpoint, dtypes, mesh, "text encoder", "config.text.checkpoint"),
    )


def check_latents(config: ConfigDict) -> None:
    """Whether the autoencoder's checkpoint has latents such as the model is to learn; none of its weights are read.

    Raises:
        FileNotFoundError: There is no checkpoint.
        ValueError: They have another number of channels.
    """
    workdir = config.autoencoder.checkpoint
    about = load_config(workdir) if workdir else {}
    if "autoencoder" not in about:
        return
    found = autoencoder_config(ConfigDict(about["autoencoder"])).latent_channels
    if found != config.model.in_channels:
        raise ValueError(
            f"the latents of {workdir} have {found} channels, and the config is for {config.model.in_channels}: take a "
            "config of such latents (configs/stage1_residual.py is for Autoencoder-R), and measure the statistics of "
            "latents that have none with `python -m svg_jax.latent_stats`"
        )


def load_autoencoder(section: ConfigDict, network: Network[Autoencoder], mesh: Mesh, *, trains: bool = False) -> Params:
    """Of the checkpoint that `config.autoencoder` names, or the stand-in.

    A checkpoint of a vision model alone, as `svg_jax.convert import` makes one, gives the encoder; the rest is new
    then.

    Args:
        section: `config.autoencoder`.
        network: What it describes.
        mesh: Where it goes.
        trains: Whether all of it is kept in float32: most to be trained, the encoder to be saved beside that as it was.
    """
    if section.checkpoint and load_config(section.checkpoint).get("kind") == "encoder":
        sizes = autoencoder_config(section).encoder
        encoder = load_part(Network(lambda rngs: make_encoder(sizes, rngs=rngs)), section.checkpoint, mesh)
        return fresh(network, mesh, jax.random.key(0)) | {"encoder." + name: w for name, w in encoder.items()}
    dtypes = compute_types(section, () if trains else ("encoder", "residual"))
    key = "config.autoencoder.checkpoint"
    params = _loaded(network, section.checkpoint, dtypes, mesh, "autoencoder", key)
    if section.checkpoint or section.encoder.get("family", "dinov3") != "dinov3":
        return params
    params = with_cosine_patches(params, from_config(ViTConfig, section.encoder), "encoder.")
    return jax.device_put(params, shardings(network, mesh))


def compute_types(section: ConfigDict, parts: Sequence[str]) -> dict[str, str]:
    """Compute type by the beginning of a parameter's name, for parts of `config.autoencoder`."""
    prefixes = {"encoder": "encoder.", "residual": "extra_vit.", "decoder": "decoder."}
    return {prefixes[part]: section[part].dtype for part in parts if section.get(part)}


def begin_autoencoder(config: ConfigDict, networks: AutoencoderNetworks, mesh: Mesh) -> Params:
    """What a run of `svg_jax.train_autoencoder` begins with.

    The autoencoder is that of `config.init_from`, else of `config.autoencoder.checkpoint`, else the stand-in. The
    networks of its loss are those beside it, where there are such; else the discriminator is new, which is said, and
    LPIPS comes from `config.loss.lpips`.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: It is of another architecture, or there are no weights for LPIPS.
    """
    network, source = networks.autoencoder, config.init_from or config.autoencoder.checkpoint
    if config.init_from:
        params = load_params(config.init_from, network.shapes, shardings(network, mesh), select=_is_model)
    else:
        params = load_autoencoder(config.autoencoder, network, mesh, trains=True)
    shapes = {LOSS + name: shape for name, shape in networks.loss.shapes.items()}
    places = {LOSS + name: place for name, place in shardings(networks.loss, mesh).items()}
    saved = {name for part in open_params(source).values() for name in part} if source else set()
    known = {name for name in shapes if name in saved}
    lpips = [name for name in shapes if name.startswith(OWN_LPIPS)]
    loss = {LOSS + n: value for n, value in fresh(networks.loss, mesh, jax.random.key(config.seed)).items()}
    if not known.issuperset(lpips):
        loss |= _load_lpips(config, mesh)
    discriminator = {name for name in shapes if name.startswith(DISCRIMINATOR)}
    of_autoencoder = any(_is_model(name) and name.startswith("decoder.") for name in saved)
    if of_autoencoder and discriminator - known:
        logger.warning("%s has no discriminator: training begins with a new one", source)
        known -= discriminator
    if source and known:
        wanted = {name: shapes[name] for name in known}
        loss |= load_params(source, wanted, {name: places[name] for name in known}, select=known.__contains__)
    return params | loss


def _load_lpips(config: ConfigDict, mesh: Mesh) -> Params:
    """LPIPS of the workdir that `config.loss.lpips` names."""
    workdir, sizes = config.loss.lpips, loss_config(config.loss)
    if workdir is None:
        check_perceptual_weights(sizes, (), "config.loss.lpips, which is not set,")
    about = load_config(workdir)
    if about.get("kind") != "lpips" or "lacks" in about:
        check_perceptual_weights(sizes, (), f"config.loss.lpips={workdir}")
    perceptual = sizes.perceptual
    assert perceptual is not None
    params = load_part(Network(lambda rngs: LPIPS(perceptual, rngs=rngs)), workdir, mesh)
    return {OWN_LPIPS + name: value for name, value in params.items()}


def load_part(network: Network[Any], workdir: str, mesh: Mesh, prefix: str = "") -> Params:
    """A network's parameters, whose names in the checkpoint begin with `prefix`.

    Raises:
        FileNotFoundError: There is no checkpoint.
        WrongArchitecture: What begins so is of another architecture.
    """
    shapes = {prefix + name: shape for name, shape in network.shapes.items()}
    places = {prefix + name: place for name, place in shardings(network, mesh).items()}
    params = load_params(workdir, shapes, places, select=lambda name: name.startswith(prefix))
    return {name.removeprefix(prefix): value for name, value in params.items()}


def _is_model(name: str) -> bool:
    """Whether a parameter of a run is the autoencoder's, and not of its loss."""
    return not name.startswith(LOSS)


def _loaded(
    network: Network[Any], checkpoint: str | None, dtypes: dict[str, str], mesh: Mesh, what: str, key: str
) -> Params:
    if checkpoint:
        return load_params(checkpoint, in_compute_type(network, dtypes), shardings(network, mesh), select=_is_model)
    logger.warning("no weights given for the %s: using a random stand-in, for trying things out (--%s)", what, key)
    return fresh(network, mesh, jax.random.key(0))


class Loaded(NamedTuple):
    """A network, its parameters on the devices, and what a report says of them."""

    network: Network[Any]
    params: Params
    origin: dict[str, Any]


def find_autoencoder(checkpoint: str) -> tuple[str, ConfigDict]:
    """Workdir and config section of an autoencoder; none of its weights are read.

    Args:
        checkpoint: Workdir of a training run, or the folder that `svg_jax.convert import --to` made.

    Raises:
        FileNotFoundError: There is no checkpoint.
        ValueError: It is of something else.
    """
    inside = epath.Path(checkpoint) / "autoencoder"
    workdir = str((inside if inside.exists() else epath.Path(checkpoint)).absolute())
    config = load_config(workdir)
    if "autoencoder" not in config or "model" in config:
        found = "a diffusion transformer" if "model" in config else f"weights of the kind '{config.get('kind')}'"
        raise ValueError(f"{workdir} holds {found} and no autoencoder: name the workdir of an autoencoder")
    return workdir, ConfigDict(config["autoencoder"])


def open_autoencoder(
    workdir: str,
    section: ConfigDict,
    mesh: Mesh,
    *,
    ema: bool = True,
    dtype: str | None = None,
    match: str | None = None,
) -> Loaded:
    """An autoencoder that `find_autoencoder` has found.

    Args:
        workdir: Where it lies.
        section: Its config; takes the choices below.
        mesh: Where it goes.
        ema: The averaged weights rather than the raw ones.
        dtype: Compute type of all its parts; as configured by default.
        match: How the residual latents are matched to the others (`ResidualConfig.match`); as configured by default.

    Raises:
        ValueError: It has no raw weights, or no residual branch whose matching could be chosen.
    """
    parts = [section[name] for name in ("encoder", "decoder", "residual") if section.get(name) is not None]
    residual = section.get("residual")
    with section.ignore_type():
        if dtype is not None:
            lookup("dtype", dtype, DTYPES)
            for part in parts:
                part.dtype = dtype
        if match is not None:
            if residual is None:
                raise ValueError(f"--match {match} is for autoencoders with a residual branch, and {workdir} has none")
            residual.match = match
    sizes = autoencoder_config(section)
    network: Network[Autoencoder] = Network(lambda rngs: Autoencoder(sizes, rngs=rngs))
    if not ema and "params" not in open_params(workdir):
        raise ValueError(f"{workdir} has no raw weights beside the averaged ones: leave --no-ema out")
    params = load_params(
        workdir,
        network.shapes,
        shardings(network, mesh),
        parts=("ema" if ema else "params", "frozen"),
        select=_is_model,
    )
    origin = {
        "checkpoint": workdir,
        "step": newest_step(workdir),
        "ema": ema,
        "dtype": ", ".join(sorted({part.dtype for part in parts})),
        "match": None if residual is None else residual.match,
        "weights": digest(params),
    }
    return Loaded(network, params, origin)


def digest(params: Params) -> str:
    """16 hexadecimal digits of the SHA-256 of names, types, shapes and numbers: the same weights, the same digits."""
    total = hashlib.sha256()
    for name, value in sorted(params.items()):
        array = on_host(value) if isinstance(value, Array) else np.asarray(value)
        total.update(f"{name} {array.dtype} {array.shape}".encode())
        total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()[:16]
