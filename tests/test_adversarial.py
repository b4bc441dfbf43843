"""The losses of the autoencoder against the release: every combination it can compute, gradients, statistics."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxtyping import Array

from svg_jax.adversarial import (
    AdversarialLoss,
    AutoencoderLoss,
    LossConfig,
    ReconstructionLoss,
    adaptive_weight,
    adversarial_loss,
    check_perceptual_weights,
    disc_factor,
    discriminator_loss,
    is_trained,
    negative_log_likelihood,
    reconstruction_loss,
)
from svg_jax.models.discriminator import Statistics, running_statistics
from svg_jax.nn.functional import Network, Params
from tests.vectors import Case, assert_close

OPTION = re.compile(r"(imagenet|list)\.(tensor|list)\.(zero|msd)\.step(\d+)\.opt([01])(\.evalmode)?(\.pw0)?$")


class HalfSquares(nnx.Module):
    """What stands for LPIPS in the vectors: half the mean squared difference, times a number."""

    def __init__(self) -> None:
        self.times = nnx.Param(jnp.ones(()))

    def __call__(self, a: Array, b: Array) -> Array:
        return self.times[...] * 0.5 * jnp.mean(jnp.square(a - b), axis=(1, 2, 3))


@dataclasses.dataclass(frozen=True)
class Options:
    """One combination of the vectors."""

    key: str
    convention: str
    images: str
    stand_in: str
    step: int
    optimiser: int
    evaluates: bool
    without_perceptual: bool

    @classmethod
    def read(cls, key: str) -> Options:
        match = OPTION.match(key)
        assert match, key
        variant, images, stand_in, step, optimiser, evaluates, without = match.groups()
        convention = "batch" if variant == "imagenet" else "list"
        return cls(key, convention, images, stand_in, int(step), int(optimiser), bool(evaluates), bool(without))


@functools.cache
def case() -> Case:
    return Case.load("losses")


def options() -> list[Options]:
    """All that the release computes."""
    status = json.loads(bytes(case().outputs["status_json"]))
    return [Options.read(key) for key, found in sorted(status.items()) if found == "ok"]


def config_of(chosen: Options, **changes: Any) -> LossConfig:
    """A batch in one tensor is normalised together under both conventions."""
    settings, disc = case().config["loss"], case().config["disc"]
    values = {
        **settings,
        "perceptual_weight": 0.0 if chosen.without_perceptual else settings["perceptual_weight"],
        "disc_channels": disc["ndf"],
        "disc_num_layers": disc["n_layers"],
        "convention": "batch" if chosen.images == "tensor" else chosen.convention,
    }
    return LossConfig(**{**values, **changes})


def network_of(config: LossConfig) -> Network[AutoencoderLoss]:
    """The loss with the vectors' stand-in for LPIPS."""

    def make(rngs: nnx.Rngs) -> AutoencoderLoss:
        loss = AutoencoderLoss(dataclasses.replace(config, perceptual_weight=0.0), rngs=rngs)
        if config.perceptual is not None:
            loss.perceptual_loss = nnx.data(HalfSquares())
        return loss

    return Network(make)


@functools.cache
def params() -> Params:
    """The discriminator of the vectors in our names, and the log variance."""
    found = {"logvar": jnp.float32(case().config["loss"]["logvar_init"])}
    for name, value in case().weights().items():
        if value.ndim == 4:
            found[f"discriminator.{name.removesuffix('weight')}kernel"] = jnp.asarray(value.transpose(2, 3, 1, 0))
        elif value.ndim == 1:
            found[f"discriminator.{re.sub('weight$', 'scale', name)}"] = jnp.asarray(value)
    return found


def nhwc(x: np.ndarray) -> Array:
    return jnp.asarray(x.transpose(0, 2, 3, 1))


def pairs(images: str) -> list[tuple[Array, Array]]:
    """Images and features that pass together."""
    inputs = case().inputs
    if images == "tensor":
        return [(nhwc(inputs["tensor.inputs"]), nhwc(inputs["tensor.feat"]))]
    indices = range(len(case().config["list_sizes"]))
    return [(nhwc(inputs[f"list.inputs_{i}"]), nhwc(inputs[f"list.feat_{i}"])) for i in indices]


