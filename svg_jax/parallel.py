"""Where arrays live: the device mesh, and one table from logical axes to mesh axes.

Mesh axes, outermost first:

  data     the batch; parameters are copied. Across slices (slow network), and across one dimension of a slice's torus.
  fsdp     the batch and the parameters: each kernel is cut, and gathered one layer at a time while it is used.
  context  the tokens of a sample, between attentions.
  tensor   heads and hidden units.

Nothing is ever made whole on one device: shapes first, then shardings from here, then a sharded init or restore.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array

AXES = ("data", "fsdp", "context", "tensor")
BATCH = PartitionSpec(("data", "fsdp"))
TOKENS = PartitionSpec(("data", "fsdp"), "context")

# A dimension that the mesh does not divide stays whole, and `fsdp` then takes the next dimension that it divides.
RULES: dict[str | None, str | None] = {
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "mlp": "tensor",
    "layers": None,
    None: None,
}


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices. An axis of -1 takes what is left; `data` and `fsdp` may both be -1, see `two_level`.

    Where the devices are several slices (TPU) or nodes (GPU) and `data` is a multiple of their number, only `data`
    crosses from one to another.

    Raises:
        ValueError: Unknown axes, or sizes that do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    if unknown := set(sizes) - set(AXES):
        raise ValueError(f"unknown mesh axes {sorted(unknown)}: there are {', '.join(AXES)}")
    slices = num_slices(devices)
    one_slice = devices if slices == 1 else [d for d in devices if d.slice_index == devices[0].slice_index]
    shape = _fill([sizes.get(axis, 1) for axis in AXES], len(devices), slices, torus_of(one_slice))
    if math.prod(shape) != len(devices) or min(shape) < 1:
        wanted = ", ".join(f"{axis}={sizes.get(axis, 1)}" for axis in AXES)
        raise ValueError(f"mesh {wanted} does not fit {len(devices)} devices: the sizes must multiply to that number")
    types = (AxisType.Auto,) * len(AXES)
    if slices == 1 or (shape[0] % slices and devices[0].platform != "tpu"):
        return Mesh(_arranged(shape, devices), AXES, axis_types=types)
    if shape[0] % slices:
        raise ValueError(f"mesh data={shape[0]} on {slices} slices: only `data` crosses slices, make it a multiple")
    within, across = (shape[0] // slices, *shape[1:]), (slices, *(1,) * (len(AXES) - 1))
    grid = mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=types)


def _arranged(shape: Sequence[int], devices: Sequence[jax.Device]) -> np.ndarray:
    """Devices on a grid, each axis along sides of the torus where that is possible."""
    try:
        return mesh_utils.create_device_mesh(shape, devices)
    except NotImplementedError:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def num_slices(devices: Sequence[jax.Device]) -> int:
    """Groups of devices joined by a fast network: TPU slices, or nodes of GPUs; 1 on CPUs."""
    if devices[0].platform == "cpu":
        return 1
    return len({getattr(device, "slice_index", None) for device in devices})


def two_level(devices: int, torus: Sequence[int] = ()) -> tuple[int, int]:
    """(data, fsdp) inside one slice: fsdp is the smallest size that is at least 8 and the square root of `devices`.

    It is a divisor and, in a torus, a product of whole sides: 16 x 16 chips are (16, 16), 4 x 4 x 4 are (4, 16), 8 x 8
    are (8, 8), 8 are (1, 8). Parameters are then gathered along some dimensions of the torus: groups that span all of
    them make the compiler all-reduce whole gradients, but in the smallest slices.
    """
    sides = itertools.chain.from_iterable(itertools.combinations(torus, n) for n in range(len(torus) + 1))
    sizes = {math.prod(some) for some in sides} if math.prod(torus) == devices else range(1, devices + 1)
    least = min(devices, max(8, math.isqrt(devices - 1) + 1))
    fsdp = min(size for size in sizes if size >= least and devices % size == 0)
    return devices // fsdp, fsdp


def torus_of(devices: Sequence[jax.Device]) -> tuple[int, ...]:
    """Sides of the torus that the devices of one slice form; empty where they form none."""
    places = [getattr(device, "coords", None) for device in devices]
    if any(place is None for place in places):
        return ()
    cores = {getattr(device, "core_on_chip", 0) for device in devices}
    return (*(len(set(side)) for side in zip(*places, strict=True)), len(cores))


def _fill(shape: list[int], devices: int, slices: int, torus: Sequence[int]) -> list[int]:
    given = math.prod(size for size in shape if size != -1)
    if given < 1 or devices % given:
        return shape
    if shape[:2] == [-1, -1] and -1 not in shape[2:] and devices % (given * slices) == 0:
        data, fsdp = two_level(devices // given // slices, torus)
        return [data * slices, fsdp, *shape[2:]]
    if shape.count(-1) == 1:
        return [devices // given if size == -1 else size for size in shape]
    return shape


def param_spec(shape: tuple[int, ...], axes: tuple[str | None, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
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


def shardings_of(arrays: Any) -> Any:
    """Where the arrays of a tree live, abstract ones too."""
    return jax.tree.map(lambda array: array.sharding, arrays)


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis over every device that does not split a sample."""
    return NamedSharding(mesh, BATCH)


