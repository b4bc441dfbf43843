"""What a file is, told by its content; what `inspect` says of it."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from svg_jax.checkpoint import Checkpoints, load_config, load_params, open_params, save_params
from svg_jax.convert.kinds import kind_of, recognise, restored
from svg_jax.convert.model import SIZES
from svg_jax.convert.rules import release_shapes
from svg_jax.models.autoencoder import AutoencoderConfig
from svg_jax.models.next_dit import NextDiTConfig
from svg_jax.models.vit import ViTConfig, rope_periods
from svg_jax.parallel import make_mesh, param_shardings
from tests.convert import release
from tests.convert.release import gemma_config, run, state_dict, tensors, tiny, transformers_folder, vit_config


@pytest.mark.parametrize("size", SIZES[ViTConfig])
def test_every_published_vision_model_is_told_by_its_weights(size: str) -> None:
    config = getattr(ViTConfig, size)()
    model = restored({"encoder": vars(config)})
    structs = release_shapes(model.shapes, model.table)
    found = recognise({"rope_embed.periods": rope_periods(config.head_dim // 4, 100.0)}, structs)
    assert found.networks["encoder"] == config
    assert found.size == size
    assert not any(found.differences(structs).values())


@pytest.mark.parametrize("changes", [{}, {"in_channels": 392}, {"qk_norm": False}], ids=str)
@pytest.mark.parametrize("size", SIZES[NextDiTConfig])
def test_every_published_diffusion_transformer_is_told_by_its_weights(size: str, changes: dict[str, Any]) -> None:
    config = getattr(NextDiTConfig, size)(**changes)
    model = restored({"model": vars(config)})
    structs = release_shapes(model.shapes, model.table)
    found = recognise({}, structs)
    assert found.networks["model"] == config
    assert found.notes == ()
    assert not any(found.differences(structs).values())
    if "qk_norm" not in changes:
        assert found.size == size


def test_the_published_autoencoder_is_told_by_its_weights() -> None:
    config = AutoencoderConfig.svg_p()
    model = restored({"autoencoder": {"encoder": vars(config.encoder), "decoder": vars(config.decoder)}})
    structs = release_shapes(model.shapes, model.table)
    found = recognise({"encoder.rope_embed.periods": rope_periods(16, 100.0)}, structs)
    assert found.networks == {"encoder": config.encoder, "decoder": config.decoder}
    assert found.size == "vits16plus + svg"


def test_sizes_that_nobody_published_are_inferred_and_the_guess_is_told() -> None:
    model = tiny("dit")
    found = recognise({}, release_shapes(model.shapes, model.table))
    sizes = ("dim", "num_layers", "num_refiner_layers", "num_heads", "num_kv_heads", "hidden_dim", "axes_dims")
    for size in (*sizes, "in_channels", "text_dim"):
        assert getattr(found.networks["model"], size) == getattr(release.DIT, size), size
    assert "axes_dims (4, 4, 4) and patch size 1 are guessed" in found.notes[0]
    assert found.size == "no published size (3 layers)"


@pytest.mark.parametrize("kind", ["dit", "autoencoder", "encoder", "text_encoder", "transformers"])
def test_names_of_files_mean_nothing(kind: str) -> None:
    assert kind_of(state_dict(tiny(kind))) == {"transformers": "encoder"}.get(kind, kind)
    assert kind_of({"a": 1}) is None
    assert kind_of({"mean", "std"}) == kind_of({"dinov3_sp_mean", "dinov3_sp_std"}) == "statistics"


def told(capsys: pytest.CaptureFixture[str], path: Path) -> dict[str, str]:
    capsys.readouterr()
    run("inspect", path)
    lines = capsys.readouterr().out.splitlines()
    return {line.split(" ")[0]: line.split(" ", 1)[1].strip() for line in lines if line}


def test_inspect_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = state_dict(tiny("dit"))
    parameters = sum(array.size for array in state.values())
    state = {name: a if "norm" in name else a.astype(ml_dtypes.bfloat16) for name, a in state.items()}
    torch.save({"model": tensors(state), "opt": {"lr": 1}}, tmp_path / "some.file")
    facts = told(capsys, tmp_path / "some.file")
    assert facts["kind"] == "diffusion transformer (Next-DiT)"
    assert facts["wrapped"] == "under the key 'model'"
    assert "dim 48, num_layers 3" in facts["model"]
    assert facts["parameters"].startswith(f"{parameters:,} in {len(state)} tensors")
    norms = sum("norm" in name for name in state)
    assert f"float32 ({norms} tensors)" in facts["dtypes"]
    assert f"bfloat16 ({len(state) - norms} tensors)" in facts["dtypes"]
    assert facts["dropped"] == "1: opt"
    assert facts["missing"] == facts["unexpected"] == facts["of"].removeprefix("another shape").strip() == "none"


def test_inspect_names_keys_that_do_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = state_dict(tiny("encoder"))
    del state["norm.bias"]
    save_file(state | {"head.weight": np.ones(2, np.float32)}, tmp_path / "x.safetensors")
    facts = told(capsys, tmp_path / "x.safetensors")
    assert facts["missing"] == "1: norm.bias"
    assert facts["unexpected"] == "1: head.weight"


def test_inspect_what_is_not_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"conv.weight": np.ones((2, 3), np.float32)}, tmp_path / "x.safetensors")
    facts = told(capsys, tmp_path / "x.safetensors")
    assert facts["kind"] == "unknown"
    assert facts["parameters"].startswith("6 in 1 tensors")
    assert facts["keys"] == "1: conv.weight"


def test_inspect_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transformers_folder(tmp_path / "gemma", state_dict(tiny("text_encoder")), gemma_config(release.GEMMA), shards=2)
    transformers_folder(tmp_path / "dino", state_dict(tiny("transformers")), vit_config(release.VIT))
    torch.save({"mean": torch.ones(12, 16), "std": torch.ones(12, 16)}, tmp_path / "s.pt")
    assert told(capsys, tmp_path / "gemma")["kind"] == "language model (Gemma 2)"
    assert told(capsys, tmp_path / "dino")["kind"] == "vision model (DINOv3)"
    assert told(capsys, tmp_path / "s.pt")["kind"] == "latent statistics"
    run("import", tmp_path / "gemma", tmp_path / "dino", tmp_path / "s.pt", "--to", tmp_path / "in")
    facts = told(capsys, tmp_path / "in/text_encoder")
    assert facts["kind"] == "language model (Gemma 2)"
    assert facts["frozen"].startswith(f"{sum(s.size for s in tiny('text_encoder').shapes.values()):,} in")
    run("inspect", tmp_path / "in")
    said = capsys.readouterr().out
    assert [kind in said for kind in ("Gemma 2", "DINOv3", "latent statistics", "Next-DiT")] == [
        True,
        True,
        True,
        False,
    ]


class OneAtATime(Mapping[str, np.ndarray]):
    """Makes an array when it is asked for, and knows how many of them live."""

    def __init__(self, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> None:
        self.shapes, self.asked, self.most = shapes, list[str](), 0
        self._living: list[Any] = []

    def __getitem__(self, name: str) -> np.ndarray:
        array = np.full(self.shapes[name].shape, len(self.asked), np.float32)
        self.asked.append(name)
        self._living.append(weakref.ref(array))
        self.most = max(self.most, sum(ref() is not None for ref in self._living))
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def test_saving_asks_for_each_parameter_once_and_lets_it_go(tmp_path: Path) -> None:
    arrays = OneAtATime({f"w{i}": jax.ShapeDtypeStruct((64, 64), np.float32) for i in range(20)})
    save_params(str(tmp_path), {"ema": arrays, "frozen": {}}, {"a": [1, None]})
    assert sorted(arrays.asked) == sorted(arrays.shapes)
    assert arrays.most <= 2
    assert load_config(str(tmp_path)) == {"a": [1, None]}
    with Checkpoints(str(tmp_path)) as checkpoints:
        assert checkpoints._manager.all_steps() == [0]
    saved = open_params(str(tmp_path))["ema"]
    for i, name in enumerate(arrays.asked):
        np.testing.assert_array_equal(saved[name], np.full((64, 64), i, np.float32))


def test_parameters_come_straight_onto_a_mesh_in_the_networks_type(tmp_path: Path) -> None:
    """Saved in bfloat16, wanted in float32, split over eight devices; what is only carried is not looked at."""
    kernel = np.arange(16 * 32).reshape(16, 32).astype(ml_dtypes.bfloat16)
    carried = {"loss.x": np.ones(3, np.float32), "loss.count": np.array(3)}
    save_params(str(tmp_path), {"ema": {"k": kernel}, "frozen": {"b": np.ones(4, np.float16)}, "carried": carried}, {})
    shapes = {"k": jax.ShapeDtypeStruct((16, 32), np.float32), "b": jax.ShapeDtypeStruct((4,), np.float32)}
    mesh = make_mesh({"fsdp": 4, "tensor": 2}, jax.devices()[:8])
    at = param_shardings(shapes, {"k": ("embed", "mlp"), "b": (None,)}, mesh)
    params = load_params(str(tmp_path), shapes, at)
    assert {name: (value.dtype.name, value.sharding) for name, value in params.items()} == {
        name: ("float32", at[name]) for name in shapes
    }
    assert params["k"].addressable_shards[0].data.shape == (4, 16)
    np.testing.assert_array_equal(params["k"], kernel.astype(np.float32))
    np.testing.assert_array_equal(open_params(str(tmp_path))["carried"]["loss.count"], 3)
