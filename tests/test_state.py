"""What an update does to parameters, average and moments, and where each of them lives."""

from __future__ import annotations

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from svg_jax.nn.functional import Params
from svg_jax.parallel import make_mesh, param_shardings, replicated
from svg_jax.state import TrainState, adamw, learning_rate, on_device, state_shardings
from svg_jax.topologies import topology_devices
from tests.vectors import assert_close

HYPER = {"b1": 0.9, "b2": 0.95, "eps": 1e-15, "weight_decay": 0.1, "clip": 2.0}
SHAPES = {"layer.kernel": (16, 8), "layer.bias": (8,), "layers.kernel": (3, 16, 8)}
AXES = {"layer.kernel": ("embed", "mlp"), "layer.bias": (None,), "layers.kernel": ("layers", "embed", "mlp")}


def random_params(seed: int, scale: float = 1.0) -> Params:
    draw = np.random.default_rng(seed)
    return {name: jnp.asarray(scale * draw.normal(size=shape), jnp.float32) for name, shape in SHAPES.items()}


def optimiser(lr: float = 0.01) -> optax.GradientTransformation:
    return adamw(optax.constant_schedule(lr), **HYPER)


def test_the_average_follows_its_formula() -> None:
    """An average that starts at the parameters: e <- d e + (1 - d) p, after the update."""
    state = TrainState.create(random_params(0), optax.sgd(0.5), jax.random.key(0), frozen={"a": jnp.ones(2)})
    expected = {name: np.asarray(value, np.float64) for name, value in state.ema.items()}
    params = dict(expected)
    for i in range(1, 4):
        grads = random_params(i)
        state = state.apply(grads, optax.sgd(0.5), ema_decay=0.8)
        for name in expected:
            params[name] = params[name] - 0.5 * np.asarray(grads[name])
            expected[name] = 0.8 * expected[name] + 0.2 * params[name]
    for name in expected:
        assert_close(state.params[name], params[name], 1e-6, name)
        assert_close(state.ema[name], expected[name], 1e-6, name)
    assert int(state.step) == 3
    assert jax.random.key_data(state.key).tolist() == jax.random.key_data(jax.random.key(0)).tolist()
    assert state.frozen["a"].tolist() == [1.0, 1.0]


def test_a_fresh_state_can_be_donated() -> None:
    """Parameters and average are two buffers, though equal."""
    create = functools.partial(TrainState.create, optimiser=optimiser(), key=jax.random.key(0))
    state = jax.jit(create)(random_params(0))
    step = jax.jit(lambda state, grads: state.apply(grads, optimiser(), 0.9), donate_argnums=0)
    assert int(step(state, random_params(1)).step) == 1
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))


def test_adamw_follows_its_paper() -> None:
    """Loshchilov and Hutter, algorithm 2, on clipped gradients, with the decay multiplied by the learning rate."""
    lr, b1, b2 = 0.01, HYPER["b1"], HYPER["b2"]
    state = TrainState.create(random_params(0), optimiser(lr), jax.random.key(0))
    p = {name: np.asarray(value, np.float64) for name, value in state.params.items()}
    m, v = ({name: np.zeros(shape) for name, shape in SHAPES.items()} for _ in range(2))
    for i in range(1, 5):
        grads = random_params(i, scale=0.1 * i)  # below and above the clip
        norm = np.sqrt(sum(np.sum(np.asarray(g, np.float64) ** 2) for g in grads.values()))
        state = state.apply(grads, optimiser(lr), ema_decay=0.9)
        for name, gradient in grads.items():
            g = np.asarray(gradient, np.float64) * min(1.0, HYPER["clip"] / norm)
            m[name] = b1 * m[name] + (1 - b1) * g
            v[name] = b2 * v[name] + (1 - b2) * g**2
            step = m[name] / (1 - b1**i) / (np.sqrt(v[name] / (1 - b2**i)) + HYPER["eps"])
            p[name] = p[name] - lr * (step + HYPER["weight_decay"] * p[name])
    for name in p:
        assert_close(state.params[name], p[name], 1e-5, name)


