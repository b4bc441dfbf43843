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

from svg_jax.adversarial import AutoencoderLoss, LossConfig, discriminator_loss, generator_loss
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
from tests.vectors import assert_close

PATCH, CHANNELS, SIZE = 2, 16, (16, 20)
START = 2  # of the discriminator
DECAY = 0.75


def sizes_of(residual: bool) -> AutoencoderConfig:
    branch = ResidualConfig(
        dim=8, num_layers=1, num_heads=2, hidden_dim=16, out_channels=4, patch_size=PATCH, grid=(4, 4), mask_ratio=0.5
    )
    extra = branch.out_channels if residual else 0
    return AutoencoderConfig(
        ViTConfig(dim=CHANNELS, num_layers=1, num_heads=2, hidden_dim=32, patch_size=PATCH, layer_scale=0.5),
        DecoderConfig(z_channels=CHANNELS + extra, channels=32, channel_multipliers=(1, 1), num_res_blocks=0),
        branch if residual else None,
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


@functools.cache
def networks_of(residual: bool, loss: LossConfig) -> AutoencoderNetworks:
    sizes = sizes_of(residual)
    return AutoencoderNetworks(
        Network(lambda rngs: Autoencoder(sizes, rngs=rngs)), Network(lambda rngs: AutoencoderLoss(loss, rngs=rngs))
    )


@functools.cache
def params_of(residual: bool, loss: LossConfig) -> Params:
    return jax.jit(networks_of(residual, loss).init)(jax.random.key(0))


def state_of(
    *, at: int = START, residual: bool = False, loss: LossConfig = LOSS, rate: float = 1.0, **changes: Array
) -> TrainState:
    """Before the step `at`; `changes` are parameters, their dots as double underscores."""
    params = {**params_of(residual, loss), **{name.replace("__", "."): value for name, value in changes.items()}}
    sizes = sizes_of(residual)
    trained = {name: value for name, value in params.items() if is_trained_in_run(name, sizes, loss)}
    frozen = {name: value for name, value in params.items() if name not in trained}
    state = TrainState.create(trained, optax.sgd(rate), jax.random.key(7), frozen)
    return dataclasses.replace(state, step=jnp.int32(at))


@functools.cache
def step_of(residual: bool = False, loss: LossConfig = LOSS) -> Any:
    """Plain gradient descent with rate 1: the gradient is p - p'."""
    return jax.jit(autoencoder_step(networks_of(residual, loss), loss, optax.sgd(1.0), ema_decay=DECAY))


def make_batch(seed: int = 1, valid: tuple[bool, ...] = (True, True, False, True)) -> Batch:
    images = np.random.default_rng(seed).integers(0, 256, (len(valid), *SIZE, 3))
    return Batch(images=jnp.asarray(images, jnp.uint8), valid=jnp.array(valid))


def by_hand(state: TrainState, batch: Batch, loss: LossConfig, per_image: bool) -> tuple[dict[str, Array], Params]:
    """The equations as they stand, on the valid images alone: two losses, each with its own parameters."""
    networks, images = networks_of(False, loss), batch["images"][np.asarray(batch["valid"])]
    x = target_pixels(images)

    def parts(params: Params) -> tuple[Autoencoder, AutoencoderLoss]:
        everything = {**state.frozen, **params}
        loss_params = {k.removeprefix("loss."): v for k, v in everything.items() if k.startswith("loss.")}
        model = {k: v for k, v in everything.items() if not k.startswith("loss.")}
        return networks.autoencoder(model), networks.loss(loss_params)

    def of_reconstruction(params: Params) -> Array:
        model, networks = parts(params)
        y = model.decoder(model.features_of_images(images))
        error = jnp.abs(x - y) + loss.perceptual_weight * networks.perceptual_loss(x, y)[:, None, None, None]
        return jnp.mean(error / jnp.exp(networks.logvar[...]) + networks.logvar[...])

    def of_generator(params: Params) -> Array:
        model, _ = parts(params)
        y = model.decoder(model.features_of_images(images))
        logits, _ = parts(state.params)[1].discriminator(y, per_image=per_image)
        return generator_loss(logits).mean()

    def of_discriminator(params: Params) -> Array:
        model, _ = parts(state.params)
        y = model.decoder(model.features_of_images(images))
        real, fake = (parts(params)[1].discriminator(some, per_image=per_image)[0] for some in (x, y))
        return discriminator_loss(real, fake, loss.disc_loss).mean()

    values, gradients = zip(
        *(jax.jit(jax.value_and_grad(f))(state.params) for f in (of_reconstruction, of_generator, of_discriminator)),
        strict=True,
    )
    kernels = [np.linalg.norm(g["decoder.conv_out.kernel"]) for g in gradients[:2]]
    weight = loss.disc_weight * kernels[0] / (kernels[1] + 1e-4)
    named = dict(zip(("nll", "generator", "discriminator"), values, strict=True)) | {"weight": weight}
    return named, {n: gradients[0][n] + weight * gradients[1][n] + gradients[2][n] for n in state.params}


@pytest.mark.parametrize("changes", [{}, {"convention": "list", "disc_loss": "vanilla"}], ids=["batch", "list"])
def test_both_sides_descend_their_own_loss(changes: dict[str, str]) -> None:
    loss, batch = dataclasses.replace(LOSS, **changes), make_batch()
    state = state_of(loss=loss)
    after, metrics = step_of(loss=loss)(state, batch)
    values, gradients = by_hand(state, batch, loss, per_image=loss.convention == "list")
    assert_close(metrics["loss/generator"], values["generator"], 1e-5, "generator")
    assert_close(metrics["loss/discriminator"], values["discriminator"], 1e-5, "discriminator")
    assert_close(metrics["loss/adaptive_weight"], values["weight"], 1e-4, "weight")
    total = values["nll"] + values["weight"] * values["generator"] + values["discriminator"]
    assert_close(metrics["loss"], total, 1e-5, "loss")
    largest = max(float(jnp.abs(g).max()) for g in gradients.values())
    for name, gradient in gradients.items():
        error = jnp.abs(state.params[name] - after.params[name] - gradient).max()
        assert error < 1e-5 * largest, name
        assert jnp.any(gradient != 0), name
    assert int(metrics["bad_records"]) == 1
    names = {name for name in params_of(False, LOSS) if name.startswith("decoder.") or name == "loss.logvar"}
    names |= {n for n in params_of(False, LOSS) if n.startswith("loss.discriminator.") and ".running_" not in n}
    assert after.params.keys() == after.ema.keys() == names


def test_running_statistics_follow_three_passes() -> None:
    """The generator's reconstructions, then images, then reconstructions again; nothing else that is frozen moves."""
    state, batch = state_of(), make_batch()
    after, _ = step_of()(state, batch)
    networks, everything = networks_of(False, LOSS), {**state.frozen, **state.params}
    model = networks.autoencoder({k: v for k, v in everything.items() if not k.startswith("loss.")})
    loss = networks.loss({k.removeprefix("loss."): v for k, v in everything.items() if k.startswith("loss.")})
    x = target_pixels(batch["images"][np.asarray(batch["valid"])])
    y = model.decoder(model.features_of_images(batch["images"][np.asarray(batch["valid"])]))
    real, fake = (loss.discriminator(images)[1] for images in (x, y))
    prefix = "loss.discriminator."
    old = {name.removeprefix(prefix): value for name, value in everything.items() if name.startswith(prefix)}
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
    _, later = step_of()(state_of(), make_batch())
    assert metrics["loss/disc_factor"] == metrics["loss/discriminator"] == 0.0
    np.testing.assert_array_equal(metrics["loss/adaptive_weight"], later["loss/adaptive_weight"])
    for name, value in state.params.items():
        moved = bool(jnp.any(after.params[name] != value))
        assert moved != name.startswith("loss.discriminator."), name


@pytest.mark.parametrize("residual", [False, True], ids=["P", "R"])
def test_slots_without_an_image_change_nothing(residual: bool) -> None:
    batch, other = make_batch(), make_batch(seed=2)
    filled = Batch(
        images=jnp.where(batch["valid"][:, None, None, None], batch["images"], other["images"]), valid=batch["valid"]
    )
    assert not jnp.array_equal(filled["images"], batch["images"])
    results = [step_of(residual)(state_of(residual=residual), some) for some in (batch, filled)]
    jax.tree.map(np.testing.assert_array_equal, *(jax.tree.leaves((s.params, s.frozen, m)) for s, m in results))


def test_a_batch_without_images_changes_no_parameter() -> None:
    state = state_of()
    after, metrics = step_of()(state, make_batch(valid=(False,) * 4))
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
    value = params_of(False, LOSS)[name.replace("__", ".")]
    state = state_of(at=at, **{name: value.at[0].set(jnp.nan)})
    after, metrics = step_of()(state, make_batch())
    assert after.skipped.tolist() == [1, 1] == [metrics["skipped_steps"], metrics["skipped_in_a_row"]]
    assert int(after.step) == at + 1
    for old, new in ((state.params, after.params), (state.ema, after.ema), (state.frozen, after.frozen)):
        jax.tree.map(np.testing.assert_array_equal, old, new)


@pytest.mark.parametrize("shape", [{"data": 2, "fsdp": 4}, {"data": 1, "fsdp": 8}], ids=str)
def test_eight_devices_do_as_one(shape: dict[str, int]) -> None:
    """Statistics of batch normalisation and of the residual branch run over the global batch."""
    batch, state = make_batch(valid=(True,) * 5 + (False,) + (True,) * 2), state_of(residual=True)
    networks, mesh = networks_of(True, LOSS), make_mesh(shape)
    expected, metrics = step_of(residual=True)(state, batch)
    at = param_shardings(networks.shapes, networks.axes, mesh)
    places = state_shardings(jax.eval_shape(lambda: state), at, mesh)
    step = autoencoder_step(networks, LOSS, optax.sgd(1.0), ema_decay=DECAY)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(state, places), jax.device_put(batch, batch_sharding(mesh))
        found, also = jax.jit(step, out_shardings=(places, replicated(mesh)))(*sharded)
    for name, value in metrics.items():
        assert_close(also[name], value, 1e-5, name)
    everything, ours = {**expected.params, **expected.frozen}, {**found.params, **found.frozen}
    for name, value in everything.items():
        assert_close(ours[name], value, 1e-5, name)


def test_without_discriminator_or_perceptual_loss() -> None:
    loss = LossConfig(perceptual_weight=0.0, disc_weight=0.0, reduction="mean")
    state = state_of(loss=loss, rate=0.1)
    step, batch = step_of(loss=loss), make_batch()
    after, metrics = step(state, batch)
    y = networks_of(False, loss).autoencoder
    images = batch["images"][np.asarray(batch["valid"])]
    model = y({k: v for k, v in {**state.frozen, **state.params}.items() if not k.startswith("loss.")})
    errors = jnp.abs(model.decoder(model.features_of_images(images)) - target_pixels(images))
    assert_close(metrics["loss"], errors.mean(), 1e-5)
    assert {name for name in metrics if "/" in name} == {"loss/l1", "loss/lpips"}
    assert all(name.startswith("decoder.") for name in after.params)


def test_reconstructions_are_of_the_size_of_whole_patches() -> None:
    network, params = networks_of(False, LOSS).autoencoder, params_of(False, LOSS)
    model = {name: value for name, value in params.items() if not name.startswith("loss.")}
    images = jnp.zeros((2, SIZE[0] + 3, SIZE[1], 3), jnp.uint8)
    found = jax.jit(lambda params, images: reconstruct(network, params, images))(model, images)
    assert found.shape == (2, *SIZE, 3)
    assert found.dtype == jnp.uint8


def test_moments_are_those_of_all_valid_images() -> None:
    network, params = networks_of(False, LOSS).autoencoder, params_of(False, LOSS)
    model = {name: value for name, value in params.items() if not name.startswith("loss.")}
    update = jax.jit(lambda moments, batch: update_moments(network, model, moments, batch))
    features = jax.jit(lambda images: network(model).features_of_images(images))
    moments, tokens = Moments.zero(CHANNELS), []
    for seed, valid in enumerate([(True, False, True, True), (True,) * 4, (False,) * 4]):
        batch = make_batch(seed, valid)
        moments = update(moments, batch)
        tokens.append(np.asarray(features(batch["images"]), np.float64)[list(valid)].reshape(-1, CHANNELS))
    together = np.concatenate(tokens)
    assert int(moments.num_tokens) == len(together)
    assert_close(moments.mean, together.mean(axis=0), 1e-5)
    assert_close(moments.std(), together.std(axis=0), 1e-5)
    assert Moments.zero(3).std().tolist() == [0.0] * 3
