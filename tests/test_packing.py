"""Training on several images a sequence is training on one a sequence: the same losses and the same gradient."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from configs import stage1_packed, tiny_scenes
from data_pipelines.packing import pack_tokens
from data_pipelines.scenes import write_scenes
from svg_jax import assemble, train
from svg_jax.flow.losses import velocity_loss
from svg_jax.nn.patches import token_mask
from svg_jax.parallel import batch_sharding, make_mesh, param_shardings
from svg_jax.programs import check_batch, train_program
from svg_jax.state import TrainState
from svg_jax.steps import Batch, accumulate, text_segments, text_to_image_step
from tests.test_steps import CHANNELS, OBJECTIVE, TOKENS, make_batch, tiny_networks
from tests.test_train import SMALL, scalars
from tests.vectors import assert_close

IMAGES = 16
PACK, BUDGET = 2, 7
SHAPES = ((2, 3), (3, 1), (0, 0), (1, 2), (2, 2))  # (0, 0): no image
GRID = np.array([SHAPES[i % 5] for i in range(IMAGES)], np.int32)
LENGTHS = [(5, 1, 3, 4, 2, 2)[i % 6] for i in range(IMAGES)]


def batch_of(pack: int, fill: int = 0) -> Batch:
    """The same images and captions in either form; `fill` stands in the padding of the captions."""
    draw = np.random.default_rng(4)
    ids = [[2, *draw.integers(3, 259, length - 1)] for length in LENGTHS]
    tokens, num_tokens, cut = pack_tokens(ids, pack, BUDGET if pack > 1 else 5, fill)
    assert not cut.any()
    return Batch(
        patches=make_batch(grid=GRID)["patches"],
        grid=jnp.asarray(GRID),
        cause=jnp.asarray(GRID[:, 0] == 0, jnp.int32),
        tokens=jnp.asarray(tokens),
        num_tokens=jnp.asarray(num_tokens),
    )


@functools.cache
def step() -> Any:
    """Plain gradient descent with rate 1: the gradient is p - p'."""
    networks = tiny_networks().networks
    return jax.jit(text_to_image_step(networks, OBJECTIVE, optax.sgd(1.0), ema_decay=0.5))


def assert_same(found: tuple[TrainState, Any], expected: tuple[TrainState, Any]) -> None:
    """Losses and metrics to 1e-5, gradients to 1e-4."""
    assert expected[1].keys() == found[1].keys()
    for name, value in expected[1].items():
        there = ~np.isnan(np.asarray(value, np.float32))
        np.testing.assert_array_equal(there, ~np.isnan(np.asarray(found[1][name], np.float32)))
        assert_close(np.asarray(found[1][name])[there], np.asarray(value)[there], 1e-5, name)
    assert (np.asarray(expected[1]["loss_by_time"]) > 0).sum() > 2
    for name, start in tiny_networks().params.items():
        gradient = np.asarray(start) - np.asarray(expected[0].params[name])
        scale = max(np.abs(gradient).max(), np.abs(start).max() * 1e-2)  # the difference rounds
        error = np.abs(np.asarray(found[0].params[name]) - np.asarray(expected[0].params[name])).max()
        assert error <= 1e-4 * scale, f"{name}: {error} of {scale}"


def test_the_loss_of_every_image_is_the_same() -> None:
    tiny = tiny_networks()
    draw = np.random.default_rng(0)
    x_t, target = draw.normal(size=(2, IMAGES, TOKENS, CHANNELS + 4)).astype(np.float32)
    t = jnp.asarray(draw.uniform(size=IMAGES), jnp.float32)

    @jax.jit
    def losses(batch: Batch) -> jax.Array:
        text = tiny.networks.text(tiny.frozen["text"])
        dit, grid = tiny.networks.dit(tiny.params), batch["grid"]
        if batch["tokens"].shape[0] == IMAGES:
            mask = jnp.arange(batch["tokens"].shape[1])[None] < batch["num_tokens"][:, None]
            velocity = dit(x_t, t, text.features(batch["tokens"], mask), grid=grid, text_mask=mask)
        else:
            segments = text_segments(batch)
            features = text.packed_features(batch["tokens"], segments)
            velocity = dit(x_t, t, features, grid=grid, text_segments=segments)
        return velocity_loss(velocity, target, token_mask(grid, TOKENS))

    alone, packed = np.asarray(losses(batch_of(1))), np.asarray(losses(batch_of(PACK)))
    assert (alone > 0).sum() == (GRID[:, 0] > 0).sum()
    np.testing.assert_allclose(packed, alone, rtol=1e-5)


@pytest.mark.parametrize("fill", [0, 77])
def test_a_step_is_the_same(fill: int) -> None:
    tiny = tiny_networks()
    packed = step()(tiny.state(), tiny.frozen, batch_of(PACK, fill))
    assert_same(packed, step()(tiny.state(), tiny.frozen, batch_of(1)))


