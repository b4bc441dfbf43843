"""The mesh, the rule table, and what it makes of the real networks."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from svg_jax.models.decoder import Decoder, DecoderConfig
from svg_jax.models.gemma2 import Gemma2, Gemma2Config
from svg_jax.models.next_dit import NextDiT, NextDiTConfig
from svg_jax.models.vit import ViT, ViTConfig
from svg_jax.nn.functional import Network
from svg_jax.parallel import (
    AXES,
    batch_multiple,
    constrain_tokens,
    gathered,
    make_mesh,
    param_shardings,
    param_spec,
    to_devices,
    two_level,
)
from svg_jax.topologies import topology_devices
from tests.vectors import assert_close

MESH = {"fsdp": 4, "tensor": 2}


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({"data": 1, "fsdp": -1, "tensor": 1}, (1, 8, 1, 1)),
        ({"fsdp": 4, "tensor": 2}, (1, 4, 1, 2)),
        ({"data": 2, "fsdp": 2, "tensor": -1}, (2, 2, 1, 2)),
        ({"data": -1}, (8, 1, 1, 1)),
        ({"fsdp": 2, "context": -1}, (1, 2, 4, 1)),
        ({"data": -1, "fsdp": -1, "context": 1, "tensor": 1}, (1, 8, 1, 1)),
        ({"data": -1, "fsdp": -1, "context": 2}, (1, 4, 2, 1)),
    ],
)
def test_mesh_sizes(sizes: dict[str, int], shape: tuple[int, ...]) -> None:
    mesh = make_mesh(sizes)
    assert dict(mesh.shape) == dict(zip(AXES, shape, strict=True))
    assert batch_multiple(mesh) == shape[0] * shape[1]


@pytest.mark.parametrize(
    ("devices", "sizes"),
    [(1, (1, 1)), (4, (1, 4)), (8, (1, 8)), (12, (1, 12)), (16, (2, 8)), (64, (8, 8)), (128, (8, 16)), (256, (16, 16))],
)
def test_two_levels(devices: int, sizes: tuple[int, int]) -> None:
    assert two_level(devices) == sizes


@pytest.mark.parametrize(
    ("torus", "sizes"),
    [
        ((16, 16, 1, 1), (16, 16)),
        ((4, 4, 4, 1), (4, 16)),
        ((4, 4, 8, 1), (8, 16)),
        ((4, 8, 1, 1), (4, 8)),
        ((2, 4, 1, 1), (1, 8)),
    ],
)
def test_two_levels_of_a_torus_are_made_of_whole_sides(torus: tuple[int, ...], sizes: tuple[int, int]) -> None:
    assert two_level(math.prod(torus), torus) == sizes


@dataclasses.dataclass(frozen=True)
class Node:
    """What a mesh wants to know of a device that is not there: four GPUs a node."""

    id: int
    platform: str = "gpu"
    device_kind: str = "NVIDIA H100 80GB HBM3"

    @property
    def slice_index(self) -> int:
        return self.id // 4

    process_index = slice_index


def test_only_data_crosses_from_node_to_node() -> None:
    devices: list[Any] = [Node(i) for i in np.random.default_rng(0).permutation(8)]
    mesh = make_mesh({"data": -1, "fsdp": -1}, devices)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 4, "context": 1, "tensor": 1}
    for row in mesh.devices.reshape(2, 4):
        assert len({device.slice_index for device in row}) == 1
    mesh = make_mesh({"data": 4, "fsdp": 2}, devices)
    nodes = [[device.slice_index for device in row] for row in mesh.devices.reshape(4, 2)]
    assert nodes == [[0, 0], [0, 0], [1, 1], [1, 1]]


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu, of the extra 'aot'")
@pytest.mark.parametrize(
    ("topology", "sizes", "shape"),
    [
        ("v5e:16x16", {"data": -1, "fsdp": -1}, (16, 16)),
        ("v5p:4x4x4", {"data": -1, "fsdp": -1}, (4, 16)),
        ("v5p:4x4x4", {"data": 8, "fsdp": 8}, (8, 8)),
        ("v6e:16x16", {"data": -1, "fsdp": 32}, (8, 32)),
    ],
)
def test_every_mesh_can_be_laid_on_a_real_torus(topology: str, sizes: dict[str, int], shape: tuple[int, int]) -> None:
    mesh = make_mesh(sizes, topology_devices(topology))
    assert (mesh.shape["data"], mesh.shape["fsdp"]) == shape


def test_a_parameter_that_would_cross_tpu_slices_is_refused() -> None:
    devices: list[Any] = [Node(i, platform="tpu", device_kind="TPU v4") for i in range(8)]
    with pytest.raises(ValueError, match="data=1 on 2 slices: only `data` crosses slices"):
        make_mesh({"fsdp": 8}, devices)


def test_a_mesh_of_some_devices() -> None:
    assert make_mesh({"fsdp": -1}, jax.devices()[:2]).size == 2


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"model": 8}, r"unknown mesh axes \['model'\]: there are data, fsdp, context, tensor"),
        ({"fsdp": 3}, "mesh data=1, fsdp=3, context=1, tensor=1 does not fit 8 devices"),
        ({"fsdp": -1, "tensor": 3}, "fsdp=-1, context=1, tensor=3 does not fit 8 devices"),
        ({"data": -1, "tensor": -1}, "data=-1, fsdp=1, context=1, tensor=-1 does not fit 8 devices"),
        ({"data": -1, "fsdp": -1, "tensor": 3}, "tensor=3 does not fit 8 devices"),
        ({"fsdp": -1, "tensor": 0}, "tensor=0 does not fit 8 devices"),
        ({"data": -2, "fsdp": -4}, "does not fit 8 devices"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_mesh(sizes)


@pytest.mark.parametrize(
    ("shape", "axes", "spec"),
    [
        ((16, 24), ("embed", "mlp"), P("fsdp", "tensor")),
        ((24, 16), ("heads", "embed"), P("tensor", "fsdp")),
        ((16, 24), ("embed", None), P("fsdp", None)),
        ((3, 3, 16, 24), (None, None, "embed", "mlp"), P(None, None, "fsdp", "tensor")),
        # A mesh axis is used once.
        ((16, 16), ("embed", "embed"), P("fsdp", None)),
        # What does not divide stays whole, and fsdp takes another dimension.
        ((6, 24), ("embed", None), P(None, "fsdp")),
        ((16, 25), ("embed", "mlp"), P("fsdp", None)),
        ((16, 25), ("mlp", "embed"), P("tensor", None)),
        ((6, 24), ("embed", "mlp"), P(None, "tensor")),
        ((6, 7), ("embed", None), P(None, None)),
        ((16, 24), (None, None), P("fsdp", None)),
        # Vectors are replicated, stacked ones too.
        ((64,), ("embed",), P()),
        ((8, 64), ("layers", None), P()),
        # The axis of the layers is never cut.
        ((8, 16, 24), ("layers", "embed", "mlp"), P(None, "fsdp", "tensor")),
        ((8, 6, 7), ("layers", "embed", "mlp"), P(None, None, None)),
    ],
)
def test_rules(shape: tuple[int, ...], axes: tuple[str | None, ...], spec: P) -> None:
    assert param_spec(shape, axes, make_mesh(MESH)) == spec


@pytest.mark.parametrize(
    "make",
    [
        lambda rngs: NextDiT(NextDiTConfig.next_dit_2p6b(), rngs=rngs),
        lambda rngs: Gemma2(Gemma2Config.gemma2_2b(), rngs=rngs),
        lambda rngs: ViT(ViTConfig.vits16plus(), rngs=rngs),
        lambda rngs: Decoder(DecoderConfig.svg(), rngs=rngs),
    ],
    ids=["next_dit", "gemma2", "vit", "decoder"],
)
@pytest.mark.parametrize("sizes", [{"fsdp": 8}, MESH], ids=str)
def test_no_released_weight_is_whole_on_a_device(make: Callable[[nnx.Rngs], Any], sizes: dict[str, int]) -> None:
    mesh, network = make_mesh(sizes), Network(make)
    shardings = param_shardings(network.shapes, network.axes, mesh)
    for name, struct in network.shapes.items():
        assert not name.startswith("layers.") or network.axes[name][0] == "layers", name
        local = shardings[name].shard_shape(struct.shape)
        if network.axes[name][0] == "layers":
            assert local[0] == struct.shape[0], f"{name}: its layers are cut"
        if name.endswith(".kernel"):
            assert np.prod(local) * mesh.shape["fsdp"] <= np.prod(struct.shape), name


def test_batches_are_split_over_data_and_fsdp() -> None:
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    batch = {"patches": np.arange(8 * 3).reshape(8, 3).astype(np.uint8), "grid": np.ones((8, 2), np.int32)}
    arrays = to_devices(batch, mesh)
    for name, value in batch.items():
        np.testing.assert_array_equal(arrays[name], value)
        assert arrays[name].dtype == value.dtype
        assert {shard.data.shape[0] for shard in arrays[name].addressable_shards} == {2}


def test_activations_are_kept_split_where_a_mesh_is_set() -> None:
    mesh = make_mesh({"fsdp": 4, "context": 2})
    x = jnp.ones((8, 6, 2))
    assert constrain_tokens(x) is x
    with jax.set_mesh(mesh):
        split = jax.jit(lambda x: constrain_tokens(x * 2))(x)
        odd_tokens = jax.jit(lambda x: constrain_tokens(x * 2))(x[:, :5])
        odd_batch = jax.jit(lambda x: constrain_tokens(x * 2))(x[:3])
    assert split.sharding.shard_shape(split.shape) == (2, 3, 2)
    assert odd_tokens.sharding.shard_shape(odd_tokens.shape) == (2, 5, 2)
    assert odd_batch.sharding.shard_shape(odd_batch.shape) == (3, 6, 2)


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"data": 2, "fsdp": 4}, {"fsdp": 4, "tensor": 2}], ids=str)
def test_gradients_of_gathered_kernels_come_back_scattered(sizes: dict[str, int]) -> None:
    mesh = make_mesh(sizes)
    axes, batch = ("embed", "mlp"), NamedSharding(mesh, P(("data", "fsdp")))
    at = NamedSharding(mesh, param_spec((64, 32), axes, mesh))
    w = jax.device_put(jax.random.normal(jax.random.key(0), (64, 32)), at)
    x = jax.device_put(jax.random.normal(jax.random.key(1), (8, 64)), batch)

    def loss(w: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(x @ gathered(w, axes, jnp.float32)))

    with jax.set_mesh(mesh):
        whole = jax.jit(lambda w: gathered(w, axes, jnp.bfloat16), in_shardings=at)(w)
        gradient = jax.jit(jax.grad(loss), in_shardings=(at, batch))(w, x)
    assert whole.dtype == jnp.bfloat16
    assert "fsdp" not in whole.sharding.spec
    assert whole.sharding.shard_shape(whole.shape) == (64, 32 // mesh.shape["tensor"])
    assert gradient.sharding.is_equivalent_to(at, 2)
    assert_close(gradient, 2 * x.T @ (x @ w), 1e-5)


def test_where_nothing_is_split_a_kernel_is_only_cast() -> None:
    w = jnp.ones((4, 4))
    assert gathered(w, ("embed", "mlp"), jnp.float32) is w
    assert gathered(w, ("embed", "mlp"), jnp.bfloat16).dtype == jnp.bfloat16
