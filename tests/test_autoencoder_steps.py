"""The autoencoder's step: what each gradient is the gradient of, what enters it, what changes and what does not."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jaxtyping import Array

from data_pipelines.broken import by_cause
from data_pipelines.records import Cause
from svg_jax.adversarial import AutoencoderLoss, LossConfig
from svg_jax.autoencoder_steps import (
    AutoencoderNetworks,
    Batch,
    Moments,
    autoencoder_step,
    is_trained_in_run,
    reconstruct,
    target_pixels,
    update_moments,
)
from svg_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from svg_jax.models.decoder import DecoderConfig
from svg_jax.models.discriminator import running_statistics
from svg_jax.models.residual import ResidualConfig
from svg_jax.models.vit import ViTConfig
from svg_jax.nn.functional import Network, Params
from svg_jax.parallel import batch_sharding, make_mesh, param_shardings, replicated
from svg_jax.state import TrainState, state_shardings
from tests.tiny import random_params
from tests.vectors import assert_close

PATCH, CHANNELS, SIZE = 2, 16, (16, 20)
START = 2  # of the discriminator
DECAY = 0.75
VALID = (True, True, False, True, True, True, False, True)

BRANCH = ResidualConfig(
    dim=8, num_layers=1, num_heads=2, hidden_dim=16, out_channels=4, patch_size=PATCH, grid=(4, 4), mask_ratio=0.5
)
SIZES = AutoencoderConfig(
    ViTConfig(dim=CHANNELS, num_layers=1, num_heads=2, hidden_dim=32, patch_size=PATCH, layer_scale=0.5),
    DecoderConfig(z_channels=CHANNELS + BRANCH.out_channels, channels=32, channel_multipliers=(1, 1), num_res_blocks=0),
    BRANCH,
)
LOSS = LossConfig(
    perceptual_channels=(16, 16, 16, 16, 16),  # narrower ones make features that all but vanish
    disc_channels=4,
    disc_num_layers=1,
    disc_start=START,
    logvar_init=0.25,
    learn_logvar=True,
    reduction="mean",
)
PLAIN = LossConfig(perceptual_weight=0.0, disc_weight=0.0, reduction="mean")


@functools.cache
def networks_of(loss: LossConfig = LOSS) -> AutoencoderNetworks:
    return AutoencoderNetworks(
        Network(lambda rngs: Autoencoder(SIZES, rngs=rngs)), Network(lambda rngs: AutoencoderLoss(loss, rngs=rngs))
    )


@functools.cache
def params_of(loss: LossConfig = LOSS) -> Params:
    return {k: jnp.asarray(v) for k, v in random_params(networks_of(loss).shapes, 0).items()} | {
        "loss.logvar": jnp.float32(loss.logvar_init)
    }


def state_of(*, at: int = START, loss: LossConfig = LOSS, **changes: Array) -> TrainState:
    """Before the step `at`; `changes` are parameters, their dots as double underscores."""
    params = {**params_of(loss), **{name.replace("__", "."): value for name, value in changes.items()}}
    trained = {name: value for name, value in params.items() if is_trained_in_run(name, SIZES, loss)}
    frozen = {name: value for name, value in params.items() if name not in trained}
    state = TrainState.create(trained, optax.sgd(1.0), jax.random.key(7), frozen)
    return dataclasses.replace(state, step=jnp.int32(at))


@functools.cache
def step_of(loss: LossConfig = LOSS) -> Any:
    """Plain gradient descent with rate 1: the gradient is p - p'."""
    return jax.jit(autoencoder_step(networks_of(loss), loss, optax.sgd(1.0), ema_decay=DECAY))


def make_batch(seed: int = 1, valid: tuple[bool, ...] = VALID) -> Batch:
    images = np.random.default_rng(seed).integers(0, 256, (len(valid), *SIZE, 3))
    cause = jnp.where(jnp.array(valid), 0, 1 + list(Cause).index(Cause.EMPTY))
    return Batch(images=jnp.asarray(images, jnp.uint8), valid=jnp.array(valid), cause=cause)