@pytest.mark.parametrize(("norm", "kept"), [(8.0, 2.0), (0.5, 0.5)])
def test_gradients_are_clipped_by_their_global_norm(norm: float, kept: float) -> None:
    params = random_params(0)
    grads = random_params(1)
    grads = jax.tree.map(lambda g: g * norm / optax.tree.norm(grads), grads)
    state = TrainState.create(params, optimiser(), jax.random.key(0)).apply(grads, optimiser(), 0.9)
    first_moment = optax.tree_utils.tree_get(state.opt_state, "mu")
    assert float(optax.tree.norm(first_moment)) == pytest.approx((1 - HYPER["b1"]) * kept, rel=1e-5)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.0, 1.0, 2.0, 2.0, 2.0]),
        ("linear", [0.0, 1.0, 2.0, 1.0, 0.0]),
        ("cosine", [0.0, 1.0, 2.0, 1.0, 0.0]),
    ],
)
def test_schedules_warm_up_and_decay(schedule: str, expected: list[float]) -> None:
    rate = learning_rate(lr=2.0, schedule=schedule, warmup_steps=10, num_train_steps=110)
    np.testing.assert_allclose([float(rate(step)) for step in (0, 5, 10, 60, 110)], expected, atol=1e-6)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_without_warm_up_the_first_step_has_the_full_rate(schedule: str) -> None:
    assert float(learning_rate(lr=2.0, schedule=schedule, warmup_steps=0, num_train_steps=10)(0)) == 2.0


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown schedule 'cosin': choose one of constant, linear, cosine"):
        learning_rate(lr=1.0, schedule="cosin", warmup_steps=0, num_train_steps=1)


def test_moments_live_with_their_parameters() -> None:
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    shapes = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in SHAPES.items()}
    params_at = param_shardings(shapes, AXES, mesh)
    create = functools.partial(TrainState.create, optimiser=optimiser(), key=jax.random.key(0))
    state_at = state_shardings(jax.eval_shape(create, shapes), params_at, mesh)

    split = NamedSharding(mesh, P("fsdp", "tensor"))
    for part in (
        state_at.params,
        state_at.ema,
        optax.tree_utils.tree_get(state_at.opt_state, "mu"),
        optax.tree_utils.tree_get(state_at.opt_state, "nu"),
    ):
        stacked = NamedSharding(mesh, P(None, "fsdp", "tensor"))
        assert part == {"layer.kernel": split, "layer.bias": replicated(mesh), "layers.kernel": stacked}
    assert state_at.step == state_at.key == replicated(mesh)
    state = jax.jit(create, out_shardings=state_at)(random_params(0))
    moment = optax.tree_utils.tree_get(state.opt_state, "nu")["layer.kernel"]
    assert moment.addressable_shards[0].data.shape == (4, 4)


def test_an_update_that_is_not_healthy_changes_no_bit() -> None:
    state = TrainState.create(random_params(0), optimiser(), jax.random.key(0)).apply(
        random_params(1), optimiser(), 0.9
    )
    grads = {name: jnp.full_like(value, jnp.nan) for name, value in state.params.items()}
    step = jax.jit(lambda state, grads, healthy: state.apply(grads, optimiser(), 0.9, healthy=healthy))
    after = step(state, grads, False)
    for field in ("params", "ema", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, field), getattr(state, field))
    assert (int(after.step), after.skipped.tolist()) == (2, [1, 1])
    after = step(step(after, grads, False), random_params(2), True)
    assert (int(after.step), after.skipped.tolist()) == (4, [2, 0])
    expected = state.apply(random_params(2), optimiser(), 0.9)
    for name, value in expected.params.items():
        assert_close(after.params[name], value, 1e-6, name)


