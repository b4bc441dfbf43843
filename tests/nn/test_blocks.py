"""What blocks may be made of; their numbers are tested with the models they stand in."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from svg_jax.nn.blocks import Block, BlockConfig, PatchEmbed
from svg_jax.nn.functional import Network
from tests.vectors import assert_close

TINY = BlockConfig(dim=8, num_heads=2, hidden_dim=6)
TOKENS = jax.random.normal(jax.random.key(1), (2, 5, TINY.dim))


def network(**changes: object) -> Network[Block]:
    config = dataclasses.replace(TINY, **changes)  # type: ignore[arg-type]
    return Network(lambda rngs: Block(config, rngs=rngs))


def test_names_of_parameters_follow_the_settings() -> None:
    norms = {f"norm{i}.{name}" for i in (1, 2) for name in ("scale", "bias")}
    proj = {"attn.proj.kernel", "attn.proj.bias"}

    def maps(prefix: str, *names: str) -> set[str]:
        return {f"{prefix}.{name}.{part}" for name in names for part in ("kernel", "bias")}

    qkv, plain = maps("attn", "qkv"), maps("mlp", "fc1", "fc2")
    assert network().shapes.keys() == norms | proj | qkv | plain
    assert network(layer_scale=0.1).shapes.keys() == norms | proj | qkv | plain | {"ls1.gamma", "ls2.gamma"}
    assert network(gated=True).shapes.keys() == norms | proj | qkv | maps("mlp", "w1", "w2", "w3")
    assert network(gated=True, fused_gate=True).shapes.keys() == norms | proj | qkv | maps("mlp", "w12", "w3")
    assert network(mask_key_bias=True).shapes.keys() == norms | proj | qkv | plain | {"attn.qkv.bias_mask"}
    assert network(qkv_bias=False).shapes.keys() == norms | proj | {"attn.qkv.kernel"} | plain


def test_a_fused_gate_is_the_same_function() -> None:
    apart, fused = network(gated=True), network(gated=True, fused_gate=True)
    params = apart.init(jax.random.key(0))
    joined = {name: value for name, value in params.items() if ".w1." not in name and ".w2." not in name}
    joined |= {
        f"mlp.w12.{part}": jnp.concatenate([params[f"mlp.w1.{part}"], params[f"mlp.w2.{part}"]], axis=-1)
        for part in ("kernel", "bias")
    }
    assert_close(fused(joined)(TOKENS, None, None), apart(params)(TOKENS, None, None), 1e-6)


def test_tokens_that_do_not_exist_change_nothing() -> None:
    made = network()
    params = made.init(jax.random.key(0))
    valid = jnp.array([[True] * 5, [True] * 3 + [False] * 2])
    other = jnp.where(valid[..., None], TOKENS, 1e3)
    expected, found = (made(params)(x, None, valid)[1, :3] for x in (TOKENS, other))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("layout", ["halves", "interleaved"])
def test_angles_of_all_heads_or_of_each(layout: str) -> None:
    made = network(rotary=layout)
    params = made.init(jax.random.key(0))
    params |= {"attn.qkv.kernel": 20.0 * params["attn.qkv.kernel"]}  # so that it matters where attention looks
    angles = jax.random.normal(jax.random.key(2), (2, 5, 2))
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    per_head = tuple(jnp.broadcast_to(value[:, :, None], (2, 5, 2, 2)) for value in (cos, sin))
    shared = made(params)(TOKENS, (cos, sin), None)
    np.testing.assert_array_equal(made(params)(TOKENS, per_head, None), shared)
    of_one_head = tuple(value.at[:, :, 1].set(still) for value, still in zip(per_head, (1.0, 0.0), strict=True))
    assert np.abs(made(params)(TOKENS, of_one_head, None) - shared).max() > 1e-3
    with pytest.raises(ValueError, match=r"needs the \(cos, sin\)"):
        made(params)(TOKENS, None, None)


def test_patches_under_the_mask_count_as_zeros() -> None:
    made = Network(lambda rngs: PatchEmbed(2, 8, "float32", rngs=rngs))
    params = made.init(jax.random.key(0)) | {"proj.bias": jnp.arange(8.0)}
    patches = jnp.stack([jnp.ones(12), jnp.full(12, jnp.nan)])[None]
    found = made(params)(patches, jnp.array([[True, False]]))
    assert_close(found[0, 1], np.arange(8.0), 0.0)
    assert_close(found[:, :1], made(params)(patches[:, :1]), 1e-6)
    with pytest.raises(ValueError, match="has 11 numbers, but patch_size 2 needs 12"):
        made(params)(patches[..., :11])


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"num_heads": 3}, "8 channels .* among 3 heads"),
        ({"activation": "relu"}, "'relu': choose gelu or gelu_tanh"),
        ({"rotary": "thirds"}, "'thirds': choose halves or interleaved"),
    ],
)
def test_bad_settings_are_refused(changes: dict, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        dataclasses.replace(TINY, **changes)
