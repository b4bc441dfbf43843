"""The released network with every backend of attention: its velocities and gradients, from the golden vectors."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from svg_jax.convert.rules import to_release
from svg_jax.convert.tables import NEXT_DIT
from svg_jax.models.next_dit import NextDiT
from svg_jax.nn.attention import BACKENDS, chunked
from svg_jax.nn.functional import Network
from svg_jax.nn.segments import segments_of
from tests.models.test_next_dit import CASES, image, load, pad_batch
from tests.vectors import assert_close

ON_CPU = [name for name in BACKENDS if name != "gpu_cudnn"]


@functools.cache
def network(name: str, backend: str) -> Network[NextDiT]:
    config = dataclasses.replace(load(name)[1], attention=backend)
    return Network(lambda rngs: NextDiT(config, rngs=rngs))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "CPU_BLOCK", (7, 5))


@pytest.mark.golden
@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("name", CASES)
def test_velocities_of_mixed_aspect_ratios(name: str, backend: str) -> None:
    """Captions and images of several lengths in one padded batch."""
    case, config, _, params = load(name)
    patch, count = config.patch_size, len(case.config["list"]["sizes"])
    images = [case.inputs[f"list.x{i}"] for i in range(count)]
    x, grid = pad_batch(images, patch, max(x[0].size for x in images) // patch**2 + 3, fill=9.0)
    mask = case.inputs["list.cap_mask"].astype(bool)
    text = np.where(mask[..., None], case.inputs["list.cap_feats"], np.float32(9.0))
    run = jax.jit(
        lambda params: network(name, backend)(params)(x, case.inputs["list.t"], text, grid=grid, text_mask=mask)
    )
    y = run(params)
    for i in range(count):
        assert_close(image(y[i], tuple(grid[i]), patch), case.outputs[f"list.y{i}"], 1e-4, f"image {i}")


@pytest.mark.golden
@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("name", CASES)
def test_velocities_of_images_in_one_sequence(name: str, backend: str) -> None:
    """All images of the case and their captions in one row: what each gives alone.

    An image that is not there, with a caption of one token, stands before them.
    """
    case, config, _, params = load(name)
    patch, count = config.patch_size, len(case.config["list"]["sizes"])
    images = [case.inputs[f"list.x{i}"] for i in range(count)]
    x, grid = pad_batch([images[0], *images], patch, max(x[0].size for x in images) // patch**2 + 3, fill=9.0)
    grid[0] = 0
    t = np.concatenate([[0.3], case.inputs["list.t"]]).astype(np.float32)
    text, mask = case.inputs["list.cap_feats"], case.inputs["list.cap_mask"].astype(bool)
    row = np.concatenate([text[0, :1], text[mask], np.full((2, text.shape[2]), 9.0, np.float32)])[None]
    segments = segments_of(jnp.concatenate([jnp.ones(1, int), mask.sum(1)])[None], row.shape[1])
    run = jax.jit(lambda params: network(name, backend)(params)(x, t, row, grid=grid, text_segments=segments))
    y = run(params)
    assert bool(jnp.isfinite(y).all())
    for i in range(count):
        found = image(y[i + 1], tuple(grid[i + 1]), patch)
        assert_close(found, case.outputs[f"list.y{i}"], 1e-4, f"image {i}")


@pytest.mark.golden
@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("name", CASES)
def test_gradients(name: str, backend: str) -> None:
    case, config, _, params = load(name)
    budget = case.inputs["tensor.x"][0, 0].size // config.patch_size**2
    x, grid = pad_batch(list(case.inputs["tensor.x"]), config.patch_size, budget, 0.0)
    target, _ = pad_batch(list(case.inputs["grad.target"]), config.patch_size, budget, 0.0)
    text, mask = case.inputs["tensor.cap_feats"], case.inputs["tensor.cap_mask"].astype(bool)

    @jax.jit
    @jax.value_and_grad
    def loss(params: Any) -> jax.Array:
        y = network(name, backend)(params)(x, case.inputs["tensor.t"], text, grid=grid, text_mask=mask)
        return jnp.mean(jnp.square(y - target))

    value, grads = loss(params)
    assert_close(value, case.outputs["grad.loss"], 1e-5)
    released = to_release({key: np.asarray(g) for key, g in grads.items()}, NEXT_DIT)
    for key in case.config["grad"]["keys"]:
        assert_close(released[key], case.outputs[f"grad.{key}"], 1e-4, key)
