"""What is compiled to train an autoencoder: one step for the decoder and its discriminator, and pictures from it.

Batches hold images of one size, since the decoder is convolutional; each size is compiled once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from svg_jax import steps
from svg_jax.adversarial import (
    AutoencoderLoss,
    LossConfig,
    adaptive_weight,
    adversarial_loss,
    disc_factor,
    is_trained,
    reconstruction_loss,
)
from svg_jax.models.autoencoder import Autoencoder, AutoencoderConfig, to_uint8
from svg_jax.nn.functional import Axes, Network, Params
from svg_jax.parallel import gathered
from svg_jax.state import TrainState

LOSS = "loss."  # what the names of the loss's parameters begin with in a run's
LAST = "decoder.conv_out."


class Batch(TypedDict):
    """A global batch of images of one size."""

    images: UInt8[Array, "batch height width 3"]
    valid: Bool[Array, " batch"]  # False: a slot without an image, whose pixels mean nothing
    cause: Int[Array, " batch"]  # 0, or why there is none: 1 + the position in `records.Cause`


class AutoencoderNetworks(NamedTuple):
    """What is trained, and on what. A run's parameters are the autoencoder's, and "loss." + those of the loss."""

    autoencoder: Network[Autoencoder]
    loss: Network[AutoencoderLoss]

    @property
    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and dtype of every parameter of a run."""
        return {**self.autoencoder.shapes, **{LOSS + name: shape for name, shape in self.loss.shapes.items()}}

    @property
    def axes(self) -> dict[str, Axes]:
        """Their logical axes."""
        return {**self.autoencoder.axes, **{LOSS + name: axes for name, axes in self.loss.axes.items()}}

    def init(self, key: Key[Array, ""]) -> Params:
        """Fresh parameters of a run."""
        model_key, loss_key = jax.random.split(key)
        loss = {LOSS + name: value for name, value in self.loss.init(loss_key).items()}
        return {**self.autoencoder.init(model_key), **loss}


def is_trained_in_run(name: str, sizes: AutoencoderConfig, loss: LossConfig) -> bool:
    """Whether a parameter of a run is trained; `TrainState.frozen` holds the others."""
    return is_trained(name.removeprefix(LOSS), loss) if name.startswith(LOSS) else sizes.trained(name)


