"""What evaluation loads: the autoencoder that is judged, and the networks that judge (LPIPS, Inception)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from svg_jax import assemble
from svg_jax.adversarial import PERCEPTUAL_WEIGHTS
from svg_jax.checkpoint import load_config, load_params, newest_step, open_params
from svg_jax.flow.names import lookup
from svg_jax.models.autoencoder import Autoencoder
from svg_jax.models.inception import Inception
from svg_jax.models.lpips import LPIPS, LPIPSConfig
from svg_jax.nn.functional import Network, Params

LOSS = "loss."  # how the names of a run's loss network begin, in the checkpoint of its autoencoder
OWN_LPIPS = "loss.perceptual_loss."

# How to get the weights of the networks that judge.
SOURCES = {
    "lpips": f"{PERCEPTUAL_WEIGHTS}, and name it with --lpips weights/lpips",
    "inception": "download https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth, convert it with `python -m svg_jax.convert import "
    "pt_inception-2015-12-05-6726825d.pth --to weights`, and name it with --inception weights/inception",
}


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


def load_autoencoder(
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
            lookup("dtype", dtype, assemble.DTYPES)
            for part in parts:
                part.dtype = dtype
        if match is not None:
            if residual is None:
                raise ValueError(f"--match {match} is for autoencoders with a residual branch, and {workdir} has none")
            residual.match = match
    sizes = assemble.autoencoder_config(section)
    network: Network[Autoencoder] = Network(lambda rngs: Autoencoder(sizes, rngs=rngs))
    if not ema and "params" not in open_params(workdir):
        raise ValueError(f"{workdir} has no raw weights beside the averaged ones: leave --no-ema out")
    params = load_params(
        workdir,
        network.shapes,
        assemble.shardings(network, mesh),
        parts=("ema" if ema else "params", "frozen"),
        select=lambda name: not name.startswith(LOSS),
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


def load_lpips(workdir: str | None, mesh: Mesh, *, autoencoder: str | None = None) -> Loaded:
    """LPIPS with VGG16: of a workdir that `svg_jax.convert` made, or the one that an autoencoder was trained with.

    Raises:
        ValueError: Neither has it; the message says how to get the weights.
    """
    network: Network[LPIPS] = Network(lambda rngs: LPIPS(LPIPSConfig(), rngs=rngs))
    if workdir is None and autoencoder is not None:
        names = {name for part in open_params(autoencoder).values() for name in part}
        if any(name.startswith(OWN_LPIPS) for name in names):
            params = _loaded(network, autoencoder, mesh, OWN_LPIPS)
            return Loaded(network, params, {"checkpoint": autoencoder, "weights": digest(params)})
    return _load_judge("lpips", network, workdir, mesh)


def load_inception(workdir: str | None, mesh: Mesh) -> Loaded:
    """The Inception of FID, of a workdir that `svg_jax.convert` made.

    Raises:
        ValueError: None is named, or it holds something else; the message says how to get the weights.
    """
    return _load_judge("inception", Network(lambda rngs: Inception(rngs=rngs)), workdir, mesh)


def _load_judge(kind: str, network: Network[Any], workdir: str | None, mesh: Mesh) -> Loaded:
    metric = {"lpips": "LPIPS", "inception": "rFID"}[kind]
    if workdir is None:
        raise ValueError(f"{metric} needs weights: {SOURCES[kind]}; or choose --metrics without it")
    config = load_config(workdir)
    if config.get("kind") != kind:
        raise ValueError(f"--{kind} {workdir} holds no {kind} weights: {SOURCES[kind]}")
    if "lacks" in config:
        raise ValueError(f"--{kind} {workdir}: {config['lacks']}")
    params = _loaded(network, workdir, mesh)
    return Loaded(network, params, {"checkpoint": str(epath.Path(workdir).absolute()), "weights": digest(params)})


def _loaded(network: Network[Any], workdir: str, mesh: Mesh, prefix: str = "") -> Params:
    """Its parameters, whose names in the checkpoint have a prefix."""
    shapes = {prefix + name: shape for name, shape in network.shapes.items()}
    places = {prefix + name: place for name, place in assemble.shardings(network, mesh).items()}
    select: Callable[[str], bool] = lambda name: name.startswith(prefix)  # noqa: E731
    params = load_params(workdir, shapes, places, select=select)
    return {name.removeprefix(prefix): value for name, value in params.items()}


def digest(params: Params) -> str:
    """16 hexadecimal digits of the SHA-256 of names, types, shapes and numbers: the same weights, the same digits."""
    total = hashlib.sha256()
    for name, value in sorted(params.items()):
        array = np.asarray(jax.device_get(value))
        total.update(f"{name} {array.dtype} {array.shape}".encode())
        total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()[:16]