def test_a_first_moment_in_bfloat16_takes_half_and_changes_the_update_little() -> None:
    half = adamw(optax.constant_schedule(0.01), **HYPER, mu_dtype="bfloat16")
    states = [TrainState.create(random_params(0), kind, jax.random.key(0)) for kind in (optimiser(), half)]
    for i in range(1, 6):
        states = [
            state.apply(random_params(i), kind, 0.9) for state, kind in zip(states, (optimiser(), half), strict=True)
        ]
    full, rounded = states
    for name, moment in optax.tree_utils.tree_get(rounded.opt_state, "mu").items():
        assert moment.dtype == jnp.bfloat16
        assert optax.tree_utils.tree_get(rounded.opt_state, "nu")[name].dtype == jnp.float32
        moved = np.abs(full.params[name] - random_params(0)[name]).max()
        difference = np.abs(full.params[name] - rounded.params[name]).max()
        assert 0 < difference < 2**-7 * moved  # bfloat16 keeps eight bits


def test_an_average_on_the_hosts_is_sharded_as_the_parameters_are() -> None:
    """It alone lives there, and an update brings it to the devices and back, to the same numbers."""
    mesh = make_mesh({"fsdp": 8})
    shapes = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in SHAPES.items()}
    params_at = param_shardings(shapes, AXES, mesh)
    create = functools.partial(TrainState.create, optimiser=optimiser(), key=jax.random.key(0))
    update = functools.partial(TrainState.apply, optimiser=optimiser(), ema_decay=0.9)
    after = {}
    for kind in (None, "pinned_host"):
        state_at = state_shardings(jax.eval_shape(create, shapes), params_at, mesh, ema_memory_kind=kind)
        state = jax.jit(create, out_shardings=state_at)(random_params(0))
        step = jax.jit(update, out_shardings=state_at, donate_argnums=0)
        for i in range(1, 3):
            state = step(state, random_params(i))
        after[kind] = state
    host, device = after["pinned_host"], after[None]
    for name, value in host.ema.items():
        assert value.sharding == params_at[name].with_memory_kind("pinned_host")
        np.testing.assert_array_equal(value, device.ema[name])
    rest = (host.params, host.opt_state, host.step, host.skipped, on_device(host.ema))
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(rest)} == {"device"}
    assert on_device(host.ema)["layer.kernel"].sharding.is_equivalent_to(params_at["layer.kernel"], 2)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu, of the extra 'aot'")
def test_an_average_on_the_hosts_leaves_its_memory_on_a_tpu_to_others(uncached: None) -> None:
    mesh = make_mesh({"fsdp": -1}, topology_devices("v5e:2x2"))
    shapes = {"layers.kernel": jax.ShapeDtypeStruct((8, 1024, 1024), jnp.float32)}
    params_at = param_shardings(shapes, {"layers.kernel": ("layers", "embed", "mlp")}, mesh)
    create = functools.partial(TrainState.create, optimiser=optimiser(), key=jax.random.key(0))
    abstract = jax.eval_shape(create, shapes)
    grads = {"layers.kernel": jax.ShapeDtypeStruct((8, 1024, 1024), jnp.float32, sharding=params_at["layers.kernel"])}
    update = functools.partial(TrainState.apply, optimiser=optimiser(), ema_decay=0.9)
    needed = {}
    for kind in (None, "pinned_host"):
        state_at = state_shardings(abstract, params_at, mesh, ema_memory_kind=kind)
        state = jax.tree.map(lambda s, at: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at), abstract, state_at)
        compiled = jax.jit(update, out_shardings=state_at, donate_argnums=0).lower(state, grads).compile()
        found = compiled.memory_analysis()
        needed[kind] = found.argument_size_in_bytes + found.temp_size_in_bytes
    share = 8 * 1024 * 1024 * 4 // mesh.size
    assert needed[None] - needed["pinned_host"] > 0.6 * share  # all but what is on its way
