"""Rules: matching, stacking, exactness of every transform, and what is said of weights that do not fit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from svg_jax.convert import transforms
from svg_jax.convert.rules import Carried, Filled, Rule, Table, release_shapes, to_jax, to_release
from svg_jax.convert.transforms import CONV2D, LINEAR

TABLE: Table = (
    Carried("{path:.+}.inv_freq", "computed, not learnt"),
    Filled("ones", np.ones, "the release has no such thing"),
    Rule("{stack:layers|refiner}.{i}.{norm:norm[12]}.weight", "{stack}.{norm}.scale"),
    Rule("{stack:layers|refiner}.{i}.{path:.+}.weight", "{stack}.{path}.kernel", LINEAR),
    Rule(("head.a", "head.b", "head.c"), "head.kernel", transforms.FUSED_LINEAR),
    Rule("{path:.+}.weight", "{path}.kernel", LINEAR),
)


def random(shape: tuple[int, ...], dtype: type = np.float32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def state_dict(depth: int = 3) -> dict[str, np.ndarray]:
    state = {f"layers.{i}.mlp.0.weight": random((4, 2), seed=i) for i in range(depth)}
    state |= {f"layers.{i}.norm2.weight": random((2,), seed=i) for i in range(depth)}
    return state | {"in.weight": random((2, 5)), **{f"head.{x}": random((3, 2)) for x in "abc"}}


SHAPES = {
    "layers.mlp.0.kernel": jax.ShapeDtypeStruct((3, 2, 4), jnp.float32),
    "layers.norm2.scale": jax.ShapeDtypeStruct((3, 2), jnp.float32),
    "in.kernel": jax.ShapeDtypeStruct((5, 2), jnp.float32),
    "head.kernel": jax.ShapeDtypeStruct((2, 9), jnp.float32),
    "ones": jax.ShapeDtypeStruct((4,), jnp.float32),
}


@pytest.mark.parametrize("depth", [3, 12])  # "10" sorts before "2" as a word
def test_layers_are_stacked_in_order(depth: int) -> None:
    state = state_dict(depth)
    params = to_jax(state, TABLE)
    assert set(params) == {"layers.mlp.0.kernel", "layers.norm2.scale", "in.kernel", "head.kernel"}
    for i in range(depth):
        np.testing.assert_array_equal(params["layers.mlp.0.kernel"][i], state[f"layers.{i}.mlp.0.weight"].T)
        np.testing.assert_array_equal(params["layers.norm2.scale"][i], state[f"layers.{i}.norm2.weight"])
    np.testing.assert_array_equal(params["in.kernel"], state["in.weight"].T)


def test_shapes_decide_names_sizes_and_what_is_filled_in() -> None:
    params = to_jax(state_dict() | {"layers.0.rope.inv_freq": random((1,))}, TABLE, SHAPES)
    assert {name: value.shape for name, value in params.items()} == {name: s.shape for name, s in SHAPES.items()}
    np.testing.assert_array_equal(params["ones"], np.ones(4))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_there_and_back_is_exact_in_every_dtype(dtype: type) -> None:
    state = {key: value.astype(dtype) for key, value in state_dict().items()}
    state["in.weight"][0, 0] = np.nan  # bits, not values
    back = to_release(to_jax(state, TABLE, SHAPES), TABLE)
    assert back.keys() == state.keys()
    for key, value in state.items():
        assert back[key].dtype == value.dtype
        assert back[key].tobytes() == value.tobytes(), key


def test_parameters_on_a_device_are_exported() -> None:
    state = {key: value.astype(ml_dtypes.bfloat16) for key, value in state_dict().items()}
    params = {key: jnp.asarray(value) for key, value in to_jax(state, TABLE, SHAPES).items()}
    back = to_release(params, TABLE)
    for key, value in state.items():
        assert back[key].dtype == value.dtype
        np.testing.assert_array_equal(back[key], value)


def test_memory_maps_are_enough(tmp_path) -> None:
    state = state_dict()
    np.save(tmp_path / "in.npy", state["in.weight"])
    state["in.weight"] = np.load(tmp_path / "in.npy", mmap_mode="r")
    assert np.shares_memory(to_jax(state, TABLE, SHAPES)["in.kernel"], state["in.weight"]), "nothing is copied"


def test_missing_unexpected_and_misshaped_keys_are_listed_side_by_side() -> None:
    state = state_dict()
    del state["layers.1.norm2.weight"], state["head.b"]
    state |= {"layers.3.norm2.weight": random((2,)), "optimizer": random(())}
    state["in.weight"] = random((2, 6))
    with pytest.raises(ValueError, match="do not fit") as error:
        to_jax(state, TABLE, SHAPES)
    message = str(error.value)
    assert "2 missing: head.b, layers.1.norm2.weight" in message
    assert "2 unexpected: layers.3.norm2.weight, optimizer" in message
    assert "1 of another shape: in.weight (2, 6) instead of (2, 5)" in message


def test_many_keys_are_counted_and_cut() -> None:
    state = state_dict() | {f"extra.{i}": random(()) for i in range(50)}
    with pytest.raises(ValueError, match=r"50 unexpected: extra\.0, extra\.1, extra\.2.* and 30 more"):
        to_jax(state, TABLE, SHAPES)


def test_a_gap_in_a_stack_is_noticed_without_shapes() -> None:
    state = state_dict()
    del state["layers.1.mlp.0.weight"]
    with pytest.raises(ValueError, match=r"1 missing: layers\.1\.mlp\.0\.weight"):
        to_jax(state, TABLE)


@pytest.mark.parametrize("other", [random((2,), np.float16), random((3,))])
def test_layers_of_one_stack_must_be_alike(other: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"layers\.1\.norm2\.weight is .* and layers\.0\.norm2\.weight"):
        to_jax(state_dict() | {"layers.1.norm2.weight": other}, TABLE)


def test_a_table_that_uses_a_key_twice_is_refused() -> None:
    table: Table = (Rule("a", "x"), Rule("a", "y"))
    shapes = {name: jax.ShapeDtypeStruct((1,), jnp.float32) for name in "xy"}
    with pytest.raises(ValueError, match="uses a key twice"):
        to_jax({"a": random((1,))}, table, shapes)


def test_parameters_that_the_release_cannot_hold_are_not_exported() -> None:
    params = to_jax(state_dict(), TABLE, SHAPES)
    with pytest.raises(ValueError, match="'ones' cannot be exported: the release has no such thing"):
        to_release(params | {"ones": np.zeros(4)}, TABLE)
    with pytest.raises(ValueError, match=r"no conversion rule leads to the parameter 'layers\.beta'"):
        to_release(params | {"layers.beta": np.zeros(4)}, TABLE)


def test_release_shapes_need_no_numbers() -> None:
    expected = {key: (value.shape, jnp.float32) for key, value in state_dict().items()}
    assert {key: (s.shape, s.dtype) for key, s in release_shapes(SHAPES, TABLE).items()} == expected


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("LINEAR", [(3, 5)]),
        ("CONV2D", [(4, 3, 2, 5)]),
        ("CONV3D", [(4, 3, 2, 5, 6)]),
        ("PATCHES", [(7, 3, 4, 4)]),
        ("FUSED_LINEAR", [(4, 5)] * 3),
        ("FUSED_BIAS", [(4,)] * 3),
        ("FUSED_QV_BIAS", [(4,)] * 2),
        ("LEADING_AXIS", [(1, 2, 3)]),
    ],
)
def test_every_transform_is_inverted_exactly(name: str, shapes: list[tuple[int, ...]]) -> None:
    transform = getattr(transforms, name)
    arrays = [random(shape, seed=i) for i, shape in enumerate(shapes)]
    for before, after in zip(arrays, transform.to_release(transform.to_ours(*arrays)), strict=True):
        assert before.tobytes() == after.tobytes()


def test_convolutions_and_patches_go_where_they_belong() -> None:
    weight = random((4, 3, 2, 2))
    kernel = CONV2D.to_ours(weight)
    assert kernel[1, 0, 2, 3] == weight[3, 2, 1, 0]
    assert transforms.PATCHES.to_ours(weight)[(1 * 2 + 0) * 3 + 2, 3] == weight[3, 2, 1, 0]  # row, column, channel
