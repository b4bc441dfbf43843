"""Gemma 2 against transformers: every hidden state, with and without the soft cap, padding, greedy steps."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

from svg_jax.convert.rules import to_jax
from svg_jax.convert.tables import GEMMA2
from svg_jax.models.gemma2 import Cache, Gemma2, Gemma2Config, greedy
from svg_jax.nn.functional import Network, Params
from svg_jax.parallel import batch_sharding, make_mesh, param_shardings
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
def test_texts_of_one_row_equal_transformers(name: str, prefix: str) -> None:
    """All texts of the case one after the other, with what none of them sees at the end."""
    case, network, params = load(name, SETTINGS[prefix])
    tokens, mask = inputs_of(case)
    lengths = mask.sum(1)
    row = np.concatenate([tokens[mask], [7, 7, 7]])[None]
    segments = np.concatenate([np.repeat(np.arange(1, len(tokens) + 1), lengths), [0, 0, 0]])[None]
    packed = jax.jit(lambda params, *args: network(params).packed_features(*args))(params, row, segments)
    assert_close(packed[0, :-3], case.outputs[f"{prefix}hidden_states_minus2"][mask], 1e-4)


@pytest.mark.golden
@pytest.mark.parametrize("prefix", SETTINGS)
@pytest.mark.parametrize("name", CASES)
def test_every_greedy_step_equals_transformers(name: str, prefix: str) -> None:
    """The expected tokens, one after the other through the cache: the logits of every step."""
    case, network, params = load(name, SETTINGS[prefix])
    ids = case.outputs[f"{prefix}generated_ids"].astype(np.int32)
    prompt = case.inputs["prompt_ids"].shape[1]
    np.testing.assert_array_equal(ids[:, :prompt], case.inputs["prompt_ids"])

    @jax.jit
    def step_logits(params: Params, ids: Array) -> Array:
        model = network(params)
        places = jnp.broadcast_to(jnp.arange(ids.shape[1])[None], ids.shape)
        x, cache = model.extend(ids[:, :prompt], places[:, :prompt], model.empty_cache(*ids.shape))

        def step(cache: Cache, i: Array) -> tuple[Cache, Array]:
            x, cache = model.extend(ids[:, i][:, None], places[:, i][:, None], cache)
            return cache, model.logits(x)[:, 0]

        _, rest = jax.lax.scan(step, cache, jnp.arange(prompt, ids.shape[1] - 1))
        return jnp.concatenate([model.logits(x)[:, -1:], rest.swapaxes(0, 1)], axis=1)

    steps = np.asarray(step_logits(params, ids))
    expected = case.outputs[f"{prefix}generated_step_logits"]
    assert_close(steps, expected[:, : steps.shape[1]], 1e-4)
    np.testing.assert_array_equal(steps.argmax(-1), ids[:, prompt:])


@pytest.mark.golden
@pytest.mark.parametrize("prefix", SETTINGS)
@pytest.mark.parametrize("name", CASES)
def test_greedy_decoding_equals_transformers(name: str, prefix: str) -> None:
    case, network, params = load(name, SETTINGS[prefix])
    prompts = case.inputs["prompt_ids"].astype(np.int32)
    expected = case.outputs[f"{prefix}generated_ids"][:, prompts.shape[1] :]
    eos = case.config["model"]["eos_token_id"]
    lengths = np.full(len(prompts), prompts.shape[1], np.int32)
    ids, num_new = continued(network, expected.shape[1], eos)(params, prompts, lengths)
    for row, count, wanted in zip(np.asarray(ids), num_new, expected, strict=True):
        end = list(wanted).index(eos) if eos in wanted else len(wanted)
        assert count == end
        np.testing.assert_array_equal(row[:end], wanted[:end])


@pytest.mark.golden
@pytest.mark.parametrize("name", CASES)
def test_prompts_of_other_lengths_in_a_batch_change_nothing(name: str) -> None:
    """Each prompt alone and without padding, all of them in one padded batch, and whatever the padding holds."""
    case, network, params = load(name, False)
    tokens, mask = inputs_of(case)
    lengths = mask.sum(1, dtype=np.int32)
    assert len(set(lengths)) > 1
    new, eos = case.config["new_tokens"], case.config["model"]["eos_token_id"]
    run = continued(network, new, eos)
    together = np.asarray(run(params, tokens, lengths)[0])
    noise = np.where(mask, tokens, (tokens + 7) % case.config["model"]["vocab_size"])
    np.testing.assert_array_equal(run(params, noise, lengths)[0], together)
    for i, length in enumerate(lengths):
        alone = run(params, tokens[i : i + 1, :length], lengths[i : i + 1])[0]
        np.testing.assert_array_equal(alone[0], together[i])
        np.testing.assert_array_equal(alone[0], recomputed(network, params, tokens[i, :length], new, eos))


@functools.cache
def continued(network: Network[Gemma2], max_new_tokens: int, eos: int):
    @jax.jit
    def run(params: Params, tokens: Array, num_tokens: Array) -> tuple[Array, Array]:
        return greedy(network(params), tokens, num_tokens, max_new_tokens=max_new_tokens, eos_id=eos)

    return run


def recomputed(network: Network[Gemma2], params: Params, prompt: np.ndarray, new: int, eos: int) -> np.ndarray:
    """Greedy decoding without a cache: the whole text runs again for every token."""
    slots = len(prompt) + new
    logits = jax.jit(lambda params, *args: network(params)(*args))
    ids = np.full(slots, eos, np.int32)
    ids[: len(prompt)] = prompt
    for end in range(len(prompt), slots):
        ids[end] = np.asarray(logits(params, ids[None], np.arange(slots)[None] < end))[0, end - 1].argmax()
        if ids[end] == eos:
            break
    return ids[len(prompt) :]


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


PROMPTS = np.array([[2, 40, 41, 42, 43, 44], [2, 90, 91, 0, 0, 0], [2, 8, 9, 10, 11, 0], [2, 70, 0, 0, 0, 0]], np.int32)
LENGTHS = np.array([6, 3, 5, 2], np.int32)


def test_a_row_stops_at_the_end_token_and_the_others_go_on() -> None:
    network, params = tiny()
    free, counts = continued(network, 9, -1)(params, PROMPTS, LENGTHS)  # no token is -1: nothing ends early
    assert counts.tolist() == [9] * 4
    eos = int(free[0, 4])  # what the first row says at its fifth step ends every row that says it
    ids, num_new = continued(network, 9, eos)(params, PROMPTS, LENGTHS)
    for row, count, said in zip(np.asarray(ids), num_new, np.asarray(free), strict=True):
        end = list(said).index(eos) if eos in said else 9
        assert count == end
        np.testing.assert_array_equal(row, [*said[:end], *[eos] * (9 - end)])
    assert num_new[0] < 9
    assert num_new.max() == 9


def test_no_step_runs_once_every_row_has_ended() -> None:
    network, params = tiny()
    eos = int(continued(network, 1, -1)(params, PROMPTS[:1], LENGTHS[:1])[0][0, 0])
    steps = []

    class Counted(Gemma2):
        def extend(self, *args: Any) -> Any:
            jax.debug.callback(lambda: steps.append(1))
            return super().extend(*args)

    counted = Network(lambda rngs: Counted(network(params).config, rngs=rngs))
    ids, num_new = continued(counted, 50, eos)(params, PROMPTS[:1], LENGTHS[:1])
    jax.effects_barrier()
    assert (num_new.tolist(), set(ids[0].tolist()), len(steps)) == ([0], {eos}, 1)


def test_decoding_compiles_once_whatever_the_prompts() -> None:
    network, params = tiny()
    run = continued(network, 5, 1)
    before = run._cache_size()
    for tokens, lengths in ((PROMPTS, LENGTHS), (PROMPTS[::-1], LENGTHS[::-1]), (PROMPTS + 1, LENGTHS - 1)):
        run(params, tokens, lengths)
    assert run._cache_size() == before + 1


def test_decoding_on_a_mesh_gives_the_same_tokens() -> None:
    network, params = tiny()
    expected = continued(network, 8, -1)(params, PROMPTS, LENGTHS)[0]
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    spread = jax.device_put(params, param_shardings(network.shapes, network.axes, mesh))
    with jax.set_mesh(mesh):
        inputs = jax.device_put((PROMPTS, LENGTHS), batch_sharding(mesh))
        np.testing.assert_array_equal(continued(network, 8, -1)(spread, *inputs)[0], expected)


def test_decoding_in_bfloat16() -> None:
    config = Gemma2Config.tiny(sliding_window=4, dtype="bfloat16")
    network = Network(lambda rngs: Gemma2(config, rngs=rngs))
    assert jax.eval_shape(lambda params: network(params).empty_cache(4, 8), network.shapes).keys.dtype == jnp.bfloat16
    run, params = continued(network, 6, -1), tiny()[1]
    together = np.asarray(run(params, PROMPTS, LENGTHS)[0])
    for i, length in enumerate(LENGTHS):
        alone = run(params, PROMPTS[i : i + 1, :length], LENGTHS[i : i + 1])[0]
        np.testing.assert_array_equal(alone[0], together[i])


def test_no_new_tokens_are_refused() -> None:
    network, params = tiny()
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        greedy(network(params), PROMPTS, LENGTHS, max_new_tokens=0, eos_id=1)


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
