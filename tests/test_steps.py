"""The compiled steps: what enters a loss, what a gradient is the gradient of, what changes and what does not."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jaxtyping import Array

from data_pipelines.broken import by_cause
from data_pipelines.records import Cause
from svg_jax.flow.paths import path
from svg_jax.flow.solvers import Solver
from svg_jax.models.autoencoder import Autoencoder, AutoencoderConfig, to_uint8
from svg_jax.models.decoder import DecoderConfig
from svg_jax.models.gemma2 import Gemma2, Gemma2Config
from svg_jax.models.next_dit import NextDiT, NextDiTConfig
from svg_jax.models.residual import ResidualConfig
from svg_jax.models.vit import ViTConfig
from svg_jax.nn.functional import Network, Params
from svg_jax.parallel import batch_sharding, make_mesh, replicated
from svg_jax.state import TrainState
from svg_jax.steps import (
    Batch,
    FlowObjective,
    Frozen,
    Networks,
    Sampling,
    accumulate,
    decode_latents,
    draw_latents,
    encode_prompts,
    text_to_image_step,
)
from tests.vectors import assert_close

PATCH, CHANNELS, TOKENS, TEXT_TOKENS = 4, 16, 6, 5
GRID = np.array([[2, 3], [3, 1], [1, 2], [0, 0]], np.int32)  # (0, 0): no image
NUM_TOKENS = np.array([5, 1, 3, 2], np.int32)
OBJECTIVE = FlowObjective(path("Linear"), shift=2.0)
DECAY = 0.75


class Tiny(NamedTuple):
    """Networks of every kind with a few parameters, none of them zero."""

    networks: Networks
    params: Params
    frozen: Frozen

    def state(self, seed: int = 0) -> TrainState:
        return TrainState.create(self.params, optax.sgd(1.0), jax.random.key(seed))


@functools.cache
def tiny_networks() -> Tiny:
    dit = NextDiTConfig(
        in_channels=CHANNELS + 4, text_dim=16, dim=16, num_layers=2, num_refiner_layers=1, num_heads=2, num_kv_heads=1,
        multiple_of=8, axes_dims=(4, 2, 2), axes_lens=(8, 8, 8),
    )  # fmt: skip
    vit = ViTConfig(dim=CHANNELS, num_layers=1, num_heads=2, hidden_dim=32, patch_size=PATCH, layer_scale=0.5)
    # With a residual branch, whose channels depend on the whole batch.
    residual = ResidualConfig(dim=16, num_layers=1, num_heads=2, hidden_dim=32, out_channels=4, patch_size=PATCH)
    decoder = DecoderConfig(z_channels=CHANNELS + 4, channels=32, channel_multipliers=(1, 1, 1), num_res_blocks=0)
    text = Gemma2Config.tiny(dim=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, hidden_dim=16)
    networks = Networks(
        Network(lambda rngs: NextDiT(dit, rngs=rngs)),
        Network(lambda rngs: Autoencoder(AutoencoderConfig(vit, decoder, residual), rngs=rngs)),
        Network(lambda rngs: Gemma2(text, rngs=rngs)),
    )
    init = jax.jit(lambda key: [network.init(key) for network in networks])
    params, autoencoder, language = init(jax.random.key(0))
    draw = np.random.default_rng(0)
    params = {name: value + 0.1 * draw.normal(size=value.shape).astype(np.float32) for name, value in params.items()}
    return Tiny(networks, params, Frozen(autoencoder=autoencoder, text=language))


@pytest.fixture(scope="module")
def tiny() -> Tiny:
    return tiny_networks()


def make_batch(seed: int = 1, grid: np.ndarray = GRID) -> Batch:
    """Random pixels and captions; padding holds random numbers too."""
    draw = np.random.default_rng(seed)
    num_tokens = np.resize(NUM_TOKENS, len(grid))
    return Batch(
        patches=jnp.asarray(draw.integers(0, 256, (len(grid), TOKENS, PATCH * PATCH * 3)), jnp.uint8),
        grid=jnp.asarray(grid),
        tokens=jnp.asarray(draw.integers(0, 259, (len(grid), TEXT_TOKENS)), jnp.int32),
        num_tokens=jnp.asarray(num_tokens),
        cause=jnp.asarray(np.where(grid[:, 0] > 0, 0, 1 + list(Cause).index(Cause.TRUNCATED)), jnp.int32),
    )


def with_other_padding(batch: Batch) -> Batch:
    """The same images and captions: only what no mask lets through is drawn anew."""
    other = make_batch(seed=2, grid=np.asarray(batch["grid"]))
    image = np.arange(TOKENS)[None] < np.prod(batch["grid"], axis=1)[:, None]
    text = (np.arange(TEXT_TOKENS)[None] < np.asarray(batch["num_tokens"])[:, None]) & image.any(axis=1)[:, None]
    return Batch(
        patches=jnp.where(image[..., None], batch["patches"], other["patches"]),
        grid=batch["grid"],
        tokens=jnp.where(text, batch["tokens"], other["tokens"]),
        num_tokens=batch["num_tokens"],
        cause=batch["cause"],
    )


@pytest.fixture(scope="module")
def steps(tiny: Tiny) -> dict[int, Any]:
    """Compiled steps by number of micro-batches. Plain gradient descent with rate 1: the gradient is p - p'."""

    def step(micro_batches: int) -> Any:
        return jax.jit(
            text_to_image_step(tiny.networks, OBJECTIVE, optax.sgd(1.0), ema_decay=DECAY, micro_batches=micro_batches)
        )

    return {parts: step(parts) for parts in (1, 2)}


