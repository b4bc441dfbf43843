from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from svg_jax.flow import losses
from tests.vectors import assert_close

SIZES = np.array([5, 7, 1, 0])  # valid tokens of each sample; the last slot holds no image
TOKENS, CHANNELS = 7, 3
MASK = jnp.arange(TOKENS)[None, :] < SIZES[:, None]


def arrays() -> tuple[jax.Array, jax.Array]:
    predicted, target = jax.random.normal(jax.random.key(0), (2, len(SIZES), TOKENS, CHANNELS))
    return predicted, target


def test_loss_is_the_mean_over_each_samples_own_tokens() -> None:
    predicted, target = arrays()
    expected = [np.mean((np.asarray(predicted - target)[i, :n]) ** 2) if n else 0.0 for i, n in enumerate(SIZES)]
    assert_close(losses.velocity_loss(predicted, target, MASK), np.array(expected), 1e-6)


def test_masked_slots_change_neither_loss_nor_gradient() -> None:
    predicted, target = arrays()
    spoilt = jnp.where(MASK[:, :, None], predicted, jnp.nan)

    def total(predicted: jax.Array) -> jax.Array:
        return losses.batch_mean(losses.velocity_loss(predicted, target, MASK), MASK.any(axis=1))

    (loss, gradient), (spoilt_loss, spoilt_gradient) = map(jax.value_and_grad(total), (predicted, spoilt))
    assert loss == spoilt_loss
    assert bool((gradient == spoilt_gradient).all())
    assert bool((jnp.where(MASK[:, :, None], 0.0, gradient) == 0).all())


def test_two_token_axes_and_bfloat16() -> None:
    predicted, target = (x.reshape(len(SIZES), TOKENS, 1, CHANNELS) for x in arrays())
    flat = losses.velocity_loss(*arrays(), MASK)
    assert_close(losses.velocity_loss(predicted, target, MASK[:, :, None]), flat, 1e-6)
    halved = losses.velocity_loss(predicted.astype(jnp.bfloat16), target, MASK[:, :, None])
    assert halved.dtype == jnp.float32
    assert_close(halved, flat, 1e-2)


def test_batch_mean_skips_empty_slots() -> None:
    per_sample = jnp.asarray([1.0, 2.0, 6.0, jnp.nan])
    assert losses.batch_mean(per_sample, MASK.any(axis=1)) == 3.0
    assert losses.batch_mean(per_sample, jnp.zeros(4, bool)) == 0.0


def test_losses_by_time_add_up() -> None:
    t = jnp.asarray([0.0, 0.26, 0.49, 1.0, 0.3])
    per_sample = jnp.asarray([1.0, 2.0, 4.0, 8.0, jnp.nan])
    valid = jnp.asarray([True, True, True, True, False])
    sums, counts = losses.loss_by_time(per_sample, t, valid, 4)
    assert sums.tolist() == [1.0, 6.0, 0.0, 8.0]
    assert counts.tolist() == [1.0, 2.0, 0.0, 1.0]
