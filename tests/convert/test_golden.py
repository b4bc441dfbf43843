"""Golden weights in their release format, through the command line, reproduce the golden outputs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from svg_jax.checkpoint import load_config
from svg_jax.config import from_config
from svg_jax.convert.kinds import restored
from svg_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from svg_jax.models.decoder import DecoderConfig
from svg_jax.models.gemma2 import Gemma2, Gemma2Config
from svg_jax.models.next_dit import NextDiT, NextDiTConfig
from svg_jax.models.vit import ViT, ViTConfig
from svg_jax.nn.functional import Network
from svg_jax.nn.patches import patchify, unpatchify
from tests.convert.release import assert_same, load, run, state_dict, tensors, transformers_folder
from tests.vectors import Case, assert_close, cases

DITS = [name for name in cases("dit") if (Case.load(name).config.get("model") or {}).get("dim")]
DINOS = {name: Case.load(name).config["model"] for name in cases("dinov3_")}
HUB = [name for name, model in DINOS.items() if "embed_dim" in model]
TRANSFORMERS = [name for name, model in DINOS.items() if "hidden_size" in model]


def section(workdir: Path, *keys: str) -> Any:
    config: Any = load_config(str(workdir))
    for key in keys:
        config = config[key]
    return {**config, "dtype": "float32"}


@pytest.mark.golden
@pytest.mark.parametrize("name", DITS)
def test_diffusion_transformer(tmp_path: Path, name: str) -> None:
    case = Case.load(name)
    torch.save(tensors(case.weights()), tmp_path / "any.name")
    (tmp_path / "architecture.json").write_text(json.dumps(case.config["model"]))
    run("import", tmp_path / "any.name", "--to", tmp_path / "in", "--architecture", tmp_path / "architecture.json")

    config = dataclasses.replace(from_config(NextDiTConfig, section(tmp_path / "in/dit", "model")), remat="none")
    network = Network(lambda rngs: NextDiT(config, rngs=rngs))
    x = case.inputs["tensor.x"].transpose(0, 2, 3, 1)
    grid = (x.shape[1] // config.patch_size, x.shape[2] // config.patch_size)
    y = jax.jit(lambda params, *args, **kwargs: network(params)(*args, **kwargs))(
        load(tmp_path / "in/dit", network),
        patchify(x, config.patch_size),
        case.inputs["tensor.t"],
        case.inputs["tensor.cap_feats"],
        grid=np.array([grid] * len(x), np.int32),
        text_mask=case.inputs["tensor.cap_mask"].astype(bool),
    )
    y = unpatchify(y, grid, config.patch_size).transpose(0, 3, 1, 2)
    assert_close(y, case.outputs["tensor.y"], 1e-4)

    run("export", tmp_path / "in/dit", "--to", tmp_path / "out.pth")
    assert_same(tmp_path / "out.pth", case.weights())


def check_vit(case: Case, vit: Any) -> None:
    images = {key: value for key, value in case.inputs.items() if key.startswith("image_")}
    assert images
    for key, image in images.items():
        out = vit(image.transpose(0, 2, 3, 1))
        size = key.removeprefix("image_")
        if f"{size}.x_norm_patchtokens" in case.outputs:
            assert_close(out.patch_tokens, case.outputs[f"{size}.x_norm_patchtokens"], 1e-4, size)
            assert_close(out.class_token, case.outputs[f"{size}.x_norm_clstoken"], 1e-4, size)
        else:
            front = 1 + out.storage_tokens.shape[1]
            assert_close(out.patch_tokens, case.outputs[f"{size}.last_hidden_state"][:, front:], 1e-4, size)


@pytest.mark.golden
@pytest.mark.parametrize("container", ["torch", "safetensors"])
@pytest.mark.parametrize("name", HUB)
def test_vision_model_of_torch_hub(tmp_path: Path, name: str, container: str) -> None:
    """Its sizes are told by its weights alone."""
    case, file = Case.load(name), tmp_path / "weights.pth"
    if container == "torch":
        torch.save(tensors(case.weights()), file)
    else:
        save_file(case.weights(), file)
    run("import", file, "--to", tmp_path)
    config = from_config(ViTConfig, section(tmp_path / "encoder", "encoder"))
    expected = ViTConfig.from_release(case.config["model"])
    assert dataclasses.replace(config, layer_scale=expected.layer_scale) == expected
    network = Network(lambda rngs: ViT(config, rngs=rngs))
    params = load(tmp_path / "encoder", network)
    check_vit(case, lambda images: jax.jit(lambda params: network(params).images(jnp.asarray(images)))(params))


@pytest.mark.golden
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_vision_model_of_transformers(tmp_path: Path, name: str) -> None:
    case = Case.load(name)
    transformers_folder(tmp_path / "hf", case.weights(), case.config["model"])
    run("import", tmp_path / "hf", "--to", tmp_path)
    config = from_config(ViTConfig, section(tmp_path / "encoder", "encoder"))
    network = Network(lambda rngs: ViT(config, rngs=rngs))
    params = load(tmp_path / "encoder", network)
    check_vit(case, lambda images: jax.jit(lambda params: network(params).images(jnp.asarray(images)))(params))


@pytest.mark.golden
@pytest.mark.parametrize("name", cases("gemma2"))
def test_text_encoder(tmp_path: Path, name: str) -> None:
    case = Case.load(name)
    transformers_folder(tmp_path / "hf", case.weights(), case.config["model"], shards=3, tokenizer=True)
    run("import", tmp_path / "hf", "--to", tmp_path)
    config = from_config(Gemma2Config, section(tmp_path / "text_encoder", "text", "encoder"))
    network = Network(lambda rngs: Gemma2(config, rngs=rngs))
    params = load(tmp_path / "text_encoder", network)
    mask = case.inputs["attention_mask"].astype(bool)
    tokens = case.inputs["input_ids"].astype(np.int32)
    features = jax.jit(lambda params: network(params).features(tokens, mask))(params)
    assert_close(features[mask], case.outputs["nosoftcap.hidden_states_minus2"][mask], 1e-4)


def lightning(path: Path, state: dict[str, np.ndarray]) -> None:
    """With a training run's own state beside the weights."""
    state = {**state, "loss.logvar": np.float32(0.5), "loss.discriminator.main.0.bias": np.ones(3, np.float32)}
    optimizer = {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
    content = {"epoch": 1, "global_step": 2, "state_dict": tensors(state), "optimizer_states": [optimizer]}
    torch.save(content, path)


def imported_autoencoder(folder: Path) -> tuple[Network[Autoencoder], Any]:
    sections = load_config(str(folder))["autoencoder"]
    encoder, decoder = ({**sections[name], "dtype": "float32"} for name in ("encoder", "decoder"))
    config = AutoencoderConfig(from_config(ViTConfig, encoder), from_config(DecoderConfig, decoder))
    network = Network(lambda rngs: Autoencoder(config, rngs=rngs))
    return network, load(folder, network)


@pytest.mark.golden
def test_autoencoder_with_the_golden_decoder(tmp_path: Path) -> None:
    case = Case.load("decoder")
    decoder = DecoderConfig.from_release(case.config["model"])
    vit = ViTConfig(dim=decoder.z_channels, num_layers=1, num_heads=1, hidden_dim=8, patch_size=decoder.factor)
    model = restored({"autoencoder": {"encoder": vars(vit), "decoder": vars(decoder)}})
    state = state_dict(model) | {f"decoder.{name}": value for name, value in case.weights().items()}
    lightning(tmp_path / "a.ckpt", state)
    run("import", tmp_path / "a.ckpt", "--to", tmp_path)
    network, params = imported_autoencoder(tmp_path / "autoencoder")
    for height, width in case.config["sizes"]:
        z = case.inputs[f"z_{height}x{width}"].transpose(0, 2, 3, 1)
        tokens = z.reshape(len(z), -1, z.shape[-1])
        y = jax.jit(lambda params, z, grid=(height, width): network(params).decode(z, grid))(params, tokens)
        assert_close(y.transpose(0, 3, 1, 2), case.outputs[f"{height}x{width}.y"], 1e-4)


@pytest.mark.golden
@pytest.mark.parametrize("name", HUB)
def test_autoencoder_with_a_golden_encoder(tmp_path: Path, name: str) -> None:
    case = Case.load(name)
    vit = ViTConfig.from_release(case.config["model"])
    levels = int(np.log2(vit.patch_size)) + 1
    decoder = DecoderConfig(z_channels=vit.dim, channels=32, channel_multipliers=(1,) * levels, num_res_blocks=0)
    model = restored({"autoencoder": {"encoder": vars(vit), "decoder": vars(decoder)}})
    state = state_dict(model) | {f"encoder.{name}": value for name, value in case.weights().items()}
    lightning(tmp_path / "a.ckpt", state)
    run("import", tmp_path / "a.ckpt", "--to", tmp_path)
    network, params = imported_autoencoder(tmp_path / "autoencoder")
    check_vit(case, lambda images: jax.jit(lambda params: network(params).encoder.images(jnp.asarray(images)))(params))
