"""A network as a function of named parameters: names, shapes, axes, sharded initialisation, clear mismatches."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from svg_jax.nn.functional import Network, mismatch
from svg_jax.nn.linear import linear
from svg_jax.nn.norms import RMSNorm
from svg_jax.nn.stack import scan_layers, stacked
from svg_jax.parallel import make_mesh, param_shardings

DIM, HIDDEN, LENGTH = 16, 24, 3


class Layer(nnx.Module):
    """norm, then one linear map."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.norm = RMSNorm(DIM, eps=1e-6)
        self.up = linear(DIM, DIM, ("embed", "mlp"), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.up(self.norm(x))


class Model(nnx.Module):
    """A stack, and a list with a function in it."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.layers = stacked(lambda rngs: Layer(rngs=rngs), LENGTH, rngs=rngs)
        self.head = nnx.List([jax.nn.silu, linear(DIM, HIDDEN, (None, "mlp"), use_bias=False, rngs=rngs)])

    def __call__(self, x: jax.Array) -> jax.Array:
        x, _ = scan_layers(self.layers, x)
        for layer in self.head:
            x = layer(x)
        return x


NETWORK = Network(lambda rngs: Model(rngs=rngs))
SHAPES = {
    "layers.norm.scale": (LENGTH, DIM),
    "layers.up.kernel": (LENGTH, DIM, DIM),
    "layers.up.bias": (LENGTH, DIM),
    "head.1.kernel": (DIM, HIDDEN),
}


def test_names_shapes_and_axes() -> None:
    assert {name: struct.shape for name, struct in NETWORK.shapes.items()} == SHAPES
    assert {struct.dtype for struct in NETWORK.shapes.values()} == {jnp.dtype("float32")}
    assert all(isinstance(struct, jax.ShapeDtypeStruct) for struct in NETWORK.shapes.values())
    assert NETWORK.axes["layers.up.kernel"] == ("layers", "embed", "mlp")
    assert NETWORK.axes["head.1.kernel"] == (None, "mlp")
    for name, axes in NETWORK.axes.items():
        assert len(axes) == len(SHAPES[name])
        assert (axes[0] == "layers") == name.startswith("layers."), name


def test_a_network_is_the_same_under_a_mesh() -> None:
    """NNX would take logical axes for those of the mesh."""
    with jax.set_mesh(make_mesh({"fsdp": 8})):
        found = Network(lambda rngs: Model(rngs=rngs))
        assert found.shapes == NETWORK.shapes
        assert found.axes == NETWORK.axes


def test_init_makes_each_parameter_where_it_lives() -> None:
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    shardings = param_shardings(NETWORK.shapes, NETWORK.axes, mesh)
    params = jax.jit(NETWORK.init, out_shardings=shardings)(jax.random.key(0))
    local = {name: value.addressable_shards[0].data.shape for name, value in params.items()}
    assert local["layers.up.kernel"] == (LENGTH, DIM // 4, DIM // 2)
    assert local["head.1.kernel"] == (DIM // 4, HIDDEN // 2)
    whole = NETWORK.init(jax.random.key(0))
    for name, value in params.items():
        assert value.sharding.is_equivalent_to(shardings[name], value.ndim)
        np.testing.assert_allclose(value, whole[name], rtol=1e-6, err_msg=name)


def test_calls_are_pure_and_differentiable() -> None:
    params = NETWORK.init(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (2, DIM))
    y, grads = jax.jit(jax.value_and_grad(lambda params: jnp.sum(NETWORK(params)(x) ** 2)))(params)
    assert grads.keys() == params.keys()
    assert all(np.asarray(g).any() for g in grads.values())
    assert float(y) == pytest.approx(float(jnp.sum(NETWORK(params)(x) ** 2)), rel=1e-6)
    doubled = NETWORK({**params, "head.1.kernel": 2 * params["head.1.kernel"]})(x)
    np.testing.assert_allclose(doubled, 2 * NETWORK(params)(x), rtol=1e-6)


def test_a_module_can_be_made_of_shapes_alone() -> None:
    x = jax.ShapeDtypeStruct((2, DIM), jnp.float32)
    y = jax.eval_shape(lambda params, x: NETWORK(params)(x), NETWORK.shapes, x)
    assert y.shape == (2, HIDDEN)


def test_another_architecture_is_named() -> None:
    params = dict(NETWORK.shapes)
    assert mismatch(NETWORK.shapes, params) is None
    params["head.1.kernel"] = jax.ShapeDtypeStruct((DIM, 7), jnp.float32)
    params["extra"] = params.pop("layers.up.bias")
    with pytest.raises(ValueError, match="another architecture") as error:
        NETWORK(params)  # type: ignore[arg-type]
    assert "missing layers.up.bias" in str(error.value)
    assert "unexpected extra" in str(error.value)
    assert f"head.1.kernel ({DIM}, 7) instead of ({DIM}, {HIDDEN})" in str(error.value)
    assert "\n" not in str(error.value)


def test_long_lists_are_cut_short() -> None:
    expected = {f"p{i}": jax.ShapeDtypeStruct((1,), jnp.float32) for i in range(9)}
    assert mismatch(expected, {}) == ("the parameters are of another architecture: missing p0, p1, p2, p3 and 5 more")


def test_shapes_carry_shardings() -> None:
    mesh = make_mesh({"fsdp": 8})
    shardings = param_shardings(NETWORK.shapes, NETWORK.axes, mesh)
    assert shardings["layers.up.kernel"] == NamedSharding(mesh, PartitionSpec(None, "fsdp", "tensor"))
    assert shardings["layers.norm.scale"] == NamedSharding(mesh, PartitionSpec())
