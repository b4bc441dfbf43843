"""The networks that judge: LPIPS and Inception."""

from __future__ import annotations

from typing import Any

from etils import epath
from jax.sharding import Mesh

from svg_jax.adversarial import PERCEPTUAL_WEIGHTS
from svg_jax.checkpoint import load_config, open_params
from svg_jax.loading import OWN_LPIPS, Loaded, digest, load_part
from svg_jax.models.inception import Inception
from svg_jax.models.lpips import LPIPS, LPIPSConfig
from svg_jax.nn.functional import Network

# How to get the weights of the networks that judge.
SOURCES = {
    "lpips": f"{PERCEPTUAL_WEIGHTS}, and name it with --lpips weights/lpips",
    "inception": "download https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth, convert it with `python -m svg_jax.convert import "
    "pt_inception-2015-12-05-6726825d.pth --to weights`, and name it with --inception weights/inception",
}


def load_lpips(workdir: str | None, mesh: Mesh, *, autoencoder: str | None = None) -> Loaded:
    """LPIPS with VGG16: of a workdir that `svg_jax.convert` made, or the one that an autoencoder was trained with.

    Raises:
        ValueError: Neither has it; the message says how to get the weights.
    """
    network: Network[LPIPS] = Network(lambda rngs: LPIPS(LPIPSConfig(), rngs=rngs))
    if workdir is None and autoencoder is not None:
        names = {name for part in open_params(autoencoder).values() for name in part}
        if any(name.startswith(OWN_LPIPS) for name in names):
            params = load_part(network, autoencoder, mesh, OWN_LPIPS)
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
    params = load_part(network, workdir, mesh)
    return Loaded(network, params, {"checkpoint": str(epath.Path(workdir).absolute()), "weights": digest(params)})
