"""Our shards, written and damaged: what comes back, and what a damaged one costs."""

from __future__ import annotations

import dataclasses
import io
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import msgpack
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from data_pipelines import arrayrecords, files, images
from data_pipelines.arrayrecords import write_shard
from data_pipelines.records import BadRecord, Caption, Cause, Record
from data_pipelines.sources import open_source


def record(value: int) -> Record:
    with io.BytesIO() as file:
        Image.new("RGB", (10 + value, 8), (value, 0, 0)).save(file, "PNG")
        image = file.getvalue()
    captions = (Caption(f"number {value}"), Caption("größer", 0.5, "align"))[: value % 3]
    return Record(value, f"{value}.png", f"list.jsonl:{value + 1}", captions, image, (10 + value, 8))


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("SVG_CACHE", str(folder))
    return folder


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Shards of three, no and two records, beside a report."""
    for number, values in enumerate([range(3), range(0), range(3, 5)]):
        assert write_shard(tmp_path / f"s-{number}.array_record", map(record, values)) == len(values)
    (tmp_path / "report.json").write_text("{}")
    return tmp_path


def test_records_come_back_over_all_shards(shards: Path) -> None:
    for path in (shards, shards / "s-*.array_record"):
        source = open_source(path)
        assert len(source) == 5
        assert source.has_captions
        for i in (4, 0, 3, 1, 2):
            where = f"{shards}/s-{'00022'[i]}.array_record:{'01201'[i]}"
            original = record(i)
            assert source[i] == Record(i, original.where, where, original.captions, original.image, original.size)
            assert images.read(source[i]).getpixel((0, 0)) == (i, 0, 0)
        with pytest.raises(IndexError):
            source[5]


def test_another_process_asks_no_shard_again(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(shards)
    source[4]
    sent = pickle.dumps(source)
    monkeypatch.setattr(files, "signature", None)
    monkeypatch.setattr(arrayrecords, "_count", None)
    arrived = pickle.loads(sent)
    assert (arrived.signature, arrived.has_captions, len(arrived)) == (source.signature, True, 5)
    assert [arrived[i] for i in range(5)] == [source[i] for i in range(5)]


def test_records_without_captions(tmp_path: Path) -> None:
    path = tmp_path / "a.array_record"
    write_shard(path, [record(0), record(3)])
    source = open_source(path)
    assert not source.has_captions
    assert source[1].captions == ()


def test_the_same_records_make_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_shard(tmp_path / name, map(record, range(20)))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_record_without_its_image_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"list\.jsonl:1 holds no image to be written"):
        write_shard(tmp_path / "a", [Record(0, "a.png", "list.jsonl:1")])


@pytest.mark.parametrize("kind", ["noise", "empty", "cut", "footer"])
def test_a_damaged_shard_is_fatal_and_named(shards: Path, kind: str) -> None:
    path = shards / "s-2.array_record"
    content = path.read_bytes()
    damaged = {
        "noise": os.urandom(100_000),
        "empty": b"",
        "cut": content[: len(content) // 2],
        "footer": content[:-65536] + os.urandom(65536),
    }
    path.write_bytes(damaged[kind])
    with pytest.raises(ValueError, match=r"s-2\.array_record is damaged, cut short, or no ArrayRecord file"):
        open_source(shards)


def test_a_damaged_record_is_one_bad_record(shards: Path) -> None:
    path = shards / "s-0.array_record"
    content = bytearray(path.read_bytes())
    place = content.index(b"number 1")
    content[place : place + 8] = b"damage 1"
    path.write_bytes(content)
    source = open_source(shards)
    with pytest.raises(BadRecord, match=r"s-0\.array_record:1 cannot be read \(.*hash mismatch") as error:
        source[1]
    assert error.value.cause is Cause.STORE
    assert [source[i].size for i in (0, 2, 3)] == [(10, 8), (12, 8), (13, 8)]


@pytest.mark.parametrize(
    ("content", "cause", "reason"),
    [
        (b"no map", Cause.KEYS, "is no record that `python -m data_pipelines.pack` wrote|holds a int"),
        (msgpack.packb([1]), Cause.KEYS, "holds a list; expected 'image', 'captions'"),
        (msgpack.packb({"image": b"", "text": "a"}), Cause.KEYS, r"holds \['image', 'text'\]; expected"),
        (
            msgpack.packb({"image": "a.jpg", "captions": [], "where": "a", "size": None}),
            Cause.VALUE,
            "has a str under 'image'; expected bytes",
        ),
        (msgpack.packb({"image": b"", "captions": ["a"], "where": "a", "size": None}), Cause.KEYS, "expected"),
    ],
)
def test_records_of_others(tmp_path: Path, content: bytes, cause: Cause, reason: str) -> None:
    writer = ArrayRecordWriter(str(tmp_path / "a.array_record"), "group_size:1")
    writer.write(content)
    writer.close()
    with pytest.raises(BadRecord, match=reason) as error:
        open_source(tmp_path)[0]
    assert error.value.cause is cause


def test_a_missing_shard_is_named(shards: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"s-3\.array_record does not exist"):
        open_source(shards / "s-{2..3}.array_record")


def test_shards_without_records(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.array_record", [])
    with pytest.raises(ValueError, match="holds no records in 1 files"):
        open_source(tmp_path)


def test_threads_read_with_fewer_readers_than_shards(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrayrecords, "_OPEN_READERS", 1)
    source = open_source(shards)
    with ThreadPoolExecutor(8) as pool:
        sizes = list(pool.map(lambda i: source[i % 5].size, range(500)))
    assert sizes == [(10 + i % 5, 8) for i in range(500)]


def test_the_signature_follows_the_content(shards: Path) -> None:
    before = open_source(shards).signature
    assert open_source(shards).signature == before
    write_shard(shards / "s-1.array_record", [record(7)])
    assert open_source(shards).signature != before


def test_remote_shards_are_copied_once(shards: Path, own_cache: Path) -> None:
    for number in (0, 2):
        with fsspec.open(f"memory://packed/s-{number}.array_record", "wb") as file:
            file.write((shards / f"s-{number}.array_record").read_bytes())
    for _ in range(2):
        source = open_source("memory://packed/*.array_record")
        assert [source[i].size for i in range(5)] == [(10 + i, 8) for i in range(5)]
        assert source[4].where == "memory://packed/s-2.array_record:1"
        assert len(list(own_cache.iterdir())) == 2


def test_copies_of_many_bytes_are_announced(
    shards: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with fsspec.open("memory://large/s.array_record", "wb") as file:
        file.write((shards / "s-0.array_record").read_bytes())
    with caplog.at_level("WARNING", logger="absl"):
        open_source("memory://large/s.array_record")
        assert not caplog.messages
        monkeypatch.setattr(arrayrecords, "_MANY_BYTES", 1000)
        open_source(shards)
        assert not caplog.messages
        open_source("memory://large/s.array_record")
    assert "memory://large/s.array_record: shards of 0.0 GiB are copied to" in caplog.text


def test_a_pack_that_is_not_finished_is_no_data_set(shards: Path) -> None:
    (shards / "report.json").unlink()
    open_source(shards)  # shards of somebody else
    (shards / "pack.json").touch()
    bucket = fsspec.filesystem("memory")
    for file in shards.iterdir():
        bucket.pipe(f"memory://begun/{file.name}", file.read_bytes())
    for path in (str(shards), f"{shards}/*.array_record", "memory://begun"):
        with pytest.raises(ValueError, match=r"the packing of .* is not finished: run the same command again"):
            open_source(path)
    (shards / "report.json").touch()
    bucket.pipe("memory://begun/report.json", b"")
    assert len(open_source(shards)) == len(open_source("memory://begun")) == 5


def test_a_name_that_is_no_text_is_spelled_out(tmp_path: Path) -> None:
    path = tmp_path / "a.array_record"
    write_shard(path, [dataclasses.replace(record(0), where="images/\udcff.png")])
    assert open_source(path)[0].path == r"images/\udcff.png"
