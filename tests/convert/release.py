"""Files as the PyTorch release writes them, and the command line on them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from safetensors.numpy import save_file

from svg_jax.checkpoint import load_params
from svg_jax.convert.__main__ import main
from svg_jax.convert.kinds import restored
from svg_jax.convert.model import Model
from svg_jax.convert.rules import release_shapes
from svg_jax.models.decoder import DecoderConfig
from svg_jax.models.gemma2 import Gemma2Config
from svg_jax.models.next_dit import NextDiTConfig
from svg_jax.models.vit import ViTConfig
from svg_jax.nn.blocks import qkv_bias_mask
from svg_jax.nn.functional import Network, Params
from svg_jax.parallel import make_mesh, param_shardings

Arrays = Mapping[str, np.ndarray]

DIT = NextDiTConfig(
    in_channels=16, text_dim=24, dim=48, num_layers=3, num_refiner_layers=1, num_heads=4, num_kv_heads=2,
    axes_dims=(4, 4, 4), axes_lens=(32, 16, 16), multiple_of=32,
)  # fmt: skip
VIT = ViTConfig(dim=16, num_layers=2, num_heads=2, hidden_dim=32, gated=True, patch_size=4)
DECODER = DecoderConfig(z_channels=16, channels=32, channel_multipliers=(2, 1, 1), num_res_blocks=0)
GEMMA = Gemma2Config.tiny(dim=32, num_layers=2, hidden_dim=64)
SECTIONS: dict[str, dict[str, Any]] = {
    "dit": {"model": vars(DIT)},
    "encoder": {"encoder": vars(VIT)},
    "autoencoder": {"autoencoder": {"encoder": vars(VIT), "decoder": vars(DECODER)}},
    "text_encoder": {"text": {"encoder": vars(GEMMA)}, "origin": {"layout": "model."}},
    "transformers": {"encoder": vars(VIT), "origin": {"layout": "transformers"}},
}
CARRIED = {"loss.discriminator.main.0.weight": (4, 3, 4, 4), "loss.logvar": (), "extra_vit.heads.0.weight": (8, 16)}
WIDTHS = (16, 17, 18, 19, 20)  # of a small VGG16, whose layers are as many as the real one's; narrower ones round badly
VGG16_LAYERS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))


def discriminator(channels: int = 4, layers: int = 3, seed: int = 3) -> dict[str, np.ndarray]:
    """A patch discriminator by the names it has in the release: convolutions, and batch norms between them."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return 0.1 * rng.standard_normal(shape).astype(np.float32)

    widths = [3, *(channels * min(2**i, 8) for i in range(layers + 1))]
    state = {"main.0.weight": normal(channels, 3, 4, 4), "main.0.bias": normal(channels)}
    for i, (width, wider) in enumerate(itertools.pairwise(widths[1:])):
        state[f"main.{3 * i + 2}.weight"] = normal(wider, width, 4, 4)
        norm = f"main.{3 * i + 3}"
        state |= {f"{norm}.weight": normal(wider), f"{norm}.bias": normal(wider), f"{norm}.running_mean": normal(wider)}
        state |= {f"{norm}.running_var": 1 + normal(wider) ** 2, f"{norm}.num_batches_tracked": np.array(7 + i)}
    last = f"main.{3 * layers + 2}"
    return state | {f"{last}.weight": normal(1, widths[-1], 4, 4), f"{last}.bias": normal(1)}


def lpips(slices: bool, heads: bool = True, net: bool = True, seed: int = 4) -> dict[str, np.ndarray]:
    """LPIPS by the names it has in the release, or in the two public files."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return 0.1 * rng.standard_normal(shape).astype(np.float32)

    state, width = {}, 3
    for i, (layers, wider) in enumerate(zip(VGG16_LAYERS, WIDTHS, strict=True)):
        for layer in layers:
            name = f"net.slice{i + 1}.{layer}" if slices else f"features.{layer}"
            state |= {f"{name}.weight": normal(wider, width, 3, 3), f"{name}.bias": normal(wider)}
            width = wider
    state = state if net else {}
    if slices:
        state |= {f"scaling_layer.{name}": normal(1, 3, 1, 1) for name in ("shift", "scale")}
    if heads:
        state |= {f"lin{i}.model.1.weight": abs(normal(1, wider, 1, 1)) for i, wider in enumerate(WIDTHS)}
    return state


def of_loss(layers: int = 3) -> dict[str, np.ndarray]:
    """What adversarial training leaves in an autoencoder's checkpoint; `layers` of the discriminator."""
    parts = {"loss.discriminator.": discriminator(layers=layers), "loss.perceptual_loss.": lpips(slices=True)}
    state = {prefix + name: value for prefix, part in parts.items() for name, value in part.items()}
    return state | {"loss.logvar": np.float32(0.25)}