@dataclasses.dataclass(frozen=True)
class ByHand:
    """The equations as they stand, on the valid images alone."""

    state: TrainState
    batch: Batch

    def networks(self, params: Params) -> tuple[Autoencoder, AutoencoderLoss]:
        everything = {**self.state.frozen, **params}
        loss = {k.removeprefix("loss."): v for k, v in everything.items() if k.startswith("loss.")}
        model = {k: v for k, v in everything.items() if not k.startswith("loss.")}
        return networks_of().autoencoder(model), networks_of().loss(loss)

    @property
    def images(self) -> Array:
        return target_pixels(self.batch["images"][np.array(VALID)])

    def reconstructions(self, params: Params) -> Array:
        model, _ = self.networks(params)
        key = jax.random.fold_in(self.state.key, self.state.step)
        features = model.features_of_images(self.batch["images"], self.batch["valid"], key=key)
        return model.decoder(features[np.array(VALID)])

    def reconstruction(self, params: Params) -> Array:
        _, loss = self.networks(params)
        x, y = self.images, self.reconstructions(params)
        error = jnp.abs(x - y) + LOSS.perceptual_weight * loss.perceptual_loss(x, y)[:, None, None, None]
        return jnp.mean(error / jnp.exp(loss.logvar[...]) + loss.logvar[...])

    def generator(self, params: Params) -> Array:
        _, loss = self.networks(self.state.params)
        return -loss.discriminator(self.reconstructions(params))[0].mean()

    def discriminator(self, params: Params) -> Array:
        _, loss = self.networks(params)
        real, fake = (
            loss.discriminator(images)[0] for images in (self.images, self.reconstructions(self.state.params))
        )
        return 0.5 * (jax.nn.relu(1 - real).mean() + jax.nn.relu(1 + fake).mean())


def test_both_sides_descend_their_own_loss() -> None:
    state, batch = state_of(), make_batch()
    after, metrics = step_of()(state, batch)

    @jax.jit
    def expected(state: TrainState, batch: Batch) -> list[tuple[Array, Params]]:
        hand = ByHand(state, batch)
        return [
            jax.value_and_grad(loss)(state.params) for loss in (hand.reconstruction, hand.generator, hand.discriminator)
        ]

    (nll, by_nll), (generator, by_generator), (discriminator, by_discriminator) = expected(state, batch)
    norms = [np.linalg.norm(by["decoder.conv_out.kernel"]) for by in (by_nll, by_generator)]
    weight = LOSS.disc_weight * norms[0] / (norms[1] + 1e-4)
    assert_close(metrics["loss/generator"], generator, 1e-5, "generator")
    assert_close(metrics["loss/discriminator"], discriminator, 1e-5, "discriminator")
    assert_close(metrics["loss/adaptive_weight"], weight, 1e-4, "weight")
    assert_close(metrics["loss"], nll + weight * generator + discriminator, 1e-5, "loss")
    assert by_cause(metrics["bad_records"].tolist()) == {"empty": VALID.count(False)}
    names = {n for n in params_of() if n.startswith(("decoder.", "extra_vit.", "mask_token", "loss.discriminator."))}
    names = {name for name in names if ".running_" not in name} | {"loss.logvar"}
    assert after.params.keys() == after.ema.keys() == names
    for sides in (("decoder.", "extra_vit.", "mask_token"), ("loss.discriminator.",), ("loss.logvar",)):
        mine = [name for name in sorted(names) if name.startswith(sides)]
        found = flat({name: state.params[name] - after.params[name] for name in mine})
        wanted = flat({n: by_nll[n] + weight * by_generator[n] + by_discriminator[n] for n in mine})
        assert_close(found, wanted, 1e-4, str(sides))


def flat(params: Params) -> np.ndarray:
    return np.concatenate([np.ravel(params[name]) for name in sorted(params)])


