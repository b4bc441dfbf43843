"""The door that measures latents: right over a data set, interrupted or not, in the release's files and in ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
from ml_collections import ConfigDict

from data_pipelines.images import crop, decode
from data_pipelines.records import Cause
from data_pipelines.sources import open_source
from svg_jax import latent_stats
from svg_jax.checkpoint import load_config, open_params, save_params
from svg_jax.convert.formats import open_file
from svg_jax.convert.imports import latent_statistics
from svg_jax.loading import find_autoencoder, open_autoencoder
from svg_jax.parallel import make_mesh
from tests.tiny_autoencoders import PLAIN, RESIDUAL, network_of, write_autoencoder, write_pictures

SIDE, IMAGES, BATCH = 32, 21, 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`plain` and `residual` autoencoders, and `pictures`."""
    folder = tmp_path_factory.mktemp("latents")
    write_autoencoder(folder / "plain", PLAIN)
    write_autoencoder(folder / "residual", RESIDUAL)
    write_pictures(folder / "pictures", IMAGES)
    return folder


def call(folder: Path, kind: str, *more: object, data: Path | None = None) -> None:
    arguments = ["--checkpoint", folder / kind, "--data", data or folder / "pictures", "--resolution", SIDE]
    latent_stats.main([*map(str, arguments), "--batch-size", str(BATCH), "--num-threads", "0", *map(str, more)])


def features(folder: Path, sizes: Any, weights: dict[str, np.ndarray]) -> np.ndarray:
    """Of all pictures, [tokens, channels], computed at once."""
    source = open_source(folder / "pictures")
    pixels = np.stack([np.asarray(crop(decode(source[i].path), (SIDE, SIDE))) for i in range(IMAGES)])
    found = jax.jit(lambda w, x: network_of(sizes)(w).features_of_images(x))(weights, jnp.asarray(pixels))
    return np.asarray(found, np.float64).reshape(-1, found.shape[-1])


def weights_of(workdir: Path) -> dict[str, np.ndarray]:
    return {name: value for part in open_params(str(workdir)).values() for name, value in part.items()}


