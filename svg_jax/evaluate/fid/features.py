"""From images to the features that FID compares: read on the host, in batches over the devices of this process."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, UInt8

from data_pipelines.images import crop
from data_pipelines.records import Record
from svg_jax.evaluate.images import open_rgb
from svg_jax.evaluate.networks import load_inception
from svg_jax.loading import Loaded
from svg_jax.models.inception import SIDE, Inception
from svg_jax.nn.functional import Network, Params
from svg_jax.parallel import batch_multiple, batch_sharding

PRECISION = "highest"  # of matrix products and convolutions: float32 on every chip
# Images a device. Nobody chooses: the last digits depend on it, and neither on the number of devices nor of processes.
AT_ONCE = {"cpu": 4}  # larger arrays are given back to the system and faulted in for each batch
AT_ONCE_ELSEWHERE = 16


class Extractor(NamedTuple):
    """Inception, compiled for batches of so many images."""

    loaded: Loaded
    mesh: Mesh
    at_once: int
    compute: Callable[[Params, Array], dict[str, Array]]

    @property
    def channels(self) -> int:
        """Of a feature."""
        return channels_of(self.loaded)


def load_extractor(workdir: str | None, mesh: Mesh, *, logits: bool) -> Extractor:
    """The network of FID on a mesh of this process's devices.

    Args:
        workdir: Of the Inception that `svg_jax.convert` made.
        mesh: Where it runs.
        logits: Whether the Inception Score is asked for too.

    Raises:
        ValueError: There are no such weights; the message says how to get them.
    """
    return extractor_of(load_inception(workdir, mesh, metric="FID"), mesh, logits=logits)


def extractor_of(loaded: Loaded, mesh: Mesh, *, logits: bool) -> Extractor:
    """The same of a network that is there already."""
    at_once = AT_ONCE.get(mesh.devices.flat[0].platform, AT_ONCE_ELSEWHERE) * batch_multiple(mesh)
    each = functools.partial(features_and_logits, loaded.network, logits=logits)
    # What one device would compute, on each of them: a program for all together rounds otherwise.
    rows = batch_sharding(mesh).spec
    compute = jax.jit(jax.shard_map(each, mesh=mesh, in_specs=(PartitionSpec(), rows), out_specs=rows))
    return Extractor(loaded, mesh, at_once, compute)


def channels_of(inception: Loaded) -> int:
    """Of its features, which the last layer turns into logits."""
    return inception.network.shapes["fc.kernel"].shape[0]


def features_and_logits(
    network: Network[Inception], params: Params, images: Float[Array, "batch 299 299 3"], *, logits: bool
) -> dict[str, Array]:
    """`features` [batch, 2048] of images in [-1, 1], and `logits` [batch, 1008] where asked for."""
    module = network(params)
    features = module.pooled(images)
    return {"features": features, "logits": module.logits(features)} if logits else {"features": features}


def extract(extractor: Extractor, images: list[Float[np.ndarray, "299 299 3"]]) -> dict[str, np.ndarray]:
    """`features`, and `logits` where asked for, of at most `at_once` images as `prepared` gives them.

    Raises:
        ValueError: They are not finite.
    """
    # One shape for all batches, the last ones too, so that nothing is compiled twice.
    pixels = np.zeros((extractor.at_once, SIDE, SIDE, 3), np.float32)
    if images:
        pixels[: len(images)] = images
    with jax.set_mesh(extractor.mesh), jax.default_matmul_precision(PRECISION), jax.transfer_guard("disallow"):
        batch = jax.device_put(pixels, batch_sharding(extractor.mesh))
        found = jax.device_get(extractor.compute(extractor.loaded.params, batch))
    rows = {name: np.asarray(values)[: len(images)] for name, values in found.items()}
    for values in rows.values():
        check_finite(values, extractor.loaded)
    return rows


def check_finite(rows: Float[np.ndarray, "images channels"], inception: Loaded) -> None:
    """Any image has finite features; that some have none says that the weights are damaged.

    Raises:
        ValueError: These are not finite.
    """
    if not np.isfinite(rows).all():
        raise ValueError(
            f"the Inception of {inception.origin['origin']['checkpoint']} gives numbers that are not finite: convert "
            "its weights again"
        )


def prepared(record: Record, resolution: int = 0) -> Float[np.ndarray, "299 299 3"]:
    """An image as Inception takes it, in [-1, 1].

    Args:
        record: Names an image of any size.
        resolution: Side in pixels of the square to which the image is first resized and cropped, as ADM crops its
            reference images (arXiv 2105.05233); 0 takes all of the image as it is.

    Raises:
        BadRecord: It cannot be read as an image.
    """
    image = open_rgb(record)
    if resolution and image.size != (resolution, resolution):
        image = crop(image, (resolution, resolution))
    return to_inception(np.asarray(image))


def to_inception(pixels: UInt8[np.ndarray, "height width 3"]) -> Float[np.ndarray, "299 299 3"]:
    """`models.inception.resized` of one image, on the host: so images of many sizes need one compiled program.

    Bilinear without antialiasing, whatever the size, and without regard to the aspect ratio: the convention of
    `pytorch-fid`.
    """
    low, high, weight = _taps(pixels.shape[0])
    rows = pixels[low].astype(np.float32)
    rows += (pixels[high] - rows) * weight[:, None, None]
    low, high, weight = _taps(pixels.shape[1])
    squared = rows[:, low]
    squared += (rows[:, high] - squared) * weight[:, None]
    return squared / np.float32(127.5) - np.float32(1)


@functools.cache
def _taps(stored: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each new row or column: the two stored ones that it lies between, and how near it is to the second."""
    ratio = np.float32(stored) / np.float32(SIDE)  # places in float32, as in the network and in PyTorch
    centre = np.maximum(ratio * (np.arange(SIDE, dtype=np.float32) + np.float32(0.5)) - np.float32(0.5), 0.0)
    low = np.minimum(centre.astype(np.int64), stored - 1)
    return low, np.minimum(low + 1, stored - 1), (centre - low).astype(np.float32)
