"""Parquet tables, written by pyarrow as the hub's are: which columns are read, how often, and what is damaged."""

from __future__ import annotations

import builtins
import io
import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_pipelines import files, images, parquet
from data_pipelines.parquet import ParquetTables
from data_pipelines.records import BadRecord, Caption, Cause
from data_pipelines.sources import open_source
from tests.data_pipelines.servers import serve


def picture(value: int) -> bytes:
    with io.BytesIO() as file:
        Image.new("RGB", (10 + value, 8), (value, 0, 0)).save(file, "PNG")
        return file.getvalue()


def hub_rows(first: int, last: int) -> dict[str, list[Any]]:
    return {
        "image": [{"bytes": picture(i), "path": f"{i}.png"} for i in range(first, last)],
        "text": [f"number {i}" for i in range(first, last)],
        "label": list(range(first, last)),
    }


def write(path: Path, rows: dict[str, list[Any]], group: int = 2, schema: pa.Schema | None = None) -> Path:
    pq.write_table(pa.table(rows, schema=schema), path, row_group_size=group)
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SVG_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    """Tables of five and four rows, in groups of two."""
    write(tmp_path / "train-0.parquet", hub_rows(0, 5))
    write(tmp_path / "train-1.parquet", hub_rows(5, 9))
    return tmp_path


def test_rows_are_read_over_all_tables(tables: Path) -> None:
    for path in (tables, tables / "train-*.parquet"):
        source = open_source(path)
        assert len(source) == 9
        assert source.has_captions
        for i in (8, 0, 4, 5, 2):
            record = source[i]
            assert record.index == i
            assert record.where == f"{tables}/train-{i // 5}.parquet:{i % 5}"
            assert record.captions == (Caption(f"number {i}"),)
            assert images.read(record).getpixel((0, 0)) == (i, 0, 0)
        with pytest.raises(IndexError):
            source[9]


def test_another_process_asks_no_table_again(tables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(tables)
    source[4]
    sent = pickle.dumps(source)
    assert len(sent) < 2500  # the rows that were read are not in it
    monkeypatch.setattr(files, "signature", None)
    monkeypatch.setattr(parquet, "_footer", None)
    arrived = pickle.loads(sent)
    assert (arrived.signature, arrived.has_captions, len(arrived)) == (source.signature, True, 9)
    assert [arrived[i] for i in range(9)] == [source[i] for i in range(9)]


@pytest.mark.parametrize(
    ("rows", "path", "captions", "size"),
    [
        ({"jpg": [b"bytes"], "caption": ["a cat"]}, None, (Caption("a cat"),), None),
        ({"image_path": ["a/b.jpg"], "prompt": [None]}, "{folder}/a/b.jpg", (Caption(""),), None),
        ({"url": ["https://x/b.jpg"], "TEXT": ["t"]}, "https://x/b.jpg", (Caption("t"),), None),
        ({"path": ["/b.jpg"]}, "/b.jpg", (), None),
        ({"image": [{"bytes": None, "path": "b.jpg"}]}, "{folder}/b.jpg", (), None),
        (
            {"image": ["b.jpg"], "captions": [["one", "two"]], "width": [7], "height": [5]},
            "{folder}/b.jpg",
            (Caption("one"), Caption("two")),
            (7, 5),
        ),
        (
            {"path": ["/b.jpg"], "prompt": ["short"], "super_high_quality_caption": ["long"]},
            "/b.jpg",
            (Caption("long", 1.0, "align"),),
            None,
        ),
    ],
)
def test_columns(
    tmp_path: Path, rows: dict[str, Any], path: str | None, captions: tuple[Caption, ...], size: tuple[int, int] | None
) -> None:
    source = open_source(write(tmp_path / "a.parquet", rows))
    record = source[0]
    assert source.has_captions == bool(captions)
    assert (record.captions, record.size) == (captions, size)
    if path is None:
        assert record.image == b"bytes"
    else:
        assert (record.image, record.path) == (None, path.format(folder=tmp_path))


def test_a_row_without_an_image_is_one_bad_record(tmp_path: Path) -> None:
    rows = {"image": [{"bytes": None, "path": None}, {"bytes": picture(1), "path": None}], "text": ["a", "b"]}
    source = open_source(write(tmp_path / "a.parquet", rows))
    with pytest.raises(BadRecord, match=r"a\.parquet:0 has nothing under 'image'") as error:
        source[0]
    assert error.value.cause is Cause.VALUE
    assert images.read(source[1]).size == (11, 8)


def test_text_that_is_not_utf8_is_one_bad_record(tmp_path: Path) -> None:
    text = pa.array([b"caf\xe9", b"tea"]).view(pa.string())
    source = open_source(write(tmp_path / "a.parquet", {"path": ["/a", "/b"], "text": text}))
    with pytest.raises(BadRecord, match="not UTF-8") as error:
        source[0]
    assert error.value.cause is Cause.ENCODING
    assert source[1].captions == (Caption("tea"),)


def test_a_table_without_images_is_fatal(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"label": [1], "picture": ["a.jpg"]})
    with pytest.raises(
        ValueError, match=r"a\.parquet has no column of images; found label, picture, expected a struct"
    ):
        open_source(path)