def test_the_statistics_of_all_images_in_the_releases_format(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call(folder, "plain", "--out", tmp_path / "stats.pt")
    found = torch.load(tmp_path / "stats.pt", weights_only=True)
    expected = features(folder, PLAIN, weights_of(folder / "plain"))
    assert {name: (tuple(value.shape), value.dtype) for name, value in found.items()} == {
        "mean": ((1, 16), torch.float32), "std": ((1, 16), torch.float32)
    }  # fmt: skip
    np.testing.assert_allclose(found["mean"][0].numpy(), expected.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["std"][0].numpy(), expected.std(0), rtol=1e-4)
    assert f"{tmp_path / 'stats.pt'}: mean [1, 16], std [1, 16]" in capsys.readouterr().out
    weights = open_file(tmp_path / "stats.pt").weights
    mean, std = latent_statistics(dict(weights.items()), 16)  # as `svg_jax.convert import` reads it
    np.testing.assert_array_equal((mean, std), (found["mean"][0], found["std"][0]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stats.pt"]


def test_a_residual_autoencoder_gets_those_of_all_its_channels(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs = ("--out", tmp_path / "stats.safetensors", "--to", tmp_path / "new")
    call(folder, "residual", "--match", "per_image", *outputs)
    weights, measured = weights_of(folder / "residual"), weights_of(tmp_path / "new")
    sizes = ConfigDict(load_config(str(folder / "residual"))["autoencoder"])
    sizes.residual.match = "per_image"
    expected = features(folder, latent_stats.assemble.autoencoder_config(sizes), weights)
    np.testing.assert_allclose(measured["latents.mean"], expected.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(measured["latents.std"], expected.std(0), rtol=1e-4)
    release = safetensors.numpy.load_file(tmp_path / "stats.safetensors")
    np.testing.assert_array_equal(release["std"], measured["latents.std"][None, :16])
    assert "without the 4 channels of the residual branch" in capsys.readouterr().out

    assert load_config(str(tmp_path / "new")) == load_config(str(folder / "residual"))
    loaded = open_autoencoder(*find_autoencoder(str(tmp_path / "new")), make_mesh({"fsdp": 1}, jax.devices()[:1]))
    for name, value in loaded.params.items():
        before = measured if name.startswith("latents.") else weights
        np.testing.assert_array_equal(np.asarray(value), before[name], err_msg=name)


def test_interrupted_and_started_again_it_gives_the_same(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--num-images", 19, "--save-every", 1)
    call(folder, "plain", "--out", tmp_path / "whole.safetensors", *options)

    real, steps = latent_stats.within, []

    def killed(total: int, batch: Any, step: int, batch_size: int) -> Any:
        steps.append(step)
        if step == 2 and steps == [0, 1, 2]:
            raise KeyboardInterrupt
        return real(total, batch, step, batch_size)

    monkeypatch.setattr(latent_stats, "within", killed)
    with pytest.raises(KeyboardInterrupt):
        call(folder, "plain", "--out", tmp_path / "parts.safetensors", *options)
    left = tmp_path / ".parts.safetensors.measuring.npz"
    assert left.exists()
    with pytest.raises(SystemExit, match=r"was begun with num_images = 19, and now it is 21: set it back, or remove"):
        call(folder, "plain", "--out", tmp_path / "parts.safetensors")
    call(folder, "plain", "--out", tmp_path / "parts.safetensors", *options)
    assert steps == [0, 1, 2, 1, 2]  # the last batch was under way when it ended
    assert not left.exists()
    assert (tmp_path / "parts.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_preempted_it_saves_and_says_so_by_its_exit_code(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latent_stats.distributed, "preempted", lambda step: step == 2)
    with pytest.raises(SystemExit) as stopped:
        call(folder, "plain", "--out", tmp_path / "a.safetensors")
    assert stopped.value.code == latent_stats.distributed.EXIT_PREEMPTED
    with np.load(tmp_path / ".a.safetensors.measuring.npz") as left:
        assert (int(left["done"]), float(left["num_tokens"])) == (2, 2 * BATCH * (SIDE // 8) ** 2)


def test_what_is_beyond_the_images_wanted_is_not_counted() -> None:
    batch: Any = {"valid": np.array([True, False, False, True]), "cause": np.array([0, 3, 4, 0])}
    left = latent_stats.within(10, batch, 2, 4)
    assert left["valid"].tolist() == [True, False, False, False]
    assert left["cause"].tolist() == [0, 3, 0, 0]


def test_totals_count_beyond_what_float32_can() -> None:
    batch = latent_stats.Moments(jnp.float32(3), jnp.array([1.0]), jnp.array([2.0]))
    totals = latent_stats.Totals(2.0**24, np.array([0.0]), np.array([0.0])).merged(
        batch, np.eye(len(Cause), dtype=np.int32)[2]
    )
    assert totals.num_tokens == 2**24 + 3
    assert totals.bad.tolist() == [0, 0, 1] + (len(Cause) - 3) * [0]
    assert totals.mean[0] == pytest.approx(3 / (2**24 + 3), rel=1e-12)


def test_broken_images_are_counted_and_too_many_stop(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pictures = write_pictures(tmp_path / "pictures", 7)
    (pictures / "0" / "bad.png").write_text("no image")
    call(folder, "plain", "--out", tmp_path / "a.safetensors", "--max-bad-fraction", 0.2, data=pictures)
    assert "1 of 8 records skipped (not_an_image 1)" in caplog.text
    for _ in range(2):  # a second run judges as the first
        with pytest.raises(
            SystemExit, match=r"1 of 8 records \(12\.5%\) could not be used \(not_an_image 1\), above max_bad_fraction"
        ):
            call(folder, "plain", "--out", tmp_path / "b.safetensors", data=pictures)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "pictures"]


def test_mended_images_are_read_again(folder: Path, tmp_path: Path) -> None:
    pictures = write_pictures(tmp_path / "pictures", 17)
    files = sorted(pictures.rglob("*.png"))
    contents = [file.read_bytes() for file in files]
    for file in files:
        file.write_text("no image")
    options = ("--out", tmp_path / "a.safetensors", "--save-every", 1)
    with pytest.raises(SystemExit, match=r"none of the 17 images of .*pictures could be read: .*\.png"):
        call(folder, "plain", *options, "--max-bad-fraction", 0.5, data=pictures)
    for file, content in zip(files, contents, strict=True):
        file.write_bytes(content)
    call(folder, "plain", *options, data=pictures)
    assert (tmp_path / "a.safetensors").exists()


def test_what_is_measured_outlives_a_failed_write(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(latent_stats, "write_release", fails)
        with pytest.raises(SystemExit, match="disk full"):
            call(folder, "plain", "--out", tmp_path / "a.safetensors")
    monkeypatch.setattr(latent_stats, "within", lambda *_: pytest.fail("measured again"))
    call(folder, "plain", "--out", tmp_path / "a.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_features_that_are_not_finite_are_told_from_those_that_do_not_vary(folder: Path, tmp_path: Path) -> None:
    saved = {part: dict(values) for part, values in open_params(str(folder / "plain")).items()}
    name = next(name for name, value in saved["frozen"].items() if name.startswith("encoder.") and value.ndim > 1)
    saved["frozen"][name] = np.full_like(saved["frozen"][name], np.nan)
    save_params(str(tmp_path / "broken"), saved, load_config(str(folder / "plain")))
    with pytest.raises(SystemExit, match="16 of 16 latent channels hold values that are not finite: the weights are"):
        call(tmp_path, "broken", "--out", tmp_path / "a.safetensors", "--save-every", 1, data=folder / "pictures")
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_images_of_one_colour_have_no_statistics() -> None:
    totals = latent_stats.Totals(4.0, np.zeros(2), np.array([1.0, 0.0]))
    with pytest.raises(ValueError, match="1 of 2 latent channels do not vary over 4 features"):
        totals.statistics()


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ((), "nothing to write: give --out FILE, --to WORKDIR or both"),
        (("--out", "{here}/a.npz"), r"a\.npz: the name of statistics must end in \.pt, \.pth, \.safetensors"),
        (("--out", "{here}/there.pt"), "there is .*there.pt already: choose another --out, or replace"),
        (("--to", "{here}"), "there is .* already: choose another --to"),
        (("--out", "gs://bucket/a.pt"), "must be a local path"),
        (("--out", "{here}/a.pt", "--num-images", "0"), "--num-images is 0: it must be at least 1"),
        (("--out", "{here}/a.pt", "--max-bad-fraction", "-1"), "--max-bad-fraction is -1: it must lie between 0 and 1"),
        (("--out", "{here}/a.pt", "--max-bad-fraction", "nan"), "--max-bad-fraction is nan: it must lie between"),
        (("--out", "{here}/there.pt/a.pt"), r"cannot write .*a\.pt \(.*\): choose another --out"),
        (("--to", "{here}/there.pt/a/b"), r"cannot write .*a/b \(.*\): choose another --to"),
        (("--out", "{here}/folder.pt", "--overwrite"), r"folder\.pt is a folder: choose another --out"),
        (("--out", "{here}/a.pt", "--dtype", "float8"), "unknown dtype 'float8'"),
        (("--out", "{here}/a.pt", "--resolution", "30"), "resolution=30 is not a multiple of the patch size 8"),
        (("--out", "{here}/a.pt", "--batch-size", "3"), "batch_size 3 does not divide over 8 devices"),
        (("--out", "{here}/a.pt", "--match", "batch"), "--match batch is for autoencoders with a residual branch"),
        (("--out", "{here}/a.pt", "--checkpoint", "{here}/encoder"), "holds .*'encoder'.* no autoencoder"),
    ],
)
def test_what_cannot_be_measured_is_said(folder: Path, tmp_path: Path, more: tuple[str, ...], reason: str) -> None:
    (tmp_path / "there.pt").write_bytes(b"")
    (tmp_path / "folder.pt").mkdir()
    if "--checkpoint" in more:
        save_params(str(tmp_path / "encoder"), {"frozen": {"a": np.zeros(1)}}, {"kind": "encoder"})
    with pytest.raises(SystemExit, match=f"error: .*{reason}"):
        call(folder, "plain", *(part.format(here=tmp_path) for part in more))


def test_help_names_all_compute_types() -> None:
    (dtype,) = (action for action in latent_stats.parser()._actions if action.dest == "dtype")
    assert dtype.help
    assert all(name in dtype.help for name in latent_stats.assemble.DTYPES)
