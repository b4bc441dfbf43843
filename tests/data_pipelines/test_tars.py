"""WebDataset shards, written by tarfile: which members make a record, and what is wrong with which."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data_pipelines import files, images, tars
from data_pipelines.records import BadRecord, Caption, Cause
from data_pipelines.sources import open_source
from data_pipelines.tars import split_name
from tests.data_pipelines.servers import serve


def picture(value: int, kind: str = "PNG") -> bytes:
    with io.BytesIO() as file:
        Image.new("RGB", (10 + value, 8), (value, 0, 0)).save(file, kind)
        return file.getvalue()


def write(path: Path, members: Sequence[tuple[str, bytes]], **settings: Any) -> Path:
    with tarfile.open(path, "w", **settings) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def numbered(first: int, last: int) -> list[tuple[str, bytes]]:
    members = ([(f"{i:03d}.png", picture(i)), (f"{i:03d}.txt", f"number {i}\n".encode())] for i in range(first, last))
    return [member for pair in members for member in pair]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SVG_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two shards of three and two records."""
    write(tmp_path / "s-000.tar", numbered(0, 3))
    write(tmp_path / "s-001.tar", numbered(3, 5))
    return tmp_path


def test_records_are_read_over_all_shards(shards: Path) -> None:
    for path in (shards, shards / "*.tar", shards / "s-{000..001}.tar"):
        source = open_source(path)
        assert len(source) == 5
        assert source.has_captions
        for i in (4, 0, 3, 1, 2):
            record = source[i]
            assert record.index == i
            assert record.where == f"{shards}/s-00{i // 3}.tar:{i:03d}.png"
            assert record.captions == (Caption(f"number {i}"),)
            assert images.read(record).getpixel((0, 0)) == (i, 0, 0)
        with pytest.raises(IndexError):
            source[5]