def autoencoder_step(
    networks: AutoencoderNetworks,
    loss: LossConfig,
    optimiser: optax.GradientTransformation,
    *,
    ema_decay: float,
    dtype: DTypeLike = jnp.float32,
) -> Callable[[TrainState, Batch], tuple[TrainState, steps.Metrics]]:
    """One update of the autoencoder and of the discriminator; the equations stand in `svg_jax.adversarial`.

    The reconstruction is computed once. Both of its losses become gradients by its pixels; those go through the last
    layer one by one, for the adaptive weight, and together through the rest of the decoder. Parameters of the two
    sides are different ones, so one call of the optimiser updates both. Where anything on either side is not finite,
    nothing changes, the discriminator's running statistics included.

    Args:
        networks: The autoencoder and its loss.
        loss: Settings of the loss.
        optimiser: Of all trained parameters.
        ema_decay: Of their moving average.
        dtype: In which the decoder computes; its kernels are gathered in it, all at once: they are small beside its
            activations.
    """
    axes = networks.axes

    def used(params: Params) -> Params:
        """Kernels as the layers use them; those of stacked layers are gathered where they are scanned."""
        dtypes = {"decoder.": dtype, LOSS: loss.dtype}

        def kernel(name: str, w: Array) -> Array:
            prefix = next((prefix for prefix in dtypes if name.startswith(prefix)), None)
            return w if prefix is None or w.ndim < 2 else gathered(w, axes[name], dtypes[prefix])

        return {name: kernel(name, w) for name, w in params.items()}

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, steps.Metrics]:
        valid, key = batch["valid"], jax.random.fold_in(state.key, state.step)
        trained, pull_used = jax.vjp(used, state.params)
        params = {**used(state.frozen), **trained}
        model = {name: w for name, w in params.items() if not name.startswith(LOSS)}
        of_loss = {name.removeprefix(LOSS): w for name, w in params.items() if name.startswith(LOSS)}
        last = {name: w for name, w in trained.items() if name.startswith(LAST)}
        body = {name: w for name, w in trained.items() if name in model and name not in last}

        def hidden_of(body: Params) -> Array:
            autoencoder = networks.autoencoder({**model, **body})
            return autoencoder.decoder.hidden(autoencoder.features_of_images(batch["images"], valid, key=key))

        def pixels_of(last: Params, hidden: Array) -> Array:
            return networks.autoencoder({**model, **last}).decoder.conv_out(hidden).astype(jnp.float32)

        hidden, pull_hidden = jax.vjp(hidden_of, body)
        pixels, pull_pixels = jax.vjp(pixels_of, last, hidden)
        target = target_pixels(batch["images"])[:, : pixels.shape[1], : pixels.shape[2]]
        close = reconstruction_loss(networks.loss, of_loss, loss, target, pixels, valid)

        by_pixels, total, running = close.by_pixels, close.loss, {}
        by_last, _ = pull_pixels(by_pixels)
        grads = {LOSS + "logvar": close.by_logvar}
        metrics = {"loss/l1": close.l1, "loss/lpips": close.lpips}
        if loss.discriminator is not None:
            played = adversarial_loss(networks.loss, of_loss, loss, target, pixels, valid)
            by_last_of_game, _ = pull_pixels(played.by_pixels)
            kernel, factor = LAST + "kernel", disc_factor(loss, state.step)
            weight = adaptive_weight(by_last[kernel], by_last_of_game[kernel], loss.disc_weight)
            by_pixels += weight * factor * played.by_pixels
            by_last = {n: g + (weight * factor).astype(g.dtype) * by_last_of_game[n] for n, g in by_last.items()}
            total += weight * factor * played.generator + factor * played.discriminator
            grads |= {LOSS + n: factor.astype(g.dtype) * g for n, g in played.by_params.items()}
            running = {LOSS + n: r for n, r in played.running.items()}
            metrics |= {
                "loss/generator": played.generator,
                "loss/discriminator": factor * played.discriminator,
                "loss/adaptive_weight": weight,
                "loss/disc_factor": factor,
                "logits/real": played.real,
                "logits/fake": played.fake,
            }
        if loss.learn_logvar:
            metrics["loss/logvar"] = of_loss["logvar"]
        _, by_hidden = pull_pixels(by_pixels)
        grads |= {**by_last, **pull_hidden(by_hidden)[0]}
        (grads,) = pull_used({name: grads[name] for name in trained})
        state, health = steps.update(state, grads, total, batch["cause"], optimiser, ema_decay, running)
        return state, {**health, **metrics}

    return step


def target_pixels(images: UInt8[Array, "batch h w 3"]) -> Float[Array, "batch h w 3"]:
    """0 .. 255 -> [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1.0


def reconstruct(
    network: Network[Autoencoder],
    params: Params,
    images: UInt8[Array, "batch height width 3"],
    valid: Bool[Array, " batch"] | None = None,
) -> UInt8[Array, "batch h w 3"]:
    """What the decoder makes of the features of images of one size; what does not fill a patch is cut off."""
    autoencoder = network(params)
    return to_uint8(autoencoder.decoder(autoencoder.features_of_images(images, valid)))


class Moments(NamedTuple):
    """How many features, their mean and their sum of squared deviations a channel."""

    num_tokens: Float[Array, ""]
    mean: Float[Array, " channels"]
    deviations: Float[Array, " channels"]

    @classmethod
    def zero(cls, channels: int) -> Moments:
        return cls(jnp.zeros(()), jnp.zeros((channels,)), jnp.zeros((channels,)))

    def std(self) -> Float[Array, " channels"]:
        return jnp.sqrt(self.deviations / jnp.maximum(self.num_tokens, 1.0))


def update_moments(network: Network[Autoencoder], params: Params, moments: Moments, batch: Batch) -> Moments:
    """Adds the features of a batch's images (Chan, Golub and LeVeque 1979, the pairwise form of Welford's)."""
    features = network(params).features_of_images(batch["images"], batch["valid"])
    mask = jnp.broadcast_to(batch["valid"][:, None, None, None], (*features.shape[:3], 1))
    count = jnp.sum(mask, dtype=jnp.float32)
    mean = jnp.sum(jnp.where(mask, features, 0.0), axis=(0, 1, 2)) / jnp.maximum(count, 1.0)
    squares = jnp.square(features - mean[None, None, None])
    deviations = jnp.sum(jnp.where(mask, squares, 0.0), axis=(0, 1, 2))
    total = jnp.maximum(moments.num_tokens + count, 1.0)
    delta = mean - moments.mean
    return Moments(
        moments.num_tokens + count,
        moments.mean + delta * count / total,
        moments.deviations + deviations + jnp.square(delta) * moments.num_tokens * count / total,
    )
