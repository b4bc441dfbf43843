"""Time, traffic and arithmetic that a step needs, against sums done by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from svg_jax.chips import Chip
from svg_jax.collectives import Collective
from svg_jax.roofline import device_bytes, executed_flops, ideal_bytes, read_arguments, roofline

CHIP = Chip("toy", 100.0, 1e3, 1e3, 50.0, 20.0, 2, 5.0)


def sent(size: int, *, between: bool = False, asynchronous: bool = False, times: int = 1) -> Collective:
    return Collective("all-gather", "a", size, 4, times, between, asynchronous)


def test_parts_of_the_bound() -> None:
    collectives = [sent(10, asynchronous=True, times=3), sent(20), sent(15, between=True, asynchronous=True)]
    line = roofline(CHIP, collectives, executed_flops=400.0, model_flops=300.0, state_bytes=25.0)
    assert (line.compute, line.overlapped, line.exposed, line.dcn, line.state) == (4.0, 3.0, 2.0, 3.0, 1.0)
    assert line.bound == 4.0 + 2.0 + 3.0 + 1.0
    assert line.mfu == pytest.approx(300.0 / (100.0 * 10.0))


def test_what_overlaps_may_take_longest() -> None:
    line = roofline(CHIP, [sent(100, asynchronous=True)], executed_flops=400.0, model_flops=400.0, state_bytes=0.0)
    assert line.bound == 10.0
    assert line.dcn == 0.0


def test_a_network_without_figure_is_not_guessed() -> None:
    chip = Chip("toy", 100.0, 1e3, 1e3, 50.0, 20.0, 2, None)
    assert roofline(chip, [sent(1, between=True)], executed_flops=1, model_flops=1, state_bytes=0).dcn is None


def test_ideal_bytes() -> None:
    ideal = ideal_bytes(100, 40, item=2, devices=4, recomputed=True, micro_batches=3)
    assert ideal == {"forward": 450.0, "recomputation": 450.0, "gradients": 450.0, "frozen": 90.0}
    assert ideal_bytes(100, 0, item=4, devices=4, recomputed=False)["recomputation"] == 0.0
    assert set(ideal_bytes(100, 40, item=2, devices=1, recomputed=True).values()) == {0.0}


def count(function: object, *shapes: tuple[int, ...], unknown_trips: int = 1) -> float:
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return executed_flops(jax.jit(function).trace(*arguments).jaxpr.jaxpr, unknown_trips=unknown_trips)  # type: ignore[arg-type]


def test_products_and_convolutions() -> None:
    assert count(jnp.dot, (3, 5), (5, 7)) == 2 * 3 * 5 * 7
    assert count(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (2, 3, 5), (2, 5, 7)) == 2 * 2 * 3 * 5 * 7
    convolution = jax.lax.conv_general_dilated
    strings = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
    assert (
        count(lambda x, w: convolution(x, w, (1, 1), "SAME", **strings), (1, 8, 8, 3), (3, 3, 3, 4))
        == 2 * 8 * 8 * 4 * 3 * 3 * 3
    )


def test_loops_count_as_often_as_they_run() -> None:
    def layers(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]

    once = 2 * 4 * 8 * 8
    assert count(layers, (4, 8), (3, 8, 8)) == 3 * once

    def recomputed(x: jax.Array, w: jax.Array) -> jax.Array:
        layer = jax.checkpoint(lambda x, w: (jnp.tanh(jnp.tanh(x @ w) @ w), None), prevent_cse=False)
        return jax.lax.scan(layer, x, w)[0].sum()

    # Two products forward, both again, and two for each backward.
    assert count(jax.grad(recomputed, argnums=(0, 1)), (4, 8), (3, 8, 8)) == 3 * (2 + 2 + 4) * once


def test_loops_of_unknown_length() -> None:
    def steps(x: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda x: x[0, 0] < 0, lambda x: x @ x, x)

    assert count(steps, (4, 4), unknown_trips=7) == 7 * 2 * 4**3


def test_a_branch_counts_as_the_dearest() -> None:
    def either(x: jax.Array) -> jax.Array:
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)

    assert count(either, (4, 4)) == 2 * 2 * 4**3


def test_manual_partitions_count_on_every_device() -> None:
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    product = jax.shard_map(jnp.dot, mesh=mesh, in_specs=(P("a"), P()), out_specs=P("a"), check_vma=False)
    assert count(product, (8, 4), (4, 4)) == 2 * (2 * 8 * 4 * 4)  # cut over `a`, done twice over `b`


def test_bytes_of_a_device() -> None:
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    cut = jax.ShapeDtypeStruct((8, 6), jnp.float32, sharding=NamedSharding(mesh, P("a", "b")))
    whole = jax.ShapeDtypeStruct((5,), jnp.bfloat16, sharding=NamedSharding(mesh, P()))
    elsewhere = jax.ShapeDtypeStruct((5,), jnp.bfloat16, sharding=NamedSharding(mesh, P(), memory_kind="pinned_host"))
    assert device_bytes({"x": cut, "y": [whole, None, elsewhere]}) == 2 * 3 * 4 + 5 * 2


def test_arguments_that_are_never_read() -> None:
    arguments = ({"a": jax.ShapeDtypeStruct((2,), jnp.float32), "b": jax.ShapeDtypeStruct((3,), jnp.float32)},)

    def doubled(params: dict[str, jax.Array]) -> jax.Array:
        jnp.sum(params["b"])  # of no use to the result
        return 2 * params["a"]

    read = read_arguments(jax.jit(doubled).trace(*arguments).jaxpr.jaxpr, arguments)
    assert read == ({"a": arguments[0]["a"], "b": None},)
