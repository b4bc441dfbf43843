"""Gemma 2 against transformers: every hidden state, with and without the soft cap, padding, greedy steps."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

from svg_jax.convert.rules import to_jax
from svg_jax.convert.tables import GEMMA2
from svg_jax.models.gemma2 import Gemma2, Gemma2Config
from svg_jax.nn.functional import Network, Params
from tests.vectors import Case, assert_close, cases

CASES = cases("gemma2")
SETTINGS = {"": True, "nosoftcap.": False}  # the prefix of the expected arrays: whether attention logits are capped


@functools.cache
def load(name: str, softcap: bool, dtype: str = "float32") -> tuple[Case, Network[Gemma2], Params]:
    case = Case.load(name)
    model = case.config["model"]
    cap = model["attn_logit_softcapping"] if softcap else None
    config = Gemma2Config.from_transformers(model, attn_logit_softcap=cap, dtype=dtype)
    network = Network(lambda rngs: Gemma2(config, rngs=rngs))
    params = to_jax(case.weights(), GEMMA2, network.shapes)
    return case, network, {key: jnp.asarray(value) for key, value in params.items()}


@functools.cache
def everything(name: str, softcap: bool):
    """All that the vectors hold of one forward pass, by their names."""
    _, network, _ = load(name, softcap)

    @jax.jit
    def forward(params: Params, tokens: Array, mask: Array) -> dict[str, Array]:
        model = network(params)
        last = model.last_hidden_state(tokens, mask)
        states = [*model.hidden_states(tokens, mask)[:-1], last]
        found = {f"hidden_states_{i}": state for i, state in enumerate(states)}
        features = model.features(tokens, mask)
        return found | {"hidden_states_minus2": features, "last_hidden_state": last, "logits": model(tokens, mask)}

    return forward


def inputs_of(case: Case) -> tuple[np.ndarray, np.ndarray]:
    return case.inputs["input_ids"].astype(np.int32), case.inputs["attention_mask"].astype(bool)


@pytest.mark.golden
@pytest.mark.parametrize("prefix", SETTINGS)
@pytest.mark.parametrize("name", CASES)
def test_every_hidden_state_equals_transformers(name: str, prefix: str) -> None:
    case, _, params = load(name, SETTINGS[prefix])
    tokens, mask = inputs_of(case)
    found = everything(name, SETTINGS[prefix])(params, tokens, mask)
    keys = [f"{prefix}{key}" for key in found if f"{prefix}{key}" in case.outputs]
    assert f"{prefix}hidden_states_minus2" in keys
    assert f"{prefix}last_hidden_state" in keys
    for key in keys:
        assert_close(found[key.removeprefix(prefix)][mask], case.outputs[key][mask], 1e-4, key)


@pytest.mark.golden
@pytest.mark.parametrize("name", CASES)
def test_what_padding_holds_changes_nothing(name: str) -> None:
    case, _, params = load(name, True)
    tokens, mask = inputs_of(case)
    other = np.where(mask, tokens, (tokens + 7) % case.config["model"]["vocab_size"])
    assert (other != tokens).any()
    forward = everything(name, True)
    for key, value in forward(params, tokens, mask).items():
        np.testing.assert_array_equal(value[mask], forward(params, other, mask)[key][mask], key)


@pytest.mark.golden
@pytest.mark.parametrize("prefix", SETTINGS)
@pytest.mark.parametrize("name", CASES)
def test_every_greedy_step_equals_transformers(name: str, prefix: str) -> None:
    case, network, params = load(name, SETTINGS[prefix])
    ids = case.outputs[f"{prefix}generated_ids"].astype(np.int32)
    prompt = case.inputs["prompt_ids"].shape[1]
    np.testing.assert_array_equal(ids[:, :prompt], case.inputs["prompt_ids"])
    logits = jax.jit(lambda params, *args: network(params)(*args))(params, ids, np.ones(ids.shape, bool))
    steps = np.asarray(logits[:, prompt - 1 : -1])  # attention is causal: one pass over the result shows every step
    expected = case.outputs[f"{prefix}generated_step_logits"]
    assert_close(steps, expected[:, : steps.shape[1]], 1e-4)
    np.testing.assert_array_equal(steps.argmax(-1), ids[:, prompt:])


@pytest.mark.golden
@pytest.mark.parametrize("name", CASES)
def test_bfloat16_stays_near_float32(name: str) -> None:
    case, network, params = load(name, False, "bfloat16")
    tokens, mask = inputs_of(case)
    features = jax.jit(lambda params, *args: network(params).features(*args))(params, tokens, mask)
    assert features.dtype == jnp.float32
    assert_close(features[mask], case.outputs["nosoftcap.hidden_states_minus2"][mask], 3e-2)


@functools.cache
def tiny() -> tuple[Network[Gemma2], Params]:
    network = Network(lambda rngs: Gemma2(Gemma2Config.tiny(sliding_window=4), rngs=rngs))
    return network, jax.jit(network.init)(jax.random.key(0))


def test_features_do_not_compute_the_last_layer() -> None:
    network, params = tiny()
    tokens, mask = jnp.arange(10, dtype=jnp.int32)[None] + 8, jnp.ones((1, 10), bool)
    gradient = jax.jit(jax.grad(lambda params: jnp.sum(network(params).features(tokens, mask) ** 2)))(params)
    used = {key: np.any(np.asarray(value) != 0, axis=tuple(range(1, value.ndim))) for key, value in gradient.items()}
    for key in (key for key in used if key.startswith("layers.")):
        np.testing.assert_array_equal(used[key], [True] * (len(used[key]) - 1) + [False], key)
    np.testing.assert_array_equal(np.flatnonzero(used["embed_tokens.embedding"]), tokens[0])
    assert not used["norm.scale"].any()


def test_tokens_of_the_stand_in_are_told_apart() -> None:
    """A token's features resemble those of the same token elsewhere, and no other's, but depend on the place."""
    network, params = tiny()
    tokens = jax.random.permutation(jax.random.key(1), 100)[None].astype(jnp.int32)
    both = jnp.concatenate([tokens, tokens[:, ::-1]])
    features = jax.jit(lambda params, *args: network(params).features(*args))(params, both, jnp.ones(both.shape, bool))
    unit = np.asarray(features / jnp.linalg.norm(features, axis=-1, keepdims=True))
    likeness = unit[0] @ unit[1, ::-1].T
    np.testing.assert_array_equal(likeness.argmax(1), np.arange(100))
    assert 0.8 < np.diag(likeness).mean() < 0.999


def test_gemma2_2b_has_the_published_number_of_parameters() -> None:
    shapes = Network(lambda rngs: Gemma2(Gemma2Config.gemma2_2b(), rngs=rngs)).shapes
    assert sum(np.prod(struct.shape) for struct in shapes.values()) == 2_614_341_888


def test_kernels_carry_logical_axes() -> None:
    axes = tiny()[0].axes
    assert axes["embed_tokens.embedding"] == ("vocab", "embed")
    assert axes["layers.self_attn.k_proj.kernel"] == ("layers", "embed", "heads")
    assert axes["layers.self_attn.o_proj.kernel"] == ("layers", "heads", "embed")
    assert axes["layers.mlp.up_proj.kernel"] == ("layers", "embed", "mlp")
    assert axes["layers.mlp.down_proj.kernel"] == ("layers", "mlp", "embed")


@pytest.mark.parametrize("change", [{"hidden_activation": "gelu"}, {"layer_types": ["full_attention"] * 26}])
def test_what_no_published_model_has_is_refused(change: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        Gemma2Config.from_transformers(change)
