"""Whatever is wrong with what was given ends in one sentence, and nothing foreign is ever run."""

from __future__ import annotations

import builtins
import json
import os
import pickle
import re
import shlex
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from svg_jax.checkpoint import load_config, open_params
from svg_jax.convert import files
from svg_jax.convert.__main__ import EXAMPLES, parser
from svg_jax.convert.imports import latent_statistics
from tests.convert import release
from tests.convert.release import gemma_config, run, state_dict, tensors, tiny, transformers_folder


def error(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What the command says as it fails: one line."""
    with pytest.raises(SystemExit) as exit_:
        run(*arguments)
    message = str(exit_.value)
    assert message.startswith("error: ")
    assert "\n" not in message
    assert "Traceback" not in capsys.readouterr().err
    return message


class Shell:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def hidden_in_weights(path: Path, bad: Shell) -> None:
    torch.save({"model": tensors(state_dict(tiny("dit"))), "epoch": bad}, path)


def beside_the_tensors(path: Path, bad: Shell) -> None:
    torch.save({**tensors(state_dict(tiny("dit"))), "x": bad}, path)


def of_the_old_format(path: Path, bad: Shell) -> None:
    torch.save({"model": {"a": torch.ones(2)}, "x": bad}, path, _use_new_zipfile_serialization=False)


def a_plain_pickle(path: Path, bad: Shell) -> None:
    path.write_bytes(pickle.dumps(bad))


def of_the_oldest_protocol(path: Path, bad: Shell) -> None:
    path.write_bytes(pickle.dumps({"a": bad}, protocol=2))


def a_hand_made_archive(path: Path, bad: Shell) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(bad, protocol=2))
        archive.writestr("archive/version", "3\n")


@pytest.mark.parametrize("command", ["import", "inspect"])
@pytest.mark.parametrize(
    "write",
    [
        hidden_in_weights, beside_the_tensors, of_the_old_format, a_plain_pickle, of_the_oldest_protocol,
        a_hand_made_archive,
    ],
)  # fmt: skip
def test_a_malicious_pickle_is_refused_and_nothing_is_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], write: Callable[[Path, Shell], None], command: str
) -> None:
    trace = tmp_path / "was_run"
    write(tmp_path / "bad.pth", Shell(f"touch {trace}"))
    where = ("--to", tmp_path / "in") if command == "import" else ()
    message = error(capsys, command, tmp_path / "bad.pth", *where)
    assert "reading that could run code: refused, nothing of it was run" in message
    assert not trace.exists()
    assert not (tmp_path / "in").exists()
    # The file is a real one: read carelessly, it does run.
    if write in (a_plain_pickle, of_the_oldest_protocol):
        pickle.loads((tmp_path / "bad.pth").read_bytes())
    else:
        torch.load(tmp_path / "bad.pth", weights_only=False)
    assert trace.exists()


def test_a_malicious_file_of_arguments_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(tensors(state_dict(tiny("dit"))), tmp_path / "consolidated.00-of-01.pth")
    torch.save(Shell(f"touch {tmp_path / 'was_run'}"), tmp_path / "model_args.pth")
    assert "model_args.pth holds 'posix.system'" in error(capsys, "import", tmp_path, "--to", tmp_path / "in")
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize("command", ["import", "inspect"])
@pytest.mark.parametrize("share", [0.9, 0.5, 0.01])
@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_a_truncated_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str, share: float, command: str
) -> None:
    path, state = tmp_path / "cut.pth", state_dict(tiny("dit"))
    if form == "safetensors":
        save_file(state, path)
    else:
        torch.save(tensors(state), path, _use_new_zipfile_serialization=form == "zip")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    where = ("--to", tmp_path / "in") if command == "import" else ()
    assert "download it again" in error(capsys, command, path, *where)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty: download it again"),
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "is a web page, not weights"),
        (b"\n <html>", "is a web page, not weights"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer.*git lfs pull"),
        (b"GIF89a and so on", r"holds no weights that are known here \(it begins with b'GIF89a a'\)"),
        (b"\x10" + bytes(7) + b"{not json at al}", "no readable safetensors header"),
        (b"PK\x03\x04 but no archive", "cut off or no file of PyTorch's"),
    ],
)
def test_what_is_no_file_of_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, message: str
) -> None:
    (tmp_path / "weights.pth").write_bytes(content)
    for command in (("inspect",), ("import", "--to", tmp_path / "in")):
        assert re.search(message, error(capsys, *command, tmp_path / "weights.pth"))


def test_quantised_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = {"x_embedder.weight": np.ones((2, 2), ml_dtypes.float8_e4m3fn)}
    save_file(state, tmp_path / "w.safetensors")
    for command in (("inspect",), ("import", "--to", tmp_path / "in")):
        message = error(capsys, *command, tmp_path / "w.safetensors")
        assert "'x_embedder.weight' is F8_E4M3, and quantised weights are not read here" in message


def test_a_source_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is no file" in error(capsys, "import", tmp_path / "none.pth", "--to", tmp_path)
    assert "there is no file" in error(capsys, "inspect", tmp_path / "none.pth")
    (tmp_path / "empty").mkdir()
    assert "neither a checkpoint folder of the release" in error(capsys, "import", tmp_path / "empty", "--to", tmp_path)
    assert "no checkpoint in" in error(capsys, "export", tmp_path / "empty", "--to", tmp_path / "x.pth")


def test_a_missing_shard_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = gemma_config(release.GEMMA)
    transformers_folder(tmp_path / "hf", state_dict(tiny("text_encoder")), config, shards=2)
    (tmp_path / "hf/model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors" in error(capsys, "import", tmp_path / "hf", "--to", tmp_path)


def test_a_piece_of_a_split_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(tensors(state_dict(tiny("dit"))), tmp_path / "consolidated.00-of-02.pth")
    assert "split over devices: not supported" in error(capsys, "import", tmp_path, "--to", tmp_path / "in")


def test_keys_that_do_not_fit_are_listed_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = state_dict(tiny("autoencoder"))
    del state["decoder.mid.attn_1.q.bias"], state["encoder.blocks.1.ls1.gamma"]
    state |= {"decoder.quant.weight": np.ones(2, np.float32), "ema.x": np.ones(2, np.float32)}
    state["encoder.blocks.1.attn.proj.bias"] = np.ones(3, np.float32)
    torch.save({"state_dict": tensors(state)}, tmp_path / "a.ckpt")
    message = error(capsys, "import", tmp_path / "a.ckpt", "--to", tmp_path / "in")
    assert "2 missing: decoder.mid.attn_1.q.bias, encoder.blocks.1.ls1.gamma" in message
    assert "2 unexpected: decoder.quant.weight, ema.x" in message
    assert "1 of another shape: encoder.blocks.1.attn.proj.bias (3,) instead of (16,)" in message
    assert not (tmp_path / "in").exists()


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_an_autoencoder_without_one_half(tmp_path: Path, capsys: pytest.CaptureFixture[str], part: str) -> None:
    state = state_dict(tiny("autoencoder"))
    left = {name: value for name, value in state.items() if not name.startswith(f"{part}.")}
    torch.save({"state_dict": tensors(left)}, tmp_path / "a.ckpt")
    assert f"this autoencoder has no '{part}.' keys" in error(capsys, "import", tmp_path / "a.ckpt", "--to", tmp_path)


def test_other_kinds_of_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = {
        "a decoder alone": {n[8:]: v for n, v in state_dict(tiny("autoencoder")).items() if n.startswith("decoder.")},
        "nothing that is known here": {"conv1.weight": np.ones((2, 2), np.float32)},
        "needs its config.json": state_dict(tiny("text_encoder")),
    }
    for message, state in cases.items():
        torch.save(tensors(state), tmp_path / "w.pth")
        assert message in error(capsys, "import", tmp_path / "w.pth", "--to", tmp_path)
    for content, message in (({"step": 3}, "no state dict: its keys are step"), (torch.ones(2), "holds one Tensor")):
        torch.save(content, tmp_path / "w.pth")
        assert message in error(capsys, "import", tmp_path / "w.pth", "--to", tmp_path)


def test_a_wrong_architecture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(tensors(state_dict(tiny("dit"))), tmp_path / "w.pth")
    file = tmp_path / "a.json"
    arguments = {"dim": 48, "n_layers": 3, "n_heads": 4, "axes_dims": [4, 4, 4], "in_channels": 16, "cap_feat_dim": 24}
    wrong = [
        (arguments | {"n_kv_heads": 2, "n_refiner_layers": 1, "multiple_of": 32, "n_layers": 4}, "missing: layers.3"),
        (arguments | {"n_kv_heads": 4, "n_refiner_layers": 1, "multiple_of": 32}, "(96, 48) instead of (144, 48)"),
        (arguments | {"depth": 3}, "cannot be told: .*'depth'"),
        (arguments | {"n_kv_heads": 3}, "must divide in turn"),
    ]
    for content, message in wrong:
        file.write_text(json.dumps(content))
        found = error(capsys, "import", tmp_path / "w.pth", "--to", tmp_path / "in", "--architecture", file)
        assert message in found or re.search(message, found), found
    file.write_text("{")
    found = error(capsys, "import", tmp_path / "w.pth", "--to", tmp_path / "in", "--architecture", file)
    assert "--architecture" in found
    assert "no readable JSON" in found


def test_what_weights_do_not_tell_must_be_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = {name: value for name, value in state_dict(tiny("dit")).items() if "_norm.weight" not in name}
    torch.save(tensors(state), tmp_path / "w.pth")
    assert "--architecture FILE.json" in error(capsys, "import", tmp_path / "w.pth", "--to", tmp_path / "in")


def test_two_of_one_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.pth", "b.pth"):
        torch.save(tensors(state_dict(tiny("encoder"))), tmp_path / name)
    message = error(capsys, "import", tmp_path / "a.pth", tmp_path / "b.pth", "--to", tmp_path / "in")
    assert "a.pth and" in message
    assert "are both a vision model" in message


def test_nothing_is_overwritten_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = (state_dict(tiny("encoder"), seed=seed) for seed in (1, 2))
    torch.save(tensors(one), tmp_path / "one.pth")
    torch.save(tensors(other), tmp_path / "other.pth")
    torch.save(tensors(state_dict(tiny("dit"))), tmp_path / "dit.pth")

    def norm() -> np.ndarray:
        return open_params(str(tmp_path / "in/encoder"))["frozen"]["norm.scale"]

    run("import", tmp_path / "one.pth", "--to", tmp_path / "in")
    message = error(capsys, "import", tmp_path / "dit.pth", tmp_path / "other.pth", "--to", tmp_path / "in")
    assert "in/encoder already: choose another --to, or replace it with --overwrite" in message
    assert sorted(path.name for path in (tmp_path / "in").iterdir()) == ["encoder"], "nothing was begun"
    np.testing.assert_array_equal(norm(), one["norm.weight"])

    (tmp_path / "cut.pth").write_bytes((tmp_path / "other.pth").read_bytes()[:-5000])
    error(capsys, "import", tmp_path / "cut.pth", "--to", tmp_path / "in", "--overwrite")
    np.testing.assert_array_equal(norm(), one["norm.weight"])
    run("import", tmp_path / "other.pth", "--to", tmp_path / "in", "--overwrite")
    np.testing.assert_array_equal(norm(), other["norm.weight"])
    assert sorted(path.name for path in (tmp_path / "in").iterdir()) == ["encoder"]

    run("export", tmp_path / "in/encoder", "--to", tmp_path / "out.pth")
    assert "--overwrite" in error(capsys, "export", tmp_path / "in/encoder", "--to", tmp_path / "out.pth")
    run("export", tmp_path / "in/encoder", "--to", tmp_path / "out.pth", "--overwrite")


def test_an_import_that_breaks_off_leaves_what_was_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(tensors(state_dict(tiny("encoder"))), tmp_path / "w.pth")
    run("import", tmp_path / "w.pth", "--to", tmp_path / "in")
    before = load_config(str(tmp_path / "in/encoder"))

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("svg_jax.convert.imports.save_params", full)
    assert "No space left" in error(capsys, "import", tmp_path / "w.pth", "--to", tmp_path / "in", "--overwrite")
    assert load_config(str(tmp_path / "in/encoder")) == before
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["encoder"]


def test_exports_that_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind in ("encoder", "autoencoder"):
        torch.save(tensors(state_dict(tiny(kind))), tmp_path / f"{kind}.pth")
        run("import", tmp_path / f"{kind}.pth", "--to", tmp_path / "in")
    folder = tmp_path / "in"
    wrong = {
        "the name must end in": ("encoder", "x.npz"),
        "not imported from a folder of transformers": ("encoder", "folder"),
        "has no params": ("autoencoder", "x.ckpt", "--part", "params"),
        "has no latent statistics": ("encoder", "x.pt", "--as", "statistics"),
        "the name of statistics must end in": ("autoencoder", "x", "--as", "statistics"),
        "latent statistics were never given": ("autoencoder", "x.pt", "--as", "statistics"),
    }
    for message, (kind, target, *flags) in wrong.items():
        assert message in error(capsys, "export", folder / kind, "--to", tmp_path / target, *flags)
        assert not (tmp_path / target).exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_statistics_that_do_not_fit_name_the_tool_that_makes_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"mean": torch.ones(2, 40), "std": torch.ones(2, 40)}, tmp_path / "s.pt")
    torch.save(tensors(state_dict(tiny("autoencoder"))), tmp_path / "a.ckpt")
    message = error(capsys, "import", tmp_path / "a.ckpt", tmp_path / "s.pt", "--to", tmp_path / "in")
    assert "of 40 channels and the latents have 16: `python -m svg_jax.latent_stats --checkpoint=" in message
    assert not (tmp_path / "in").exists()


def test_extended_statistics() -> None:
    """The 8 channels of the residual branch get the average of the others."""
    rng = np.random.default_rng(0)
    arrays = {name: rng.random((12, 384), np.float32) + 0.5 for name in ("mean", "std")}
    mean, std = latent_statistics(arrays, 392)
    for row, name in ((mean, "mean"), (std, "std")):
        np.testing.assert_array_equal(row[:384], arrays[name][-1])
        np.testing.assert_allclose(row[384:], np.full(8, arrays[name][-1].mean()), rtol=1e-6)
    both = {"dinov3_sp_mean": mean[None, None], "dinov3_sp_std": std[None, None]}
    np.testing.assert_array_equal(latent_statistics(both, 392), (mean, std))
    with pytest.raises(ValueError, match="of 392 channels and the latents have 384"):
        latent_statistics(both, 384)
    with pytest.raises(ValueError, match="not finite, or a standard deviation of zero"):
        latent_statistics(arrays | {"std": np.zeros((1, 384), np.float32)}, 384)


def test_without_pytorch(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(tensors(state_dict(tiny("dit"))), tmp_path / "w.pth")
    save_file(state_dict(tiny("dit")), tmp_path / "w.safetensors")
    transformers_folder(tmp_path / "hf", state_dict(tiny("text_encoder")), gemma_config(release.GEMMA), shards=2)
    imports = builtins.__import__

    def without(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name.split(".")[0] == "torch":
            raise ModuleNotFoundError("No module named 'torch'")
        return imports(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    for command in (("inspect", tmp_path / "w.pth"), ("import", tmp_path / "w.pth", "--to", tmp_path / "x")):
        assert 'pip install "svg_jax[torch]"' in error(capsys, *command)
    for source in ("w.safetensors", "hf"):
        run("inspect", tmp_path / source)
        run("import", tmp_path / source, "--to", tmp_path / "in")
    run("inspect", tmp_path / "in")
    run("export", tmp_path / "in/dit", "--to", tmp_path / "out.safetensors")
    run("export", tmp_path / "in/text_encoder", "--to", tmp_path / "out")
    assert 'pip install "svg_jax[torch]"' in error(capsys, "export", tmp_path / "in/dit", "--to", tmp_path / "out.pth")


def test_statistics_leave_a_trained_autoencoder_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"mean": torch.ones(2, 16), "std": torch.ones(2, 16)}, tmp_path / "s.pt")
    torch.save(tensors(state_dict(tiny("autoencoder"))), tmp_path / "a.ckpt")
    run("import", tmp_path / "a.ckpt", "--to", tmp_path / "in")
    (tmp_path / "in/autoencoder/checkpoints/7").mkdir()
    message = error(capsys, "import", tmp_path / "s.pt", "--to", tmp_path / "in")
    assert "in/autoencoder holds more than an import" in message
    assert not (tmp_path / "in/statistics").exists()
    (tmp_path / "in/autoencoder/checkpoints/7").rmdir()
    run("import", tmp_path / "s.pt", "--to", tmp_path / "in")
    assert "in/autoencoder: its latent statistics are replaced" in capsys.readouterr().out


def test_an_export_replaces_only_an_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(tensors(state_dict(tiny("dit"))), tmp_path / "w.pth")
    run("import", tmp_path / "w.pth", "--to", tmp_path / "in")
    workdir, home = tmp_path / "in/dit", tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("years of work")
    assert "holds what no export writes (thesis.txt)" in error(capsys, "export", workdir, "--to", home, "--overwrite")
    assert (home / "thesis.txt").read_text() == "years of work"
    for target in (workdir, workdir / "out", tmp_path / "in", tmp_path):
        assert "lie one in the other" in error(capsys, "export", workdir, "--to", target, "--overwrite")
    assert "must be a local path" in error(capsys, "export", workdir, "--to", "gs://bucket/x")
    assert "must be a local path" in error(capsys, "inspect", "gs://bucket/x")
    (home / "thesis.txt").unlink()
    run("export", workdir, "--to", home, "--overwrite")
    run("export", workdir, "--to", home, "--overwrite")
    assert sorted(file.name for file in home.iterdir()) == ["consolidated_ema.00-of-01.pth", "model_args.pth"]
    assert "has no latent statistics" in error(
        capsys, "export", workdir, "--to", tmp_path / "s.pt", "--as", "statistics"
    )


def test_a_replacement_that_was_stopped_between_its_renames_is_undone(tmp_path: Path) -> None:
    (tmp_path / ".out.before").mkdir()
    (tmp_path / ".out.before/kept").touch()
    with pytest.raises(OSError, match="full"), files.replacing(tmp_path / "out"):
        raise OSError("full")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["kept"]
    with files.replacing(tmp_path / "out") as folder:
        folder.mkdir()
    assert not list((tmp_path / "out").iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_matrices_of_another_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = {
        "dit": ("x_embedder.weight", "layers.0.attention.qkv.weight", "layers.0.attention.q_norm.weight"),
        "encoder": ("cls_token", "rope_embed.periods", "patch_embed.proj.weight", "norm.weight"),
        "autoencoder": ("decoder.conv_in.weight", "decoder.conv_out.weight", "encoder.rope_embed.periods"),
    }
    for kind, names in wrong.items():
        for name in names:
            for value in (np.ones((), np.float32), np.ones((2, 2, 2, 2, 2), np.float32), np.ones((0,), np.float32)):
                torch.save(tensors(state_dict(tiny(kind)) | {name: value}), tmp_path / "w.pth")
                assert "w.pth: " in error(capsys, "import", tmp_path / "w.pth", "--to", tmp_path / "in")
    for shapes in (((), ()), ((2, 16), (16,)), ((0, 16), (0, 16))):
        content = {name: torch.ones(shape) for name, shape in zip(("mean", "std"), shapes, strict=True)}
        torch.save(content, tmp_path / "s.pt")
        assert "must be two arrays" in error(capsys, "import", tmp_path / "s.pt", "--to", tmp_path / "in")


def test_files_beside_the_weights_of_another_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(tensors(state_dict(tiny("dit"))), tmp_path / "consolidated.00-of-01.pth")
    (tmp_path / "a.json").write_text("[]")
    flags = ("--to", tmp_path / "in", "--architecture", tmp_path / "a.json")
    assert "--architecture must hold an object" in error(capsys, "import", tmp_path, *flags)
    torch.save([1], tmp_path / "model_args.pth")
    message = error(capsys, "import", tmp_path, "--to", tmp_path / "in")
    assert "model_args.pth must hold arguments by name, and holds one list" in message
    torch.save({"lr": 1e-4}, tmp_path / "model_args.pth")
    run("import", tmp_path, "--to", tmp_path / "in")
    transformers_folder(tmp_path / "hf", state_dict(tiny("text_encoder")), gemma_config(release.GEMMA), shards=2)
    (tmp_path / "hf/model.safetensors.index.json").write_text('{"weight_map": [1]}')
    assert "index.json must say under 'weight_map'" in error(capsys, "import", tmp_path / "hf", "--to", tmp_path)


def test_layers_of_several_dtypes_fail_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    state = state_dict(tiny("dit"))
    state["layers.1.attention.qkv.weight"] = state["layers.1.attention.qkv.weight"].astype(np.float16)
    torch.save(tensors(state), tmp_path / "w.pth")
    monkeypatch.delattr("svg_jax.convert.imports.save_params")
    message = error(capsys, "import", tmp_path / "w.pth", "--to", tmp_path / "in")
    assert "w.pth: layers.1.attention.qkv.weight is float16 and layers.0.attention.qkv.weight float32" in message


def test_the_two_halves_of_an_autoencoder_can_be_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(tensors(state_dict(tiny("autoencoder"))), tmp_path / "a.ckpt")
    (tmp_path / "a.json").write_text(json.dumps({"encoder": {"depth": 1}, "decoder": {"ch": 1}}))
    flags = ("--to", tmp_path / "in", "--architecture", tmp_path / "a.json")
    assert "cannot be told: 'embed_dim'" in error(capsys, "import", tmp_path / "a.ckpt", *flags)


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ({"autoencoder": {"encodr": {}}}, "the autoencoder of --architecture has no 'encodr': did you mean 'encoder'?"),
        ({"autoencodr": {"encoder": {}}}, "--architecture has no 'autoencodr': did you mean 'autoencoder'?"),
        ({"encodr": {}}, "--architecture has no 'encodr': did you mean 'encoder'?"),
        ({"dit": {}, "extra_vit": {}}, "--architecture has no 'extra_vit': it has dit, autoencoder, encoder"),
        ({"text_encoder": {}}, "--architecture has no 'text_encoder': did you mean 'encoder'?"),
        (
            {"extra_vit": {"num_head": 2}},
            "the extra_vit of --architecture has no 'num_head': did you mean 'num_heads'?",
        ),
        ({"decoder": {"ch_mul": [1]}}, "the decoder of --architecture has no 'ch_mul': did you mean 'ch_mult'?"),
        (
            {"encoder": {"norm_layr": "x"}},
            "the DINOv3 of --architecture has no 'norm_layr': did you mean 'norm_layer'?",
        ),
    ],
)
def test_a_misspelt_key_of_an_architecture_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], architecture: dict[str, Any], message: str
) -> None:
    torch.save(tensors(state_dict(tiny("autoencoder"))), tmp_path / "a.ckpt")
    (tmp_path / "a.json").write_text(json.dumps(architecture))
    flags = ("--to", tmp_path / "in", "--architecture", tmp_path / "a.json")
    assert error(capsys, "import", tmp_path / "a.ckpt", *flags) == f"error: {tmp_path}/a.ckpt: {message}"
    assert not (tmp_path / "in").exists()


def test_the_architecture_of_one_source_leaves_the_others_alone(tmp_path: Path) -> None:
    torch.save({"mean": torch.ones(2, 16), "std": torch.ones(2, 16)}, tmp_path / "s.pt")
    torch.save(tensors(state_dict(tiny("autoencoder"))), tmp_path / "a.ckpt")
    (tmp_path / "a.json").write_text(json.dumps({"resize": False, "extra_vit": {"num_heads": 2}}))
    sources = (tmp_path / "a.ckpt", tmp_path / "s.pt")
    run("import", *sources, "--to", tmp_path / "in", "--architecture", tmp_path / "a.json")
    assert sorted(path.name for path in (tmp_path / "in").iterdir()) == ["autoencoder", "statistics"]


def test_the_examples_are_commands() -> None:
    lines = EXAMPLES.strip().splitlines()
    for line in lines:
        *program, _ = (words := shlex.split(line))[:4]
        assert program == ["python", "-m", "svg_jax.convert"]
        assert callable(parser().parse_args(words[3:]).run)
    assert {shlex.split(line)[3] for line in lines} == {"import", "export", "inspect"}


def test_every_ending_that_help_names_can_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("export", "--help")
    named = re.search(r"a file: ([^;]*);", " ".join(capsys.readouterr().out.split()))
    assert named
    torch.save(tensors(state_dict(tiny("encoder"))), tmp_path / "w.pth")
    run("import", tmp_path / "w.pth", "--to", tmp_path / "in")
    assert f"the name must end in one of {named[1]}, or have no ending" in error(
        capsys, "export", tmp_path / "in/encoder", "--to", tmp_path / "x.npz"
    )
    for suffix in named[1].split(", "):
        run("export", tmp_path / "in/encoder", "--to", tmp_path / f"out{suffix}")
        assert (tmp_path / f"out{suffix}").stat().st_size > 0
