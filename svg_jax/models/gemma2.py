"""Gemma 2, the language model whose hidden states condition the diffusion model (arXiv 2408.00118).

The release loads it with an attention that ignores the soft cap on attention logits, and reads the hidden state before
the last layer: so the cap is off by default, and `features` never computes that layer.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from svg_jax.nn.attention import attention
from svg_jax.nn.linear import linear, sharded
from svg_jax.nn.norms import OffsetRMSNorm
from svg_jax.nn.rotary import axis_table, rotate_halves
from svg_jax.nn.segments import places
from svg_jax.nn.stack import scan_layers, stacked
from svg_jax.parallel import constrain_tokens

Rotary = tuple[Array, Array]  # cos and sin
EVERYTHING = np.iinfo(np.int32).max  # the window of a layer that looks at all tokens before


@dataclasses.dataclass(frozen=True)
class Gemma2Config:
    """Sizes of a Gemma 2; the defaults are Gemma-2-2B."""

    vocab_size: int = 256000
    dim: int = 2304
    num_layers: int = 26
    num_heads: int = 8
    num_kv_heads: int = 4
    head_dim: int = 256
    hidden_dim: int = 9216  # of the feed-forward layers
    sliding_window: int = 4096  # of every other layer, from the first
    query_scalar: float = 256.0  # logits are divided by its square root
    attn_logit_softcap: float | None = None  # 50 in the paper, without effect in the release
    final_logit_softcap: float | None = 30.0
    rope_base: float = 10000.0
    norm_eps: float = 1e-6
    embedding_std: float = 0.02  # at initialisation
    kernel_std: float = 0.02
    dtype: str = "float32"  # of the linear maps and attention; the residual stream and the norms are float32
    attention: str = "auto"  # see nn.attention.BACKENDS

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads or self.head_dim % 2:
            raise ValueError(
                f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}, "
                f"and head_dim {self.head_dim} must be even"
            )

    @classmethod
    def gemma2_2b(cls, **changes: Any) -> Gemma2Config:
        """The text encoder of the release."""
        return cls(**changes)

    @classmethod
    def tiny(cls, **changes: Any) -> Gemma2Config:
        """A random stand-in for machines without the weights: 256 bytes and 8 special tokens.

        Every branch adds a vector of unit size to embeddings of size sqrt(dim): a token's features say mostly which
        token it is, and somewhat what stands before it.
        """
        sizes: dict[str, Any] = {
            "vocab_size": 264,
            "dim": 64,
            "num_layers": 3,
            "num_heads": 4,
            "num_kv_heads": 2,
            "head_dim": 16,
        }
        sizes |= {
            "hidden_dim": 128,
            "sliding_window": 64,
            "query_scalar": 16.0,
            "embedding_std": 1.0,
            "kernel_std": 0.1,
        }
        return cls(**{**sizes, **changes})

    @classmethod
    def from_transformers(cls, config: dict[str, Any], **changes: Any) -> Gemma2Config:
        """From the `config.json` of a `Gemma2ForCausalLM` folder.

        Its soft cap on attention logits is not taken over, see above: pass `attn_logit_softcap` to have it.

        Raises:
            ValueError: The config asks for something no published Gemma 2 has.
        """
        layers = config.get("num_hidden_layers", cls.num_layers)
        alternating = ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)]
        expected = {"attention_bias": False, "tie_word_embeddings": True, "layer_types": alternating}
        expected |= {"hidden_activation": "gelu_pytorch_tanh"}
        for name, value in expected.items():
            if config.get(name, value) != value:
                raise ValueError(f"a Gemma 2 with {name} = {config[name]!r} is not supported: it must be {value!r}")
        renamed = {"vocab_size": "vocab_size", "dim": "hidden_size", "num_layers": "num_hidden_layers"}
        renamed |= {"num_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads", "head_dim": "head_dim"}
        renamed |= {"hidden_dim": "intermediate_size", "sliding_window": "sliding_window", "rope_base": "rope_theta"}
        renamed |= {"query_scalar": "query_pre_attn_scalar", "final_logit_softcap": "final_logit_softcapping"}
        renamed |= {"norm_eps": "rms_norm_eps"}
        values = {ours: config[theirs] for ours, theirs in renamed.items() if theirs in config}
        if "rope_theta" in (nested := config.get("rope_parameters") or {}):  # where transformers 5 writes it
            values["rope_base"] = nested["rope_theta"]
        return cls(**{**values, **changes})


class Cache(NamedTuple):
    """Keys and values of tokens already seen, every layer's: the token at position p of a row is in its slot p."""

    keys: Float[Array, "layers batch slots kv_heads head_dim"]
    values: Float[Array, "layers batch slots kv_heads head_dim"]