@pytest.fixture(scope="module")
def by_hand(tiny: Tiny) -> Callable[[int, Array], tuple[Array, Params]]:
    """The mean loss and its gradient as the documents state them, one image at a time, without padding or masks."""
    batch, held = make_batch(), np.flatnonzero(GRID[:, 0])
    x1 = jax.jit(tiny.networks.autoencoder(tiny.frozen["autoencoder"]).encode)(batch["patches"], batch["grid"])
    mask = jnp.arange(TEXT_TOKENS)[None] < batch["num_tokens"][:, None]
    text = jax.jit(tiny.networks.text(tiny.frozen["text"]).features)(batch["tokens"], mask)

    @jax.jit
    @jax.value_and_grad
    def loss(params: Params, times: Array, noise: Array) -> Array:
        losses = []
        for i in held:
            n, words, t = int(np.prod(GRID[i])), int(NUM_TOKENS[i]), times[i]
            x_t = t * x1[i, :n] + (1 - t) * noise[i, :n]
            words_mask = jnp.ones((1, words), bool)
            v = tiny.networks.dit(params)(
                x_t[None], t[None], text[i : i + 1, :words], grid=jnp.asarray(GRID[i : i + 1]), text_mask=words_mask
            )
            losses.append(jnp.mean((v[0] - (x1[i, :n] - noise[i, :n])) ** 2))
        return jnp.mean(jnp.stack(losses))

    def run(parts: int, key: Array) -> tuple[Array, Params]:
        times, noise = np.zeros(len(GRID), np.float32), np.zeros((len(GRID), TOKENS, CHANNELS + 4), np.float32)
        keys = [key] if parts == 1 else jax.random.split(key, parts)
        for part in range(parts):  # a part takes every parts-th row
            time_key, noise_key = jax.random.split(keys[part])
            rows = slice(part, None, parts)
            count = len(times[rows])
            z = jax.nn.sigmoid(jax.random.normal(time_key, (count,)))
            times[rows] = z / (z + OBJECTIVE.shift * (1 - z))
            noise[rows] = jax.random.normal(noise_key, (count, TOKENS, CHANNELS + 4))
        return loss(tiny.params, times, noise)

    return run


@pytest.mark.parametrize("parts", [1, 2])
def test_a_step_descends_the_mean_loss_over_all_images(
    tiny: Tiny, steps: dict[int, Any], by_hand: Callable[[int, Array], tuple[Array, Params]], parts: int
) -> None:
    """Parts with unlike numbers of images too: of two, one holds rows 0 and 2, the other row 1."""
    state = dataclasses.replace(tiny.state(), step=jnp.asarray(7, jnp.int32))
    value, grads = by_hand(parts, jax.random.fold_in(state.key, 7))
    after, metrics = steps[parts](state, tiny.frozen, make_batch())
    assert_close(metrics["loss"], value, 1e-5)
    norm = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in map(np.asarray, grads.values())))
    assert_close(metrics["grad_norm"], norm, 1e-4)
    for name, gradient in grads.items():
        assert np.asarray(gradient).any() or name.startswith("norm_final"), name
        scale = max(np.abs(gradient).max(), np.abs(state.params[name]).max() * 1e-2)  # the difference rounds
        error = np.abs((state.params[name] - after.params[name]) - gradient).max()
        assert error <= 1e-4 * scale, f"{name}: {error} of {scale}"
        assert_close(after.ema[name], DECAY * state.params[name] + (1 - DECAY) * after.params[name], 1e-6, name)
    assert int(after.step) == 8


def test_padding_and_empty_slots_change_nothing(tiny: Tiny, steps: dict[int, Any]) -> None:
    one, other = (
        steps[1](tiny.state(), tiny.frozen, batch) for batch in (make_batch(), with_other_padding(make_batch()))
    )
    assert_close(other[1]["loss"], one[1]["loss"], 1e-6)
    for name, value in one[0].params.items():
        assert_close(other[0].params[name], value, 1e-6, name)