def run(*arguments: object) -> None:
    """The command line, in this process."""
    main([str(argument) for argument in arguments])


def tiny(kind: str) -> Model:
    """A small network of that kind."""
    return restored({"kind": kind, **SECTIONS[kind]})


def state_dict(model: Model, dtype: Any = np.float32, seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights under the release's names; those that other code relies on are what they must be."""
    rng = np.random.default_rng(seed)
    state = {}
    for name, struct in release_shapes(model.shapes, model.table).items():
        value = rng.standard_normal(struct.shape).astype(np.float32)
        if name.endswith("bias_mask"):
            value = np.array(qkv_bias_mask(struct.shape))
        if name.endswith("periods"):
            value = (100.0 ** (np.arange(*struct.shape) / struct.shape[0])).astype(np.float32)
        state[name] = value.astype(dtype)
    return state


def tensors(state: Arrays) -> dict[str, torch.Tensor]:
    """As PyTorch holds them."""
    found = {}
    for name, array in state.items():
        bits = np.array(array).view(np.int16) if array.dtype.name == "bfloat16" else np.array(array)
        tensor = torch.from_numpy(bits)
        found[name] = tensor.view(torch.bfloat16) if array.dtype.name == "bfloat16" else tensor
    return found


def assert_same(path: Path, expected: Arrays, wrapper: str | None = None) -> None:
    """A file of PyTorch's holds these tensors, bit for bit, and no others."""
    content = torch.load(path, weights_only=True)
    found = content if wrapper is None else content[wrapper]
    wanted = tensors(expected)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(bits(found[name]), bits(tensor)), name


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bytes, NaN equal to itself."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def transformers_folder(
    folder: Path, state: Arrays, config: Mapping[str, Any], *, shards: int = 1, tokenizer: bool = False
) -> None:
    """As `save_pretrained` leaves one."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(dict(config), indent=2))
    names = list(state)
    pieces = [names[i::shards] for i in range(shards)]
    files = (
        ["model.safetensors"]
        if shards == 1
        else [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    )
    for file, piece in zip(files, pieces, strict=True):
        save_file({name: state[name] for name in piece}, folder / file, metadata={"format": "pt"})
    if shards > 1:
        weight_map = {name: file for file, piece in zip(files, pieces, strict=True) for name in piece}
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if tokenizer:
        (folder / "tokenizer.json").write_text("{}")
        (folder / "tokenizer_config.json").write_text('{"padding_side": "left"}')
        (folder / "generation_config.json").write_text('{"eos_token_id": 1}')


def gemma_config(config: Gemma2Config) -> dict[str, Any]:
    """`config.json` of a Gemma 2."""
    return {
        "model_type": "gemma2", "vocab_size": config.vocab_size, "hidden_size": config.dim,
        "num_hidden_layers": config.num_layers, "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads, "head_dim": config.head_dim,
        "intermediate_size": config.hidden_dim, "torch_dtype": "bfloat16",
    }  # fmt: skip


def vit_config(config: ViTConfig) -> dict[str, Any]:
    """`config.json` of a DINOv3 of transformers."""
    return {
        "model_type": "dinov3_vit", "hidden_size": config.dim, "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads, "intermediate_size": config.hidden_dim,
        "use_gated_mlp": config.gated, "hidden_act": "silu" if config.gated else "gelu",
        "patch_size": config.patch_size, "num_register_tokens": config.num_storage_tokens,
    }  # fmt: skip


def load(workdir: Path, network: Network[Any]) -> Params:
    """Parameters from an imported workdir, split over the eight devices; those of losses, which may lie there, not."""
    mesh = make_mesh({"fsdp": 4, "tensor": 2}, jax.devices()[:8])
    at = param_shardings(network.shapes, network.axes, mesh)
    return load_params(str(workdir), network.shapes, at, select=lambda name: not name.startswith("loss."))