def test_a_table_of_other_columns_is_named(tables: Path) -> None:
    write(tables / "train-2.parquet", {"image": hub_rows(0, 1)["image"]})
    with pytest.raises(
        ValueError, match=r"train-2\.parquet lacks the columns \['text'\], which .*train-0\.parquet has"
    ):
        open_source(tables)


def test_a_table_of_no_rows(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no records in 1 files"):
        open_source(write(tmp_path / "a.parquet", {"path": pa.array([], pa.string())}))


@pytest.mark.parametrize("kind", ["noise", "empty", "cut"])
def test_a_damaged_table_is_fatal_and_named(tables: Path, kind: str) -> None:
    path = tables / "train-1.parquet"
    path.write_bytes({"noise": os.urandom(3000), "empty": b"", "cut": path.read_bytes()[:900]}[kind])
    with pytest.raises(ValueError, match=r"train-1\.parquet is damaged, or no Parquet file"):
        open_source(tables)


def test_damage_inside_a_table_is_a_bad_record(tables: Path) -> None:
    path = tables / "train-0.parquet"
    content = bytearray(path.read_bytes())
    place = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    content[place : place + 20] = b"\xff" * 20
    path.write_bytes(content)
    source = open_source(tables)
    for i in (2, 3):
        with pytest.raises(BadRecord, match=rf"train-0\.parquet:{i} cannot be read") as error:
            source[i]
        assert error.value.cause is Cause.STORE
    assert source[4].captions == (Caption("number 4"),)


def test_checksums_are_verified_where_a_table_has_them(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    # Without statistics, the bytes of the pictures stand in the pages alone.
    settings = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    pq.write_table(pa.table(hub_rows(0, 2)), path, write_page_checksum=True, **settings)
    content = bytearray(path.read_bytes())
    content[content.index(b"IDAT") + 5] ^= 1  # one bit of a picture
    path.write_bytes(content)
    with pytest.raises(BadRecord, match="CRC checksum") as error:
        open_source(path)[0]
    assert error.value.cause is Cause.STORE


def test_a_group_is_read_once_by_many_threads(tables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(tables)
    read: list[int] = []
    real, barrier = pq.ParquetFile.read_row_group, threading.Barrier(8)

    def counted(self: pq.ParquetFile, group: int, **settings: Any) -> pa.Table:
        read.append(group)
        return real(self, group, **settings)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)

    def look(thread: int) -> list[str]:
        barrier.wait()
        return [source[(i + thread) % 9].captions[0].text for i in range(9)]

    with ThreadPoolExecutor(8) as pool:
        for thread, texts in enumerate(pool.map(look, range(8))):
            assert texts == [f"number {(i + thread) % 9}" for i in range(9)]
    assert sorted(read) == [0, 1, 1, 2]  # the first group was read on opening; groups 0 to 2, and 0 and 1


def test_groups_beyond_the_limit_are_let_go(tables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "_CACHE_BYTES", 1)
    source = open_source(tables)
    assert isinstance(source, ParquetTables)
    for i in range(9):
        assert source[i].captions == (Caption(f"number {i}"),)
        assert len(source._groups) == 1


def test_remote_tables(tables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(tables) as server:
        source = open_source(f"{server.url}/parts/train-0.parquet")
        assert source[4].captions == (Caption("number 4"),)
        monkeypatch.setattr(files, "_default", files.Remote(0.2, 1, 0.01))
        server.folder = tables / "gone"
        with pytest.raises(BadRecord, match=r"train-0\.parquet:2: .*train-0\.parquet does not exist") as error:
            source[2]
        assert error.value.cause is Cause.MISSING
        server.folder = tables
        assert source[2].captions == (Caption("number 2"),)


def test_without_pyarrow_the_extra_is_named(tables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "pyarrow":
            raise ModuleNotFoundError("No module named 'pyarrow'", name="pyarrow")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"needs pyarrow: .*svg_jax\[parquet\].*pyarrow is missing"):
        open_source(tables)