def test_micro_batches_keep_captions_with_their_images() -> None:
    batch: Any = {"captions": jnp.arange(1.0, 5.0), "images": jnp.arange(8.0) ** 2}

    def products(batch: Any, key: jax.Array) -> Any:
        return {"sum": jnp.sum(batch["captions"][:, None] * batch["images"].reshape(-1, 2))}, {}

    whole = accumulate(products, batch, jax.random.key(0), 1)
    for parts in (2, 4):
        assert accumulate(products, batch, jax.random.key(0), parts) == whole
    with pytest.raises(ValueError, match="a batch of 4 cannot be cut into 8 micro-batches"):
        accumulate(products, batch, jax.random.key(0), 8)


def test_a_step_over_eight_devices_is_the_same() -> None:
    tiny, mesh = tiny_networks(), make_mesh({"data": 2, "fsdp": 2, "context": 2})
    dit, expected = tiny.networks.dit, step()(tiny.state(), tiny.frozen, batch_of(1))
    with jax.set_mesh(mesh):
        params = jax.device_put(tiny.params, param_shardings(dit.shapes, dit.axes, mesh))
        state = TrainState.create(params, optax.sgd(1.0), jax.random.key(0))
        batch = jax.device_put(batch_of(PACK), batch_sharding(mesh))
        assert_same(step()(state, tiny.frozen, batch), expected)


@pytest.mark.slow
def test_training_through_the_door_is_the_same(tmp_path: Path) -> None:
    """Two steps on scenes: the losses, by time too, and the share of captions that were cut."""
    data = write_scenes(tmp_path / "scenes", 16, seed=0)
    changes = {"data.path": str(data), "num_train_steps": 2, "checkpoint.every": 2, "mesh.fsdp": 4}
    small = {**SMALL, **changes, "batch_size": 16, "mesh.data": 1, "mesh.tensor": 2, "text.max_tokens_packed": 64}
    lines = []
    for pack in (1, 4):
        config = tiny_scenes.get_config()
        config.update_from_flattened_dict({**small, "data.pack": pack})
        train.main(config, str(tmp_path / str(pack)))
        lines.append(scalars(tmp_path / str(pack)))
    for alone, packed in zip(*lines, strict=True):
        same = [name for name in alone if name.startswith(("loss", "grad_norm", "data/bad", "data/truncated"))]
        assert len(same) > 3
        np.testing.assert_allclose([packed[name] for name in same], [alone[name] for name in same], rtol=1e-4)


def packed_config(**changes: Any) -> ConfigDict:
    config = tiny_scenes.get_config()
    config.data.path = "train.jsonl"
    config.batch_size = 16
    config.data.pack = 4
    config.text.max_tokens_packed = 3 * config.text.max_tokens
    config.update_from_flattened_dict(changes)
    return config


def test_the_program_takes_the_images_of_a_batch_and_a_quarter_of_the_rows_of_text() -> None:
    config = packed_config()
    assemble.check(config, needs="model")
    program = train_program(config, make_mesh({"data": 4}, jax.devices()[:4]))
    batch = program.arguments[2]
    length, tokens = config.text.max_tokens, batch["patches"].shape[1]
    assert (batch["patches"].shape[0], batch["num_tokens"].shape, batch["tokens"].shape) == (16, (16,), (4, 3 * length))
    assert (program.images, program.tokens) == (16, 16 * tokens + 4 * 3 * length)
    alone = train_program(packed_config(**{"data.pack": 1}), make_mesh({"data": 4}, jax.devices()[:4]))
    assert alone.arguments[2]["tokens"].shape == (16, length)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text.max_tokens_packed": 3}, "config.text.max_tokens_packed is 3: it is how many tokens 4 captions have"),
        ({"text.max_tokens_packed": 97}, "from 4 to 4 x config.text.max_tokens = 96"),
        ({"data.pack": 0}, "config.data.pack is 0: it must be above zero"),
        ({"model.attention": "gpu_cudnn"}, "cannot keep the 4 images of a sequence apart: choose another"),
    ],
)
def test_a_config_that_cannot_be_packed_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        assemble.check(packed_config(**changes), needs="model")


def test_without_a_budget_nothing_is_packed() -> None:
    config = packed_config()
    config.text.max_tokens_packed = None
    with pytest.raises(ValueError, match="max_tokens_packed is None"):
        assemble.check(config, needs="model")


def test_a_batch_of_half_sequences_is_refused() -> None:
    with pytest.raises(ValueError, match=r"batch_size 24 in sequences of 4 images .* choose a multiple of 32"):
        check_batch(24, 2, make_mesh({"data": 4}, jax.devices()[:4]), 4)


def test_the_packed_stage_differs_in_nothing_else() -> None:
    config = stage1_packed.get_config()
    config.data.path = "train.jsonl"
    assemble.check(config, needs="model")
    assert config.text.max_tokens_packed < config.data.pack * config.text.max_tokens