def test_running_statistics_follow_three_passes() -> None:
    """The generator's reconstructions, then images, then reconstructions again; nothing else that is frozen moves."""
    state, batch = state_of(), make_batch()
    after, _ = step_of()(state, batch)

    @jax.jit
    def passes(state: TrainState, batch: Batch) -> list[Any]:
        hand = ByHand(state, batch)
        _, loss = hand.networks(state.params)
        return [loss.discriminator(images)[1] for images in (hand.images, hand.reconstructions(state.params))]

    real, fake = passes(state, batch)
    prefix = "loss.discriminator."
    old = {name.removeprefix(prefix): value for name, value in params_of().items() if name.startswith(prefix)}
    new = {prefix + name: value for name, value in running_statistics(old, [fake, real, fake]).items()}
    assert new
    for name, value in state.frozen.items():
        if name in new:
            assert_close(after.frozen[name], new[name], 1e-5, name)
        else:
            np.testing.assert_array_equal(after.frozen[name], value, err_msg=name)


def test_before_its_start_the_discriminator_only_watches() -> None:
    state = state_of(at=START - 1)
    after, metrics = step_of()(state, make_batch())
    assert metrics["loss/disc_factor"] == metrics["loss/discriminator"] == 0.0
    assert metrics["loss/adaptive_weight"] > 0.0
    for name, value in state.params.items():
        if name.startswith("loss.discriminator."):
            np.testing.assert_array_equal(after.params[name], value, err_msg=name)
    assert jnp.any(after.params["decoder.conv_in.kernel"] != state.params["decoder.conv_in.kernel"])


def test_slots_without_an_image_change_nothing() -> None:
    batch, other = make_batch(), make_batch(seed=2)
    pixels = jnp.where(batch["valid"][:, None, None, None], batch["images"], other["images"])
    filled = Batch(images=pixels, valid=batch["valid"], cause=batch["cause"])
    assert not jnp.array_equal(filled["images"], batch["images"])
    results = [step_of()(state_of(), some) for some in (batch, filled)]
    jax.tree.map(np.testing.assert_array_equal, *((s.params, s.frozen, metrics) for s, metrics in results))


def test_a_batch_without_images_changes_no_parameter() -> None:
    state = state_of()
    after, metrics = step_of()(state, make_batch(valid=(False,) * len(VALID)))
    assert float(metrics["loss/l1"]) == 0.0
    for name, value in {**state.params, **state.frozen}.items():
        if name != "loss.logvar":
            np.testing.assert_array_equal({**after.params, **after.frozen}[name], value, err_msg=name)


@pytest.mark.parametrize(
    "name",
    ["decoder__conv_out__bias", "loss__discriminator__main__3__scale", "loss__perceptual_loss__net__slice5__24__bias"],
)
@pytest.mark.parametrize("at", [START - 1, START])
def test_a_step_that_is_not_finite_on_either_side_changes_nothing(name: str, at: int) -> None:
    value = params_of()[name.replace("__", ".")]
    state = state_of(at=at, **{name: value.at[0].set(jnp.nan)})
    after, metrics = step_of()(state, make_batch())
    assert after.skipped.tolist() == [1, 1] == [metrics["skipped_steps"], metrics["skipped_in_a_row"]]
    assert int(after.step) == at + 1
    for old, new in ((state.params, after.params), (state.ema, after.ema), (state.frozen, after.frozen)):
        jax.tree.map(np.testing.assert_array_equal, old, new)


def test_eight_devices_do_as_one() -> None:
    """Statistics of batch normalisation and of the residual branch run over the global batch."""
    batch, state, networks = make_batch(), state_of(), networks_of()
    expected, metrics = step_of()(state, batch)
    mesh = make_mesh({"data": 2, "fsdp": 4})
    at = param_shardings(networks.shapes, networks.axes, mesh)
    assert any("fsdp" in place.spec for name, place in at.items() if name.startswith("loss.discriminator."))
    places = state_shardings(jax.eval_shape(lambda: state), at, mesh)
    step = autoencoder_step(networks, LOSS, optax.sgd(1.0), ema_decay=DECAY)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(state, places), jax.device_put(batch, batch_sharding(mesh))
        found, also = jax.jit(step, out_shardings=(places, replicated(mesh)))(*sharded)
    for name, value in metrics.items():
        assert_close(also[name], value, 1e-5, name)
    assert_close(flat(found.params), flat(expected.params), 1e-5, "params")
    changes = [flat({n: after.params[n] - state.params[n] for n in state.params}) for after in (found, expected)]
    assert_close(*changes, 1e-5, "changes")
    for name, value in expected.frozen.items():
        assert_close(found.frozen[name], value, 1e-5, name)


