"""The tables of the released networks: exact both ways, and complete."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from flax import nnx

from svg_jax.convert.rules import Table, release_shapes, to_jax, to_release
from svg_jax.convert.tables import DECODER, DINOV3, GEMMA2, NEXT_DIT, dinov3_transformers
from svg_jax.models.decoder import Decoder, DecoderConfig
from svg_jax.models.gemma2 import Gemma2, Gemma2Config
from svg_jax.models.next_dit import NextDiT, NextDiTConfig
from svg_jax.models.vit import ViT, ViTConfig
from svg_jax.nn.functional import Network
from tests.vectors import Case, cases

NAMES = [*cases("dit"), *cases("dinov3_"), "decoder", *cases("gemma2")]


def network_of(name: str, model: dict[str, Any]) -> tuple[Network[nnx.Module], Table]:
    if name.startswith("dit"):
        config = NextDiTConfig.from_release(model)
        return Network(lambda rngs: NextDiT(config, rngs=rngs)), NEXT_DIT
    if name.startswith("decoder"):
        decoder = DecoderConfig.from_release(model)
        return Network(lambda rngs: Decoder(decoder, rngs=rngs)), DECODER
    if name.startswith("gemma2"):
        gemma = Gemma2Config.from_transformers(model)
        return Network(lambda rngs: Gemma2(gemma, rngs=rngs)), GEMMA2
    if "hidden_size" in model:
        vit = ViTConfig.from_transformers(model)
        return Network(lambda rngs: ViT(vit, rngs=rngs)), dinov3_transformers(gated=vit.gated, rope_base=vit.rope_base)
    vit = ViTConfig.from_release(model)
    return Network(lambda rngs: ViT(vit, rngs=rngs)), DINOV3


@pytest.mark.golden
@pytest.mark.parametrize("with_shapes", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_there_and_back_bit_for_bit(name: str, with_shapes: bool) -> None:
    case = Case.load(name)
    network, table = network_of(name, case.config["model"])
    weights = case.weights()
    params = to_jax(weights, table, network.shapes if with_shapes else None)
    if with_shapes:
        network(params)  # the names and shapes are the network's
    back = to_release(params, table)
    assert back.keys() == weights.keys()
    for key, value in weights.items():
        assert (back[key].shape, back[key].dtype) == (value.shape, value.dtype), key
        assert back[key].tobytes() == value.tobytes(), key


@pytest.mark.golden
@pytest.mark.parametrize("name", NAMES)
def test_every_missing_key_is_noticed(name: str) -> None:
    case = Case.load(name)
    network, table = network_of(name, case.config["model"])
    weights = case.weights()
    for key in weights:
        with pytest.raises(ValueError, match="do not fit") as error:
            to_jax({other: value for other, value in weights.items() if other != key}, table, network.shapes)
        assert str(error.value).endswith(f"1 missing: {key}")


@pytest.mark.golden
@pytest.mark.parametrize("name", NAMES)
def test_other_shapes_and_unknown_keys_are_noticed(name: str) -> None:
    case = Case.load(name)
    network, table = network_of(name, case.config["model"])
    weights = case.weights()
    key = next(key for key, s in release_shapes(network.shapes, table).items() if len(s.shape) > 1)
    with pytest.raises(ValueError, match="1 of another shape"):
        to_jax(weights | {key: weights[key][..., :-1]}, table, network.shapes)
    with pytest.raises(ValueError, match=r"1 unexpected: layers\.999\.weight"):
        to_jax(weights | {"layers.999.weight": np.zeros((1, 1), np.float32)}, table, network.shapes)


@pytest.mark.golden
@pytest.mark.parametrize("name", [name for name in cases("dinov3_vit") if "vit7b" not in name])
def test_torch_hub_weights_become_transformers_weights(name: str) -> None:
    """All that acts survives; the bias of the keys, which a mask takes off, does not."""
    case = Case.load(name)
    network, _ = network_of(name, case.config["model"])
    config = ViTConfig.from_release(case.config["model"])
    table = dinov3_transformers(gated=config.gated, rope_base=config.rope_base)
    params = to_jax(case.weights(), DINOV3, network.shapes)
    exported = to_release(params, table)
    assert not any(key.endswith(("k_proj.bias", "bias_mask", "periods")) for key in exported)
    again = to_jax(exported, table, network.shapes)
    masked = {"blocks.attn.qkv.bias": params["blocks.attn.qkv.bias"] * params["blocks.attn.qkv.bias_mask"]}
    for key, value in (params | masked).items():
        np.testing.assert_allclose(again[key], value, rtol=1e-6 if key == "rope_embed.periods" else 0)


def test_what_transformers_cannot_hold_is_not_exported() -> None:
    config = ViTConfig(dim=16, num_layers=1, num_heads=2, hidden_dim=24, gated=True, qkv_bias=False, local_norm=True)
    shapes = Network(lambda rngs: ViT(config, rngs=rngs)).shapes
    params = {name: np.zeros(shape.shape, np.float32) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match="no conversion rule leads to the parameter 'local_cls_norm"):
        to_release(params, dinov3_transformers(gated=True))


@pytest.mark.parametrize(
    ("network", "table", "names"),
    [
        (
            Network(lambda rngs: NextDiT(NextDiTConfig.next_dit_2p6b(), rngs=rngs)),
            NEXT_DIT,
            {"layers.25.attention.qkv.weight": (3840, 2304), "context_refiner.1.ffn_norm2.weight": (2304,)},
        ),
        (
            Network(lambda rngs: ViT(ViTConfig.vits16plus(), rngs=rngs)),
            DINOV3,
            {"patch_embed.proj.weight": (384, 3, 16, 16), "blocks.11.attn.qkv.bias_mask": (1152,)},
        ),
        (
            Network(lambda rngs: Gemma2(Gemma2Config.gemma2_2b(), rngs=rngs)),
            GEMMA2,
            {"model.embed_tokens.weight": (256000, 2304), "model.layers.25.self_attn.k_proj.weight": (1024, 2304)},
        ),
    ],
    ids=["next_dit", "vit", "gemma2"],
)
def test_released_sizes(network: Network[nnx.Module], table: Table, names: dict[str, tuple[int, ...]]) -> None:
    shapes = release_shapes(network.shapes, table)
    assert {name: shapes[name].shape for name in names} == names
    assert sum(np.prod(s.shape) for s in shapes.values()) == sum(np.prod(s.shape) for s in network.shapes.values())


def test_a_tied_head_is_dropped() -> None:
    config = Gemma2Config.tiny()
    network = Network(lambda rngs: Gemma2(config, rngs=rngs))
    state = {key: np.zeros(s.shape, np.float32) for key, s in release_shapes(network.shapes, GEMMA2).items()}
    params = to_jax(state | {"lm_head.weight": np.zeros((config.vocab_size, config.dim))}, GEMMA2, network.shapes)
    assert params.keys() == network.shapes.keys()