def test_a_batch_without_images_changes_no_parameter(tiny: Tiny, steps: dict[int, Any]) -> None:
    after, metrics = steps[1](tiny.state(), tiny.frozen, make_batch(grid=np.zeros_like(GRID)))
    assert float(metrics["loss"]) == float(metrics["grad_norm"]) == 0.0
    for name, value in tiny.params.items():
        np.testing.assert_array_equal(after.params[name], value)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("fsdp", [1, 4])
def test_a_step_that_is_not_finite_is_skipped(tiny: Tiny, steps: dict[int, Any], parts: int, fsdp: int) -> None:
    """Though NaN comes from one caption of one micro-batch, and from one device."""
    text = tiny.frozen["text"]
    poisoned = {**text, "embed_tokens.embedding": text["embed_tokens.embedding"].at[7].set(jnp.nan)}
    batch = make_batch()
    batch["tokens"] = jnp.where(batch["tokens"] == 7, 8, batch["tokens"])
    broken = Batch(**{**batch, "tokens": batch["tokens"].at[2, 0].set(7)})
    mesh = make_mesh({"fsdp": fsdp}, jax.devices()[:fsdp])
    rows, everywhere = batch_sharding(mesh), replicated(mesh)
    state, frozen = jax.device_put((tiny.state(), Frozen(**{**tiny.frozen, "text": poisoned})), everywhere)
    sound, _ = steps[parts](state, frozen, jax.device_put(batch, rows))
    after, metrics = steps[parts](sound, frozen, jax.device_put(broken, rows))
    assert np.isnan(metrics["loss"])
    assert (int(metrics["skipped_steps"]), int(metrics["skipped_in_a_row"])) == (1, 1)
    assert by_cause(metrics["bad_records"].tolist()) == {"truncated": 1}
    assert int(after.step) == 2
    for name, value in sound.params.items():
        np.testing.assert_array_equal(after.params[name], value)
        np.testing.assert_array_equal(after.ema[name], sound.ema[name])
        assert (np.asarray(value) != np.asarray(tiny.params[name])).any() or name.startswith("norm_final")


def test_randomness_is_the_key_and_the_step(tiny: Tiny, steps: dict[int, Any]) -> None:
    def loss(step: int, seed: int = 0) -> float:
        state = dataclasses.replace(tiny.state(seed), step=jnp.asarray(step, jnp.int32))
        return float(steps[1](state, tiny.frozen, make_batch())[1]["loss"])

    assert loss(3) == loss(3)
    assert len({loss(3), loss(4), loss(3, seed=1)}) == 3


def test_the_loss_by_time_adds_up_to_the_loss(tiny: Tiny, steps: dict[int, Any]) -> None:
    _, metrics = steps[1](tiny.state(), tiny.frozen, make_batch())
    by_time = np.asarray(metrics["loss_by_time"])
    assert np.nanmin(by_time) <= float(metrics["loss"]) <= np.nanmax(by_time)
    assert np.isnan(by_time).any()  # bins that no time fell into
    assert by_time.shape == (10,)


def test_one_program_for_all_shapes_of_images(tiny: Tiny, steps: dict[int, Any]) -> None:
    before = steps[1]._cache_size()
    for grid in (GRID, GRID[::-1].copy(), np.ones_like(GRID)):
        steps[1](tiny.state(), tiny.frozen, make_batch(grid=grid))
    assert steps[1]._cache_size() == max(before, 1)


def test_accumulation_sums_over_parts_that_cover_the_batch() -> None:
    batch: Any = {"x": jnp.arange(12.0).reshape(6, 2)}

    def function(batch: Any, key: Array) -> Any:
        return {"sum": batch["x"].sum(axis=0)}, {"loss": jnp.sum(batch["x"] ** 2)}

    whole = accumulate(function, batch, jax.random.key(0), 1)
    for parts in (2, 3, 6):
        assert jax.tree.map(np.asarray, accumulate(function, batch, jax.random.key(0), parts))[1] == whole[1]
    with pytest.raises(ValueError, match="a batch of 6 cannot be cut into 4 micro-batches"):
        accumulate(function, batch, jax.random.key(0), 4)


def sample(tiny: Tiny, params: Params, tokens: Array, lengths: Array, places: Array, settings: Sampling, solver: str):
    """Prompts -> latents -> pictures, as the pipeline strings them together."""
    text = encode_prompts(tiny.networks.text, tiny.frozen["text"], tokens, lengths)
    z = draw_latents(
        tiny.networks.dit, params, text, lengths, places, jax.random.key(5), settings,
        grid=(2, 3), solver=Solver(solver), guide=len(places) < len(tokens),
    )  # fmt: skip
    return decode_latents(tiny.networks.autoencoder, tiny.frozen["autoencoder"], z, grid=(2, 3))


