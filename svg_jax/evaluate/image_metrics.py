"""PSNR and SSIM of reconstructions, in the conventions of the SVG-T2I release, and what an image is stored as there.

Images are [B, H, W, 3] with values in [-1, 1] unless they are uint8. Each function gives a value an image; that of a
batch is their mean, and that of a data set the mean over its batches, whatever their sizes.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

SIGMA = 1.5  # pixels, of the Gaussian window of SSIM
RADIUS = 5  # pixels on each side of its centre: int(3.5 * SIGMA + 0.5)


def levels(x: Float[Array, "batch h w 3"]) -> Float[Array, "batch h w 3"]:
    """clip(127.5 x + 128, 0, 255): pixels on the scale of 8 bits, not yet cut to whole numbers."""
    return jnp.clip(127.5 * x + 128.0, 0.0, 255.0)


def stored(x: Float[Array, "batch h w 3"]) -> UInt8[Array, "batch h w 3"]:
    """The 8-bit image that the release writes: `levels`, cut off and not rounded."""
    return levels(x).astype(jnp.uint8)


def compared(x: Float[Array, "batch h w 3"]) -> Float[Array, "batch h w 3"]:
    """The reconstruction as the release compares it in SSIM and LPIPS: `levels` / 255 * 2 - 1.

    Not cut to 8 bits, and by 1 / 255 brighter than x, as 128 stands where 127.5 would undo the scaling.
    """
    return levels(x) / 255.0 * 2.0 - 1.0


def psnr(a: UInt8[Array, "batch h w 3"], b: UInt8[Array, "batch h w 3"]) -> Float[Array, " batch"]:
    """20 log10(255 / sqrt(mean (a - b)^2)) in dB, of 8-bit images; infinite where they are equal."""
    error = jnp.mean(jnp.square(a.astype(jnp.float32) - b.astype(jnp.float32)), axis=(1, 2, 3))
    return 20.0 * jnp.log10(255.0 / jnp.sqrt(error))


def ssim(a: Float[Array, "batch h w c"], b: Float[Array, "batch h w c"]) -> Float[Array, " batch"]:
    """Structural similarity (Wang et al. 2004, eq. 13), averaged over pixels and channels.

        (2 m_a m_b + c1) (2 v_ab + c2) / ((m_a^2 + m_b^2 + c1) (v_a + v_b + c2))

    with the local means m and (co)variances v under a Gaussian window of 11 x 11 pixels, c1 = (0.01 L)^2,
    c2 = (0.03 L)^2 and the range L = 2 of values from -1 to 1, to which both are clipped. Borders are reflected and
    count as the rest does, as in torchmetrics 1.8.2; earlier versions left 5 pixels a side out.

    Raises:
        ValueError: A side has less than 6 pixels, which cannot be reflected.
    """
    if min(a.shape[1:3]) <= RADIUS:
        raise ValueError(f"SSIM of {a.shape[2]} x {a.shape[1]} pixels: both sides need at least {RADIUS + 1}")
    a, b = jnp.clip(a, -1.0, 1.0), jnp.clip(b, -1.0, 1.0)
    c1, c2 = (0.01 * 2.0) ** 2, (0.03 * 2.0) ** 2
    sums = _blurred(jnp.concatenate([a, b, a * a, b * b, a * b], axis=-1))
    mean_a, mean_b, square_a, square_b, product = jnp.split(sums, 5, axis=-1)
    variance_a = jnp.maximum(square_a - mean_a * mean_a, 0.0)
    variance_b = jnp.maximum(square_b - mean_b * mean_b, 0.0)
    covariance = product - mean_a * mean_b
    luminance = (2.0 * mean_a * mean_b + c1) / (mean_a * mean_a + mean_b * mean_b + c1)
    structure = (2.0 * covariance + c2) / (variance_a + variance_b + c2)
    return jnp.mean(luminance * structure, axis=(1, 2, 3))


def _blurred(x: Float[Array, "batch h w c"]) -> Float[Array, "batch h w c"]:
    """Under the window, a side after the other; sums of shifted images, which no accelerator computes in fewer bits."""
    offsets = np.arange(-RADIUS, RADIUS + 1, dtype=np.float32)
    window = np.exp(-((offsets / SIGMA) ** 2) / 2)
    window /= window.sum()
    for axis in (1, 2):
        size = x.shape[axis]
        padding = [(0, 0)] * x.ndim
        padding[axis] = (RADIUS, RADIUS)
        padded = jnp.pad(x, padding, mode="reflect")
        shifted = [padded[:, i : i + size] if axis == 1 else padded[:, :, i : i + size] for i in range(len(window))]
        x = sum((w * y for w, y in zip(window.tolist(), shifted, strict=True)), jnp.zeros_like(x))
    return x