def test_bfloat16_computes_the_same_step_roughly() -> None:
    """Parameters, statistics and losses stay float32."""
    parts = {
        name: dataclasses.replace(getattr(SIZES, name), dtype="bfloat16") for name in ("encoder", "decoder", "residual")
    }
    sizes, loss = dataclasses.replace(SIZES, **parts), dataclasses.replace(LOSS, dtype="bfloat16")
    networks = AutoencoderNetworks(
        Network(lambda rngs: Autoencoder(sizes, rngs=rngs)), Network(lambda rngs: AutoencoderLoss(loss, rngs=rngs))
    )
    step = autoencoder_step(networks, loss, optax.sgd(1.0), ema_decay=DECAY, dtype="bfloat16")
    state, batch = state_of(), make_batch()
    after, metrics = jax.jit(step)(state, batch)
    _, expected = step_of()(state, batch)
    assert {value.dtype for value in {**after.params, **after.frozen}.values()} == {jnp.dtype("float32")}
    for name in ("loss", "loss/l1", "loss/discriminator"):
        assert metrics[name].dtype == jnp.float32
        assert_close(metrics[name], expected[name], 3e-2, name)


def test_without_discriminator_or_perceptual_loss() -> None:
    state, batch = state_of(loss=PLAIN), make_batch()
    after, metrics = step_of(PLAIN)(state, batch)
    assert_close(metrics["loss"], metrics["loss/l1"], 1e-6)
    assert {name for name in metrics if "/" in name} == {"loss/l1", "loss/lpips"}
    assert all(name.startswith(("decoder.", "extra_vit.", "mask_token")) for name in after.params)
    _, later = step_of(PLAIN)(
        dataclasses.replace(state, params=jax.tree.map(lambda p, q: 0.9 * p + 0.1 * q, state.params, after.params)),
        batch,
    )
    assert later["loss"] < metrics["loss"]


def test_reconstructions_are_of_the_size_of_whole_patches() -> None:
    network, params = networks_of().autoencoder, params_of()
    model = {name: value for name, value in params.items() if not name.startswith("loss.")}
    images = jnp.zeros((2, SIZE[0] + 1, SIZE[1], 3), jnp.uint8)
    found = jax.jit(lambda params, images: reconstruct(network, params, images))(model, images)
    assert found.shape == (2, *SIZE, 3)
    assert found.dtype == jnp.uint8


def test_moments_are_those_of_all_valid_images() -> None:
    network, params = networks_of().autoencoder, params_of()
    model = {name: value for name, value in params.items() if not name.startswith("loss.")}
    update = jax.jit(lambda moments, batch: update_moments(network, model, moments, batch))
    features = jax.jit(lambda batch: network(model).features_of_images(batch["images"], batch["valid"]))
    moments, tokens = Moments.zero(SIZES.latent_channels), []
    for seed, valid in enumerate([(True, False, True, True), (True,) * 4, (False,) * 4]):
        batch = make_batch(seed, valid)
        moments = update(moments, batch)
        tokens.append(np.asarray(features(batch), np.float64)[list(valid)].reshape(-1, SIZES.latent_channels))
    together = np.concatenate(tokens)
    assert int(moments.num_tokens) == len(together)
    assert_close(moments.mean, together.mean(axis=0), 1e-5)
    assert_close(moments.std(), together.std(axis=0), 1e-5)
    assert Moments.zero(3).std().tolist() == [0.0] * 3
