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
from svg_jax.nn.functional import Network, Params
from svg_jax.output_folder import ORIGIN

# How to get the weights of the networks that judge.
SOURCES = {
    "lpips": PERCEPTUAL_WEIGHTS,
    "inception": "download https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth, convert it with `python -m svg_jax.convert import "
    "pt_inception-2015-12-05-6726825d.pth --to weights`",
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
            return Loaded(network, params, _origin(autoencoder, params))
    return _load_judge("lpips", network, workdir, mesh, "LPIPS", "--lpips")


def load_inception(workdir: str | None, mesh: Mesh, *, metric: str = "rFID", flag: str = "--inception") -> Loaded:
    """The Inception of FID, of a workdir that `svg_jax.convert` made.

    Args:
        workdir: The folder.
        mesh: Where it goes.
        metric: What needs it, for messages.
        flag: What names it, for messages.

    Raises:
        ValueError: None is named, or it holds something else; the message says how to get the weights.
    """
    return _load_judge("inception", Network(lambda rngs: Inception(rngs=rngs)), workdir, mesh, metric, flag)


def _load_judge(kind: str, network: Network[Any], workdir: str | None, mesh: Mesh, metric: str, flag: str) -> Loaded:
    how = f"{SOURCES[kind]}, and name it with {flag} weights/{kind}"
    if workdir is None:
        without = "" if metric == "FID" else "; or choose --metrics without it"
        raise ValueError(f"{metric} needs weights: {how}{without}")
    config = load_config(workdir)
    if config.get("kind") != kind:
        raise ValueError(f"{flag} {workdir} holds no {kind} weights: {how}")
    if "lacks" in config:
        raise ValueError(f"{flag} {workdir}: {config['lacks']}")
    params = load_part(network, workdir, mesh)
    return Loaded(network, params, _origin(str(epath.Path(workdir).absolute()), params))


def _origin(checkpoint: str, params: Params) -> dict[str, Any]:
    """Which weights these are, and where they lay."""
    return {"weights": digest(params), ORIGIN: {"checkpoint": checkpoint}}