def last_layer(kernel: Array, features: Array) -> Array:
    """Features to reconstructions."""
    y = jax.lax.conv_general_dilated(
        features, kernel, (1, 1), [(1, 1), (1, 1)], dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return y + jnp.asarray(case().inputs["last_layer.bias"])[None, None, None]


def kernel() -> Array:
    return jnp.asarray(case().inputs["last_layer.weight"].transpose(2, 3, 1, 0))


class Parts(NamedTuple):
    """Ours of what passes together: terms, gradients by the last kernel, and what a real and a fake pass see."""

    close: ReconstructionLoss
    played: AdversarialLoss
    by_nll: Array
    by_game: Array
    passes: list[dict[str, Statistics]]
    images: int
    logits: int


@functools.cache
def compiled(config: LossConfig, train: bool) -> Any:
    network = network_of(config)

    @jax.jit
    def run(params, kernel, x, features):
        valid = jnp.ones((len(x),), bool)
        y, pull = jax.vjp(lambda kernel: last_layer(kernel, features), kernel)
        close = reconstruction_loss(network, params, config, x, y, valid)
        played = adversarial_loss(network, params, config, x, y, valid, train=train)
        passes = [
            network(params).discriminator(images, train=train, per_image=config.convention == "list")
            for images in (x, y)
        ]
        return close, played, pull(close.by_pixels)[0], pull(played.by_pixels)[0], passes

    return run


@functools.cache
def parts_of(config: LossConfig, stand_in: str, train: bool, images: str) -> list[Parts]:
    given = dict(params())
    if config.perceptual is not None:
        given["perceptual_loss.times"] = jnp.float32({"zero": 0.0, "msd": 1.0}[stand_in])
    found = []
    for x, features in pairs(images):
        *terms, passes = compiled(config, train)(given, kernel(), x, features)
        found.append(Parts(*terms, [seen for _, seen in passes], len(x), passes[0][0].size))
    return found


def parts_for(chosen: Options) -> list[Parts]:
    return parts_of(config_of(chosen), chosen.stand_in, not chosen.evaluates, chosen.images)


def mean(values: list[Any], weights: list[int]) -> Any:
    return sum(v * (w / sum(weights)) for v, w in zip(values, weights, strict=True))


@pytest.mark.golden
@pytest.mark.parametrize("chosen", [o for o in options() if o.optimiser == 0], ids=lambda o: o.key)
def test_generator(chosen: Options) -> None:
    expected = {k.removeprefix(chosen.key + "."): v for k, v in case().outputs.items() if k.startswith(chosen.key)}
    if not chosen.without_perceptual:  # keys with more options begin alike
        expected = {k: v for k, v in expected.items() if not k.startswith(("evalmode", "pw0"))}
    parts, config = parts_for(chosen), config_of(chosen)
    images, logits = [p.images for p in parts], [p.logits for p in parts]
    nll = mean([p.close.loss for p in parts], images)
    l1, lpips = (mean([getattr(p.close, name) for p in parts], images) for name in ("l1", "lpips"))
    generator = mean([p.played.generator for p in parts], logits)
    by_nll, by_game = mean([p.by_nll for p in parts], images), mean([p.by_game for p in parts], logits)
    factor = disc_factor(config, jnp.int32(chosen.step))
    weight = adaptive_weight(by_nll, by_game, config.disc_weight)

    assert_close(nll, expected["log.nll_loss"], 1e-5, "nll")
    assert_close(l1 + config.perceptual_weight * lpips, expected["log.rec_loss"], 1e-5, "rec")
    assert_close(lpips, expected["log.p_loss"], 1e-5, "lpips")
    assert_close(generator, expected["log.g_loss"], 1e-5, "generator")
    if expected["loss"].ndim:  # the list variant evaluating a tensor: no weight, and one loss for each logit
        assert_close(np.full(expected["loss"].shape, nll), expected["loss"], 1e-5, "loss")
        return
    assert_close(weight, expected["log.d_weight"], 1e-5, "weight")
    assert_close(factor, expected["log.disc_factor"] * (chosen.step >= config.disc_start), 1e-5, "factor")

    # For lists the release trains on the last image alone, still divided by their number; ours on all of them.
    trained = [(p.close.loss, p.by_nll) for p in parts][-1] if chosen.images == "list" else (nll, by_nll)
    trained_nll, trained_gradient = (value / len(parts) for value in trained)
    assert_close(trained_nll + weight * factor * generator, expected["loss"], 1e-5, "loss")
    gradient = trained_gradient + weight * factor * by_game
    assert_close(gradient.transpose(3, 2, 0, 1), expected["grad_last_layer_weight"], 1e-4, "gradient")


@pytest.mark.golden
@pytest.mark.parametrize("chosen", [o for o in options() if o.optimiser == 1], ids=lambda o: o.key)
def test_discriminator(chosen: Options) -> None:
    expected = {k.removeprefix(chosen.key + "."): v for k, v in case().outputs.items() if k.startswith(chosen.key)}
    parts, config = parts_for(chosen), config_of(chosen)
    ones = [1] * len(parts)
    factor = disc_factor(config, jnp.int32(chosen.step))
    loss = factor * mean([p.played.discriminator for p in parts], ones)
    assert_close(loss, expected["loss"], 1e-5, "loss")
    assert_close(loss, expected["log.disc_loss"], 1e-5, "disc_loss")
    assert_close(mean([p.played.real for p in parts], ones), expected["log.logits_real"], 1e-5, "real")
    assert_close(mean([p.played.fake for p in parts], ones), expected["log.logits_fake"], 1e-5, "fake")
    name = "discriminator.main.0.kernel"
    gradient = factor * mean([p.played.by_params[name] for p in parts], ones)
    assert_close(gradient.transpose(3, 2, 0, 1), expected["grad_disc_main_0_weight"], 1e-4, "gradient")


@pytest.mark.golden
@pytest.mark.parametrize("chosen", [o for o in options() if o.optimiser == 1], ids=lambda o: o.key)
def test_running_statistics(chosen: Options) -> None:
    """One pass after the other, image by image in lists; the discriminator's own update alone."""
    running = {name.removeprefix("discriminator."): value for name, value in params().items()}
    for parts in parts_for(chosen):
        running |= running_statistics(running, parts.passes)
    first = next(name for name in running if name.endswith("running_mean"))
    assert_close(running[first], case().outputs[f"{chosen.key}.running_mean_after"], 1e-5, first)


@pytest.mark.golden
def test_formulas() -> None:
    inputs, outputs = case().inputs, case().outputs
    real, fake = (jnp.asarray(inputs[f"hinge.logits_{side}"])[:, 0] for side in ("real", "fake"))
    for kind in ("hinge", "vanilla"):
        assert_close(discriminator_loss(real, fake, kind).mean(), outputs[f"hinge.{kind}_d_loss"], 1e-5, kind)
    start = case().config["loss"]["disc_start"]
    expected = outputs["hinge.adopt_weight"]
    config = LossConfig(disc_start=start, disc_factor=float(expected[-1]))
    factors = jnp.stack([disc_factor(config, jnp.int32(step)) for step in (0, start - 1, start, start + 1)])
    assert_close(factors, expected, 1e-5, "factor")


def test_the_list_convention_is_the_batch_convention_image_by_image() -> None:
    """Gradients are means over images; running statistics take all generator passes first, then image by image."""
    (x, features), *_ = pairs("tensor")
    y, valid = last_layer(kernel(), features), jnp.ones((len(x),), bool)
    alone = LossConfig(disc_channels=case().config["disc"]["ndf"], disc_num_layers=case().config["disc"]["n_layers"])
    run = {
        convention: jax.jit(functools.partial(adversarial_loss, network_of(config), config=config))
        for convention in ("batch", "list")
        for config in [dataclasses.replace(alone, convention=convention, perceptual_weight=0.0)]
    }
    found = run["list"](params(), x=x, y=y, valid=valid)
    one_by_one = [run["batch"](params(), x=x[i : i + 1], y=y[i : i + 1], valid=valid[:1]) for i in range(len(x))]
    ones = [1] * len(x)
    assert_close(found.generator, mean([one.generator for one in one_by_one], ones), 1e-5)
    assert_close(found.discriminator, mean([one.discriminator for one in one_by_one], ones), 1e-5)
    assert_close(found.by_pixels * len(x), jnp.concatenate([one.by_pixels for one in one_by_one]), 1e-4)
    for name, gradient in found.by_params.items():
        if "bias" not in name:  # that of the last bias all but vanishes
            assert_close(gradient, mean([one.by_params[name] for one in one_by_one], ones), 1e-4, name)

    old = {name.removeprefix("discriminator."): value for name, value in params().items()}
    network = network_of(dataclasses.replace(alone, perceptual_weight=0.0))
    discriminate = jax.jit(lambda params, images: network(params).discriminator(images, per_image=True)[1])
    real, fake = ([discriminate(params(), images[i : i + 1]) for i in range(len(x))] for images in (x, y))
    for passes in [[of] for of in fake] + [list(both) for both in zip(real, fake, strict=True)]:
        old |= running_statistics(old, passes)
    for name, value in found.running.items():
        assert_close(value, old[name.removeprefix("discriminator.")], 1e-5, name)


def test_mean_reduction_divides_by_the_numbers_of_an_image() -> None:
    x, y = (jnp.asarray(np.random.default_rng(i).normal(size=(2, 4, 3, 3)), jnp.float32) for i in range(2))
    lpips, logvar = jnp.array([0.5, 0.25]), jnp.float32(0.3)
    whole, average = (
        negative_log_likelihood(x, y, lpips, logvar, weight=2.0, reduction=reduction) for reduction in ("sum", "mean")
    )
    assert_close(average * (4 * 3 * 3), whole, 1e-5)
    assert_close(average, (jnp.abs(x - y).mean((1, 2, 3)) + 2.0 * lpips) / np.exp(0.3) + 0.3, 1e-5)


def test_adaptive_weight_is_clipped() -> None:
    assert adaptive_weight(jnp.ones(4), jnp.zeros(4), 0.5) == 0.5e4
    assert_close(adaptive_weight(jnp.full(4, 3.0), jnp.ones(4), 0.5), 0.5 * 6.0 / 2.0001, 1e-5)


def test_settings() -> None:
    released = {
        "target": "ldm.modules.losses.LPIPSWithDiscriminatorDecoderIN",
        "params": {"disc_start": 5000, "disc_weight": 0.5},
    }
    assert LossConfig.from_release(released) == LossConfig()
    native = {"target": "ldm.modules.losses.LPIPSWithDiscriminatorDecoder", "params": {"disc_start": 5001}}
    assert LossConfig.from_release(native) == LossConfig(convention="list", disc_weight=1.0, disc_start=2501)
    alone = LossConfig(perceptual_weight=0.0, disc_weight=0.0)
    assert set(Network(lambda rngs: AutoencoderLoss(alone, rngs=rngs)).shapes) == {"logvar"}
    assert is_trained("logvar", LossConfig(learn_logvar=True))
    assert not is_trained("logvar", LossConfig())
    assert not is_trained("discriminator.main.3.running_mean", LossConfig())
    assert not is_trained("perceptual_loss.lin0.model.1.kernel", LossConfig())
    with pytest.raises(ValueError, match=r"loss.disc_loss 'hing': choose one of hinge, vanilla"):
        LossConfig(disc_loss="hing")


def test_perceptual_loss_without_weights() -> None:
    names = ["perceptual_loss.net.slice1.0.kernel"]
    check_perceptual_weights(LossConfig(), names, "weights/lpips")
    check_perceptual_weights(LossConfig(perceptual_weight=0.0), [], "weights/lpips")
    with pytest.raises(ValueError, match=r"weights/lpips holds no VGG16.*vgg16-397923af.pth.*loss.perceptual_weight=0"):
        check_perceptual_weights(LossConfig(), ["decoder.conv_in.kernel"], "weights/lpips")
