"""The residual branch of Autoencoder-R: a small ViT whose few channels carry the detail that the vision model drops.

Two kinds, as in the release. "rope" turns queries and keys by angles that are learnt for each layer and head (mixed
rotary embedding, arXiv 2403.13298) and so reads images of any shape; "learnt" adds a learnt vector to each place of one
grid, which is interpolated for other grids. The last layers make 8 channels of each token; `match_distribution` brings
them to the scale of the vision model's features, to which they are appended.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from svg_jax.nn.blocks import INIT, Block, BlockConfig, PatchEmbed
from svg_jax.nn.linear import linear
from svg_jax.nn.norms import LayerNorm
from svg_jax.nn.patches import token_mask, token_positions
from svg_jax.nn.resize import interpolate_table
from svg_jax.nn.stack import scan_layers, stacked
from svg_jax.parallel import constrain_tokens

FAMILIES = ("rope", "learnt")
MATCHES = ("batch", "per_image", "none")


@dataclasses.dataclass(frozen=True)
class ResidualConfig:
    """Sizes of the branch; the defaults are those of the released Autoencoder-R."""

    family: str = "rope"
    dim: int = 384
    num_layers: int = 12
    num_heads: int = 6
    hidden_dim: int = 1536  # of the feed-forward layers
    out_channels: int = 8
    patch_size: int = 16
    grid: tuple[int, int] = (16, 16)  # rows and columns of the places that "learnt" has a vector for
    rope_theta: float = 10.0  # of the frequencies at initialisation, which "rope" learns
    layer_scale: float = 1e-4  # at initialisation; "learnt" has none
    norm_eps: float = 1e-6
    match: str = "batch"  # over what statistics are matched: see match_distribution
    mask_ratio: float = 0.0  # share of the images whose residual latents training replaces by a learnt token
    frozen: bool = False  # gets no gradient
    remat: str = "none"  # see nn.stack.REMAT
    dtype: str = "float32"  # of the linear maps and attention; the residual stream and the norms are float32
    attention: str = "auto"  # see nn.attention.BACKENDS

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"unknown residual family '{self.family}': choose {' or '.join(FAMILIES)}")
        if self.match not in MATCHES:
            raise ValueError(f"unknown residual match '{self.match}': choose {', '.join(MATCHES)}")
        if not 0.0 <= self.mask_ratio <= 1.0:
            raise ValueError(f"residual mask_ratio is {self.mask_ratio}: it is a share, from 0 to 1")
        if self.dim % self.num_heads or (self.family == "rope" and self.head_dim % 4):
            raise ValueError(
                f"residual dim / num_heads = {self.dim} / {self.num_heads} must be whole, and a multiple of 4 for "
                "rotary embeddings"
            )

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.dim // self.num_heads

    @property
    def tokens_in_front(self) -> int:
        """Of the patches in the sequence: the class token."""
        return 1

    @property
    def block(self) -> BlockConfig:
        """Of its blocks."""
        rope = self.family == "rope"
        return BlockConfig(
            dim=self.dim,
            num_heads=self.num_heads,
            hidden_dim=self.hidden_dim,
            layer_scale=self.layer_scale if rope else None,
            norm_eps=self.norm_eps,
            rotary="interleaved" if rope else None,
            dtype=self.dtype,
            attention=self.attention,
        )

    @classmethod
    def from_release(cls, arguments: dict[str, Any], **changes: Any) -> ResidualConfig:
        """From the `extra_vit_config` of a release config.

        Raises:
            ValueError: A branch other than its two ViTs.
        """
        sizes: dict[str, dict[str, Any]] = {
            "vit-rope-s": {"family": "rope"},
            "vit-s": {"family": "learnt", "num_layers": 6, "num_heads": 8},
        }
        kind = arguments.get("vit_type", "vit-s")
        if kind not in sizes:
            raise ValueError(f"a residual branch with vit_type = '{kind}' is not supported: {' or '.join(sizes)}")
        values = {
            "out_channels": arguments["output_dim"],
            "match": "batch" if arguments.get("use_outnorm", False) else "none",
            "mask_ratio": arguments.get("mask_ratio", 0.0),
            "frozen": arguments.get("frozen", False),
        }
        return cls(**{**sizes[kind], **values, **changes})


class MixedRotaryBlock(Block):
    """A block whose heads each turn by their own learnt angles."""

    def __call__(  # type: ignore[override]
        self,
        x: Float[Array, "batch tokens dim"],
        places: Float[Array, "batch tokens 2"],
        valid: Bool[Array, "batch tokens"],
        freqs: Float[Array, "2 heads*half"],
    ) -> Float[Array, "batch tokens dim"]:
        angles = mixed_angles(places, freqs.reshape(2, self.attn.num_heads, -1))
        return super().__call__(x, (jnp.cos(angles), jnp.sin(angles)), valid)


def mixed_angles(
    places: Float[Array, "batch tokens 2"], freqs: Float[Array, "2 heads half"]
) -> Float[Array, "batch tokens heads half"]:
    """column * freqs[0] + row * freqs[1], float32 (arXiv 2403.13298, equation 14); `places` are (row, column)."""
    row, column = places[..., 0, None, None], places[..., 1, None, None]
    freqs = freqs.astype(jnp.float32)[:, None, None]
    return column * freqs[0] + row * freqs[1]


def initial_freqs(
    key: PRNGKeyArray, layers: int, heads: int, head_dim: int, theta: float
) -> Float[Array, "2 layers heads*half"]:
    """theta^(-4i / head_dim) for i < head_dim / 4, along a random direction a layer and head and along its normal."""
    magnitude = theta ** (-4.0 * jnp.arange(head_dim // 4, dtype=jnp.float32) / head_dim)
    direction = jax.random.uniform(key, (layers, heads, 1), maxval=2.0 * math.pi)
    turned = jnp.concatenate(
        [jnp.broadcast_to(a, (layers, heads, head_dim // 4)) for a in (direction, direction + math.pi / 2)], axis=-1
    )
    x, y = (jnp.concatenate([magnitude, magnitude])[None, None] * f(turned) for f in (jnp.cos, jnp.sin))
    return jnp.stack([x, y]).reshape(2, layers, -1)


def gelu(x: Array) -> Array:
    """Exact."""
    return jax.nn.gelu(x, approximate=False)


class ResidualViT(nnx.Module):
    """Patches -> a few channels each, on padded tokens.

    The release turns an image that has as many patches as its construction grid, but another shape, as if it had that
    shape (at 1024 px: 512 x 2048). Here every patch turns by its own row and column. Its dropout (0.1, in training, of
    the "learnt" kind) is left out.
    """

    def __init__(self, config: ResidualConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        dim, dtype, rope = config.dim, config.dtype, config.family == "rope"
        self.patch_embed = PatchEmbed(config.patch_size, dim, dtype, rngs=rngs)
        self.cls_token = nnx.Param(INIT(rngs.params(), (1, 1, dim), jnp.float32))
        if rope:
            sizes = (config.num_layers, config.num_heads, config.head_dim)
            self.freqs = nnx.Param(initial_freqs(rngs.params(), *sizes, config.rope_theta))
        else:
            self.pos_embed = nnx.Param(INIT(rngs.params(), (1 + math.prod(config.grid), dim), jnp.float32))
        make = MixedRotaryBlock if rope else Block
        self.blocks = stacked(lambda rngs: make(config.block, rngs=rngs), config.num_layers, rngs=rngs)
        self.norm = LayerNorm(dim, eps=config.norm_eps)
        self.heads: nnx.List[Any] = nnx.List(
            [
                linear(dim, dim, ("embed", None), dtype=dtype, kernel_init=INIT, rngs=rngs),
                gelu,
                linear(dim, config.out_channels, ("embed", None), dtype=dtype, kernel_init=INIT, rngs=rngs),
            ]
        )

    def __call__(
        self,
        patches: Float[Array, "batch tokens pixels"],
        grid: Int[Array, "batch 2"],
        mask: Bool[Array, "batch tokens"] | None = None,
    ) -> Float[Array, "batch tokens out_channels"]:
        """Residual channels, float32, not matched to anything; what stands in empty slots means nothing.

        Args:
            patches: Pixels normalised with ImageNet's statistics, row-major, (row, column, channel) inside a patch.
            grid: (rows, cols) of each image in patches; (0, 0) for none.
            mask: Which slots hold a patch, the first rows * cols by default.
        """
        x = self.norm(self.run(patches, grid, mask)[0])[:, 1:]
        for layer in self.heads:
            x = layer(x)
        return x.astype(jnp.float32)

    def run(
        self,
        patches: Float[Array, "batch tokens pixels"],
        grid: Int[Array, "batch 2"],
        mask: Bool[Array, "batch tokens"] | None = None,
        collect: bool = False,
    ) -> tuple[Float[Array, "batch sequence dim"], Float[Array, "layers batch sequence dim"] | None]:
        """The class token and the patches after the last block, not normalised, and with `collect` after each."""
        batch, tokens, _ = patches.shape
        mask = token_mask(grid, tokens) if mask is None else mask
        x = self.patch_embed(patches, mask).astype(jnp.float32)
        front = jnp.broadcast_to(self.cls_token[...].astype(jnp.float32), (batch, 1, self.config.dim))
        valid = jnp.pad(mask, ((0, 0), (1, 0)), constant_values=True)
        rows_and_cols = token_positions(grid, tokens)
        settings: dict[str, Any] = {"dtype": self.config.dtype, "remat": self.config.remat, "collect": collect}
        if self.config.family == "learnt":
            table = self.pos_embed[...].astype(jnp.float32)
            front = front + table[None, :1]
            x = x + interpolate_table(table[1:].reshape(*self.config.grid, -1), rows_and_cols, grid)
            x = constrain_tokens(jnp.concatenate([front, x], axis=1))
            return scan_layers(self.blocks, x, None, valid, **settings)
        places = jnp.stack(rows_and_cols, axis=-1).astype(jnp.float32)
        places = jnp.pad(places, ((0, 0), (1, 0), (0, 0)))  # the class token stands at 0 and does not turn
        x = constrain_tokens(jnp.concatenate([front, x], axis=1))
        return scan_layers(self.blocks, x, places, valid, per_layer=(self.freqs[...].transpose(1, 0, 2),), **settings)


def match_distribution(
    features: Float[Array, "batch tokens channels"],
    residual: Float[Array, "batch tokens few"],
    mask: Bool[Array, "batch tokens"],
    over: str = "batch",
    eps: float = 1e-6,
) -> Float[Array, "batch tokens few"]:
    """(r - mean_r) / (std_r + eps) * std_f + mean_f: the residual channels r at the scale of the features f.

    Means and deviations (n - 1 in the denominator) are taken of each channel over tokens, then averaged over channels
    to one number, through which no gradient goes. The release takes them over the batch of one GPU, so that a latent
    depends on the other images there. Here "batch" is the whole global batch, however it is split over devices,
    without empty slots; "per_image" is each image alone, for inference, equal to "batch" of that one image; "none"
    changes nothing.
    A single token has no deviation: it is shifted and not scaled.

    Args:
        features: Of the vision model.
        residual: Of the residual branch.
        mask: Slots that hold a token.
        over: "batch", "per_image" or "none".
        eps: Keeps the quotient finite.
    """
    if over == "none":
        return residual
    axes = (1,) if over == "per_image" else (0, 1)
    mean_f, std_f = _statistics(features, mask, axes)
    mean_r, std_r = _statistics(residual, mask, axes)
    return (residual - mean_r) / (std_r + eps) * std_f + mean_f


def _statistics(
    x: Float[Array, "batch tokens channels"], mask: Bool[Array, "batch tokens"], axes: tuple[int, ...]
) -> tuple[Float[Array, "#batch 1 1"], Float[Array, "#batch 1 1"]]:
    """Mean and standard deviation a channel, averaged over channels."""
    x, there = jax.lax.stop_gradient(x.astype(jnp.float32)), mask[..., None]
    count = jnp.sum(there, axis=axes, keepdims=True, dtype=jnp.float32)
    mean = jnp.sum(jnp.where(there, x, 0.0), axis=axes, keepdims=True) / jnp.maximum(count, 1.0)
    squares = jnp.sum(jnp.where(there, jnp.square(x - mean), 0.0), axis=axes, keepdims=True)
    std = jnp.where(count > 1.0, jnp.sqrt(squares / jnp.maximum(count - 1.0, 1.0)), 1.0)
    return jnp.mean(mean, axis=-1, keepdims=True), jnp.mean(std, axis=-1, keepdims=True)


def masked(
    residual: Float[Array, "batch tokens few"], token: Float[Array, "1 few 1"], ratio: float, key: PRNGKeyArray
) -> Float[Array, "batch tokens few"]:
    """The residual latents with those of a random share of the images, all of them, replaced by the token.

    The decoder then learns to do without them. Applied after matching, so that the token stands at the scale of the
    latents and no masked image enters the statistics. (The release's own code for this is commented out, and comes
    before.)
    """
    hidden = jax.random.uniform(key, (residual.shape[0], 1, 1)) < ratio
    return jnp.where(hidden, token.transpose(0, 2, 1).astype(residual.dtype), residual)
