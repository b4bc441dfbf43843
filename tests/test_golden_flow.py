"""Flow matching around the diffusion transformer against the release: losses, their gradients, guided sampling."""

from __future__ import annotations

import functools
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
from svg_jax.flow.solvers import Solver, integrate
from svg_jax.nn.functional import Params
from svg_jax.nn.patches import token_mask
from tests.flow.solvers import test_dpm, test_ode, test_sde
from tests.models.test_next_dit import image, load, pad_batch
from tests.vectors import Case, assert_close

TOLERANCE = 1e-4
LOSS = re.compile(r"loss\.(?P<path>\w+)\.(?P<form>tensor|list)\.loss")
GRADIENT = re.compile(r"loss\.(?P<path>\w+)\.(?P<form>tensor|list)\.grad_(?P<name>\w+)")
SAMPLED_ODE = re.compile(r"dit\.ode\.(?P<method>\w+)\.(?P<shift>noshift|shift)")
SAMPLED_DPM = re.compile(r"dit\.dpm\.o(?P<order>\d)\.shift(?P<shift>[\dp.]+)")
DPM = {"1": "dpm++1", "2": "dpm++2m", "3": "dpm++3m"}
# What the vectors call the parameters whose gradients they hold, and the release's names.
GRADIENT_NAMES = {"x_embedder_weight": "x_embedder.weight", "final_linear_bias": "final_layer.linear.bias"}


def matches(case: Case, pattern: re.Pattern[str]) -> list[re.Match[str]]:
    return [found for found in map(pattern.fullmatch, case.outputs) if found]


LOSSES = [(found["path"], found["form"]) for found in matches(Case.load("transport"), LOSS)]
GRADIENTS = [found.group(0) for found in matches(Case.load("transport"), GRADIENT)]
SAMPLES = [found for pattern in (SAMPLED_ODE, SAMPLED_DPM) for found in matches(Case.load("sampler"), pattern)]


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


@functools.cache
def sampler(name: str, num_steps: int):
    """(noise [n, tokens, channels], shift) -> data, guided: one compilation for all shifts."""
    case = Case.load("sampler")
    settings = case.config["dit"]
    _, config, network, params = load(settings["case"])
    text, text_mask = case.inputs["dit.cap_feats"], case.inputs["dit.cap_mask"].astype(bool)
    rows, columns = (size // config.patch_size for size in case.inputs["dit.z"].shape[2:])
    grid = np.tile(np.array([[rows, columns]], np.int32), (len(text), 1))
    tolerances = {key: case.config["ode"][key] for key in ("rtol", "atol")}

    @jax.jit
    def sample(x: Array, shift: float) -> Array:
        def halves(x: Array, t: Array) -> Array:
            dit = network(params)
            return dit(x, t, jnp.asarray(text), grid=jnp.asarray(grid), text_mask=jnp.asarray(text_mask))

        velocity = guided(halves, settings["cfg_scale"], renorm=1.0)
        return integrate(velocity, x, Solver(name, **tolerances), num_steps=num_steps, shift=shift)

    return sample


@pytest.mark.golden
@pytest.mark.parametrize("found", SAMPLES, ids=lambda found: found.string)
def test_guided_sampling_matches_the_release(found: re.Match[str]) -> None:
    case = Case.load("sampler")
    settings = case.config["dit"]
    if found.re is SAMPLED_DPM:
        name, num_steps = DPM[found["order"]], settings["dpm_steps"]
        shift = float(found["shift"].replace("p", "."))
    else:
        name, num_steps = found["method"], settings["ode_steps"] - 1  # the release counts points
        shift = settings["shift"] if found["shift"] == "shift" else 1.0
    patch, z = load(settings["case"])[1].patch_size, case.inputs["dit.z"][: settings["n"]]
    x, grid = pad_batch(list(z), patch, z[0, 0].size // patch**2, fill=0.0)
    y = sampler(name, num_steps)(jnp.asarray(x), shift)
    drawn = np.stack([image(y[i], tuple(grid[i]), patch) for i in range(len(z))])
    assert_close(np.concatenate([drawn, drawn]), case.outputs[found.string], TOLERANCE, found.string)  # both halves


@pytest.mark.golden
def test_the_vectors_cover_every_form_and_solver() -> None:
    assert {form for _, form in LOSSES} == {"tensor", "list"}
    assert GRADIENTS
    sampled = {(found["method"], found["shift"]) for found in SAMPLES if found.re is SAMPLED_ODE}
    methods = ("euler", "midpoint", "heun2", "dopri5")
    assert sampled >= {(method, shift) for method in methods for shift in ("noshift", "shift")}
    assert any(found.re is SAMPLED_DPM for found in SAMPLES)


@pytest.mark.golden
def test_no_sampler_vector_is_left_out() -> None:
    """Every stored output is one that a test here or beside the solvers compares with."""
    patterns = (SAMPLED_ODE, SAMPLED_DPM, *test_ode.PATTERNS, *test_dpm.PATTERNS, *test_sde.PATTERNS)
    stored = set(Case.load("sampler").outputs) - {"status_json"}  # a report, no result
    assert {key for key in stored if any(pattern.fullmatch(key) for pattern in patterns)} == stored
