from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from svg_jax.flow import paths
from tests.vectors import Case, assert_close

TOLERANCE = 1e-5
NAMES = list(paths.PATHS)


def golden(name: str) -> tuple[paths.Path, dict[str, jax.Array], dict[str, np.ndarray]]:
    case = Case.load("transport")
    prefix = f"path.{name}."
    outputs = {key.removeprefix(prefix): value for key, value in case.outputs.items() if key.startswith(prefix)}
    return paths.path(name), {key: jnp.asarray(value) for key, value in case.inputs.items()}, outputs


def states(shape: tuple[int, ...] = (3, 5, 2)) -> tuple[jax.Array, jax.Array, jax.Array]:
    noise, data = jax.random.normal(jax.random.key(0), (2, *shape))
    return jnp.asarray([0.2, 0.5, 0.9]), noise, data


@pytest.mark.golden
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("coefficient", ["alpha", "sigma", "d_alpha", "d_sigma", "d_log_alpha"])
def test_coefficients_match_the_release(name: str, coefficient: str) -> None:
    path, inputs, outputs = golden(name)
    expected = outputs["d_alpha_alpha_ratio" if coefficient == "d_log_alpha" else coefficient]
    assert_close(getattr(path, coefficient)(inputs["t"]), expected, TOLERANCE)


@pytest.mark.golden
@pytest.mark.parametrize("name", NAMES)
def test_states_and_targets_match_the_release(name: str) -> None:
    path, inputs, outputs = golden(name)
    t, x0, x1 = inputs["t"], inputs["x0"], inputs["x1"]
    assert_close(path.interpolate(t, x0, x1), outputs["xt"], TOLERANCE, "xt")
    assert_close(path.target_velocity(t, x0, x1), outputs["ut"], TOLERANCE, "ut")


@pytest.mark.golden
@pytest.mark.parametrize("name", NAMES)
def test_conversions_match_the_release(name: str) -> None:
    path, inputs, outputs = golden(name)
    t, velocity, score, x = inputs["t"], inputs["velocity"], inputs["score"], jnp.asarray(outputs["xt"])
    for key, converted in {
        "score_from_velocity": path.score_from_velocity(velocity, x, t),
        "noise_from_velocity": path.noise_from_velocity(velocity, x, t),
        "velocity_from_score": path.velocity_from_score(score, x, t),
    }.items():
        assert_close(converted, outputs[key], TOLERANCE, key)


@pytest.mark.golden
@pytest.mark.parametrize("name", NAMES)
def test_noising_sde_matches_the_release(name: str) -> None:
    path, inputs, outputs = golden(name)
    drift, variance = path.noising_sde(jnp.asarray(outputs["xt"]), inputs["t"])
    assert_close(drift, outputs["drift_mean"], TOLERANCE, "drift_mean")
    assert_close(variance, outputs["drift_var"].reshape(variance.shape), TOLERANCE, "drift_var")


@pytest.mark.golden
@pytest.mark.parametrize("name", NAMES)
def test_every_diffusion_form_matches_the_release(name: str) -> None:
    path, inputs, outputs = golden(name)
    t, norm = inputs["t"], float(outputs["diffusion.constant"])  # w = norm in this form
    forms = [key.removeprefix("diffusion.") for key in outputs if key.startswith("diffusion.")]
    assert len(forms) == len(paths.DIFFUSION_FORMS)
    for form in forms:
        expected = np.broadcast_to(outputs[f"diffusion.{form}"].reshape(-1), t.shape)
        assert_close(path.diffusion(t, form, norm), expected, TOLERANCE, form)


@pytest.mark.parametrize("name", NAMES)
def test_derivatives_are_those_of_automatic_differentiation(name: str) -> None:
    path, (t, _, _) = paths.path(name), states()
    assert_close(path.d_alpha(t), jax.vmap(jax.grad(path.alpha))(t), TOLERANCE)
    assert_close(path.d_sigma(t), jax.vmap(jax.grad(path.sigma))(t), TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
def test_true_velocity_gives_back_noise_data_and_score(name: str) -> None:
    path, (t, x0, x1) = paths.path(name), states()
    x, v = path.interpolate(t, x0, x1), path.target_velocity(t, x0, x1)
    assert_close(path.noise_from_velocity(v, x, t), x0, 1e-4)
    assert_close(path.data_from_velocity(v, x, t), x1, 1e-4)
    assert_close(path.velocity_from_noise(x0, x, t), v, 1e-4)
    assert_close(path.velocity_from_score(path.score_from_velocity(v, x, t), x, t), v, 1e-4)


@pytest.mark.parametrize("name", ["Linear", "GVP"])
def test_ends_of_a_path_are_noise_and_data(name: str) -> None:
    path, (_, x0, x1) = paths.path(name), states()
    assert_close(path.interpolate(jnp.float32(0), x0, x1), x0, 1e-6)
    assert_close(path.interpolate(jnp.float32(1), x0, x1), x1, 1e-6)
    # No division by alpha or sigma: these conversions hold at both ends.
    for t in (0.0, 1.0):
        time = jnp.float32(t)
        x, v = path.interpolate(time, x0, x1), path.target_velocity(time, x0, x1)
        assert_close(path.noise_from_velocity(v, x, time), x0, 1e-5)
        assert_close(path.data_from_velocity(v, x, time), x1, 1e-5)


@pytest.mark.parametrize("shape", [(3,), (3, 3), (3, 4, 3), (3, 2, 4, 5)])
def test_any_trailing_shape_and_scalar_times(shape: tuple[int, ...]) -> None:
    path, (t, x0, x1) = paths.Linear(), states(shape)
    by_sample = jnp.stack([path.interpolate(t[i], x0[i : i + 1], x1[i : i + 1])[0] for i in range(len(t))])
    assert_close(path.interpolate(t, x0, x1), by_sample, 1e-6)


def test_bfloat16_states_do_not_round_the_time() -> None:
    x0, x1 = jnp.zeros((1, 4), jnp.bfloat16), jnp.ones((1, 4), jnp.bfloat16)
    t = jnp.asarray([0.999], jnp.float32)  # bfloat16 would round it to 1, and sigma to 0
    x = paths.Linear().interpolate(t, x1, x0)
    assert x.dtype == jnp.bfloat16
    assert_close(x.astype(jnp.float32), np.full((1, 4), 1e-3), 5e-3)


def test_misspelt_names_show_the_nearest() -> None:
    with pytest.raises(
        ValueError, match=r"unknown path 'linaer': did you mean 'Linear'\? choose one of Linear, GVP, VP"
    ):
        paths.path("linaer")
    with pytest.raises(ValueError, match="did you mean 'SBDM'"):
        paths.Linear().diffusion(jnp.ones(2), "sbdm")
