"""Files that are made once: where they are kept, and when they are made anew."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
from numpy.typing import NDArray

from data_pipelines import files
from data_pipelines.cache import cache_folder, fetch, open_index
from tests.data_pipelines.servers import serve


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("SVG_CACHE", str(folder))
    return folder


class Build:
    """Gives the same numbers in two blocks, and counts how often it was asked."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> Iterator[NDArray[np.int64]]:
        self.times += 1
        yield np.arange(3)
        yield np.arange(3, 5)


def test_an_index_is_built_once_and_again_when_its_source_changes(tmp_path: Path) -> None:
    source, build = tmp_path / "list.jsonl", Build()
    source.write_text("first")
    for _ in range(3):
        index = open_index(source, "lines", build)
        assert isinstance(index, np.memmap)
        np.testing.assert_array_equal(index, np.arange(5))
        assert not index.flags.writeable
    assert build.times == 1
    assert [path.name for path in tmp_path.iterdir() if path != source] == [".list.jsonl.lines"]
    source.write_text("second")
    open_index(source, "lines", build)
    assert build.times == 2


def test_the_index_of_a_folder_or_a_pattern_stands_in_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = Build()
    monkeypatch.chdir(tmp_path)
    for name in (".", str(tmp_path), f"file://{tmp_path}", "*.tar", f"{tmp_path}/*.tar"):
        np.testing.assert_array_equal(open_index(name, "lines", build, version="1"), np.arange(5))
    assert build.times == 2
    assert {path.name for path in tmp_path.iterdir()} == {".svg_jax.lines", ".*.tar.lines"}


@pytest.mark.parametrize("name", ["tfds:coco/train", "gs://bucket/*.tar", "/proc/a*/b.tar"])
def test_what_has_no_folder_is_kept_in_the_cache_folder_wherever_one_works(
    own_cache: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = Build()
    for folder in (own_cache, tmp_path):
        monkeypatch.chdir(folder)
        open_index(name, "lines", build, version="1")
    assert build.times == 1
    assert [path.suffix for path in own_cache.iterdir()] == [".lines"]


def test_a_cut_index_is_built_anew(tmp_path: Path) -> None:
    source, build = tmp_path / "a", Build()
    source.touch()
    open_index(source, "lines", build)
    os.truncate(tmp_path / ".a.lines", 70)
    np.testing.assert_array_equal(open_index(source, "lines", build), np.arange(5))
    assert build.times == 2


def test_an_index_of_nothing(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    for _ in range(2):
        assert open_index(tmp_path / "a", "lines", lambda: iter(())).shape == (0,)


def test_where_nothing_can_be_written_beside_the_cache_folder_is_used(own_cache: Path) -> None:
    build = Build()
    for _ in range(2):
        np.testing.assert_array_equal(open_index("/proc/version", "lines", build, version="1"), np.arange(5))
    assert build.times == 1
    assert [path.suffix for path in own_cache.iterdir()] == [".lines"]


def test_where_nothing_can_be_written_at_all_the_index_is_built_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SVG_CACHE", "/proc/no/cache")
    np.testing.assert_array_equal(open_index("/proc/version", "lines", Build(), version="1"), np.arange(5))


def test_an_index_that_cannot_be_built_leaves_nothing(tmp_path: Path) -> None:
    def build() -> Iterator[NDArray[np.int64]]:
        yield np.arange(3)
        raise ValueError("damaged")

    (tmp_path / "a").touch()
    with pytest.raises(ValueError, match="damaged"):
        open_index(tmp_path / "a", "lines", build)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("kind", ["parts", "whole"])
def test_a_remote_file_is_copied_once_for_each_version(tmp_path: Path, kind: str) -> None:
    (tmp_path / "list.jsonl").write_bytes(b"first" * 1000)
    with serve(tmp_path) as server:
        address = f"{server.url}/{kind}/list.jsonl"
        copy = fetch(address)
        assert copy.read_bytes() == b"first" * 1000
        assert copy.parent == cache_folder()
        assert copy.name.endswith("-list.jsonl")
        asked = server.asked.copy()
        assert fetch(address) == copy
        assert server.asked == asked
        (tmp_path / "list.jsonl").write_bytes(b"second")
        assert fetch(address).read_bytes() == b"second"
        with pytest.raises(FileNotFoundError, match=r"none\.jsonl does not exist"):
            fetch(f"{server.url}/{kind}/none.jsonl")


def test_a_copy_is_read_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    content = bytes(range(256)) * 10
    with fsspec.open("memory://bucket/list.json", "wb") as file:
        file.write(content)
    sizes: list[int] = []
    read = files.read_bytes

    def counted(*args: object, **settings: int) -> bytes:
        sizes.append(settings["end"] - settings["start"])
        return read(*args, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr("data_pipelines.cache._BLOCK_BYTES", 1000)
    monkeypatch.setattr("data_pipelines.files._BLOCK_BYTES", 1000)
    monkeypatch.setattr(files, "read_bytes", counted)
    assert fetch("memory://bucket/list.json").read_bytes() == content
    assert sizes == [1000, 1000, 560]


def test_a_local_list_is_itself(tmp_path: Path) -> None:
    assert fetch(str(tmp_path)) == fetch(f"file://{tmp_path}") == tmp_path
