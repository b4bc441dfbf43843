"""Dense and convolutional maps whose kernels carry logical axis names (`svg_jax.parallel` maps them to the mesh)."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike
from jaxtyping import Array, Float

XAVIER = nnx.initializers.xavier_uniform()


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


def conv(in_features: int, out_features: int, size: int, *, rngs: nnx.Rngs, dtype: DTypeLike | None = None) -> nnx.Conv:
    """A `size` x `size` convolution over [B, H, W, C] that keeps H and W; kernel [size, size, in, out]."""
    return nnx.Conv(
        in_features,
        out_features,
        (size, size),
        padding="SAME",
        dtype=dtype,
        kernel_init=nnx.initializers.variance_scaling(1.0 / 3.0, "fan_in", "uniform"),  # PyTorch's default
        kernel_metadata=sharded(None, None, "embed", "mlp"),
        rngs=rngs,
    )
