"""Imported and exported again: the same keys, the same dtypes, every tensor bit for bit, whatever kind and wrapper."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from configs import base, tiny_autoencoder
from svg_jax.checkpoint import Checkpoints, load_config, open_params
from svg_jax.convert.formats import open_file
from svg_jax.convert.imports import latent_statistics
from svg_jax.state import TrainState, adamw
from tests.convert import release
from tests.convert.release import (
    assert_same,
    gemma_config,
    run,
    state_dict,
    tensors,
    tiny,
    transformers_folder,
    vit_config,
)

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@pytest.fixture
def data() -> Path:
    """The real released files; they are not part of the repository."""
    folder = Path(os.environ.get("SVG_DATA_DIR") or Path(__file__).parents[2].parent / "shared" / "data")
    if not (folder / "dinov3_sp_stats.pt").exists():
        pytest.skip(f"no released files in {folder} (SVG_DATA_DIR)")
    return folder


def carried() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    found = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in release.CARRIED.items()}
    return found | {"loss.discriminator.main.3.num_batches_tracked": np.array(7)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wrapper", [None, "model", "weights"])
def test_diffusion_transformer(tmp_path: Path, dtype: str, wrapper: str | None) -> None:
    state = state_dict(tiny("dit"), DTYPES[dtype])
    state["final_layer.linear.bias"][0] = np.nan
    content: Any = tensors(state) if wrapper is None else {wrapper: tensors(state), "step": 3}
    torch.save(content, tmp_path / "in.pth")
    run("import", tmp_path / "in.pth", "--to", tmp_path)
    run("export", tmp_path / "dit", "--to", tmp_path / "out.pth")
    assert_same(tmp_path / "out.pth", state, wrapper)
    assert load_config(str(tmp_path / "dit"))["data"]["resolution"] == 1024


def test_dtypes_mixed_in_one_file(tmp_path: Path) -> None:
    """Norms in float32 and the rest in bfloat16, as mixed precision leaves them; every layer the same."""
    state = state_dict(tiny("dit"))
    state = {name: a if "norm" in name else a.astype(ml_dtypes.bfloat16) for name, a in state.items()}
    torch.save(tensors(state), tmp_path / "in.pth")
    run("import", tmp_path / "in.pth", "--to", tmp_path)
    run("export", tmp_path / "dit", "--to", tmp_path / "out.pth")
    assert_same(tmp_path / "out.pth", state)
    run("export", tmp_path / "dit", "--to", tmp_path / "half.pth", "--dtype", "bfloat16")
    assert_same(tmp_path / "half.pth", {name: a.astype(ml_dtypes.bfloat16) for name, a in state.items()})


def test_checkpoint_folder_of_the_release(tmp_path: Path) -> None:
    raw, ema = (state_dict(tiny("dit"), seed=seed) for seed in (1, 2))
    folder = tmp_path / "0001000"
    folder.mkdir()
    torch.save(tensors(raw), folder / "consolidated.00-of-01.pth")
    torch.save(tensors(ema), folder / "consolidated_ema.00-of-01.pth")
    torch.save({"state": {}}, folder / "optimizer.00000-of-00001.pth")
    args = argparse.Namespace(model="NextDiT_2B_GQA_patch1_Adaln_Refiner", qk_norm=True, lr=2e-4, resume=None)
    torch.save(args, folder / "model_args.pth")
    run("import", folder, "--to", tmp_path)
    saved = open_params(str(tmp_path / "dit"))
    assert saved.keys() == {"params", "ema"}
    run("export", tmp_path / "dit", "--to", tmp_path / "out")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "consolidated.00-of-01.pth", "consolidated_ema.00-of-01.pth", "model_args.pth",
    ]  # fmt: skip
    assert_same(tmp_path / "out/consolidated.00-of-01.pth", raw)
    assert_same(tmp_path / "out/consolidated_ema.00-of-01.pth", ema)
    assert torch.load(tmp_path / "out/model_args.pth", weights_only=False) == args
    run("export", tmp_path / "dit", "--to", tmp_path / "raw.pth", "--part", "params")
    assert_same(tmp_path / "raw.pth", raw)


def test_a_folder_with_one_of_the_two_comes_back_as_it_was(tmp_path: Path) -> None:
    state = state_dict(tiny("dit"))
    (tmp_path / "before").mkdir()
    torch.save(tensors(state), tmp_path / "before/consolidated.00-of-01.pth")
    run("import", tmp_path / "before", "--to", tmp_path)
    run("export", tmp_path / "dit", "--to", tmp_path / "after")
    assert_same(tmp_path / "after/consolidated.00-of-01.pth", state)
    assert not (tmp_path / "after/consolidated_ema.00-of-01.pth").exists()


def test_autoencoder_with_all_that_training_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = state_dict(tiny("autoencoder")) | carried()
    state["norm_vit.weight"] = np.ones(24, np.float32)
    content = {"state_dict": tensors(state), "epoch": 3, "optimizer_states": [{"state": {}}], "lr_schedulers": []}
    torch.save(content, tmp_path / "in.ckpt")
    run("import", tmp_path / "in.ckpt", "--to", tmp_path)
    said = capsys.readouterr().out
    assert "dropped: epoch, optimizer_states, lr_schedulers (a training run's own state" in said
    assert "its discriminator is of another kind than those here, and only carried along" in said
    assert "carried for export: loss.discriminator.main.0.weight and 1 more (of a loss that is not used here)" in said
    assert "carried for export: extra_vit.heads.0.weight (of a residual branch, whose channels the decoder" in said
    saved = open_params(str(tmp_path / "autoencoder"))
    ours = ("encoder.", "decoder.", "loss.logvar")
    assert set(saved["carried"]) == {name for name in state if not name.startswith(ours)}
    assert all(name.startswith(ours[1:]) for name in saved["ema"])
    assert {"latents.mean", "latents.std", "encoder.cls_token"} <= set(saved["frozen"])
    run("export", tmp_path / "autoencoder", "--to", tmp_path / "out.ckpt")
    assert_same(tmp_path / "out.ckpt", state, "state_dict")


@pytest.mark.parametrize("legacy", [True, False])
def test_vision_model_of_torch_hub(tmp_path: Path, legacy: bool) -> None:
    state = state_dict(tiny("encoder"))
    torch.save(tensors(state), tmp_path / "in.pth", _use_new_zipfile_serialization=not legacy)
    run("import", tmp_path / "in.pth", "--to", tmp_path)
    run("export", tmp_path / "encoder", "--to", tmp_path / "out.pth")
    assert_same(tmp_path / "out.pth", state)


@pytest.mark.parametrize(
    ("kind", "metadata"), [("dit", None), ("encoder", {"format": "pt"}), ("autoencoder", {"format": "pt"})]
)
def test_safetensors(tmp_path: Path, kind: str, metadata: dict[str, str] | None) -> None:
    state = state_dict(tiny(kind), ml_dtypes.bfloat16)
    save_file(state, tmp_path / "in.safetensors", metadata=metadata)
    run("import", tmp_path / "in.safetensors", "--to", tmp_path)
    run("export", tmp_path / kind, "--to", tmp_path / "out.safetensors")
    check_safetensors(tmp_path / "in.safetensors", tmp_path / "out.safetensors")


def check_safetensors(one: Path, other: Path) -> None:
    with safe_open(one, "np") as a, safe_open(other, "np") as b:
        assert a.metadata() == b.metadata()
    before, after = load_file(one), load_file(other)
    assert after.keys() == before.keys()
    for name, array in before.items():
        assert (after[name].dtype, after[name].shape) == (array.dtype, array.shape), name
        assert after[name].tobytes() == array.tobytes(), name


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("kind", ["text_encoder", "transformers"])
def test_folder_of_transformers(tmp_path: Path, kind: str, shards: int) -> None:
    state = state_dict(tiny(kind), ml_dtypes.bfloat16 if kind == "text_encoder" else np.float32)
    state |= {"lm_head.weight": state["model.embed_tokens.weight"]} if kind == "text_encoder" else {}
    config = gemma_config(release.GEMMA) if kind == "text_encoder" else vit_config(release.VIT)
    transformers_folder(tmp_path / "hf", state, config, shards=shards, tokenizer=kind == "text_encoder")
    workdir = tmp_path / {"transformers": "encoder"}.get(kind, kind)
    run("import", tmp_path / "hf", "--to", tmp_path)
    if kind == "text_encoder":
        names = {file.name for file in (workdir / "tokenizer").iterdir()}
        assert names == {"tokenizer.json", "tokenizer_config.json"}
    run("export", workdir, "--to", tmp_path / "out")
    names = {file.name for file in (tmp_path / "hf").iterdir()}
    assert {file.name for file in (tmp_path / "out").iterdir()} == names
    for name in names:
        before, after = tmp_path / "hf" / name, tmp_path / "out" / name
        if name.endswith(".json"):
            assert json.loads(after.read_text()) == json.loads(before.read_text())
        else:
            check_safetensors(before, after)
    run("export", workdir, "--to", tmp_path / "half", "--dtype", "float16")
    half = {**open_file(next((tmp_path / "half").glob("*.safetensors"))).weights}
    assert {str(array.dtype) for array in half.values()} == {"float16"}


def test_a_gemma_without_its_head_keeps_its_shorter_names(tmp_path: Path) -> None:
    state = {name.removeprefix("model."): a for name, a in state_dict(tiny("text_encoder")).items()}
    transformers_folder(tmp_path / "hf", state, gemma_config(release.GEMMA))
    run("import", tmp_path / "hf", "--to", tmp_path)
    run("export", tmp_path / "text_encoder", "--to", tmp_path / "out")
    check_safetensors(tmp_path / "hf/model.safetensors", tmp_path / "out/model.safetensors")


@pytest.mark.parametrize(
    ("names", "shape"), [(("mean", "std"), (12, 16)), (("dinov3_sp_mean", "dinov3_sp_std"), (1, 1, 16))]
)
def test_statistics(tmp_path: Path, names: tuple[str, str], shape: tuple[int, ...]) -> None:
    state = {name: np.random.default_rng(i).random(shape, np.float32) + 0.1 for i, name in enumerate(names)}
    torch.save(tensors(state), tmp_path / "in.pt")
    run("import", tmp_path / "in.pt", "--to", tmp_path)
    np.testing.assert_array_equal(open_params(str(tmp_path / "statistics"))["frozen"]["mean"], state[names[0]])
    run("export", tmp_path / "statistics", "--to", tmp_path / "out.pt")
    assert_same(tmp_path / "out.pt", state)


def test_real_statistics(tmp_path: Path, data: Path) -> None:
    for file, shape in (("dinov3_s16p_layer_patchtoken_stats_dist.pt", (12, 384)), ("dinov3_sp_stats.pt", (1, 1, 392))):
        run("import", data / file, "--to", tmp_path, "--overwrite")
        mean, std = open_params(str(tmp_path / "statistics"))["frozen"].values()
        assert mean.shape == std.shape == shape
        run("export", tmp_path / "statistics", "--to", tmp_path / "out.pt", "--overwrite")
        assert_same(tmp_path / "out.pt", {name: t.numpy() for name, t in torch.load(data / file).items()})
        assert all(len(row) == 392 for row in latent_statistics({"mean": mean, "std": std}, 392))


def test_old_pickles_with_tensors_of_a_gpu_are_read(data: Path) -> None:
    content = open_file(data / "lpips_vgg_heads_v0.1.pth")
    expected = torch.load(data / "lpips_vgg_heads_v0.1.pth", map_location="cpu", weights_only=True)
    assert content.weights.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(content.weights[name], tensor.numpy())


def save_run(workdir: Path, params: dict[str, Any], frozen: dict[str, Any], config: dict[str, Any]) -> None:
    """A checkpoint as a training run leaves it, with a moving average that is not the parameters."""
    optimiser = adamw(optax.constant_schedule(1e-2), b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.0, clip=1.0)
    state = TrainState.create(params, optimiser, jax.random.key(0), frozen)
    state = dataclasses.replace(state, ema={name: value + 1 for name, value in params.items()})
    with Checkpoints(str(workdir)) as checkpoints:
        checkpoints.save(state, {"step": 1}, config)


def test_a_diffusion_transformer_trained_here(tmp_path: Path) -> None:
    model = tiny("dit")
    params = {name: jnp.full(shape.shape, i, jnp.float32) for i, (name, shape) in enumerate(model.shapes.items())}
    config = base.get_config().to_dict() | {"model": vars(release.DIT)}
    save_run(tmp_path / "run", params, {}, config)
    saved = open_params(str(tmp_path / "run"))
    run("export", tmp_path / "run", "--to", tmp_path / "out")
    for part, file in (("params", "consolidated.00-of-01.pth"), ("ema", "consolidated_ema.00-of-01.pth")):
        content = open_file(tmp_path / "out" / file).weights
        assert all(str(struct.dtype) == "float32" for struct in content.structs.values())
        kernel = np.stack([content[f"layers.{i}.attention.qkv.weight"].T for i in range(release.DIT.num_layers)])
        np.testing.assert_array_equal(kernel, saved[part]["layers.attention.qkv.kernel"])
    assert not model.differences(content.structs)["missing"]
    assert torch.load(tmp_path / "out/model_args.pth", weights_only=False).qk_norm is True
    run("import", tmp_path / "out", "--to", tmp_path / "again")
    for part, params in saved.items():
        again = open_params(str(tmp_path / "again/dit"))[part]
        for name, value in params.items():
            np.testing.assert_array_equal(again[name], value)


def test_an_autoencoder_trained_here_and_its_statistics(tmp_path: Path) -> None:
    model = tiny("autoencoder")
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.standard_normal(s.shape), jnp.float32) for name, s in model.shapes.items()}
    latents = {"latents.mean": jnp.arange(16.0), "latents.std": jnp.arange(16.0) + 1.0}
    decoder = {name: value for name, value in params.items() if name.startswith("decoder.")}
    frozen = {name: value for name, value in params.items() if name.startswith("encoder.")} | latents
    config = tiny_autoencoder.get_config().to_dict() | release.SECTIONS["autoencoder"]
    save_run(tmp_path / "run", decoder, frozen, config)
    run("export", tmp_path / "run", "--to", tmp_path / "out.ckpt")
    content = open_file(tmp_path / "out.ckpt")
    assert content.wrapper == "state_dict"
    assert not any(model.differences(content.weights.structs).values())
    bias = open_params(str(tmp_path / "run"))["ema"]["decoder.conv_in.bias"]
    np.testing.assert_array_equal(content.weights["decoder.conv_in.bias"], bias)
    run("export", tmp_path / "run", "--to", tmp_path / "stats.pt", "--as", "statistics")
    statistics = torch.load(tmp_path / "stats.pt")
    assert statistics["mean"][-1].tolist() == latents["latents.mean"].tolist()
    assert statistics["std"].shape == (1, 16)


def test_statistics_go_into_the_autoencoder_in_any_order(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = {"mean": np.arange(32, dtype=np.float32).reshape(2, 16), "std": np.ones((2, 16), np.float32) * 3}
    torch.save(tensors(state), tmp_path / "s.pt")
    torch.save({"state_dict": tensors(state_dict(tiny("autoencoder")) | carried())}, tmp_path / "a.ckpt")
    orders = {"together": ["s.pt a.ckpt"], "statistics": ["s.pt", "a.ckpt"], "autoencoder": ["a.ckpt", "s.pt"]}
    for first, calls in orders.items():
        with caplog.at_level(logging.WARNING, logger="svg_jax"):
            caplog.clear()
            for call in calls:
                run("import", *(tmp_path / file for file in call.split()), "--to", tmp_path / first)
        assert ("no latent statistics are given" in caplog.text) == (first == "autoencoder")
        saved = open_params(str(tmp_path / first / "autoencoder"))
        np.testing.assert_array_equal(saved["frozen"]["latents.mean"], np.arange(16, 32))
        np.testing.assert_array_equal(saved["frozen"]["latents.std"], np.full(16, 3))
        run("export", tmp_path / first / "autoencoder", "--to", tmp_path / first / "out.ckpt")
        assert_same(tmp_path / first / "out.ckpt", state_dict(tiny("autoencoder")) | carried(), "state_dict")


def test_a_header_as_long_as_a_pickle_begins(tmp_path: Path) -> None:
    """The first byte of a safetensors file, the lowest of its header's length, may be a pickle's first."""
    shape = (2, 2)
    for width in range(1, 400):
        save_file({"n" * width: np.ones(shape, np.float32)}, tmp_path / "w.safetensors")
        if (tmp_path / "w.safetensors").read_bytes()[:1] == b"\x80":
            break
    assert (tmp_path / "w.safetensors").read_bytes()[:1] == b"\x80"
    content = open_file(tmp_path / "w.safetensors")
    assert content.container == "safetensors"
    np.testing.assert_array_equal(content.weights["n" * width], np.ones(shape))


def test_weights_beside_other_tensors_and_other_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = (state_dict(tiny("dit"), seed=seed) for seed in (1, 2))
    content = {"rng": torch.zeros(8, dtype=torch.uint8), "model": tensors(one), "ema": tensors(other), "step": 3}
    torch.save(content | {"model": {**content["model"], 7: torch.ones(1)}}, tmp_path / "in.pth")
    run("import", tmp_path / "in.pth", "--to", tmp_path)
    said = capsys.readouterr().out
    assert "dropped: ema (holds weights too" in said
    assert "dropped: 7, rng, step (a training run's own state, not weights" in said
    run("export", tmp_path / "dit", "--to", tmp_path / "out.pth")
    assert_same(tmp_path / "out.pth", one, "model")
