"""A scanned stack is the loop over its layers, whatever is recomputed."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from svg_jax.nn.functional import Network, Params
from svg_jax.nn.linear import linear
from svg_jax.nn.stack import REMAT, scan_layers, stacked
from tests.vectors import assert_close

WIDTH, LENGTH = 8, 4
traces: list[int] = []


class Layer(nnx.Module):
    """x + gain * tanh(x W + b + shift)."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.linear = linear(WIDTH, WIDTH, ("embed", "mlp"), rngs=rngs)

    def __call__(self, x: jax.Array, shift: jax.Array, gain: jax.Array | float = 1.0) -> jax.Array:
        traces.append(1)
        return x + gain * jnp.tanh(self.linear(x) + shift)


@functools.cache
def stack(length: int = LENGTH) -> tuple[Network[Layer], Params]:
    network = Network(lambda rngs: stacked(lambda rngs: Layer(rngs=rngs), length, rngs=rngs))
    return network, network.init(jax.random.key(0))


def data() -> tuple[jax.Array, jax.Array, jax.Array]:
    x, shift = jax.random.normal(jax.random.key(1), (2, 3, WIDTH))
    return x, shift, jnp.linspace(0.5, 2.0, LENGTH)


def loop(layers: int, gains: jax.Array | None = None) -> list[jax.Array]:
    """The output of each of the first layers, one after the other."""
    x, shift, _ = data()
    single = Network(lambda rngs: Layer(rngs=rngs))
    outputs = []
    for i in range(layers):
        layer = single({name: value[i] for name, value in stack()[1].items()})
        x = layer(x, shift) if gains is None else layer(x, shift, gains[i])
        outputs.append(x)
    return outputs


@pytest.mark.parametrize("stop", [None, 1, LENGTH - 1, LENGTH])
def test_scan_is_the_loop(stop: int | None) -> None:
    network, params = stack()
    x, shift, _ = data()
    y, collected = scan_layers(network(params), x, shift, stop=stop)
    assert collected is None
    assert_close(y, loop(stop or LENGTH)[-1], 1e-6)


@pytest.mark.parametrize("stop", [None, 2])
def test_every_output_can_be_collected(stop: int | None) -> None:
    network, params = stack()
    x, shift, _ = data()
    y, collected = scan_layers(network(params), x, shift, stop=stop, collect=True)
    assert collected is not None
    assert_close(collected, np.stack(loop(stop or LENGTH)), 1e-6)
    np.testing.assert_array_equal(collected[-1], y)


@pytest.mark.parametrize("stop", [None, 3])
def test_each_layer_gets_its_own_entry(stop: int | None) -> None:
    network, params = stack()
    x, shift, gains = data()
    y, _ = scan_layers(network(params), x, shift, per_layer=(gains,), stop=stop)
    assert_close(y, loop(stop or LENGTH, gains)[-1], 1e-6)


def test_layers_past_the_stop_are_not_read() -> None:
    network, params = stack()
    x, shift, _ = data()
    spoilt = {name: value.at[2:].set(jnp.nan) for name, value in params.items()}
    assert_close(scan_layers(network(spoilt), x, shift, stop=2)[0], loop(2)[-1], 1e-6)


def gradients(remat: str, stop: int | None = None) -> tuple[jax.Array, Params]:
    network, params = stack()
    x, shift, gains = data()

    @jax.jit
    @jax.value_and_grad
    def loss(params: Params) -> jax.Array:
        return jnp.sum(scan_layers(network(params), x, shift, per_layer=(gains,), stop=stop, remat=remat)[0] ** 2)

    return loss(params)


@pytest.mark.parametrize("stop", [None, 2])
@pytest.mark.parametrize("remat", REMAT)
def test_what_is_recomputed_changes_no_gradient(remat: str, stop: int | None) -> None:
    (value, grads), (expected_value, expected) = gradients(remat, stop), gradients("none", stop)
    assert_close(value, expected_value, 1e-6)
    for name in expected:
        assert np.asarray(grads[name][: stop or LENGTH]).any()
        assert_close(grads[name], expected[name], 1e-6, name)


@pytest.mark.parametrize(("remat", "only_inputs"), [("none", False), ("full", True)])
def test_full_recomputation_keeps_the_input_of_each_layer_only(remat: str, only_inputs: bool) -> None:
    network, params = stack()
    x = jnp.ones((32, WIDTH))

    def loss(params: Params, x: jax.Array) -> jax.Array:
        return jnp.sum(scan_layers(network(params), x, jnp.zeros((1, WIDTH)), remat=remat)[0])

    kept = jax.eval_shape(lambda params, x: jax.vjp(loss, params, x)[1], params, x)
    activations = [leaf for leaf in jax.tree.leaves(kept) if leaf.shape == (LENGTH, *x.shape)]
    assert (len(activations) == 1) == only_inputs


def test_a_layer_is_traced_as_often_whatever_the_depth() -> None:
    counts = []
    for length in (2, 6):
        network, params = stack(length)
        x, shift, _ = data()
        traces.clear()
        jax.jit(lambda params, x, network=network, shift=shift: scan_layers(network(params), x, shift)[0])(params, x)
        counts.append(len(traces))
    assert counts[0] == counts[1]


def test_layers_start_different_and_named() -> None:
    network, params = stack()
    kernels = params["linear.kernel"]
    assert kernels.shape == (LENGTH, WIDTH, WIDTH)
    assert len({float(kernel[0, 0]) for kernel in kernels}) == LENGTH
    assert network.axes["linear.kernel"] == ("layers", "embed", "mlp")


def test_an_unknown_policy_is_refused() -> None:
    network, params = stack()
    x, shift, _ = data()
    with pytest.raises(
        ValueError, match="unknown remat policy 'ful': choose one of none, dots, attention, full, offload"
    ):
        scan_layers(network(params), x, shift, remat="ful")


def test_an_empty_stack_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one layer, got 0"):
        stacked(lambda rngs: Layer(rngs=rngs), 0, rngs=nnx.Rngs(0))