def test_sampling_is_guidance_around_the_network_and_a_solver(tiny: Tiny) -> None:
    """The compiled sampler against the same one written out for one picture, padding cut off."""
    prompt, negative = [2, 5, 7], [2]
    tokens = jnp.array([prompt + [9] * (TEXT_TOKENS - 3), negative + [9] * (TEXT_TOKENS - 1)])
    settings = Sampling(num_steps=4, guidance_scale=3.0, renorm=0.7, guidance_interval=(0.0, 0.6), shift=4.0)
    drawn = jax.jit(
        lambda params: sample(tiny, params, tokens, jnp.array([3, 1]), jnp.array([[1, 2]]), settings, "euler")
    )(tiny.params)

    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(5), 1), 2)
    grid = jnp.array([[2, 3]])

    @jax.jit
    def by_hand(params):
        autoencoder = tiny.networks.autoencoder(tiny.frozen["autoencoder"])
        text, dit = tiny.networks.text(tiny.frozen["text"]), tiny.networks.dit(params)
        texts = [text.features(jnp.array([ids]), jnp.ones((1, len(ids)), bool)) for ids in (prompt, negative)]
        x = jax.random.normal(key, (6, autoencoder.config.latent_channels))[None]
        times = [u / (u + 4.0 * (1 - u)) for u in (0.0, 0.25, 0.5, 0.75, 1.0)]
        for t, after in itertools.pairwise(times):
            at = jnp.full((1,), t)
            cond, uncond = (dit(x, at, f, grid=grid, text_mask=jnp.ones(f.shape[:2], bool)) for f in texts)
            v = uncond + 3.0 * (cond - uncond)
            v = v * jnp.minimum(1.0, 0.7 * jnp.linalg.norm(cond) / jnp.linalg.norm(v))
            x = x + (after - t) * (v if t < 0.6 else cond)
        return to_uint8(autoencoder.decode(x, (2, 3)))

    assert np.abs(np.asarray(drawn, np.int32) - np.asarray(by_hand(tiny.params), np.int32)).max() <= 1


@pytest.mark.parametrize("solver", ["midpoint", "dpm++2m", "sde_euler"])
def test_a_picture_depends_on_its_own_prompt_and_place_only(tiny: Tiny, solver: str) -> None:
    batch = make_batch()

    def draw(rows: list[int]) -> np.ndarray:
        prompts = jnp.concatenate([batch["tokens"][jnp.array(rows)], jnp.full((len(rows), TEXT_TOKENS), 2)])
        lengths = jnp.concatenate([batch["num_tokens"][jnp.array(rows)], jnp.ones(len(rows), jnp.int32)])
        places = jnp.array([[row, 0] for row in rows])
        run = jax.jit(lambda *arrays: sample(tiny, tiny.params, *arrays, Sampling(num_steps=3), solver))
        return np.asarray(run(prompts, lengths, places), np.int32)

    together, alone = draw([0, 1, 2]), draw([2])
    assert together.shape == (3, 2 * PATCH, 3 * PATCH, 3)
    assert np.abs(together[2] - alone[0]).max() <= 1  # float32 may round a pixel the other way
    assert (together[0] != together[2]).any()


def test_without_guidance_the_unconditional_half_is_not_computed(tiny: Tiny) -> None:
    batch = make_batch()
    tokens, lengths, places = batch["tokens"][:2], batch["num_tokens"][:2], jnp.array([[0, 0], [1, 0]])
    both = jnp.concatenate([tokens, jnp.full_like(tokens, 2)]), jnp.concatenate([lengths, jnp.ones_like(lengths)])
    alone, scaled = (
        np.asarray(sample(tiny, tiny.params, *texts, places, Sampling(num_steps=2, guidance_scale=1.0), "euler"), int)
        for texts in ((tokens, lengths), both)
    )
    assert np.abs(alone - scaled).max() <= 1


def test_steps_and_guidance_compile_nothing_anew(tiny: Tiny) -> None:
    traced = []
    batch = make_batch()

    @jax.jit
    def run(settings: Sampling) -> Array:
        traced.append(1)
        tokens, lengths = batch["tokens"][:2], batch["num_tokens"][:2]
        return sample(tiny, tiny.params, tokens, lengths, jnp.array([[0, 0]]), settings, "dpm++2m")

    for steps, scale in ((1, 4.0), (3, 2.0), (7, 0.0)):
        run(Sampling(num_steps=steps, guidance_scale=scale))
    assert len(traced) == 1