def batch_multiple(mesh: Mesh) -> int:
    """What a global batch must be a multiple of."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def constrain_tokens(x: Array) -> Array:
    """Keeps activations [batch, tokens, ...] split over both; does nothing where no mesh is set (`jax.set_mesh`)."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or x.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]):
        return x
    return jax.lax.with_sharding_constraint(x, BATCH if x.shape[1] % mesh.shape["context"] else TOKENS)


def gathered(w: Array, axes: tuple[str | None, ...], dtype: DTypeLike) -> Array:
    """A parameter as a layer uses it: cast to `dtype`, then whole along `fsdp`; its gradient is scattered likewise.

    Forward, w is cast where it lies and then gathered, so that the wire carries `dtype`. Backward, the gradient is
    bound to the layout of w before anything else, so that the compiler reduce-scatters it; left to itself it
    all-reduces whole gradients.

    Args:
        w: The parameter, without an axis of layers.
        axes: Its logical axes.
        dtype: What the layer computes in.
    """
    mesh = jax.sharding.get_abstract_mesh()
    stored = PartitionSpec() if mesh.empty else param_spec(w.shape, axes, mesh)
    if "fsdp" not in stored or mesh.shape["fsdp"] == 1:
        return w.astype(dtype)
    used = PartitionSpec(*(None if axis == "fsdp" else axis for axis in stored))
    return _gather(w, stored, used, jax.numpy.dtype(dtype), w.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def _gather(w: Array, stored: PartitionSpec, used: PartitionSpec, dtype: DTypeLike, held: DTypeLike) -> Array:
    w = jax.lax.with_sharding_constraint(w.astype(dtype), stored)
    return jax.lax.with_sharding_constraint(w, used)


def _gather_forward(w: Array, *settings: Any) -> tuple[Array, None]:
    return _gather(w, *settings), None


def _gather_backward(
    stored: PartitionSpec, used: PartitionSpec, dtype: DTypeLike, held: DTypeLike, _: None, gradient: Array
) -> tuple[Array]:
    return (jax.lax.with_sharding_constraint(gradient, stored).astype(held),)


_gather.defvjp(_gather_forward, _gather_backward)


def on_host(array: Array) -> np.ndarray:
    """All of an array, also where parts of it lie on other hosts; then every process calls this."""
    if not (array.is_fully_addressable or array.is_fully_replicated):
        array = _copy_everywhere(array.sharding.mesh)(array)  # type: ignore[attr-defined]
    return np.asarray(jax.device_get(array))


@functools.cache
def _copy_everywhere(mesh: Mesh) -> Callable[[Array], Array]:
    return jax.jit(lambda x: x, out_shardings=replicated(mesh))


def to_devices(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, Any]:
    """This host's slice of a global batch -> global arrays on the mesh."""
    sharding = batch_sharding(mesh)
    with jax.transfer_guard_host_to_device("allow"):  # meant, though JAX calls it implicit where a host has a part only
        return {key: jax.make_array_from_process_local_data(sharding, value) for key, value in batch.items()}
