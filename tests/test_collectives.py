"""What is read from compiled programs: those that XLA makes for eight CPU devices and for TPUs, and forms by hand."""

from __future__ import annotations

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from svg_jax.collectives import Collective, by_kind, collectives, replica_groups, sent

TWO_SLICES = [0, 0, 0, 0, 1, 1, 1, 1]


@pytest.fixture
def mesh() -> Mesh:
    return jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def module(body: str, *computations: str) -> str:
    """The text of a module with one entry."""
    return "\n\n".join(["HloModule test", *computations, f"ENTRY %main (p: f32[8,16]) -> f32[] {{\n{body}\n}}"])


def only(hlo: str, **settings: object) -> Collective:
    (found,) = collectives(hlo, **settings)  # type: ignore[arg-type]
    return found


# What XLA makes of real programs.


def test_a_stack_of_layers_on_eight_devices(mesh: Mesh) -> None:
    def loss(w: jax.Array, x: jax.Array) -> jax.Array:
        def layer(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
            return jax.lax.with_sharding_constraint(jnp.tanh(x @ w), P(("data", "fsdp"))), None

        return jnp.mean(jax.lax.scan(layer, x, w)[0])

    w = jax.ShapeDtypeStruct((3, 64, 64), jnp.float32, sharding=NamedSharding(mesh, P(None, "fsdp")))
    x = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=NamedSharding(mesh, P(("data", "fsdp"))))
    with jax.set_mesh(mesh):
        found = collectives(jax.jit(jax.grad(loss)).lower(w, x).compile().as_text(), TWO_SLICES)
    weight = 64 * 64 * 4
    gathers = [one for one in found if one.kind == "all-gather"]
    assert [(one.bytes, one.group, one.times, one.between_slices) for one in gathers] == [
        (weight * 3 / 4, 4, 3, False)
    ] * 2
    (reduced,) = [one for one in found if one.kind == "all-reduce" and one.bytes > 100]
    assert (reduced.bytes, reduced.group, reduced.times, reduced.between_slices) == (2 * weight * 7 / 8, 8, 3, True)
    assert by_kind(found)["ici"] == {"all-gather": 2 * 3 * weight * 3 // 4}


def test_every_kind_and_every_loop(mesh: Mesh) -> None:
    def work(x: jax.Array, n: jax.Array) -> jax.Array:
        x = jax.lax.fori_loop(0, n, lambda _, x: jax.lax.ppermute(x, "fsdp", [(0, 1), (1, 2), (2, 3), (3, 0)]), x)
        halved = lambda _, x: jax.lax.psum(x, "data") / 2  # noqa: E731
        x = jax.lax.fori_loop(2, 9, lambda _, x: jax.lax.fori_loop(0, 5, halved, x), x)
        x = jax.lax.cond(x[0, 0] > 0, lambda x: jax.lax.all_gather(x, "fsdp").sum(0), lambda x: x, x)
        x = jax.lax.all_to_all(x, "data", 0, 0, tiled=True)
        return jax.lax.psum_scatter(x, "fsdp", scatter_dimension=1, tiled=True)

    x = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=NamedSharding(mesh, P(("data", "fsdp"))))
    split = P(("data", "fsdp"))
    manual = jax.shard_map(work, mesh=mesh, in_specs=(split, P()), out_specs=split, check_vma=False)
    with jax.set_mesh(mesh):
        text = jax.jit(manual).lower(x, jax.ShapeDtypeStruct((), jnp.int32)).compile().as_text()
    size = 2 * 64 * 4  # of a device
    found = {one.kind: one for one in collectives(text, TWO_SLICES, unknown_trips=11)}
    assert {kind: (one.bytes, one.group, one.times, one.between_slices) for kind, one in found.items()} == {
        "collective-permute": (size, 2, 11, False),
        "all-reduce": (size, 2, 7 * 5, True),
        "all-gather": (3 * size, 4, 1, False),
        "all-to-all": (size // 2, 2, 1, True),
        "reduce-scatter": (size * 3 // 4, 4, 1, False),
    }
    assert found["all-reduce"].total == 35 * size


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("slices", [1, 2])
def test_a_two_level_step_for_a_tpu_sends_the_least(slices: int, uncached: None) -> None:
    from svg_jax.parallel import gathered, make_mesh
    from svg_jax.topologies import topology_devices

    devices = topology_devices("v5e:2x4" if slices == 1 else "v5e:2x2", slices)
    mesh = make_mesh({"data": 2, "fsdp": 4}, devices)
    layers, width, hidden = 3, 512, 2048

    def loss(weights: tuple[jax.Array, ...], x: jax.Array) -> jax.Array:
        def layer(x: jax.Array, w: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
            up, down = (gathered(one, ("embed", None), jnp.bfloat16) for one in w)
            return jax.lax.with_sharding_constraint(x + jax.nn.gelu(x @ up) @ down, P(("data", "fsdp"))), None

        y, _ = jax.lax.scan(jax.checkpoint(layer, prevent_cse=False), x, weights)
        return jnp.mean(jnp.square(y.astype(jnp.float32)))

    at = NamedSharding(mesh, P(None, "fsdp"))
    weights = tuple(
        jax.ShapeDtypeStruct((layers, *shape), jnp.float32, sharding=at) for shape in ((width, hidden), (hidden, width))
    )
    x = jax.ShapeDtypeStruct((8 * 512, width), jnp.bfloat16, sharding=NamedSharding(mesh, P(("data", "fsdp"))))
    with jax.set_mesh(mesh):
        text = jax.jit(jax.grad(loss), out_shardings=(at, at)).lower(weights, x).compile().as_text()
    found = collectives(text, [slices and (i // 4) * (slices - 1) for i in range(8)])
    params = 2 * layers * width * hidden
    table = by_kind(found)
    # Gathered in bfloat16 for the forward and for the backward pass, scattered over `fsdp`, then summed over `data`.
    assert table["ici"]["all-gather"] == 2 * params * 2 * 3 / 4
    assert table["ici"]["reduce-scatter"] == params * 2 * 3 / 4
    across = table["ici" if slices == 1 else "dcn"]["all-reduce"]
    assert across == pytest.approx(sent("all-reduce", params / 4 * 2, 2), rel=0.01)


# Forms by hand.


def test_formulas_of_a_ring() -> None:
    assert sent("all-gather", 10, 4) == 30
    assert sent("reduce-scatter", 40, 4) == 30
    assert sent("all-reduce", 40, 4) == 60
    assert sent("all-to-all", 40, 4) == 30
    assert sent("collective-permute", 40, 2) == 40


@pytest.mark.parametrize(
    ("written", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("replica_groups=[4,2]<=[2,2,2]T(0,2,1)", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("replica_groups=mesh['a'=4,'b'=2] {'b'}", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("replica_groups=mesh['a'=4,'b'=2] {'a'}", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("replica_groups=mesh['a'=2,'b'=1,'c'=2], device_ids=([2,2]T(1,0)) {'a'}", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", [[0, 1, 2, 3]]),
        ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
        ("dimensions={0}", None),
    ],
)
def test_replica_groups(written: str, groups: list[list[int]] | None) -> None:
    assert replica_groups(f", channel_id=1, {written}, dimensions={{0}}, use_global_device_ids=true") == groups


def test_start_and_done_are_one() -> None:
    found = only(
        module(
            "  %p = f32[8,16]{1,0} parameter(0)\n"
            "  %s = (f32[8,16]{1,0}, f32[32,16]{1,0:T(8,128)(2,1)}) all-gather-start(%p), replica_groups={{0,1,2,3}}\n"
            "  ROOT %d = f32[32,16]{1,0} all-gather-done(%s)"
        )
    )
    assert (found.kind, found.bytes, found.asynchronous) == ("all-gather", 3 * 8 * 16 * 4, True)


def test_asynchronous_calls() -> None:
    inner = (
        "%wrapped (q: f32[8,16]) -> f32[2,16] {\n"
        "  %q = f32[8,16]{1,0} parameter(0)\n"
        "  ROOT %r = f32[2,16]{1,0} reduce-scatter(%q), replica_groups=[1,4]<=[4], to_apply=%add\n}"
    )
    found = only(
        module(
            "  %p = f32[8,16]{1,0} parameter(0)\n"
            "  %s = ((f32[8,16]), f32[2,16], u32[]) async-start(%p), calls=%wrapped\n"
            "  %u = ((f32[8,16]), f32[2,16], u32[]) async-update(%s), calls=%wrapped\n"
            "  ROOT %d = f32[2,16]{1,0} async-done(%u), calls=%wrapped",
            inner,
        )
    )
    assert (found.kind, found.bytes, found.asynchronous) == ("reduce-scatter", 8 * 16 * 4 * 3 / 4, True)


def test_a_gather_carried_through_fusions_is_one() -> None:
    """On TPU, an asynchronous gather is started in one fusion, moved on in others and ended in a last one."""
    gather = (
        "  %p.{0} = bf16[8,16]{{1,0}} parameter(0)\n"
        "  %g.{0} = bf16[32,16]{{1,0:T(8,128)(2,1)}} all-gather(%p.{0}), replica_groups={{{{0,1,2,3}}}}, "
        'frontend_attributes={{chain_id="1"}}\n'
    )
    piece = "%piece.{0} (p.{0}: bf16[8,16]) -> bf16[32,16] {{\n" + gather + "{1}\n}}"
    ends = [
        '  ROOT %c.0 = (bf16[8,16], bf16[32,16]{:S(2)}) custom-call(%g.0), custom_call_target="AsyncCollectiveStart"',
        "  ROOT %t.1 = (bf16[8,16], bf16[32,16]) tuple(%p.1, %g.1)",
        '  ROOT %c.2 = bf16[32,16] custom-call(%p.2, %g.2), custom_call_target="AsyncCollectiveDone"',
    ]
    calls = "\n".join(
        f"  %f.{i} = bf16[32,16]{{1,0}} fusion(%p), kind=kCustom, calls=%piece.{i}" for i in range(len(ends))
    )
    pieces = [piece.format(i, end) for i, end in enumerate(ends)]
    found = only(module("  %p = bf16[8,16]{1,0} parameter(0)\n" + calls, *pieces))
    assert (found.bytes, found.times, found.asynchronous) == (3 * 8 * 16 * 2, 1, True)


def test_an_all_reduce_that_is_sliced_in_its_fusion_is_a_reduce_scatter() -> None:
    fused = (
        "%all-reduce-scatter.2 (a: bf16[8,16], b: bf16[4,4]) -> (bf16[2,16], bf16[1,4]) {\n"
        "  %a = bf16[8,16]{1,0} parameter(0)\n"
        "  %b = bf16[4,4]{1,0} parameter(1)\n"
        "  %r = (bf16[8,16], /*index=1*/bf16[4,4]) all-reduce(%a, %b), replica_groups={{0,1,2,3}}, to_apply=%add\n"
        "  ROOT %t = (bf16[2,16], bf16[1,4]) tuple(%r, %r)\n}"
    )
    body = (
        "  %p = bf16[8,16] parameter(0)\n  ROOT %f = bf16[2,16] fusion(%p), kind=kCustom, calls=%all-reduce-scatter.2"
    )
    found = only(module(body, fused))
    assert (found.kind, found.bytes) == ("reduce-scatter", (8 * 16 + 4 * 4) * 2 * 3 / 4)


def test_transfers_between_slices() -> None:
    target = 'frontend_attributes={_xla_megascale_target="{1:3}x{0:7}",_xla_megascale_transfer_type="ALL_REDUCE"}'
    found = only(
        module(
            "  %p = bf16[8,16]{1,0} parameter(0)\n  %t = token[] after-all()\n"
            f"  %s = (bf16[8,16]{{1,0}}, u32[], token[]) send(%p, %t), is_host_transfer=true, {target}\n"
            f"  %r = (bf16[8,16]{{1,0}}, u32[], token[]) recv(%t), is_host_transfer=true, {target}\n"
            "  ROOT %d = token[] send-done(%s), is_host_transfer=true"
        )
    )
    assert (found.kind, found.group, found.between_slices) == ("all-reduce", 3, True)
    assert found.bytes == round(2 * 8 * 16 * 2 * 2 / 3)


@pytest.mark.parametrize(
    ("start", "bound", "direction", "step", "trips"),
    [(0, 26, "LT", 1, 26), (1, 26, "LT", 1, 25), (0, 9, "LE", 2, 5), (7, 0, "GT", -1, 7), (7, 0, "GE", -2, 4)],
)
def test_trips_of_a_loop(start: int, bound: int, direction: str, step: int, trips: int) -> None:
    """TPU programs note no trip count, and loops whose first turn was taken out begin at one."""
    condition = (
        "%cond (c: (s32[], f32[8,16])) -> pred[] {\n"
        f"  %bound = s32[]{{:T(128)}} constant({bound})\n"
        "  %c = (s32[]{:T(128)}, f32[8,16]{1,0}) parameter(0)\n"
        "  %i = s32[] get-tuple-element(%c), index=0\n"
        f"  ROOT %lt = pred[] compare(%i, %bound), direction={direction}\n}}"
    )
    body = (
        "%body (b: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {\n"
        "  %b = (s32[]{:T(128)}, f32[8,16]{1,0}) parameter(0)\n"
        f"  %step = s32[] constant({step})\n"
        "  %j = s32[] get-tuple-element(%b), index=0\n"
        "  %x = f32[8,16] get-tuple-element(%b), index=1\n"
        "  %next = s32[] add(%j, %step)\n"
        "  %y = f32[8,16] all-reduce(%x), replica_groups={{0,1}}, to_apply=%add\n"
        "  ROOT %out = (s32[], f32[8,16]) tuple(%next, %y)\n}"
    )
    entry = (
        f"  %p = f32[8,16] parameter(0)\n  %zero = s32[] constant({start})\n  %copied = s32[] copy(%zero)\n"
        "  %t = (s32[], f32[8,16]) tuple(%copied, %p)\n"
        "  ROOT %w = (s32[], f32[8,16]) while(%t), condition=%cond, body=%body"
    )
    found = only(module(entry, condition, body))
    assert (found.times, found.total) == (trips, trips * 8 * 16 * 4)
    noted = entry + ', backend_config={"known_trip_count":{"n":"5"}}'
    assert only(module(noted, condition, body)).times == 5


def test_attributes_of_kernels_span_lines() -> None:
    found = only(
        module(
            "  %p = f32[8,16]{1,0} parameter(0)\n"
            "  %k = f32[8,16] custom-call(%p), frontend_attributes={kernel_metadata={\n"
            '"xprof_metadata":"{\\"block_q\\": 640}"\n'
            '}}, metadata={op_name="splash"}\n'
            "  ROOT %r = f32[8,16] all-reduce(%k), replica_groups={{0,1}}, to_apply=%add"
        )
    )
    assert found.bytes == 8 * 16 * 4


def test_loops_of_unknown_length_say_so() -> None:
    condition = '%cond (c: f32[8,16]) -> pred[] {\n  ROOT %c = pred[] custom-call(), custom_call_target="ask"\n}'
    body = (
        "%body (b: f32[8,16]) -> f32[8,16] {\n  %b = f32[8,16] parameter(0)\n"
        "  ROOT %r = f32[8,16] all-reduce(%b), replica_groups={{0,1}}, to_apply=%add\n}"
    )
    entry = "  %p = f32[8,16] parameter(0)\n  ROOT %w = f32[8,16] while(%p), condition=%cond, body=%body"
    found = only(module(entry, condition, body), unknown_trips=3)
    assert (found.times, found.counted) == (3, False)


def test_a_program_for_one_device_sends_nothing() -> None:
    text = jax.jit(lambda x: x @ x).lower(jnp.ones((4, 4))).compile().as_text()
    assert collectives(text) == []
    assert by_kind([]) == {"ici": {}, "dcn": {}}


def test_a_text_of_something_else_is_refused() -> None:
    with pytest.raises(ValueError, match="no ENTRY computation"):
        collectives("module @jit_f { }")


def test_sizes_of_types() -> None:
    text = module(
        "  %p = s4[3]{0} parameter(0)\n  %q = f8e4m3fn[5,2] parameter(1)\n  %s = pred[8] parameter(2)\n"
        "  ROOT %r = (s4[3], f8e4m3fn[5,2], pred[8]) all-to-all(%p, %q, %s), replica_groups={{0,1}}"
    )
    assert only(text).bytes == (2 + 10 + 8) / 2
