"""The patch discriminator against the release, and what enters its statistics."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from svg_jax.models.discriminator import DiscriminatorConfig, PatchDiscriminator, running_statistics
from svg_jax.nn.functional import Network, Params
from tests.test_adversarial import case, nhwc, params
from tests.vectors import assert_close


@functools.cache
def load() -> tuple[Network[PatchDiscriminator], Params]:
    sizes = case().config["disc"]
    config = DiscriminatorConfig(sizes["ndf"], sizes["n_layers"])
    ours = {k.removeprefix("discriminator."): v for k, v in params().items() if k != "logvar"}
    return Network(lambda rngs: PatchDiscriminator(config, rngs=rngs)), ours


@pytest.fixture(scope="module")
def images() -> jax.Array:
    return nhwc(case().inputs["tensor.inputs"])


@pytest.mark.golden
def test_logits_and_statistics(images: jax.Array) -> None:
    network, ours = load()
    train = jax.jit(lambda params, x: network(params)(x))
    logits, seen = train(ours, images)
    evaluated, none = jax.jit(lambda params, x: network(params)(x, train=False))(ours, images)
    assert_close(logits, case().outputs["disc.train_logits"][:, 0], 1e-4, "train")
    assert_close(evaluated, case().outputs["disc.eval_logits"][:, 0], 1e-4, "eval")
    assert none == {}
    running = running_statistics(ours, [seen])
    prefix = "disc.after_one_train_forward."
    expected = {k.removeprefix(prefix): v for k, v in case().outputs.items() if k.startswith(prefix)}
    expected = {name: value for name, value in expected.items() if value.ndim}
    assert expected.keys() == running.keys()
    for name, value in expected.items():
        assert_close(running[name], value, 1e-5, name)


def test_slots_without_an_image_change_nothing(images: jax.Array) -> None:
    """Whatever stands there, NaN included; alone, an image has the logits of a batch of one."""
    network, ours = load()
    padded = jnp.concatenate([images, jnp.full_like(images[:1], jnp.nan)])
    valid = jnp.arange(len(padded)) < len(images)
    for per_image in (False, True):
        run = jax.jit(lambda params, x, valid, per_image=per_image: network(params)(x, valid, per_image=per_image))
        logits, seen = run(ours, images, jnp.ones((len(images),), bool))
        others, also = run(ours, padded, valid)
        assert_close(others[: len(images)], logits, 1e-5, "logits")
        for name, value in running_statistics(ours, [seen]).items():
            assert_close(running_statistics(ours, [also])[name], value, 1e-5, name)
    alone, _ = run(ours, images[:1], jnp.ones((1,), bool))
    assert_close(logits[:1], alone, 1e-5, "alone")
    nothing = {name: ours[name] for name in ours if ".running_" in name}
    _, seen = run(ours, images, jnp.zeros((len(images),), bool))
    for name, value in running_statistics(ours, [seen]).items():
        np.testing.assert_array_equal(value, nothing[name])


def test_small_images() -> None:
    network, ours = load()
    with pytest.raises(ValueError, match=r"images of 16 x 64 pixels are too small for a discriminator with \d layers"):
        network(ours)(jnp.zeros((1, 16, 64, 3)))
