"""Where arrays live: the device mesh, and one table from logical axes to mesh axes.

Mesh axes: `data` across slices (gradients only), `fsdp` (parameters and batch), `tensor` (heads and hidden units).
Nothing is ever made whole on one device: shapes first, then shardings from here, then a sharded init or restore.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

AXES = ("data", "fsdp", "tensor")
BATCH = PartitionSpec(("data", "fsdp"))

# A dimension that the mesh does not divide stays whole, and `fsdp` then takes the next dimension that it divides.
RULES: dict[str | None, str | None] = {
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "mlp": "tensor",
    "layers": None,
    None: None,
}


def make_mesh(sizes: Mapping[str, int], devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices; one axis may be -1 and takes what is left.

    Raises:
        ValueError: Unknown axes, or sizes that do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    if unknown := set(sizes) - set(AXES):
        raise ValueError(f"unknown mesh axes {sorted(unknown)}: there are {', '.join(AXES)}")
    shape = [sizes.get(axis, 1) for axis in AXES]
    given = math.prod(size for size in shape if size != -1)
    if shape.count(-1) == 1 and given > 0 and len(devices) % given == 0:
        shape[shape.index(-1)] = len(devices) // given
    if math.prod(shape) != len(devices) or min(shape) < 1:
        wanted = ", ".join(f"{axis}={sizes.get(axis, 1)}" for axis in AXES)
        raise ValueError(f"mesh {wanted} does not fit {len(devices)} devices: the sizes must multiply to that number")
    return jax.make_mesh(tuple(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def param_spec(shape: tuple[int, ...], axes: tuple[str | None, ...], mesh: Mesh) -> PartitionSpec:
    """The rule table applied to one parameter; vectors are replicated."""
    if sum(axis != "layers" for axis in axes) < 2:
        return PartitionSpec()
    spec: list[str | None] = []
    for size, axis in zip(shape, axes, strict=True):
        target = RULES[axis]
        free = target is not None and target not in spec and size % mesh.shape[target] == 0
        spec.append(target if free else None)
    if "fsdp" not in spec:
        for i, (size, axis) in enumerate(zip(shape, axes, strict=True)):
            if spec[i] is None and axis != "layers" and size % mesh.shape["fsdp"] == 0:
                spec[i] = "fsdp"
                break
    return PartitionSpec(*spec)


def param_shardings(
    shapes: Mapping[str, jax.ShapeDtypeStruct], axes: Mapping[str, tuple[str | None, ...]], mesh: Mesh
) -> dict[str, NamedSharding]:
    """A sharding for every parameter of a network (`Network.shapes`, `Network.axes`)."""
    return {name: NamedSharding(mesh, param_spec(shapes[name].shape, axes[name], mesh)) for name in shapes}


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis over every device that does not split a sample."""
    return NamedSharding(mesh, BATCH)


def batch_multiple(mesh: Mesh) -> int:
    """What a global batch must be a multiple of."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def constrain_batch(x: Array) -> Array:
    """Keeps activations split over the batch; does nothing where no mesh is set (`jax.set_mesh`)."""
    if jax.sharding.get_abstract_mesh().empty or x.shape[0] % _batch_size():
        return x
    return jax.lax.with_sharding_constraint(x, BATCH)


def _batch_size() -> int:
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape["data"] * mesh.shape["fsdp"]


def to_devices(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, Any]:
    """This host's slice of a global batch -> global arrays on the mesh."""
    sharding = batch_sharding(mesh)
    return {key: jax.make_array_from_process_local_data(sharding, value) for key, value in batch.items()}
