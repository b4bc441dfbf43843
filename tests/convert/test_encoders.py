"""Vision models as transformers saves them, alone and inside whole models: told, converted, exact both ways."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from svg_jax.checkpoint import load_config, open_params
from svg_jax.convert.encoders import table_of, told_by
from svg_jax.convert.kinds import recognise, restored
from svg_jax.convert.rules import carried, release_shapes, to_jax, to_release
from svg_jax.models.encoders import encoder_config, make_encoder
from svg_jax.models.vit_learnt import PUBLISHED, LearntViTConfig
from svg_jax.nn.functional import Network
from svg_jax.nn.patches import patchify
from tests.convert.release import load, run, transformers_folder
from tests.convert.test_roundtrip import check_safetensors
from tests.vectors import Case, assert_close, cases

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = SIZES | {"intermediate_size": 24, "image_size": 12, "patch_size": 4}
DINOV2 = SIZES | {"image_size": 12, "patch_size": 4}
TEXT = SIZES | {"intermediate_size": 32, "vocab_size": 9, "max_position_embeddings": 4, "bos_token_id": 0}
DECODER = {f"decoder_{name}": value for name, value in SIZES.items()} | {"decoder_intermediate_size": 8}

MODELS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    # layout of the names, and the model
    "dinov2": ("transformers", lambda t: t.Dinov2Model(t.Dinov2Config(**DINOV2, qkv_bias=False))),
    "dinov2 with registers": (
        "transformers",
        lambda t: t.Dinov2WithRegistersModel(t.Dinov2WithRegistersConfig(**DINOV2, use_swiglu_ffn=True)),
    ),
    "dinov2 classifies": ("transformers:dinov2.", lambda t: t.Dinov2ForImageClassification(t.Dinov2Config(**DINOV2))),
    "mae": ("transformers", lambda t: t.ViTMAEModel(t.ViTMAEConfig(**VISION, mask_ratio=0.0))),
    "mae pretrains": ("transformers:vit.", lambda t: t.ViTMAEForPreTraining(t.ViTMAEConfig(**VISION, **DECODER))),
    "siglip2 sees": ("transformers", lambda t: t.SiglipVisionModel(t.SiglipVisionConfig(**VISION))),
    "siglip2": (
        "transformers:vision_model.",
        lambda t: t.SiglipModel(t.SiglipConfig(text_config=TEXT | {"eos_token_id": 1}, vision_config=VISION)),
    ),
}


def made(name: str) -> Any:
    """The model, every parameter random."""
    import transformers

    torch.manual_seed(0)
    model = MODELS[name][1](transformers).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def last_hidden_state(model: Any, images: torch.Tensor) -> np.ndarray:
    """Normalised patch features, without what stands before the patches."""
    tower = getattr(model, "vision_model", model)
    order = {"noise": torch.arange(9.0)[None]} if type(tower).__name__ == "ViTMAEModel" else {}
    with torch.no_grad():
        return tower(images, **order).last_hidden_state[:, -9:].numpy()


@pytest.mark.parametrize("name", ["dinov2 with registers", "mae", "siglip2"])
def test_a_folder_gives_the_features_of_its_model_and_comes_back(tmp_path: Path, name: str) -> None:
    model = made(name)
    model.save_pretrained(tmp_path / "hf")
    run("import", tmp_path / "hf", "--to", tmp_path)
    config = encoder_config({**load_config(str(tmp_path / "encoder"))["encoder"], "dtype": "float32"})
    assert config.family == name.split()[0]
    network = Network(lambda rngs: make_encoder(config, rngs=rngs))
    params = load(tmp_path / "encoder", network)
    images = np.random.default_rng(0).standard_normal((1, 12, 12, 3)).astype(np.float32)
    found = jax.jit(lambda params, x, grid: network(params)(x, grid))(
        params, patchify(images, config.patch_size), np.array([[3, 3]], np.int32)
    )
    assert_close(found, last_hidden_state(model, torch.from_numpy(images.transpose(0, 3, 1, 2).copy())), 1e-4)

    run("export", tmp_path / "encoder", "--to", tmp_path / "out")
    check_safetensors(tmp_path / "hf/model.safetensors", tmp_path / "out/model.safetensors")
    before, after = (json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("hf", "out"))
    assert after == before


@pytest.mark.parametrize("name", MODELS)
def test_every_key_has_its_place(tmp_path: Path, name: str) -> None:
    made(name).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    found = recognise(state, state, transformers=json.loads((tmp_path / "config.json").read_text()))
    assert (found.kind, found.layout) == ("encoder", MODELS[name][0])
    assert not any(found.differences(state).values())
    params = to_jax(state, found.table, found.shapes)
    back = to_release(params, found.table) | {key: state[key] for key in carried(state, found.table)}
    assert back.keys() == state.keys()
    for key, value in state.items():
        assert back[key].tobytes() == value.tobytes(), key
    for key in to_release(params, found.table):
        without = {other: value for other, value in state.items() if other != key}
        assert found.differences(without)["missing"] == [key]
    again = restored({"encoder": found.sections["encoder"], "origin": {"layout": found.layout}})
    assert (again.shapes, again.table) == (found.shapes, found.table)


@pytest.mark.golden
@pytest.mark.parametrize("name", [*cases("dinov2_hf"), *cases("siglip2_hf"), *cases("mae_hf")])
def test_golden_folders(tmp_path: Path, name: str) -> None:
    case = Case.load(name)
    family = name.split("_")[0]
    types = {"dinov2": "dinov2", "siglip2": "siglip_vision_model", "mae": "vit_mae"}
    config = case.config["model"] | {"model_type": types[family]}
    transformers_folder(tmp_path / "hf", case.weights(), config)
    run("import", tmp_path / "hf", "--to", tmp_path)
    assert load_config(str(tmp_path / "encoder"))["encoder"]["family"] == family
    run("export", tmp_path / "encoder", "--to", tmp_path / "out")
    check_safetensors(tmp_path / "hf/model.safetensors", tmp_path / "out/model.safetensors")


@pytest.mark.parametrize("name", [name for name in PUBLISHED if not name.startswith("siglip2")])
def test_names_of_timm_tell_the_published_sizes(name: str) -> None:
    config = LearntViTConfig.published(name, norm_eps=1e-6)
    shapes = Network(lambda rngs: make_encoder(config, rngs=rngs)).shapes
    structs = release_shapes(shapes, table_of(config, ""))
    found = recognise({}, structs)
    assert found.networks["encoder"] == config
    assert found.size == name
    assert {"pos_embed", "blocks.0.attn.qkv.weight", "norm.weight"} <= structs.keys()


@pytest.mark.golden
@pytest.mark.parametrize("name", cases("mae_ref"))
def test_a_golden_encoder_with_names_of_timm(name: str) -> None:
    case = Case.load(name)
    weights, sizes = case.weights(), case.config["model"]
    with pytest.raises(ValueError, match=r"this MAE is of no published size, .* --architecture FILE.json"):
        recognise(weights, weights)
    found = recognise(weights, weights, arguments={"num_heads": sizes["num_heads"]})
    config = found.networks["encoder"]
    assert (config.dim, config.num_layers, config.num_heads) == (sizes["embed_dim"], sizes["depth"], sizes["num_heads"])
    assert config.grid == (sizes["img_size"] // sizes["patch_size"],) * 2
    back = to_release(to_jax(weights, found.table, found.shapes), found.table)
    assert {key: value.tobytes() for key, value in back.items()} == {k: v.tobytes() for k, v in weights.items()}


def test_what_is_no_encoder_of_these(tmp_path: Path) -> None:
    assert told_by({"embeddings.position_embeddings": 1}) is None
    made("siglip2 sees").save_pretrained(tmp_path)
    flat = load_file(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"a SigLIP of transformers needs its config.json: name the folder with both"):
        recognise(flat, flat)
    naflex = flat | {"embeddings.patch_embedding.weight": np.ones((16, 48), np.float32)}
    with pytest.raises(ValueError, match=r"takes images of any shape \(NaFlex\): not supported"):
        recognise(naflex, naflex, transformers=VISION)
    deeper = recognise(flat, flat, transformers=VISION | {"num_hidden_layers": 3})
    assert len(deeper.differences(flat)["missing"]) == 16


def test_a_text_tower_travels_along(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made("siglip2").save_pretrained(tmp_path / "hf")
    run("import", tmp_path / "hf", "--to", tmp_path)
    said = capsys.readouterr().out
    assert "vision model (SigLIP), no published size (2 layers)" in said
    assert "(the text tower)" in said
    assert "(the pooling head, whose one vector no decoder reads)" in said
    saved = open_params(str(tmp_path / "encoder"))
    assert not any(name.startswith(("text_model", "head")) for name in saved["frozen"])
    assert {"logit_scale", "logit_bias"} <= set(saved["carried"])
