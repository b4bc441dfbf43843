"""Checkpoints: everything comes back, onto any mesh; damage costs one checkpoint; a wrong network is named."""

from __future__ import annotations

import dataclasses
import functools
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh

from svg_jax.checkpoint import Checkpoints, WrongArchitecture, load_config, load_params
from svg_jax.nn.functional import Params
from svg_jax.parallel import make_mesh, param_shardings
from svg_jax.state import TrainState, adamw, state_shardings

SHAPES = {"decoder.kernel": (16, 8), "decoder.bias": (8,)}
FROZEN = {"encoder.kernel": (8, 16)}
AXES = {"decoder.kernel": ("embed", "mlp"), "decoder.bias": (None,), "encoder.kernel": ("embed", "mlp")}
CONFIG = {"seed": 3, "model": {"dim": 8, "axes": [1, 2]}, "path": None}


def structs(shapes: dict[str, tuple[int, ...]]) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}


def create(mesh: Mesh, shapes: dict[str, tuple[int, ...]] = SHAPES) -> tuple[TrainState, Callable[[], TrainState]]:
    """An abstract state placed on a mesh, and a function that makes a real one there."""
    optimiser = adamw(optax.constant_schedule(1e-2), b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.0, clip=1.0)
    begin = functools.partial(TrainState.create, optimiser=optimiser, key=jax.random.key(5))
    abstract = jax.eval_shape(lambda params, frozen: begin(params, frozen=frozen), structs(shapes), structs(FROZEN))
    params_at = param_shardings(structs(shapes | FROZEN), AXES, mesh)
    state_at = state_shardings(abstract, params_at, mesh)

    def make() -> TrainState:
        draw = np.random.default_rng(0)

        def some(shapes: dict[str, tuple[int, ...]]) -> Params:
            return {name: jnp.asarray(draw.normal(size=shape), jnp.float32) for name, shape in shapes.items()}

        state = begin(some(shapes), frozen=some(FROZEN))
        return jax.device_put(state.apply(some(shapes), optimiser, 0.9), state_at)

    placed = jax.tree.map(lambda s, at: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at), abstract, state_at)
    return placed, make


def after(state: TrainState, step: int) -> TrainState:
    """A state that says it has done `step` updates, and whose parameters show it."""
    params = jax.tree.map(lambda x: x + step, state.params)
    return dataclasses.replace(state, step=jnp.full_like(state.step, step), params=params)


def save(workdir: Path, state: TrainState, *steps: int, **settings: int) -> None:
    checkpoints = Checkpoints(str(workdir), **settings)
    for step in steps:
        checkpoints.save(after(state, step), {"step": step}, CONFIG)
    checkpoints.close()


def restore(workdir: Path, abstract: TrainState) -> tuple[TrainState, dict[str, int]] | None:
    checkpoints = Checkpoints(str(workdir))
    try:
        return checkpoints.restore(abstract)
    finally:
        checkpoints.close()