class Attention(nnx.Module):
    """Causal grouped-query self-attention with rotated queries and keys."""

    def __init__(self, config: Gemma2Config, *, rngs: nnx.Rngs) -> None:
        self.config = config
        width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = dense(config, config.dim, width, ("embed", "heads"), rngs=rngs)
        self.k_proj = dense(config, config.dim, kv_width, ("embed", "heads"), rngs=rngs)
        self.v_proj = dense(config, config.dim, kv_width, ("embed", "heads"), rngs=rngs)
        self.o_proj = dense(config, width, config.dim, ("heads", "embed"), rngs=rngs)

    def __call__(self, x: Array, rotary: Rotary, valid: Array | None, segments: Array | None, window: Array) -> Array:
        return self._mix(*self._project(x, rotary), valid=valid, segments=segments, window=window)

    def extend(self, x: Array, rotary: Rotary, positions: Array, window: Array, cache: Cache) -> tuple[Array, Cache]:
        """Writes keys and values into one layer's cache at `positions`, then attends to what is there up to them."""
        q, k, v = self._project(x, rotary)
        put = jax.vmap(lambda slots, new, places: slots.at[places].set(new))
        cache = Cache(put(cache.keys, k, positions), put(cache.values, v, positions))
        return self._mix(q, *cache, positions=positions, window=window), cache

    def _project(self, x: Array, rotary: Rotary) -> tuple[Array, Array, Array]:
        q, k, v = (
            proj(x).reshape(*x.shape[:2], -1, self.config.head_dim) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        return rotate_halves(q, *rotary), rotate_halves(k, *rotary), v

    def _mix(self, q: Array, k: Array, v: Array, **mask: Any) -> Array:
        config = self.config
        scale, cap = config.query_scalar**-0.5, config.attn_logit_softcap
        settings: dict[str, Any] = {"causal": True, "scale": scale, "logit_softcap": cap, "backend": config.attention}
        mixed = attention(q, k, v, **settings, **mask)
        return self.o_proj(mixed.reshape(*mixed.shape[:2], -1)).astype(jnp.float32)


class MLP(nnx.Module):
    """down(gelu(gate x) * up x), GELU in its tanh form."""

    def __init__(self, config: Gemma2Config, *, rngs: nnx.Rngs) -> None:
        self.gate_proj = dense(config, config.dim, config.hidden_dim, ("embed", "mlp"), rngs=rngs)
        self.up_proj = dense(config, config.dim, config.hidden_dim, ("embed", "mlp"), rngs=rngs)
        self.down_proj = dense(config, config.hidden_dim, config.dim, ("mlp", "embed"), rngs=rngs)

    def __call__(self, x: Array) -> Array:
        y = jax.nn.gelu(self.gate_proj(x), approximate=True) * self.up_proj(x)
        return self.down_proj(y).astype(jnp.float32)


class Layer(nnx.Module):
    """x + norm(attention(norm(x))), then x + norm(mlp(norm(x)))."""

    def __init__(self, config: Gemma2Config, *, rngs: nnx.Rngs) -> None:
        self.input_layernorm = OffsetRMSNorm(config.dim, eps=config.norm_eps)
        self.self_attn = Attention(config, rngs=rngs)
        self.post_attention_layernorm = OffsetRMSNorm(config.dim, eps=config.norm_eps)
        self.pre_feedforward_layernorm = OffsetRMSNorm(config.dim, eps=config.norm_eps)
        self.mlp = MLP(config, rngs=rngs)
        self.post_feedforward_layernorm = OffsetRMSNorm(config.dim, eps=config.norm_eps)

    def __call__(self, x: Array, rotary: Rotary, valid: Array | None, segments: Array | None, window: Array) -> Array:
        return self._add(x, self.self_attn(self.input_layernorm(x), rotary, valid, segments, window))

    def extend(self, x: Array, rotary: Rotary, positions: Array, window: Array, cache: Cache) -> tuple[Array, Cache]:
        """The same on tokens that follow those in the layer's cache, see `Attention.extend`."""
        branch, cache = self.self_attn.extend(self.input_layernorm(x), rotary, positions, window, cache)
        return self._add(x, branch), cache

    def _add(self, x: Array, branch: Array) -> Array:
        x = x + self.post_attention_layernorm(branch)
        x = x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        return constrain_tokens(x)


class TokenEmbedding(nnx.Module):
    """Rows of a table times sqrt(dim); the same table reads the logits out."""

    def __init__(self, config: Gemma2Config, *, rngs: nnx.Rngs) -> None:
        self.dtype = config.dtype
        init = nnx.initializers.normal(config.embedding_std)
        table = init(rngs.params(), (config.vocab_size, config.dim), jnp.float32)
        self.embedding = nnx.Param(table, **sharded("vocab", "embed"))

    def __call__(self, tokens: Int[Array, "batch length"]) -> Float[Array, "batch length dim"]:
        rows = jnp.take(self.embedding[...], tokens, axis=0).astype(jnp.float32)
        return rows * rows.shape[-1] ** 0.5

    def logits(self, x: Float[Array, "batch length dim"]) -> Float[Array, "batch length vocab"]:
        """float32 scores of every token."""
        x, table = x.astype(self.dtype), self.embedding[...].astype(self.dtype)
        return jnp.einsum("bld,vd->blv", x, table, preferred_element_type=jnp.float32)


class Gemma2(nnx.Module):
    """Tokens -> features for the diffusion model, or logits of the next token."""

    def __init__(self, config: Gemma2Config, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.embed_tokens = TokenEmbedding(config, rngs=rngs)
        self.layers = stacked(lambda rngs: Layer(config, rngs=rngs), config.num_layers, rngs=rngs)
        self.norm = OffsetRMSNorm(config.dim, eps=config.norm_eps)

    @property
    def dim(self) -> int:
        """Channels of a feature."""
        return self.config.dim

    def __call__(
        self, tokens: Int[Array, "batch length"], mask: Bool[Array, "batch length"]
    ) -> Float[Array, "batch length vocab"]:
        """float32 logits of the token after each; arguments as for `features`."""
        return self.logits(self._run(tokens, mask)[0])

    def features(
        self, tokens: Int[Array, "batch length"], mask: Bool[Array, "batch length"]
    ) -> Float[Array, "batch length dim"]:
        """The input of the last layer, not normalised: `hidden_states[-2]` of transformers. That layer is not computed.

        Args:
            tokens: Right-padded token ids.
            mask: Which tokens are valid; what comes out of the others means nothing.

        Returns:
            float32.
        """
        return self._run(tokens, mask, stop=self.config.num_layers - 1)[0]

    def packed_features(
        self, tokens: Int[Array, "rows length"], segments: Int[Array, "rows length"]
    ) -> Float[Array, "rows length dim"]:
        """The `features` of several texts a row, each as if it stood alone; for `segments` see `nn.segments`."""
        return self._run(tokens, None, segments, stop=self.config.num_layers - 1)[0]

    def last_hidden_state(
        self, tokens: Int[Array, "batch length"], mask: Bool[Array, "batch length"]
    ) -> Float[Array, "batch length dim"]:
        """The output of the last layer, normalised; arguments as for `features`."""
        return self.norm(self._run(tokens, mask)[0])

    def hidden_states(
        self, tokens: Int[Array, "batch length"], mask: Bool[Array, "batch length"]
    ) -> Float[Array, "states batch length dim"]:
        """The scaled embeddings and the output of every layer, not normalised; arguments as for `features`."""
        _, states = self._run(tokens, mask, collect=True)
        assert states is not None
        return jnp.concatenate([self.embed_tokens(tokens)[None], states])

    def empty_cache(self, batch: int, slots: int) -> Cache:
        """Room for `slots` tokens a row."""
        config = self.config
        shape = (config.num_layers, batch, slots, config.num_kv_heads, config.head_dim)
        return Cache(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))

    def extend(
        self, tokens: Int[Array, "batch new"], positions: Int[Array, "batch new"], cache: Cache
    ) -> tuple[Float[Array, "batch new dim"], Cache]:
        """Runs tokens that follow those in the cache.

        A token sees the slots up to its own position and nothing after: what padding left there is never seen, and
        is written over when the row grows.

        Args:
            tokens: The next tokens of each row.
            positions: How many valid tokens stand before each.
            cache: `empty_cache`, or what the last call returned.

        Returns:
            The output of the last layer, not normalised, and the cache with the new tokens.
        """
        tables = axis_table(self.config.head_dim, cache.keys.shape[2], self.config.rope_base)
        cos, sin = (jnp.asarray(table)[positions] for table in tables)
        graphdef, params = nnx.split(self.layers)

        def layer(x: Array, scanned: Any) -> tuple[Array, Cache]:
            params, window, cache = scanned
            return nnx.merge(graphdef, params).extend(x, (cos, sin), positions, window, cache)

        x = constrain_tokens(self.embed_tokens(tokens))
        return jax.lax.scan(layer, x, (params, self._windows(), cache))

    def next_token(self, x: Float[Array, "batch dim"]) -> Int[Array, " batch"]:
        """The most likely token after one whose last layer's output, not normalised, is x."""
        return jnp.argmax(self.logits(x[:, None])[:, 0], axis=-1).astype(jnp.int32)

    def logits(self, x: Float[Array, "batch length dim"]) -> Float[Array, "batch length vocab"]:
        """float32 scores of the next token, from the output of the last layer, not normalised."""
        logits, cap = self.embed_tokens.logits(self.norm(x)), self.config.final_logit_softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def _windows(self) -> Int[Array, " layers"]:
        even = jnp.arange(self.config.num_layers) % 2 == 0
        return jnp.where(even, jnp.int32(self.config.sliding_window), jnp.int32(EVERYTHING))

    def _run(
        self,
        tokens: Array,
        mask: Array | None,
        segments: Array | None = None,
        *,
        stop: int | None = None,
        collect: bool = False,
    ) -> tuple[Array, Array | None]:
        config = self.config
        batch, length = tokens.shape
        tables = axis_table(config.head_dim, length, config.rope_base)
        if segments is None:
            cos, sin = (jnp.broadcast_to(jnp.asarray(table)[None], (batch, *table.shape)) for table in tables)
        else:  # each text begins at position 0
            positions = places(segments)
            cos, sin = (jnp.asarray(table)[positions] for table in tables)
        x = constrain_tokens(self.embed_tokens(tokens))
        args, windows = ((cos, sin), mask, segments), (self._windows(),)
        return scan_layers(self.layers, x, *args, per_layer=windows, stop=stop, dtype=config.dtype, collect=collect)


def greedy(
    model: Gemma2,
    tokens: Int[Array, "batch length"],
    num_tokens: Int[Array, " batch"],
    *,
    max_new_tokens: int,
    eos_id: int,
) -> tuple[Int[Array, "batch max_new_tokens"], Int[Array, " batch"]]:
    """Continues each prompt with the most likely token, again and again, until the end token.

    The prompts run once and leave their keys and values in a cache; then each step runs one token a row, until every
    row has ended. A row's result does not depend on the others.

    Args:
        model: With its output head.
        tokens: Right-padded prompts.
        num_tokens: Valid tokens of each, at least one.
        max_new_tokens: Where a row ends at the latest.
        eos_id: The end token.

    Returns:
        The new tokens, with the end token in every slot from where a row ended; how many stand before it.

    Raises:
        ValueError: `max_new_tokens` is below 1.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}: at least one token must be asked for")
    batch, length = tokens.shape
    cache = model.empty_cache(batch, length + max_new_tokens)
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], tokens.shape)
    x, cache = model.extend(tokens, positions, cache)
    token = model.next_token(x[jnp.arange(batch), num_tokens - 1])
    ids = jnp.full((batch, max_new_tokens), eos_id, jnp.int32).at[:, 0].set(token)

    def unfinished(state: tuple[Array, Array, Array, Array, Cache]) -> Array:
        i, _, ended, _, _ = state
        return (i < max_new_tokens) & ~ended.all()

    def step(state: tuple[Array, Array, Array, Array, Cache]) -> tuple[Array, Array, Array, Array, Cache]:
        i, token, ended, ids, cache = state
        x, cache = model.extend(token[:, None], (num_tokens + i - 1)[:, None], cache)
        token = jnp.where(ended, eos_id, model.next_token(x[:, 0]))
        return i + 1, token, ended | (token == eos_id), ids.at[:, i].set(token), cache

    ids = jax.lax.while_loop(unfinished, step, (jnp.int32(1), token, token == eos_id, ids, cache))[3]
    return ids, jnp.sum(ids != eos_id, axis=1, dtype=jnp.int32)


def dense(
    config: Gemma2Config, in_features: int, out_features: int, axes: tuple[str, str], *, rngs: nnx.Rngs
) -> nnx.Linear:
    """A linear map without bias."""
    init = nnx.initializers.normal(config.kernel_std)
    return linear(in_features, out_features, axes, use_bias=False, dtype=config.dtype, kernel_init=init, rngs=rngs)
