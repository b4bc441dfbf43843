"""The block that every vision transformer here is made of: attention, then a feed-forward layer, each before a norm.

Pre-norm residual blocks (arXiv 2010.11929) with, by choice, rotary angles, SwiGLU, layer scale and a mask on the bias
of the keys. Names are those of DINOv3, whatever model the block stands in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from svg_jax.nn.attention import attention
from svg_jax.nn.linear import linear, sharded
from svg_jax.nn.norms import LayerNorm
from svg_jax.nn.rotary import rotate_halves, rotate_interleaved
from svg_jax.parallel import constrain_tokens

INIT = nnx.initializers.truncated_normal(0.02)
ROTATIONS = {"halves": rotate_halves, "interleaved": rotate_interleaved}


def _gelu(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=False)


def _gelu_tanh(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=True)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"gelu": _gelu, "gelu_tanh": _gelu_tanh}

Rotary = tuple[Float[Array, "batch tokens *heads half"], Float[Array, "batch tokens *heads half"]]
"""cos and sin of each token's angles, the same for all heads or one set a head."""


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """Sizes and kind of a block."""

    dim: int
    num_heads: int
    hidden_dim: int  # of the feed-forward layers
    gated: bool = False  # SwiGLU instead of two layers around the activation
    fused_gate: bool = False  # the first two matrices of SwiGLU in one
    qkv_bias: bool = True
    mask_key_bias: bool = False  # the bias of the keys is multiplied by 0
    layer_scale: float | None = None  # at initialisation; None: no layer scale
    norm_eps: float = 1e-6
    activation: str = "gelu"  # or "gelu_tanh"
    rotary: str | None = None  # "halves" or "interleaved": which channels of a head turn together
    dtype: str = "float32"  # of the linear maps and attention; the residual stream and the norms are float32
    attention: str = "auto"  # see nn.attention.BACKENDS

    def __post_init__(self) -> None:
        if self.dim % self.num_heads:
            raise ValueError(f"{self.dim} channels cannot be split evenly among {self.num_heads} heads")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation '{self.activation}': choose {' or '.join(ACTIVATIONS)}")
        if self.rotary is not None and self.rotary not in ROTATIONS:
            raise ValueError(f"unknown rotary layout '{self.rotary}': choose {' or '.join(ROTATIONS)}, or None")


class MaskedBiasLinear(nnx.Module):
    """y = x W + b * m: queries, keys and values with a mask m that takes the bias off the keys."""

    def __init__(self, config: BlockConfig, *, rngs: nnx.Rngs) -> None:
        self.dtype = config.dtype
        features = 3 * config.dim
        self.kernel = nnx.Param(INIT(rngs.params(), (config.dim, features), jnp.float32), **sharded("embed", "heads"))
        self.bias = nnx.Param(jnp.zeros((features,), jnp.float32))
        self.bias_mask = nnx.Param(jnp.asarray(qkv_bias_mask((features,))))

    def __call__(self, x: Float[Array, "batch tokens dim"]) -> Float[Array, "batch tokens features"]:
        bias = self.bias[...] * jax.lax.stop_gradient(self.bias_mask[...])
        return x.astype(self.dtype) @ self.kernel[...].astype(self.dtype) + bias.astype(self.dtype)[None, None]


class Attention(nnx.Module):
    """Self-attention; queries and keys are turned by the tokens' angles if there are any."""

    def __init__(self, config: BlockConfig, *, rngs: nnx.Rngs) -> None:
        self.num_heads, self.backend, self.rotary = config.num_heads, config.attention, config.rotary
        if config.qkv_bias and config.mask_key_bias:
            self.qkv: nnx.Module = MaskedBiasLinear(config, rngs=rngs)
        else:
            self.qkv = linear(
                config.dim,
                3 * config.dim,
                ("embed", "heads"),
                use_bias=config.qkv_bias,
                dtype=config.dtype,
                kernel_init=INIT,
                rngs=rngs,
            )
        self.proj = linear(config.dim, config.dim, ("heads", "embed"), dtype=config.dtype, kernel_init=INIT, rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch tokens dim"], rotary: Rotary | None, valid: Bool[Array, "batch tokens"] | None
    ) -> Float[Array, "batch tokens dim"]:
        qkv = self.qkv(x).reshape(*x.shape[:2], 3, self.num_heads, -1)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        if self.rotary is not None:
            if rotary is None:
                raise ValueError(f"a block with rotary = '{self.rotary}' needs the (cos, sin) of its tokens' angles")
            rotate = ROTATIONS[self.rotary]
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        return self.proj(attention(q, k, v, valid=valid, backend=self.backend).reshape(x.shape))


class MLP(nnx.Module):
    """fc2(activation(fc1 x))."""

    def __init__(self, config: BlockConfig, *, rngs: nnx.Rngs) -> None:
        dim, hidden, dtype = config.dim, config.hidden_dim, config.dtype
        self.activation = config.activation
        self.fc1 = linear(dim, hidden, ("embed", "mlp"), dtype=dtype, kernel_init=INIT, rngs=rngs)
        self.fc2 = linear(hidden, dim, ("mlp", "embed"), dtype=dtype, kernel_init=INIT, rngs=rngs)

    def __call__(self, x: Float[Array, "batch tokens dim"]) -> Float[Array, "batch tokens dim"]:
        return self.fc2(ACTIVATIONS[self.activation](self.fc1(x)))