def assert_same(actual: TrainState, expected: TrainState) -> None:
    """Every number, the optimiser's and the key's too."""
    leaves = jax.tree_util.tree_leaves_with_path(expected)
    found = jax.tree_util.tree_leaves_with_path(actual)
    assert [path for path, _ in found] == [path for path, _ in leaves]
    for (path, value), (_, reference) in zip(found, leaves, strict=True):
        assert value.dtype == reference.dtype
        if jnp.issubdtype(reference.dtype, jax.dtypes.prng_key):
            value, reference = jax.random.key_data(value), jax.random.key_data(reference)
        np.testing.assert_array_equal(value, reference, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("other", [{"fsdp": 8}, {"fsdp": 4, "tensor": 2}, {"fsdp": 1}], ids=str)
def test_everything_comes_back_onto_any_mesh(tmp_path: Path, other: dict[str, int]) -> None:
    _, make = create(make_mesh({"fsdp": 8}))
    save(tmp_path, make(), 7)
    mesh = make_mesh(other, jax.devices()[: int(np.prod(list(other.values())))])
    abstract, _ = create(mesh)
    restored = restore(tmp_path, abstract)
    assert restored is not None
    state, data = restored
    assert data == {"step": 7}
    assert_same(state, after(make(), 7))
    for value, target in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
        assert value.sharding.is_equivalent_to(target.sharding, value.ndim)
    assert load_config(str(tmp_path)) == CONFIG


def test_a_checkpoint_from_before_a_field_was_added_restores_with_zeros_there(tmp_path: Path) -> None:
    abstract, make = create(make_mesh({"fsdp": 8}))
    state = make()
    old = {field.name: getattr(state, field.name) for field in dataclasses.fields(state) if field.name != "skipped"}
    checkpoints = Checkpoints(str(tmp_path))
    items = ocp.args.Composite(
        state=ocp.args.StandardSave(old), data=ocp.args.JsonSave({"step": 1}), config=ocp.args.JsonSave(CONFIG)
    )
    checkpoints._manager.save(1, args=items)
    checkpoints.close()
    restored = restore(tmp_path, abstract)
    assert restored is not None
    assert_same(restored[0], dataclasses.replace(state, skipped=jnp.zeros((2,), jnp.int32)))


def test_nothing_saved_is_none(tmp_path: Path) -> None:
    abstract, _ = create(make_mesh({"fsdp": 8}))
    assert restore(tmp_path / "new", abstract) is None


def rewrite(step: Path, change: Callable[[bytes], bytes]) -> None:
    """Changes the files that hold a checkpoint's arrays."""
    for path in (step / "state").rglob("d/*"):
        path.write_bytes(change(path.read_bytes()))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "state is gone": lambda step: shutil.rmtree(step / "state"),
    "arrays are cut short": lambda step: rewrite(step, lambda content: content[: len(content) // 2]),
    "arrays hold other bytes": lambda step: rewrite(step, lambda content: bytes(255 - byte for byte in content)),
    "names are no json": lambda step: (step / "state" / "_METADATA").write_text("{"),
    "data position is gone": lambda step: shutil.rmtree(step / "data"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    abstract, make = create(make_mesh({"fsdp": 8}))
    save(tmp_path, make(), 1, 2)
    DAMAGE[damage](tmp_path / "checkpoints" / "2")
    with caplog.at_level(logging.ERROR, logger="svg_jax"):
        restored = restore(tmp_path, abstract)
    assert restored is not None
    assert_same(restored[0], after(make(), 1))
    lines = [record.getMessage() for record in caplog.records if record.name == "svg_jax"]
    assert len(lines) == 1
    assert f"checkpoint {tmp_path / 'checkpoints' / '2'} cannot be read" in lines[0]
    assert lines[0].endswith("trying the one before")
    # Nothing is lost, and the step can be saved again.
    assert (tmp_path / "checkpoints" / "2.damaged").is_dir()
    save(tmp_path, make(), 2)
    restored = restore(tmp_path, abstract)
    assert restored is not None
    assert_same(restored[0], after(make(), 2))


def test_where_no_checkpoint_can_be_read_nothing_is_touched(tmp_path: Path) -> None:
    abstract, make = create(make_mesh({"fsdp": 8}))
    save(tmp_path, make(), 1)
    shutil.rmtree(tmp_path / "checkpoints" / "1" / "state")
    with pytest.raises(OSError, match=r"none of the 1 checkpoints .* can be read"):
        restore(tmp_path, abstract)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({**SHAPES, "decoder.kernel": (32, 8)}, r"decoder\.kernel \(16, 8\) instead of \(32, 8\)"),
        ({**SHAPES, "decoder.scale": (8,)}, r"missing decoder\.scale"),
        ({"decoder.kernel": (16, 8)}, r"unexpected decoder\.bias"),
    ],
)
def test_another_architecture_is_named_and_nothing_set_aside(
    tmp_path: Path, shapes: dict[str, tuple[int, ...]], message: str
) -> None:
    mesh = make_mesh({"fsdp": 8})
    save(tmp_path, create(mesh)[1](), 1)
    axes = {name: (None,) * len(shape) for name, shape in shapes.items()}
    at = param_shardings(structs(shapes), axes, mesh)
    with pytest.raises(WrongArchitecture, match=f"checkpoints/1: the parameters are of another .*{message}"):
        load_params(str(tmp_path), structs(shapes), at, parts=("ema",))
    wrong = {name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=at[name]) for name, shape in shapes.items()}
    with pytest.raises(WrongArchitecture, match=message):
        restore(tmp_path, dataclasses.replace(create(mesh)[0], params=wrong, ema=wrong))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]


