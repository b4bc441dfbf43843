"""What an autoencoder is trained on: L1 + LPIPS against a patch discriminator (VQGAN, arXiv 2012.09841, section 3.1).

Of an image x and its reconstruction y, both in [-1, 1]:

  nll   = Σ_pixels (|x - y| + w_p LPIPS(x, y)) / exp(s) + s      (s: log variance, 0 unless it is learnt)
  gan   = -mean D(y)
  L_G   = nll + w f gan,   w = w_d |∂nll/∂K| / (|∂gan/∂K| + 1e-4), the ratio at most 1e4   (K: the last kernel; eq. 7)
  L_D   = f (mean max(0, 1 - D(x)) + mean max(0, 1 + D(y))) / 2   (hinge)
          f (mean log(1 + exp(-D(x))) + mean log(1 + exp(D(y)))) / 2   (vanilla)

each averaged over the images of a batch; f is 0 before the discriminator starts. The release takes LPIPS into the sum
over pixels, as above, and so do we. Its loss for lists of images trains on the reconstruction of the last one only;
here the average is over all of them, as its log and its adaptive weight have it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from svg_jax.flow.losses import batch_mean
from svg_jax.models.discriminator import DiscriminatorConfig, PatchDiscriminator, running_statistics
from svg_jax.models.lpips import LPIPS, SMALLEST_SIDE, LPIPSConfig
from svg_jax.nn.functional import Network, Params

LARGEST_WEIGHT = 1e4
CHOICES = {"disc_loss": ("hinge", "vanilla"), "reduction": ("sum", "mean"), "convention": ("batch", "list")}
PERCEPTUAL_WEIGHTS = (
    "download https://download.pytorch.org/models/vgg16-397923af.pth and "
    "https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/vgg.pth, and convert both with "
    "`python -m svg_jax.convert import vgg16-397923af.pth vgg.pth --to weights`"
)


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The defaults are the released ones. A weight of 0 leaves its network out."""

    perceptual_weight: float = 1.0
    perceptual_channels: tuple[int, ...] = LPIPSConfig().channels
    disc_channels: int = 64
    disc_num_layers: int = 3
    disc_weight: float = 0.5
    disc_factor: float = 1.0
    disc_start: int = 2500  # batches; the release counts two a batch
    disc_loss: str = "hinge"
    logvar_init: float = 0.0
    learn_logvar: bool = False
    reduction: str = "sum"  # over the pixels of an image; with "mean" the adaptive weight is far from its limit of 1e4
    convention: str = "batch"  # "list": the discriminator normalises each image alone, as for images of many sizes
    remat: str = "none"  # of the slices of LPIPS, see nn.stack.REMAT
    dtype: str = "float32"  # in which both networks compute

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"unknown loss.{name} '{getattr(self, name)}': choose one of {', '.join(choices)}")
        for name in ("disc_channels", "disc_num_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"loss.{name} is {getattr(self, name)}: it must be 1 or more")

    @property
    def discriminator(self) -> DiscriminatorConfig | None:
        """Sizes of the discriminator, if there is one."""
        if self.disc_weight == 0 or self.disc_factor == 0:
            return None
        return DiscriminatorConfig(self.disc_channels, self.disc_num_layers, self.dtype)

    @property
    def perceptual(self) -> LPIPSConfig | None:
        """Sizes of the perceptual loss, if there is one."""
        return LPIPSConfig(self.perceptual_channels, self.remat, self.dtype) if self.perceptual_weight > 0 else None

    @property
    def smallest_side(self) -> int:
        """Pixels a side that an image needs for both networks."""
        lpips = 0 if self.perceptual is None else SMALLEST_SIDE
        return max(lpips, 0 if self.discriminator is None else self.discriminator.smallest_side)

    @classmethod
    def from_release(cls, lossconfig: Mapping[str, Any], **changes: Any) -> LossConfig:
        """From the `lossconfig` of a release config; keys that never had an effect there are ignored."""
        arguments = lossconfig.get("params", {})
        kept = ("perceptual_weight", "disc_num_layers", "disc_factor", "disc_loss", "logvar_init")
        values = {name: arguments[name] for name in kept if name in arguments}
        values["disc_weight"] = arguments.get("disc_weight", 1.0)
        values["disc_start"] = -(-arguments["disc_start"] // 2)  # its counter advances by two a batch
        values["convention"] = "batch" if str(lossconfig.get("target", "")).endswith("IN") else "list"
        return cls(**{**values, **changes})


class AutoencoderLoss(nnx.Module):
    """The networks of the loss, and its log variance."""

    def __init__(self, config: LossConfig, *, rngs: nnx.Rngs) -> None:
        self.perceptual_loss = None if config.perceptual is None else LPIPS(config.perceptual, rngs=rngs)
        disc = config.discriminator
        self.discriminator = None if disc is None else PatchDiscriminator(disc, rngs=rngs)
        self.logvar = nnx.Param(jnp.full((), config.logvar_init, jnp.float32))


def is_trained(name: str, config: LossConfig) -> bool:
    """Whether a parameter of `AutoencoderLoss` is trained; running statistics follow without a gradient."""
    if name.startswith("discriminator."):
        return ".running_" not in name
    return name == "logvar" and config.learn_logvar


def check_perceptual_weights(config: LossConfig, names: Collection[str], where: str) -> None:
    """There must be trained weights for LPIPS, since random ones measure nothing.

    Args:
        config: The loss.
        names: Of the parameters that were found, such as `perceptual_loss.net.slice1.0.kernel`.
        where: They were looked for.

    Raises:
        ValueError: There are none, and the loss needs them.
    """
    if config.perceptual is not None and not any("net.slice1." in name for name in names):
        raise ValueError(
            f"loss.perceptual_weight is {config.perceptual_weight:g}, and {where} holds no VGG16 for LPIPS: "
            f"{PERCEPTUAL_WEIGHTS}; or train without it by loss.perceptual_weight=0"
        )


def negative_log_likelihood(
    x: Float[Array, "batch h w c"],
    y: Float[Array, "batch h w c"],
    perceptual: Float[Array, " batch"],
    logvar: Float[Array, ""],
    *,
    weight: float,
    reduction: str,
) -> Float[Array, " batch"]:
    """nll of each image; `perceptual` is its LPIPS and `weight` that of LPIPS."""
    error = jnp.abs(x - y) + weight * perceptual[:, None, None, None]
    likelihood = error * jnp.exp(-logvar) + logvar
    return jnp.sum(likelihood, axis=(1, 2, 3)) if reduction == "sum" else jnp.mean(likelihood, axis=(1, 2, 3))


def generator_loss(fake: Float[Array, "batch h w"]) -> Float[Array, " batch"]:
    """-mean D(y) of each image."""
    return -jnp.mean(fake, axis=(1, 2))


def discriminator_loss(
    real: Float[Array, "batch h w"], fake: Float[Array, "batch h w"], kind: str
) -> Float[Array, " batch"]:
    """The hinge (arXiv 1705.02894) or vanilla (arXiv 1406.2661, eq. 1) loss of each image."""
    penalty = jax.nn.softplus if kind == "vanilla" else lambda logits: jax.nn.relu(1.0 + logits)
    return 0.5 * jnp.mean(penalty(-real), axis=(1, 2)) + 0.5 * jnp.mean(penalty(fake), axis=(1, 2))


def adaptive_weight(nll: Float[Array, "..."], generator: Float[Array, "..."], disc_weight: float) -> Float[Array, ""]:
    """disc_weight * min(|nll| / (|generator| + 1e-4), 1e4), of the gradients of both by the last kernel."""
    nll, generator = nll.astype(jnp.float32), generator.astype(jnp.float32)
    ratio = jnp.sqrt(jnp.sum(jnp.square(nll))) / (jnp.sqrt(jnp.sum(jnp.square(generator))) + 1e-4)
    return disc_weight * jnp.clip(ratio, 0.0, LARGEST_WEIGHT)


def disc_factor(config: LossConfig, step: Int[Array, ""]) -> Float[Array, ""]:
    """f at a step: 0 before `disc_start`."""
    return jnp.where(step >= config.disc_start, config.disc_factor, 0.0)


class ReconstructionLoss(NamedTuple):
    """nll, and its gradients by the reconstruction and by the log variance."""

    loss: Float[Array, ""]
    by_pixels: Float[Array, "batch h w 3"]
    by_logvar: Float[Array, ""]
    l1: Float[Array, ""]  # mean over pixels
    lpips: Float[Array, ""]


def reconstruction_loss(
    network: Network[AutoencoderLoss],
    params: Params,
    config: LossConfig,
    x: Float[Array, "batch h w 3"],
    y: Float[Array, "batch h w 3"],
    valid: Bool[Array, " batch"],
) -> ReconstructionLoss:
    """nll of the valid images x, and what it asks of their reconstructions y."""
    distance = network(params).perceptual_loss

    def loss(y: Array, logvar: Array) -> tuple[Array, tuple[Array, Array]]:
        lpips = jnp.zeros((len(x),)) if distance is None else distance(x, y)
        weight = config.perceptual_weight
        nll = negative_log_likelihood(x, y, lpips, logvar, weight=weight, reduction=config.reduction)
        l1 = jnp.mean(jnp.abs(x - y), axis=(1, 2, 3))
        return batch_mean(nll, valid), (batch_mean(l1, valid), batch_mean(lpips, valid))

    (value, (l1, lpips)), (by_pixels, by_logvar) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(
        y, params["logvar"]
    )
    return ReconstructionLoss(value, by_pixels, by_logvar, l1, lpips)


class AdversarialLoss(NamedTuple):
    """gan and L_D without f; their gradients by the reconstruction and by the discriminator's parameters."""

    generator: Float[Array, ""]
    by_pixels: Float[Array, "batch h w 3"]
    discriminator: Float[Array, ""]
    by_params: Params
    running: Params  # new running statistics
    real: Float[Array, ""]  # mean logits
    fake: Float[Array, ""]


def adversarial_loss(
    network: Network[AutoencoderLoss],
    params: Params,
    config: LossConfig,
    x: Float[Array, "batch h w 3"],
    y: Float[Array, "batch h w 3"],
    valid: Bool[Array, " batch"],
    *,
    train: bool = True,
) -> AdversarialLoss:
    """What the discriminator makes of the valid images x and of their reconstructions y, which pass it separately.

    In the release, reconstructions pass twice, for the generator and then, the images before them, for the
    discriminator, which is the same one both times. So are the logits: here they pass once, and only the running
    statistics follow them twice.

    Args:
        network: The loss.
        params: Its parameters.
        config: Its settings.
        x: Images.
        y: Reconstructions, through which no gradient of L_D flows.
        valid: Which slots hold an image.
        train: Whether the discriminator normalises by the batch; by its running statistics otherwise.
    """
    trained = {
        name: value for name, value in params.items() if name.startswith("discriminator.") and is_trained(name, config)
    }

    def logits(trained: Params, images: Array) -> tuple[Array, Any]:
        discriminator = network({**params, **trained}).discriminator
        assert discriminator is not None, "a loss without a discriminator has no adversary"
        return discriminator(images, valid, train=train, per_image=config.convention == "list")

    fake, pull_fake, of_fake = jax.vjp(logits, trained, y, has_aux=True)
    real, pull_real, of_real = jax.vjp(lambda trained: logits(trained, x), trained, has_aux=True)

    def for_generator(fake: Array) -> Array:
        return batch_mean(generator_loss(fake), valid)

    def for_discriminator(real: Array, fake: Array) -> Array:
        return batch_mean(discriminator_loss(real, fake, config.disc_loss), valid)

    generator, by_fake = jax.value_and_grad(for_generator)(fake)
    _, by_pixels = pull_fake(by_fake)
    discriminator, (by_real, by_fake) = jax.value_and_grad(for_discriminator, argnums=(0, 1))(real, fake)
    by_params = jax.tree.map(jnp.add, pull_real(by_real)[0], pull_fake(by_fake)[0])

    old = {name.removeprefix("discriminator."): value for name, value in params.items()}
    once = running_statistics(old, [of_fake])
    running = running_statistics({**old, **once}, [of_real, of_fake])
    return AdversarialLoss(
        generator,
        by_pixels,
        discriminator,
        by_params,
        {f"discriminator.{name}": value for name, value in running.items()},
        batch_mean(jnp.mean(real, axis=(1, 2)), valid),
        batch_mean(jnp.mean(fake, axis=(1, 2)), valid),
    )
