"""Dense and convolutional maps whose kernels carry logical axis names (`svg_jax.parallel` maps them to the mesh)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from svg_jax.nn.attention import current_platform

XAVIER = nnx.initializers.xavier_uniform()
PYTORCH_CONV = nnx.initializers.variance_scaling(1.0 / 3.0, "fan_in", "uniform")  # PyTorch's default
WIDE = 128  # channels from which a convolution has its own gradient on a CPU


def sharded(*axes: str | None) -> dict[str, Any]:
    """Metadata of a parameter: its logical axes, one a dimension; building a module places nothing on devices."""
    return {"out_sharding": axes, "eager_sharding": False}


def linear(
    in_features: int,
    out_features: int,
    axes: tuple[str | None, str | None],
    *,
    rngs: nnx.Rngs,
    use_bias: bool = True,
    dtype: DTypeLike | None = None,
    kernel_init: Initializer = XAVIER,
) -> nnx.Linear:
    """y = x W + b, W [in, out] in float32, computed in `dtype` (None: the dtype of the operands)."""
    return nnx.Linear(
        in_features,
        out_features,
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=kernel_init,
        kernel_metadata=sharded(*axes),
        dot_general=matrix_product,
        rngs=rngs,
    )


def matrix_product(
    x: Float[Array, "*rows in"], kernel: Float[Array, "in out"], dimension_numbers: Any, **settings: Any
) -> Float[Array, "*rows out"]:
    """x W with all rows in one matrix. In the gradient of W, XLA would otherwise copy the transposed activations."""
    rows = x.reshape(-1, x.shape[-1])
    y = jax.lax.dot_general(rows, kernel, (((1,), (0,)), ((), ())), **settings)
    return y.reshape(*x.shape[:-1], kernel.shape[-1])


def conv(
    in_features: int,
    out_features: int,
    size: int,
    *,
    rngs: nnx.Rngs,
    dtype: DTypeLike | None = None,
    stride: int = 1,
    padding: int | None = None,
    use_bias: bool = True,
    kernel_init: Initializer = PYTORCH_CONV,
    form: Callable[..., Array] | None = None,
) -> nnx.Conv:
    """A `size` x `size` convolution over [B, H, W, C]; kernel [size, size, in, out].

    `padding` zeros are put around the image; by default as many as keep H and W. `form` computes it, `convolution` by
    default.
    """
    return nnx.Conv(
        in_features,
        out_features,
        (size, size),
        strides=stride,
        padding="SAME" if padding is None else padding,
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=kernel_init,
        kernel_metadata=sharded(None, None, "embed", "mlp"),
        conv_general_dilated=form or convolution,
        rngs=rngs,
    )


def convolution(
    x: Float[Array, "batch h w in"],
    kernel: Float[Array, "rows cols in out"],
    strides: tuple[int, int],
    padding: Any,
    **settings: Any,
) -> Float[Array, "batch h2 w2 out"]:
    """`jax.lax.conv_general_dilated`; on a CPU, wide 3 x 3 ones have a gradient of their own."""
    plain = kernel.shape[:2] == (3, 3) and tuple(strides) == (1, 1) and padding == "SAME"
    if plain and min(kernel.shape[2:]) >= WIDE and current_platform() == "cpu":
        return _wide_conv(x, kernel)
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, **settings)


def doubled_convolution(
    x: Float[Array, "batch h w in"],
    kernel: Float[Array, "3 3 in out"],
    strides: tuple[int, int],
    padding: Any,
    **settings: Any,
) -> Float[Array, "batch 2*h 2*w out"]:
    """A 3 x 3 convolution of x with each pixel doubled to 2 x 2, in 4/9 of the multiplications.

    The three taps of an even row of the result fall on two rows of x: K[0] on the one above, K[1] + K[2] on its own;
    those of an odd row K[0] + K[1] on its own, K[2] on the one below. Columns likewise: four 2 x 2 convolutions of x,
    one for each place in the 2 x 2. Strides and padding are those that keep the size.
    """
    batch, height, width, _ = x.shape
    whole = kernel.astype(jnp.float32)
    parts = []
    for row in range(2):
        for column in range(2):
            taps = _halved(_halved(whole, 0, row), 1, column).astype(kernel.dtype)
            around = ((1 - row, row), (1 - column, column))
            parts.append(jax.lax.conv_general_dilated(x, taps, strides, around, **settings))
    y = jnp.stack(parts).reshape(2, 2, batch, height, width, -1).transpose(2, 3, 0, 4, 1, 5)
    return y.reshape(batch, 2 * height, 2 * width, -1)


def _halved(kernel: Float[Array, "..."], axis: int, place: int) -> Float[Array, "..."]:
    """Three taps on doubled pixels as two on the pixels, for the first or second of a pair."""
    first, second, third = jnp.split(kernel, 3, axis)
    taps = (first, second + third) if place == 0 else (first + second, third)
    return jnp.concatenate(taps, axis)


@jax.custom_vjp
def _wide_conv(x: Float[Array, "batch h w in"], kernel: Float[Array, "3 3 in out"]) -> Float[Array, "batch h w out"]:
    """A 3 x 3 convolution whose kernel's gradient is three matrix products.

    dK[i, j] = sum over places p of x[p + (i, j) - 1]^T dy[p]: x moved along columns, times dy moved along rows in all
    three ways. On a CPU at 128 x 128 pixels and 128 channels this takes a third of the time of XLA's own form.
    """
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _wide_conv_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _wide_conv(x, kernel), (x, kernel)


def _wide_conv_backward(residuals: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    dx = _wide_conv(dy, kernel[::-1, ::-1].swapaxes(2, 3))
    rows = jnp.concatenate([_moved(dy, 1, i - 1) for i in range(3)], axis=-1).reshape(-1, 3 * dy.shape[-1])
    columns = [_moved(x, 2, 1 - j).reshape(-1, x.shape[-1]) for j in range(3)]
    by_column = jnp.stack([column.T @ rows for column in columns])
    return dx, by_column.reshape(3, x.shape[-1], 3, dy.shape[-1]).transpose(2, 0, 1, 3)


_wide_conv.defvjp(_wide_conv_forward, _wide_conv_backward)


def _moved(x: Float[Array, "batch h w c"], axis: int, by: int) -> Float[Array, "batch h w c"]:
    """Every place takes the value that stood `by` (-1, 0 or 1) before it along an axis, zeros at the border."""
    if by == 0:
        return x
    padded = jnp.pad(x, [(1, 1) if i == axis else (0, 0) for i in range(x.ndim)])
    return jax.lax.slice_in_dim(padded, 1 - by, 1 - by + x.shape[axis], axis=axis)
