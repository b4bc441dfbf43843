"""Flow matching around the diffusion transformer against the release: losses, their gradients, guided sampling."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

from svg_jax.convert.rules import to_release
from svg_jax.convert.tables import NEXT_DIT
from svg_jax.flow.guidance import guided
from svg_jax.flow.losses import velocity_loss
from svg_jax.flow.paths import path
from svg_jax.flow.solvers import TABLEAUS, solve_ode, time_grid
from svg_jax.nn.functional import Params
from svg_jax.nn.patches import token_mask
from tests.models.test_next_dit import image, load, pad_batch
from tests.vectors import Case, assert_close

TOLERANCE = 1e-4
LOSS = re.compile(r"loss\.(?P<path>\w+)\.(?P<form>tensor|list)\.loss")
GRADIENT = re.compile(r"loss\.(?P<path>\w+)\.(?P<form>tensor|list)\.grad_(?P<name>\w+)")
SAMPLED = re.compile(r"dit\.ode\.(?P<method>\w+)\.(?P<shift>noshift|shift)")
# What the vectors call the parameters whose gradients they hold, and the release's names.
GRADIENT_NAMES = {"x_embedder_weight": "x_embedder.weight", "final_linear_bias": "final_layer.linear.bias"}


def matches(case: Case, pattern: re.Pattern[str]) -> list[re.Match[str]]:
    return [found for found in map(pattern.fullmatch, case.outputs) if found]


LOSSES = [(found["path"], found["form"]) for found in matches(Case.load("transport"), LOSS)]
GRADIENTS = [found.group(0) for found in matches(Case.load("transport"), GRADIENT)]
SAMPLES = [found.group(0) for found in matches(Case.load("sampler"), SAMPLED) if found["method"] in TABLEAUS]


def images(case: Case, key: str, form: str) -> list[np.ndarray]:
    """The images `loss.x0`, `loss.x1` of a form: one array [B, C, H, W], or one [C, H, W] for each image."""
    if form == "tensor":
        return list(case.inputs[key])
    return [case.inputs[f"{key}_{i}"] for i in range(len(case.config["loss"]["sizes"]))]


def sample_losses(params: Params, case: Case, path_name: str, form: str) -> Array:
    """The loss of each image of the case, all of them in one padded batch."""
    _, config, network, _ = load(case.config["dit_case"])
    patch, shapes = config.patch_size, images(case, "loss.x1", form)
    budget = max(x[0].size for x in shapes) // patch**2 + (form == "list")  # one slot more than any image fills
    x1, grid = pad_batch(shapes, patch, budget, fill=7.0)
    x0, _ = pad_batch(images(case, "loss.x0", form), patch, budget, fill=-3.0)
    t = jnp.asarray(case.inputs["loss.t" if form == "tensor" else "loss.t_list"])
    text, text_mask = case.inputs["loss.cap_feats"], case.inputs["loss.cap_mask"].astype(bool)

    x_t = path(path_name).interpolate(t, jnp.asarray(x0), jnp.asarray(x1))
    target = path(path_name).target_velocity(t, jnp.asarray(x0), jnp.asarray(x1))
    velocity = network(params)(x_t, t, jnp.asarray(text), grid=jnp.asarray(grid), text_mask=jnp.asarray(text_mask))
    return velocity_loss(velocity, target, token_mask(jnp.asarray(grid), budget))


@pytest.mark.golden
@pytest.mark.parametrize(("path_name", "form"), LOSSES)
def test_training_losses_match_the_release(path_name: str, form: str) -> None:
    case = Case.load("transport")
    params = load(case.config["dit_case"])[3]
    actual = jax.jit(lambda params: sample_losses(params, case, path_name, form))(params)
    for key in ("task_loss", "loss"):
        assert_close(actual, case.outputs[f"loss.{path_name}.{form}.{key}"], TOLERANCE, key)


@pytest.mark.golden
@pytest.mark.parametrize("key", GRADIENTS)
def test_gradients_of_the_batch_mean_match_the_release(key: str) -> None:
    case, found = Case.load("transport"), GRADIENT.fullmatch(key)
    assert found is not None
    params = load(case.config["dit_case"])[3]

    @jax.jit
    @jax.grad
    def gradient(params: Params) -> Array:
        return jnp.mean(sample_losses(params, case, found["path"], found["form"]))

    released = to_release({name: np.asarray(g) for name, g in gradient(params).items()}, NEXT_DIT)
    assert_close(released[GRADIENT_NAMES[found["name"]]], case.outputs[key], TOLERANCE, key)


@pytest.mark.golden
@pytest.mark.parametrize("key", SAMPLES)
def test_guided_sampling_matches_the_release(key: str) -> None:
    case, found = Case.load("sampler"), SAMPLED.fullmatch(key)
    assert found is not None
    settings = case.config["dit"]
    _, config, network, params = load(settings["case"])
    patch, z, n = config.patch_size, case.inputs["dit.z"], settings["n"]
    text, text_mask = case.inputs["dit.cap_feats"], case.inputs["dit.cap_mask"].astype(bool)
    x, grid = pad_batch(list(z[:n]), patch, z[0, 0].size // patch**2, fill=0.0)
    shift = settings["shift"] if found["shift"] == "shift" else 1.0
    times = time_grid(settings["ode_steps"] - 1, shift)  # the release counts points

    @jax.jit
    def sample(params: Params, x: Array) -> Array:
        both = jnp.asarray(np.concatenate([grid, grid]))
        dit = network(params)

        def halves(x: Array, t: Array) -> Array:
            return dit(x, t, jnp.asarray(text), grid=both, text_mask=jnp.asarray(text_mask))

        return solve_ode(guided(halves, settings["cfg_scale"], renorm=1.0), x, times, found["method"])

    y = sample(params, jnp.asarray(x))
    drawn = np.stack([image(y[i], tuple(grid[i]), patch) for i in range(n)])
    assert_close(np.concatenate([drawn, drawn]), case.outputs[key], TOLERANCE, key)  # both halves are stored


@pytest.mark.golden
def test_the_vectors_cover_every_form_and_solver() -> None:
    assert {form for _, form in LOSSES} == {"tensor", "list"}
    assert GRADIENTS
    sampled = {(found["method"], found["shift"]) for found in map(SAMPLED.fullmatch, SAMPLES) if found}
    assert sampled >= {(method, shift) for method in ("euler", "midpoint") for shift in ("noshift", "shift")}