class SwiGLU(nnx.Module):
    """w3(silu(w1 x) * w2 x) (arXiv 2002.05202)."""

    def __init__(self, config: BlockConfig, *, rngs: nnx.Rngs) -> None:
        dim, hidden, dtype = config.dim, config.hidden_dim, config.dtype
        self.w1 = linear(dim, hidden, ("embed", "mlp"), dtype=dtype, kernel_init=INIT, rngs=rngs)
        self.w2 = linear(dim, hidden, ("embed", "mlp"), dtype=dtype, kernel_init=INIT, rngs=rngs)
        self.w3 = linear(hidden, dim, ("mlp", "embed"), dtype=dtype, kernel_init=INIT, rngs=rngs)

    def __call__(self, x: Float[Array, "batch tokens dim"]) -> Float[Array, "batch tokens dim"]:
        return self.w3(jax.nn.silu(self.w1(x)) * self.w2(x))


class FusedSwiGLU(nnx.Module):
    """w3(silu(a) * b) with [a, b] = w12 x: `SwiGLU` with its first two matrices side by side, as DINOv2 stores them."""

    def __init__(self, config: BlockConfig, *, rngs: nnx.Rngs) -> None:
        dim, hidden, dtype = config.dim, config.hidden_dim, config.dtype
        self.w12 = linear(dim, 2 * hidden, ("embed", "mlp"), dtype=dtype, kernel_init=INIT, rngs=rngs)
        self.w3 = linear(hidden, dim, ("mlp", "embed"), dtype=dtype, kernel_init=INIT, rngs=rngs)

    def __call__(self, x: Float[Array, "batch tokens dim"]) -> Float[Array, "batch tokens dim"]:
        gate, value = jnp.split(self.w12(x), 2, axis=-1)
        return self.w3(jax.nn.silu(gate) * value)


class LayerScale(nnx.Module):
    """x * gamma, a channel (arXiv 2103.17239); float32. With no value to begin with there is no gamma: x as it is."""

    def __init__(self, dim: int, value: float | None) -> None:
        self.gamma = None if value is None else nnx.Param(jnp.full((dim,), value, jnp.float32))

    def __call__(self, x: Float[Array, "batch tokens dim"]) -> Float[Array, "batch tokens dim"]:
        x = x.astype(jnp.float32)
        return x if self.gamma is None else x * self.gamma[...].astype(jnp.float32)[None, None]


class PatchEmbed(nnx.Module):
    """A linear map of each patch."""

    def __init__(self, patch_size: int, dim: int, dtype: str, *, rngs: nnx.Rngs) -> None:
        self.patch_size = patch_size
        self.proj = linear(3 * patch_size**2, dim, (None, "embed"), dtype=dtype, kernel_init=INIT, rngs=rngs)

    def __call__(
        self, patches: Float[Array, "batch tokens pixels"], mask: Bool[Array, "batch tokens"] | None = None
    ) -> Float[Array, "batch tokens dim"]:
        """Where `mask` is false the patch is taken as zeros, whatever it holds, NaN included.

        Raises:
            ValueError: The patches are of another size.
        """
        pixels, expected = patches.shape[-1], 3 * self.patch_size**2
        if pixels != expected:
            raise ValueError(
                f"a patch has {pixels} numbers, but patch_size {self.patch_size} needs {expected}: "
                "cut the images with the encoder's patch_size"
            )
        return self.proj(patches if mask is None else jnp.where(mask[..., None], patches, jnp.zeros_like(patches)))


class Block(nnx.Module):
    """x + ls1(attn(norm1(x))), then x + ls2(mlp(norm2(x))); x is float32."""

    def __init__(self, config: BlockConfig, *, rngs: nnx.Rngs) -> None:
        self.norm1 = LayerNorm(config.dim, eps=config.norm_eps)
        self.attn = Attention(config, rngs=rngs)
        self.ls1 = LayerScale(config.dim, config.layer_scale)
        self.norm2 = LayerNorm(config.dim, eps=config.norm_eps)
        gated = FusedSwiGLU if config.fused_gate else SwiGLU
        self.mlp = gated(config, rngs=rngs) if config.gated else MLP(config, rngs=rngs)
        self.ls2 = LayerScale(config.dim, config.layer_scale)

    def __call__(
        self, x: Float[Array, "batch tokens dim"], rotary: Rotary | None, valid: Bool[Array, "batch tokens"] | None
    ) -> Float[Array, "batch tokens dim"]:
        """One layer.

        Args:
            x: The residual stream.
            rotary: cos and sin of the tokens' angles, where the block turns its queries and keys.
            valid: Tokens that exist; the others are never attended to.
        """
        x = x + self.ls1(self.attn(self.norm1(x), rotary, valid))
        return constrain_tokens(x + self.ls2(self.mlp(self.norm2(x))))


def qkv_bias_mask(shape: tuple[int, ...]) -> np.ndarray:
    """1 for queries, 0 for keys, 1 for values, each a third of the last axis."""
    thirds = np.array([1.0, 0.0, 1.0], np.float32)
    return np.broadcast_to(np.repeat(thirds, shape[-1] // 3), shape)
