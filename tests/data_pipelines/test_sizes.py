"""Sizes of images: measured once, kept where that can be, and measured anew for other records."""

from __future__ import annotations

import errno
import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipelines import images, sizes
from data_pipelines.sizes import image_sizes
from data_pipelines.sources import open_source

EXPECTED = [[10 + i, 5] for i in range(8)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("SVG_CACHE", str(folder))
    return folder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sizes, "_CHUNK", 3)
    for i, (width, height) in enumerate(EXPECTED):
        Image.new("RGB", (width, height)).save(tmp_path / f"{i}.png")
    return tmp_path


def test_sizes_are_measured_once_and_mapped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert image_sizes(open_source(folder)).tolist() == EXPECTED
    monkeypatch.setattr(images, "read_size", None)
    kept = image_sizes(open_source(folder))
    assert (kept.dtype, kept.tolist()) == (np.int32, EXPECTED)
    assert isinstance(kept, np.memmap)
    assert kept.filename == str(folder / ".svg_jax.sizes")


def test_sizes_are_measured_anew_for_other_records(folder: Path) -> None:
    image_sizes(open_source(folder))
    Image.new("RGB", (99, 5)).save(folder / "8.png")
    assert image_sizes(open_source(folder)).tolist() == [*EXPECTED, [99, 5]]
    assert [path.name for path in folder.iterdir() if path.suffix != ".png"] == [".svg_jax.sizes"]
    (folder / ".svg_jax.sizes").write_bytes(b"damaged")
    assert image_sizes(open_source(folder)).tolist() == [*EXPECTED, [99, 5]]


@pytest.mark.parametrize("cache_too", [False, True])
def test_where_nothing_can_be_written_sizes_are_found_all_the_same(
    folder: Path, own_cache: Path, cache_too: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(function: Any) -> Any:
        def refuse(path: Path, *args: Any, **settings: Any) -> Any:
            if path.name.endswith(".partial") and (cache_too or path.parent != own_cache):
                raise OSError(errno.EROFS, "Read-only file system", str(path))
            return function(path, *args, **settings)

        return refuse

    for name in ("open", "unlink"):  # as such a file system answers, also where there is nothing to unlink
        monkeypatch.setattr(Path, name, read_only(getattr(Path, name)))
    for _ in range(2):
        assert image_sizes(open_source(folder)).tolist() == EXPECTED
    assert [path.suffix for path in own_cache.iterdir()] == ([] if cache_too else [".sizes"])
    assert {path.suffix for path in folder.iterdir()} == {".png"}


def test_broken_ones_have_none_and_are_named(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "3.png").write_bytes(b"")
    for expected in ("no size: .*3.png is empty", "1 of 8 images of .* sizes are kept in .*/.svg_jax.sizes"):
        with caplog.at_level(logging.WARNING, logger="absl"):
            assert image_sizes(open_source(folder)).tolist() == [*EXPECTED[:3], [0, 0], *EXPECTED[4:]]
        assert re.search(expected, caplog.text)
        caplog.clear()


def test_sizes_that_the_records_say_spare_the_files(tmp_path: Path) -> None:
    lines = [{"path": "none.png", "prompt": "", "width": 30, "height": 10}, {"path": "b.png", "prompt": "", "width": 3}]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert image_sizes(open_source(tmp_path / "list.jsonl")).tolist() == [[30, 10], [0, 0]]
