"""Which kind of source a path opens, from where, and what is said of paths that open none."""

from __future__ import annotations

import functools
import http.server
import json
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from PIL import Image

from data_pipelines import sources
from data_pipelines.folders import ImageFolder
from data_pipelines.lists import JsonLines, JsonList
from data_pipelines.mixture import Mixture
from data_pipelines.sources import open_source

LINE = json.dumps({"path": "pictures/a.jpg", "prompt": "a cat"}) + "\n"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("SVG_CACHE", str(folder))
    return folder


class Shards(list[str]):
    """Stands for a source of shards: which files it was given."""

    def __init__(self, kind: str, name: str, shards: list[str]) -> None:
        super().__init__(shards)
        self.kind, self.name = kind, name


@pytest.fixture
def shards(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in sources.SHARDS:
        monkeypatch.setitem(sources.SHARDS, kind, functools.partial(Shards, kind))


def test_lists_mixtures_and_folders(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(LINE)
    (tmp_path / "a.json").write_text(f"[{LINE}]")
    (tmp_path / "a.yaml").write_text("META: [{path: a.jsonl}]")
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    for name, kind in (("a.jsonl", JsonLines), ("a.json", JsonList), ("a.yaml", Mixture), (".", ImageFolder)):
        source = open_source(tmp_path / name)
        assert type(source) is kind
        assert len(source) == 1


@pytest.mark.parametrize("kind", list(sources.SHARDS))
@pytest.mark.usefixtures("shards")
def test_shards_of_a_file_a_folder_or_a_pattern(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "shards [1]"
    folder.mkdir()
    for name in (f"b{kind}", f"a{kind}", f"c2{kind}", "report.json", ".preview.png"):
        (folder / name).touch()
    a, b, c = (str(folder / f"{name}{kind}") for name in ("a", "b", "c2"))
    opened = open_source(a)
    assert isinstance(opened, Shards)
    assert (opened, opened.kind, opened.name) == ([a], kind, a)
    opened = open_source(folder)
    assert (opened, opened.kind, opened.name) == ([a, b, c], kind, str(folder))
    assert open_source(tmp_path / "*" / f"?{kind}") == [a, b]
    (folder / "x.tar").touch()
    (folder / "x.parquet").touch()
    with pytest.raises(ValueError, match=r"shards \[1\] has files that end in .* and .*; expected one kind"):
        open_source(folder)


@pytest.mark.parametrize("image", ["a.jpg", "n01440764/a.JPEG"])
@pytest.mark.usefixtures("shards")
def test_shards_among_images_are_refused(tmp_path: Path, image: str) -> None:
    (tmp_path / "stray.tar").touch()
    (tmp_path / image).parent.mkdir(exist_ok=True)
    (tmp_path / image).touch()
    with pytest.raises(ValueError, match=f"holds images, such as {image}, and shards: move one kind elsewhere"):
        open_source(tmp_path)
    assert open_source(tmp_path / "*.tar") == [str(tmp_path / "stray.tar")]


@pytest.mark.parametrize("kind", list(sources.SHARDS))
@pytest.mark.usefixtures("shards")
def test_shards_at_an_address(kind: str) -> None:
    bucket = fsspec.filesystem("memory")
    a, b = (f"memory://shards{kind[1:]}/{name}{kind}" for name in ("a", "b"))
    for name in (a, b):
        bucket.pipe(name, b"")
    assert open_source(a) == [a]
    for name in (f"memory://shards{kind[1:]}/*{kind}", f"memory://shards{kind[1:]}", f"memory://shards{kind[1:]}/"):
        assert open_source(name) == [a, b]


def test_a_list_in_a_bucket_is_copied_once_for_each_version_of_it(cache: Path) -> None:
    bucket = fsspec.filesystem("memory")
    bucket.pipe("memory://lists/a.jsonl", LINE.encode())
    bucket.pipe("memory://lists/mix.yaml", b"META: [{path: a.jsonl}, {path: a.jsonl, root: /data}]")
    source = open_source("memory://lists/a.jsonl")
    assert source[0].path == "memory://lists/pictures/a.jpg"
    assert source[0].where == "memory://lists/a.jsonl:1"
    copies = sorted(cache.glob("*a.jsonl"))
    assert [copy.read_text() for copy in copies] == [LINE]
    mixture = open_source("memory://lists/mix.yaml")
    assert [mixture[i].path for i in range(2)] == ["memory://lists/pictures/a.jpg", "/data/pictures/a.jpg"]
    assert sorted(cache.glob("*a.jsonl")) == copies
    bucket.pipe("memory://lists/a.jsonl", LINE.encode() * 2)
    assert len(open_source("memory://lists/a.jsonl")) == 2
    with pytest.raises(FileNotFoundError, match=r"memory://lists/none\.jsonl"):
        open_source("memory://lists/none.jsonl")


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """Where a web server on this machine gives out the test's folder."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    handler.log_message = lambda *args: None  # type: ignore[attr-defined]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_a_list_on_the_web(tmp_path: Path, address: str) -> None:
    (tmp_path / "a.jsonl").write_text(LINE)
    source = open_source(f"{address}/a.jsonl")
    assert source[0].path == f"{address}/pictures/a.jpg"
    assert open_source(f"{address}/a.jsonl", root="/data")[0].path == "/data/pictures/a.jpg"
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl"):
        open_source(f"{address}/none.jsonl")


def test_paths_may_be_written_as_addresses(tmp_path: Path) -> None:
    address, elsewhere = f"file://{tmp_path}", tmp_path / "elsewhere"
    elsewhere.mkdir()
    Image.new("RGB", (4, 4)).save(elsewhere / "a.png")
    lines = [{"path": "a.png"}, {"path": f"{address}/elsewhere/a.png"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    mixture = f"META: [{{path: '{address}/a.jsonl', root: '{address}/elsewhere'}}, {{path: '{address}/elsewhere'}}]"
    (tmp_path / "a.yaml").write_text(mixture)
    for source in (open_source(f"{address}/a.yaml"), open_source(f"{address}/a.jsonl", root=f"{address}/elsewhere")):
        assert {source[i].path for i in range(len(source))} == {str(elsewhere / "a.png")}
    with tarfile.open(elsewhere / "a.tar", "w") as tar:
        tar.add(elsewhere / "a.png", "a.png")
    for name in ("elsewhere/a.tar", "elsewhere/*.tar"):
        assert open_source(f"{address}/{name}")[0].where == f"{elsewhere}/a.tar:a.png"


def test_a_mixture_in_a_mixture_is_refused_behind_a_query_too(tmp_path: Path, address: str) -> None:
    (tmp_path / "mix.yaml").write_text("META: [{path: 'mix.yaml?version=1'}]")
    with pytest.raises(ValueError, match=r"entry 1 is a mixture itself, .*mix\.yaml\?version=1; name its lists"):
        open_source(f"{address}/mix.yaml")


@pytest.mark.parametrize("name", ["none.jsonl", "none", "none.tar", "none/*.tar"])
def test_what_does_not_exist_is_fatal(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"data .*none.* does not exist.*; expected a list \(\.jsonl"):
        open_source(tmp_path / name)


def test_a_file_of_another_kind_is_fatal(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a.jpg,a cat")
    with pytest.raises(ValueError, match=r"a\.csv ends in '\.csv'; expected a list \(\.jsonl"):
        open_source(tmp_path / "a.csv")


def test_a_folder_named_like_a_list_is_no_list(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").mkdir()
    with pytest.raises(ValueError, match="holds no images"):
        open_source(tmp_path / "a.jsonl")