def test_another_process_asks_no_shard_again(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(shards)
    sent = pickle.dumps(source)
    assert len(sent) < 1500  # the index is not in it
    monkeypatch.setattr(files, "signature", None)
    monkeypatch.setattr(tars, "_scan", None)
    arrived = pickle.loads(sent)
    assert (arrived.signature, arrived.has_captions, len(arrived)) == (source.signature, True, 5)
    assert [arrived[i] for i in range(5)] == [source[i] for i in range(5)]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_of_one_record(tmp_path: Path, form: int) -> None:
    long = "deep/" * 40 + "größe"  # a name that takes headers of its own
    detailed = {"super_high_quality_caption": "a detailed cat", "caption": "a cat", "width": 11, "height": 8}
    members = [
        ("readme", b"no record"),
        ("dir.v1/a.cls", b"3"),
        ("dir.v1/a.JPG", picture(1, "JPEG")),
        ("dir.v1/a.seg.png", b"a mask"),
        ("._b.jpg", b"what a Mac leaves"),
        ("b.json", json.dumps(detailed).encode()),
        ("b.webp", picture(2, "WEBP")),
        ("c.json", b'{"caption": ["one", ["two", 3]]}'),
        ("c.png", picture(3)),
        ("d.txt", "\ufeffümlaut \n".encode()),
        ("d.json", b'{"caption": "not this one"}'),
        ("d.png", picture(4)),
        ("e.npy", b"no image"),
    ]
    if form != tarfile.USTAR_FORMAT:
        members += [(f"{long}.png", picture(5)), (f"{long}.txt", b"long")]
    source = open_source(write(tmp_path / "a.tar", members, format=form))
    records = [source[i] for i in range(len(source))]
    assert [record.path for record in records[:4]] == ["dir.v1/a.JPG", "b.webp", "c.png", "d.png"]
    assert [record.captions for record in records[:4]] == [
        (),
        (Caption("a detailed cat", 1.0, "align"),),
        (Caption("one"), Caption("two", 3.0)),
        (Caption("ümlaut"),),
    ]
    assert [record.size for record in records[:2]] == [None, (11, 8)]
    assert images.read(records[0]).size == (11, 8)
    if form != tarfile.USTAR_FORMAT:
        assert [record.path for record in records[4:]] == [f"{long}.png"]
        assert records[4].captions == (Caption("long"),)


@pytest.mark.parametrize(
    ("members", "cause", "reason"),
    [
        ([("a.txt", b"alone")], Cause.KEYS, r"a\.txt has no image; found the kinds \['\.txt'\]"),
        ([("a.png", b""), ("a.txt", b"caf\xe9")], Cause.ENCODING, r"a\.png \.txt is not UTF-8"),
        ([("a.png", b""), ("a.json", b"{")], Cause.NOT_JSON, r"a\.png \.json is not JSON"),
        ([("a.png", b""), ("a.json", b"[1]")], Cause.KEYS, r"\.json is a list; expected an object"),
        ([("a.png", b""), ("a.json", b'{"caption": 3}')], Cause.VALUE, "'caption' is a int"),
    ],
)
def test_one_bad_record(tmp_path: Path, members: list[tuple[str, bytes]], cause: Cause, reason: str) -> None:
    source = open_source(write(tmp_path / "a.tar", [*members, *numbered(1, 2)]))
    with pytest.raises(BadRecord, match=reason) as error:
        source[0]
    assert error.value.cause is cause
    assert source[1].captions == (Caption("number 1"),)


def test_a_record_larger_than_the_limit_is_not_read(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(shards)
    monkeypatch.setattr(files.read_bytes, "__kwdefaults__", {**files.read_bytes.__kwdefaults__, "limit": 100})
    with pytest.raises(BadRecord, match=r"s-000\.tar record 1: .* the limit is 100") as error:
        source[0]
    assert error.value.cause is Cause.TOO_LARGE


@pytest.mark.parametrize("kind", ["noise", "empty", "text", "gzip", "cut", "cut in the last", "header"])
def test_a_damaged_shard_is_fatal_and_named(shards: Path, kind: str) -> None:
    path = shards / "s-001.tar"
    content = path.read_bytes()
    if kind == "gzip":
        with tarfile.open(path, "w:gz") as tar:
            tar.add(shards / "s-000.tar", "a.png")
    else:
        damaged = {
            "noise": os.urandom(3000),
            "empty": b"",
            "text": b"<html>not found</html>",
            "cut": content[:700],
            "cut in the last": content[: 512 * 7 + 3],
            "header": content[:1024] + os.urandom(512) + content[1536:],
        }
        path.write_bytes(damaged[kind])
    with pytest.raises(ValueError, match=r"s-001\.tar (is damaged, compressed, or no tar file|is empty)"):
        open_source(shards)


def test_a_shard_that_is_damaged_later_gives_bad_records(shards: Path) -> None:
    source = open_source(shards)
    content = bytearray((shards / "s-000.tar").read_bytes())
    content[2048:2560] = os.urandom(512)  # the header of record 1
    (shards / "s-000.tar").write_bytes(content[:5000])
    assert source[0].captions == (Caption("number 0"),)
    for i in (1, 2):
        with pytest.raises(BadRecord, match=rf"s-000\.tar record {i + 1}") as error:
            source[i]
        assert error.value.cause is Cause.STORE


def test_a_key_in_two_places_is_fatal(tmp_path: Path) -> None:
    members = [("a.png", picture(1)), ("b.png", picture(2)), ("a.txt", b"late")]
    with pytest.raises(ValueError, match=r"members of 'a' in two places; expected .* --sort=name"):
        open_source(write(tmp_path / "a.tar", members))


def test_a_missing_shard_is_named(shards: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"s-002\.tar does not exist"):
        open_source(shards / "s-{000..002}.tar")


def test_shards_without_records(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no records in 1 files"):
        open_source(write(tmp_path / "a.tar", [("readme.md", b"nothing")]))


def test_a_shard_whose_name_is_not_utf8(tmp_path: Path) -> None:
    path = write(Path(os.fsdecode(os.fsencode(tmp_path) + b"/s-\xff.tar")), numbered(0, 2))
    for name in (path, tmp_path):
        source = open_source(name)
        assert source[1].captions == (Caption("number 1"),)
        assert source.signature == open_source(name).signature


def test_shards_are_scanned_once(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_source(shards)
    monkeypatch.setattr(tars, "_scan", None)
    second = open_source(shards)
    assert (second.signature, second[4]) == (first.signature, first[4])


def test_a_shard_written_anew_is_scanned_again(shards: Path) -> None:
    before = open_source(shards).signature
    write(shards / "s-001.tar", numbered(3, 9))
    source = open_source(shards)
    assert (len(source), source.signature != before) == (9, True)
    assert source[8].captions == (Caption("number 8"),)


def test_remote_shards_are_read_in_parts(shards: Path) -> None:
    with serve(shards) as server:
        source = open_source(f"{server.url}/parts/s-{{000..001}}.tar")
        asked = server.asked.total()
        assert [source[i].captions[0].text for i in range(5)] == [f"number {i}" for i in range(5)]
        assert server.asked.total() == asked + 5
        assert {path.suffix for path in Path(os.environ["SVG_CACHE"]).iterdir()} == {".members", ".records"}
        with pytest.raises(ValueError, match="gives no parts of files"):
            open_source(f"{server.url}/whole/s-000.tar")


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("a.jpg", ("a", ".jpg")),
        ("a/b.c/d.Seg.PNG", ("a/b.c/d", ".seg.png")),
        ("./a.jpg", ("./a", ".jpg")),
        ("a", ("a", "")),
        ("a.b/c", ("a.b/c", "")),
        ("a/.b.jpg", ("a/.b.jpg", "")),
    ],
)
def test_the_key_ends_at_the_first_dot_of_the_last_part(name: str, parts: tuple[str, str]) -> None:
    assert split_name(name) == parts
