from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from svg_jax.flow.guidance import combine, guided, renormalise
from tests.vectors import Case, assert_close, cases

TOLERANCE = 1e-5


def settings(case: Case, mode: str) -> dict[str, Any]:
    """The guidance settings behind `out.cfg.<mode>`; `renorm0p7` is a limit of 0.7."""
    found: dict[str, Any] = {"scale": case.config["cfg"]["cfg_scale"], "renorm": 0.0}
    if mode == "trunc":
        found["interval"] = (0.0, case.config["cfg"]["cfg_trunc"])
    for word in mode.split("_"):
        if word.startswith("scale"):
            found["scale"] = float(word.removeprefix("scale").replace("p", "."))
        elif word.startswith("renorm"):
            found["renorm"] = float(word.removeprefix("renorm").replace("p", "."))
    return found


def modes() -> list[tuple[str, str]]:
    """Every (case, guidance mode) that the vectors hold."""
    return [
        (name, key.removeprefix("cfg."))
        for name in cases("dit")
        for key in Case.load(name).outputs
        if key.startswith("cfg.") and key != "cfg.raw_cond_uncond"
    ]


@pytest.mark.golden
@pytest.mark.parametrize(("name", "mode"), modes())
def test_guidance_matches_the_release(name: str, mode: str) -> None:
    case = Case.load(name)
    raw, expected = jnp.asarray(case.outputs["cfg.raw_cond_uncond"]), case.outputs[f"cfg.{mode}"]
    x, t = (jnp.asarray(np.split(case.inputs[f"cfg.{key}"], 2)[0]) for key in ("x", "t"))
    actual = guided(lambda x, t: raw, **settings(case, mode))(x, t)
    assert_close(jnp.concatenate([actual, actual]), expected, TOLERANCE, mode)


def halves(tokens: int = 6) -> tuple[jax.Array, jax.Array]:
    conditional, unconditional = jax.random.normal(jax.random.key(0), (2, 2, tokens, 3))
    return conditional, unconditional


def norms(x: jax.Array) -> np.ndarray:
    return np.linalg.norm(np.asarray(x).reshape(len(x), -1), axis=1)


def test_scale_one_is_conditional_and_zero_unconditional() -> None:
    conditional, unconditional = halves()
    assert_close(combine(conditional, unconditional, 1.0), conditional, 1e-6)
    assert_close(combine(conditional, unconditional, 0.0), unconditional, 1e-6)


def test_renormalisation_caps_the_norm_and_never_enlarges() -> None:
    conditional, unconditional = halves()
    combined = combine(conditional, unconditional, 5.0)
    assert_close(norms(renormalise(combined, conditional, 0.7)), 0.7 * norms(conditional), 1e-5)
    assert_close(renormalise(0.1 * conditional, conditional, 1.0), 0.1 * conditional, 1e-6)
    assert_close(renormalise(combined, conditional, 0.0), combined, 0.0)
    assert_close(renormalise(jnp.zeros_like(combined), conditional, 1.0), jnp.zeros_like(combined), 0.0)


def test_masked_tokens_do_not_enter_the_norm() -> None:
    conditional, unconditional = halves()
    mask = jnp.asarray([[True] * 6, [True] * 4 + [False] * 2])
    combined = combine(conditional, unconditional, 5.0)
    spoilt = jnp.where(mask[:, :, None], combined, jnp.nan)
    actual = renormalise(spoilt, conditional, 1.0, mask)
    assert_close(actual[:1], renormalise(combined[:1], conditional[:1], 1.0), 1e-6)
    assert_close(actual[1:, :4], renormalise(combined[1:, :4], conditional[1:, :4], 1.0), 1e-6)


def test_the_interval_holds_for_each_sample_alone() -> None:
    conditional, unconditional = jax.random.normal(jax.random.key(0), (2, 4, 6, 3))
    network = guided(lambda x, t: jnp.concatenate([conditional, unconditional]), 4.0, renorm=0.0, interval=(0.2, 0.5))
    actual = network(conditional, jnp.asarray([0.1, 0.2, 0.4, 0.5]))
    assert_close(actual[1:3], combine(conditional, unconditional, 4.0)[1:3], 1e-6)
    for outside in (0, 3):
        assert_close(actual[outside], conditional[outside], 0.0)


def test_the_whole_interval_has_no_ends() -> None:
    conditional, unconditional = halves()
    network = guided(lambda x, t: jnp.concatenate([conditional, unconditional]), 4.0, renorm=0.0)
    assert_close(network(conditional, jnp.asarray([-0.1, 1.0])), combine(conditional, unconditional, 4.0), 1e-6)


def test_the_network_sees_the_same_state_and_time_in_both_halves() -> None:
    seen = []

    def network(x: jax.Array, t: jax.Array) -> jax.Array:
        seen.append((x, t))
        return x.astype(jnp.bfloat16)

    x, t = halves()[0], jnp.asarray([0.1, 0.2])
    assert guided(network, 4.0)(x, t).dtype == jnp.float32
    [(both, times)] = seen
    assert bool((both == jnp.concatenate([x, x])).all())
    assert bool((times == jnp.concatenate([t, t])).all())


def test_one_compilation_for_all_settings() -> None:
    traces = []

    @jax.jit
    def run(
        x: jax.Array, t: jax.Array, scale: jax.Array, renorm: jax.Array, low: jax.Array, high: jax.Array
    ) -> jax.Array:
        traces.append(1)
        return guided(lambda x, t: x, scale, renorm=renorm, interval=(low, high))(x, t)

    x, t = halves()[0], jnp.asarray([0.1, 0.2])
    for values in [(4.0, 1.0, 0.0, 1.0), (1.0, 0.0, 0.0, 0.5), (7.0, 0.7, 0.1, 0.8)]:
        run(x, t, *values)
    assert len(traces) == 1
