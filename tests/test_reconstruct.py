"""The door that shows reconstructions: which pictures, at which size, beside each other, and what is said of them."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import ExifTags, Image

from data_pipelines.images import crop, decode
from svg_jax import reconstruct
from svg_jax.autoencoder_steps import reconstruct as reconstruct_step
from svg_jax.checkpoint import load_config, open_params, save_params
from tests.tiny_autoencoders import PLAIN, RESIDUAL, network_of, write_autoencoder, write_pictures


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`plain` and `residual` autoencoders, and `pictures`, all of 40x40."""
    folder = tmp_path_factory.mktemp("reconstruct")
    write_autoencoder(folder / "plain", PLAIN)
    write_autoencoder(folder / "weights" / "autoencoder", RESIDUAL)
    write_pictures(folder / "pictures", 6, size=(40, 40))
    return folder


def call(folder: Path, out: Path, *images: object, kind: str = "plain", more: tuple[object, ...] = ()) -> None:
    reconstruct.main([*map(str, images), "--checkpoint", str(folder / kind), "--out", str(out), *map(str, more)])


def pixels(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file)).astype(np.int32)


def test_a_picture_its_reconstruction_and_the_difference(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = folder / "pictures" / "0" / "00.png"
    call(folder, tmp_path, file)
    before, after = pixels(file), pixels(tmp_path / "reconstructions" / "00.png")
    weights = {n: v for part in open_params(str(folder / "plain")).values() for n, v in part.items()}
    expected = jax.jit(lambda w, x: reconstruct_step(network_of(PLAIN), w, x))(
        weights, jnp.asarray(before[None], jnp.uint8)
    )
    assert np.abs(after - np.asarray(expected[0], np.int32)).max() <= 1
    row = pixels(tmp_path / "side_by_side" / "00.png")
    assert row.shape == (40, 120, 3)
    np.testing.assert_array_equal(row[:, :40], before)
    np.testing.assert_array_equal(row[:, 40:80], after)
    np.testing.assert_array_equal(row[:, 80:], np.minimum(4 * np.abs(before - after), 255))
    value = 20 * np.log10(255 / np.sqrt(np.mean((before - after) ** 2.0)))
    assert f"00.png: 40x40, PSNR {value:.2f} dB" in capsys.readouterr().out


def test_folders_and_patterns_in_any_mode_at_native_size(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    Image.new("LA", (40, 40), (90, 128)).save(mixed / "a.png")
    Image.new("CMYK", (40, 40), (10, 20, 30, 0)).save(mixed / "a.jpg")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (43, 37), (10, 200, 30)).save(mixed / "turned.jpg", exif=exif)
    call(folder, tmp_path / "out", mixed, folder / "pictures" / "1" / "*.png")
    written = sorted(p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.png"))
    names = ["04", "05", "a", "a_2", "turned"]
    assert written == [f"{kind}/{name}.png" for kind in ("reconstructions", "side_by_side") for name in names]
    assert pixels(tmp_path / "out" / "reconstructions" / "turned.png").shape == (40, 40, 3)
    said = capsys.readouterr().out
    assert "turned.jpg: 40x40, from 37x43, PSNR" in said
    assert re.search(r"mean of 5 pictures: PSNR [\d.]+ dB", said)


def test_sizes_are_rounded_to_patches() -> None:
    image = Image.new("RGB", (43, 21))
    assert reconstruct.fitted(image, 8, None, "a").shape == (24, 40, 3)
    assert reconstruct.fitted(image, 8, [(32, 32), (48, 16)], "a").shape == (16, 48, 3)


def test_a_residual_autoencoder_matches_each_picture_alone(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = folder / "pictures" / "0" / "01.png"
    call(folder, tmp_path, file, kind="weights", more=("--resolution", 32))
    assert "matched per image" in caplog.text
    assert pixels(tmp_path / "reconstructions" / "01.png").shape == (32, 32, 3)
    weights = {n: v for part in open_params(str(folder / "weights" / "autoencoder")).values() for n, v in part.items()}
    residual = dataclasses.replace(RESIDUAL.residual, match="per_image")
    network = network_of(dataclasses.replace(RESIDUAL, residual=residual))
    images = np.stack([np.asarray(crop(decode(folder / "pictures" / "0" / f"0{i}.png"), (32, 32))) for i in (1, 2)])
    expected = jax.jit(lambda w, x: reconstruct_step(network, w, x))(weights, jnp.asarray(images))
    after = pixels(tmp_path / "reconstructions" / "01.png")
    assert np.abs(after - np.asarray(expected[0], np.int32)).max() <= 1  # whatever its neighbours


def test_in_tiles_it_looks_almost_the_same(folder: Path, tmp_path: Path) -> None:
    file = folder / "pictures" / "0" / "02.png"
    call(folder, tmp_path / "whole", file)
    call(folder, tmp_path / "tiles", file, more=("--tile", 32))
    whole, tiles = (pixels(tmp_path / name / "reconstructions" / "02.png") for name in ("whole", "tiles"))
    assert 0 < np.abs(whole - tiles).mean() < 0.25 * whole.std()


def test_what_cannot_be_read_is_skipped_and_said(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = tmp_path / "pictures"
    shutil.copytree(folder / "pictures" / "1", pictures)
    (pictures / "bad.png").write_text("no image")
    Image.new("RGB", (40, 7)).save(pictures / "small.png")
    call(folder, tmp_path / "out", pictures)
    assert "bad.png is none: it begins" in caplog.text
    assert "small.png has 40x7 pixels, less than one patch of 8x8: enlarge it first" in caplog.text
    assert "2 pictures were skipped" in capsys.readouterr().out


def test_values_that_are_not_finite_are_said_and_not_shown(folder: Path, tmp_path: Path) -> None:
    saved = {part: dict(values) for part, values in open_params(str(folder / "plain")).items()}
    name = "decoder.conv_out.bias"
    saved["ema"][name] = np.full_like(saved["ema"][name], np.nan)
    save_params(str(tmp_path / "broken"), saved, load_config(str(folder / "plain")))
    file = folder / "pictures" / "0" / "00.png"
    with pytest.raises(
        SystemExit, match=r"the reconstruction of .*00\.png holds values that are not finite: the weights"
    ):
        call(tmp_path, tmp_path / "out", file, kind="broken")
    assert not list((tmp_path / "out").rglob("*.png"))


@pytest.mark.parametrize(
    ("image", "more", "reason"),
    [
        ("none.png", (), "there is no picture .*none.png: name files, folders or patterns"),
        ("small.png", (), "small.png has 3x9 pixels, less than one patch of 8x8: enlarge it first"),
        ("empty", (), "empty holds no images"),
        ("good.png", ("--tile", 16), "--tile 16 is too small: it must be at least 32 pixels"),
        ("good.png", ("--resolution", 30), "resolution=30 is not a multiple of the patch size 8"),
        ("good.png", ("--resolution", 0), "--resolution is 0: it must be at least one patch, 8 pixels"),
        ("good.png", ("--resolution", 32, "--max-ratio", "nan"), "max_ratio=nan is not at least 1"),
        ("good.png", ("--max-ratio", 2), "--max-ratio 2 is of the crops of --resolution: give that too"),
        (
            "good.png",
            ("--out", "{here}/small.png"),
            r"cannot write pictures to .*small\.png \(.*\): choose another --out",
        ),
        ("pictures", ("--out", "{here}/pictures"), "--out .* and the input .*pictures lie one in the other"),
        ("pictures", ("--out", "{here}/pictures/deep/er"), "lie one in the other: choose another --out"),
        ("*/*/*.png", ("--out", "{here}/before"), r"the input .*before/side_by_side/a\.png lie one in the other"),
        ("good.png", ("--match", "batch"), "--match batch is for autoencoders with a residual branch"),
        ("good.png", ("--checkpoint", "none"), "no checkpoint in .*none"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(
    folder: Path, tmp_path: Path, image: str, more: tuple[object, ...], reason: str
) -> None:
    Image.new("RGB", (3, 9)).save(tmp_path / "small.png")
    Image.new("RGB", (32, 32)).save(tmp_path / "good.png")
    (tmp_path / "empty").mkdir()
    for file in ("pictures/a.png", "before/side_by_side/a.png"):
        (tmp_path / file).parent.mkdir(parents=True)
        shutil.copy(tmp_path / "good.png", tmp_path / file)
    more = tuple(str(part).format(here=tmp_path) for part in more)
    with pytest.raises(SystemExit, match=f"error: .*{reason}"):
        call(folder, tmp_path / "out", tmp_path / image, more=more)