def test_frozen_parameters_of_another_architecture_are_no_damage(tmp_path: Path) -> None:
    abstract, make = create(make_mesh({"fsdp": 8}))
    save(tmp_path, make(), 1)
    deeper = dataclasses.replace(abstract, frozen={**abstract.frozen, "encoder.bias": abstract.params["decoder.bias"]})
    with pytest.raises(WrongArchitecture, match=r"missing encoder\.bias"):
        restore(tmp_path, deeper)
    assert restore(tmp_path, abstract) is not None


@pytest.mark.parametrize("part", ["params", "ema"])
def test_parameters_alone_come_straight_onto_their_shardings(tmp_path: Path, part: str) -> None:
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    state = create(make_mesh({"fsdp": 8}))[1]()
    save(tmp_path, state, 1, 2)
    shapes = structs(SHAPES | FROZEN)
    at = param_shardings(shapes, AXES, mesh)
    params = load_params(str(tmp_path), shapes, at, parts=(part, "frozen"))
    expected = {**getattr(after(state, 2), part), **state.frozen}
    assert params.keys() == expected.keys()
    for name, value in params.items():
        np.testing.assert_array_equal(value, expected[name])
        assert value.sharding == at[name]


def test_parameters_of_the_one_before_where_the_newest_is_damaged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mesh = make_mesh({"fsdp": 8})
    state = create(mesh)[1]()
    save(tmp_path, state, 1, 2)
    DAMAGE["arrays are cut short"](tmp_path / "checkpoints" / "2")
    shapes = structs(SHAPES)
    with caplog.at_level(logging.ERROR, logger="svg_jax"):
        params = load_params(str(tmp_path), shapes, param_shardings(shapes, AXES, mesh), parts=("params",))
    np.testing.assert_array_equal(params["decoder.bias"], after(state, 1).params["decoder.bias"])
    assert "trying the one before" in caplog.text


def test_no_checkpoint_says_what_to_do(tmp_path: Path) -> None:
    shapes = structs(SHAPES)
    at = param_shardings(shapes, AXES, make_mesh({"fsdp": 8}))
    for load in (lambda: load_params(str(tmp_path), shapes, at), lambda: load_config(str(tmp_path))):
        with pytest.raises(
            FileNotFoundError, match=r"no checkpoint in .*/checkpoints can be read: name the workdir of a training run"
        ):
            load()


def test_a_workdir_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(PermissionError, match=r"cannot write checkpoints to .*file/run.*: choose another") as error:
        Checkpoints(str(tmp_path / "file" / "run"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("problem", [MemoryError(), ValueError("RESOURCE_EXHAUSTED: out of memory")], ids=repr)
def test_a_checkpoint_that_does_not_fit_in_memory_is_not_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: Exception
) -> None:
    def too_large(*args: object, **kwargs: object) -> None:
        raise problem

    abstract, make = create(make_mesh({"fsdp": 8}))
    save(tmp_path, make(), 1, 2)
    monkeypatch.setattr(ocp.StandardCheckpointHandler, "restore", too_large)
    with pytest.raises(type(problem)) as error:
        restore(tmp_path, abstract)
    assert error.value is problem
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "2"]


def test_without_milestones_the_last_ones_are_kept(tmp_path: Path) -> None:
    save(tmp_path, create(make_mesh({"fsdp": 8}))[1](), 2, 4, 6, keep=1, keep_every=0)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["6"]


def test_the_last_ones_and_the_milestones_are_kept(tmp_path: Path) -> None:
    state = create(make_mesh({"fsdp": 8}))[1]()
    save(tmp_path, state, 2, 4, 5, 6, 6, keep=2, keep_every=4)
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [4, 5, 6]
