"""What is judged and what it is compared with, by what lies where the flags say."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines.folders import ImageFolder
from svg_jax.evaluate import networks
from svg_jax.evaluate.__main__ import main
from svg_jax.evaluate.fid.command import read_image
from svg_jax.evaluate.fid.moments import Moments
from svg_jax.evaluate.fid.picture_sources import GeneratedPictures, ImageArray
from svg_jax.evaluate.fid.sides import Side, compared_resolution, described, open_images, open_sides
from svg_jax.evaluate.fid.statistics_file import Statistics, write_statistics
from svg_jax.evaluate.generated import begin
from svg_jax.evaluate.prompt_sets import PromptEntry, PromptSet
from tests.evaluate.fid.small_inception import CHANNELS, SmallInception, write_inception


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`inception`, and `batch.npz` with images and their statistics, which are of other images here."""
    folder = tmp_path_factory.mktemp("sides")
    write_inception(folder / "inception")
    draw = np.random.default_rng(0)
    moments = Moments.of(draw.standard_normal((30, CHANNELS)))
    images = draw.integers(0, 256, (12, 8, 8, 3)).astype(np.uint8)
    np.savez(folder / "batch.npz", arr_0=images, mu=moments.mean, sigma=moments.covariance())
    np.savez(folder / "images.npz", arr_0=images)
    for resolution in (0, 64, 256):
        write_statistics(
            str(folder / f"{resolution}.npz"), Statistics.of(moments, resolution=resolution, extractor="ab")
        )
    return folder


def test_a_reference_batch_is_statistics_only_where_no_image_is_needed(folder: Path, tmp_path: Path) -> None:
    batch, images = str(folder / "batch.npz"), str(folder / "images.npz")
    (_, reference) = open_sides(images, batch, None, ("fid",))
    assert reference.statistics is not None
    for metrics in (("precision_recall",), ("fid", "precision_recall")):
        (_, reference) = open_sides(images, batch, None, metrics)
        assert reference.statistics is None
        assert isinstance(reference.source, ImageArray)
    (judged,) = open_sides(batch, None, None, ("is",))
    assert isinstance(judged.source, ImageArray)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(networks, "Inception", SmallInception)
        arguments = [f"--images={images}", f"--reference={batch}", f"--inception={folder / 'inception'}"]
        main(["fid", *arguments, "--metrics=fid,is,precision_recall", f"--out={tmp_path}"])
    scores = json.loads((tmp_path / "results.json").read_text())["scores"]
    assert scores["fid"] == pytest.approx(0.0, abs=1e-6)  # of the same images, and not of those statistics
    assert scores["precision"] == scores["recall"] == 1


def test_statistics_alone_are_compared_as_they_are(folder: Path, tmp_path: Path) -> None:
    def sides(images: str, reference: str) -> list[Side]:
        return open_sides(str(folder / images), str(folder / reference), None, ("fid",))

    assert compared_resolution(sides("64.npz", "64.npz"), 0) == 64
    assert compared_resolution(sides("0.npz", "0.npz"), 0) == 0
    assert compared_resolution(sides("images.npz", "64.npz"), 0) == 0
    with pytest.raises(
        ValueError, match=r"64\.npz and --reference .*0\.npz hold statistics of crops of 64 px and of w"
    ):
        compared_resolution(sides("64.npz", "0.npz"), 0)
    arguments = [f"--images={folder / '64.npz'}", "--metrics=fid"]
    main(["fid", *arguments, f"--reference={folder / '64.npz'}", f"--out={tmp_path / 'out'}"])
    report = json.loads((tmp_path / "out" / "results.json").read_text())
    assert report["scores"]["fid"] == pytest.approx(0.0, abs=1e-9)
    assert report["settings"]["resolution"] == 64
    for reference, flags in (("256.npz", []), ("64.npz", ["--resolution=256"])):
        with pytest.raises(SystemExit, match=r"statistics of crops of 64 px.* and .*crops of 256 px"):
            main(["fid", *arguments, f"--reference={folder / reference}", f"--out={tmp_path / 'out'}", *flags])


def test_our_folders_are_known_from_within(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = tuple(PromptEntry(i, name, f"a {name}", {}) for i, name in enumerate(("fox", "hen")))
    generated = begin(str(tmp_path / "drawn"), PromptSet("prompts", "ab", entries), 1, {"width": 8, "height": 8})
    generated.save(entries[0], [Image.new("RGB", (8, 8))])
    inside = tmp_path / "drawn" / "images"
    for path in (inside, tmp_path / "drawn"):
        with pytest.raises(ValueError, match=r"drawn is not complete: images/hen_0\.png is missing"):
            open_images(str(path), None)
    generated.save(entries[1], [Image.new("RGB", (8, 8))])
    monkeypatch.chdir(inside)
    assert read_image(0, (open_sides(".", None, None, ())[0], 1))[0] == "images/hen_0.png"
    source = open_images(str(inside), None)
    assert isinstance(source, GeneratedPictures)
    (side,) = open_sides(str(inside), None, None, ("fid",))
    assert described(side)["drawn_with"] == generated.settings
    listing = tmp_path / "drawn" / "prompts.jsonl"
    listing.rename(tmp_path / "elsewhere")
    for path in (inside, tmp_path / "drawn"):
        with pytest.raises(ValueError, match=r"prompts\.jsonl is missing, or not as it was written"):
            open_images(str(path), None)

    # Real images beside a list of prompts are no pictures of ours.
    (tmp_path / "data" / "images").mkdir(parents=True)
    (tmp_path / "data" / "prompts.jsonl").write_text("{}")
    Image.new("RGB", (8, 8)).save(tmp_path / "data" / "images" / "a.png")
    assert isinstance(open_images(str(tmp_path / "data" / "images"), None), ImageFolder)
    (tmp_path / "data" / "images" / "b.png").write_bytes((tmp_path / "data" / "images" / "a.png").read_bytes())
    (tmp_path / "data" / "images" / "settings.json").write_text("{")
    (side,) = open_sides(str(tmp_path / "data" / "images"), None, None, ("fid",))
    with pytest.raises(
        ValueError, match=r"images/settings\.json does not say how the pictures were drawn .*: remove it"
    ):
        described(side)


def test_only_what_is_asked_for_is_warned_of(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(networks, "Inception", SmallInception)
    flags = [f"--images={folder / 'images.npz'}", f"--inception={folder / 'inception'}", "--metrics=is"]
    with caplog.at_level(logging.WARNING, logger="svg_jax"):
        main(["fid", *flags, f"--reference={folder / 'batch.npz'}", f"--out={tmp_path}"])
    report = json.loads((tmp_path / "results.json").read_text())
    assert report["warnings"] == []
    assert "reference" not in report["settings"]
    assert [record.getMessage() for record in caplog.records if record.name == "svg_jax"] == [
        "--metrics is looks at --images alone: --reference is left out"
    ]
