"""JSON Lines and JSON lists: the forms of record, what is fatal, what is one bad record, and what messages name."""

from __future__ import annotations

import itertools
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from data_pipelines import lists
from data_pipelines.lists import folder_of, join, line_ends
from data_pipelines.records import BadRecord, Caption, Cause
from data_pipelines.sources import open_source

PLAIN = {"path": "pictures/a.jpg", "prompt": "a cat — eine Katze"}
DETAILED = {"image_path": "/data/b.jpg", "super_high_quality_caption": "a dog"}


@pytest.fixture(params=["jsonl", "json"])
def both_kinds(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / f"list.{request.param}"
    records = [PLAIN, DETAILED]
    lines = "\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    path.write_text(lines if request.param == "jsonl" else json.dumps(records), encoding="utf-8")
    return path


def test_both_kinds_of_list_are_read(both_kinds: Path) -> None:
    source = open_source(both_kinds)
    assert len(source) == 2
    assert source.has_captions
    first, second = source[0], source[1]
    assert (first.index, first.captions) == (0, (Caption(PLAIN["prompt"], 1.0, "base"),))
    assert first.path == str(both_kinds.parent / "pictures/a.jpg")
    assert (second.index, second.captions) == (1, (Caption("a dog", 1.0, "align"),))
    assert second.path == "/data/b.jpg"
    assert str(both_kinds) in second.where
    assert second.where.endswith("2")


@pytest.mark.parametrize(
    ("value", "path", "captions"),
    [
        ({"path": "a.jpg", "prompt": "a cat"}, "a.jpg", [("a cat", "base")]),
        ({"image_path": "b.jpg", "super_high_quality_caption": "a dog"}, "b.jpg", [("a dog", "align")]),
        ({"image_path": "b.jpg", "prompt": "a hen"}, "b.jpg", [("a hen", "base")]),
        ({"path": "a.jpg"}, "a.jpg", []),
        # Both captions and both paths: as in the release, the detailed caption goes with image_path, and comes first.
        (
            {"path": "a.jpg", "prompt": "a", "image_path": "b.jpg", "super_high_quality_caption": "b"},
            "b.jpg",
            [("b", "align")],
        ),
        ({"path": "a.jpg", "image_path": "b.jpg", "prompt": "a"}, "a.jpg", [("a", "base")]),
        ({"image_path": "b.jpg", "super_high_quality_caption": None}, "b.jpg", [("", "align")]),
        ({"path": "a.jpg", "prompt": ["a", ["b", 2]]}, "a.jpg", [("a", "base"), ("b", "base")]),
    ],
)
def test_the_keys_of_a_record_decide_its_form(
    tmp_path: Path, value: dict[str, object], path: str, captions: list[tuple[str, str]]
) -> None:
    (tmp_path / "list.jsonl").write_text(json.dumps(value))
    record = open_source(tmp_path / "list.jsonl")[0]
    assert record.path == str(tmp_path / path)
    assert [(caption.text, caption.system_prompt) for caption in record.captions] == captions


def test_a_list_of_images_alone_has_no_captions(tmp_path: Path) -> None:
    path = tmp_path / "list.jsonl"
    path.write_text('nonsense\n{"path": "a.jpg"}\n{"path": "b.jpg"}\n')
    assert not open_source(path).has_captions
    path.write_text('{"path": "a.jpg"}\n{"path": "b.jpg", "prompt": "a cat"}\n')
    assert open_source(path).has_captions


def test_relative_paths_start_at_the_root(both_kinds: Path) -> None:
    assert open_source(both_kinds, root="/elsewhere")[0].path == "/elsewhere/pictures/a.jpg"
    source = open_source(both_kinds, root="gs://bucket/images/")
    assert source[0].path == "gs://bucket/images/pictures/a.jpg"
    assert source[1].path == "/data/b.jpg"
    assert source.signature != open_source(both_kinds).signature


def test_paths_and_addresses() -> None:
    assert join("folder", "s3://bucket/a.jpg") == "s3://bucket/a.jpg"
    assert join("https://host/lists", "https://other/a.jpg?size=3") == "https://other/a.jpg?size=3"
    assert [folder_of(name) for name in ("a.jsonl", "/a.jsonl", "b/a.jsonl", "gs://b/c/a.jsonl")] == [
        ".", "/", "b", "gs://b/c",
    ]  # fmt: skip
    assert folder_of("https://host/lists/a.jsonl?key=x/y") == "https://host/lists"


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ({"width": 30, "height": 20}, (30, 20)),
        ({"width": 30}, None),
        ({"width": 30, "height": float("nan")}, None),
        ({"width": True, "height": True}, None),
        ({"width": 10**12, "height": 20}, None),
        ({"width": -30, "height": 20}, None),
    ],
)
def test_the_size_of_the_image_may_stand_in_the_list(
    tmp_path: Path, size: dict[str, float], expected: tuple[int, int] | None
) -> None:
    (tmp_path / "list.jsonl").write_text(json.dumps(PLAIN | size))
    assert open_source(tmp_path / "list.jsonl")[0].size == expected


def test_a_list_can_be_sent_to_another_process(both_kinds: Path) -> None:
    sent = pickle.dumps(open_source(both_kinds))
    assert pickle.loads(sent)[1].captions[0].text == "a dog"


def test_reading_past_the_end_is_an_index_error(both_kinds: Path) -> None:
    with pytest.raises(IndexError):
        open_source(both_kinds)[2]


@pytest.mark.parametrize(
    ("line", "cause", "reason"),
    [
        ("", Cause.NOT_JSON, "is an empty line"),
        ("   ", Cause.NOT_JSON, "is an empty line"),
        ('{"path": "a.jpg", "prom', Cause.NOT_JSON, "is not JSON"),
        ("a.jpg\ta cat", Cause.NOT_JSON, "is not JSON .*found 'a.jpg"),
        ("[" * 100_000, Cause.NOT_JSON, "is not JSON"),
        ('{"path": "a.jpg", "width": ' + "9" * 5000 + "}", Cause.NOT_JSON, "is not JSON"),
        ("[1, 2]", Cause.KEYS, "is a list; expected an object"),
        ('{"prompt": "a cat"}', Cause.KEYS, r"names no image; found the keys \['prompt'\], expected 'path'"),
        ('{"file": "a.jpg", "text": "a cat"}', Cause.KEYS, r"names no image; found the keys \['file', 'text'\]"),
        ('{"path": 3, "prompt": "a cat"}', Cause.VALUE, "has a int under 'path'; expected a string"),
        ('{"path": null, "prompt": "a cat"}', Cause.VALUE, "has a NoneType under 'path'"),
        ('{"path": "", "prompt": "a cat"}', Cause.VALUE, "has an empty string under 'path'"),
        ('{"path": "a\\u0000.jpg", "prompt": "a cat"}', Cause.VALUE, "has a path with a zero byte under 'path'"),
        ('{"path": "\\ud83e.jpg", "prompt": "a cat"}', Cause.ENCODING, "has a path under 'path' that is no UTF-8"),
        ('{"path": "a.jpg", "prompt": 7}', Cause.VALUE, "'prompt' is a int; expected a text"),
        ('{"path": "a.jpg", "prompt": {"en": "a cat"}}', Cause.VALUE, "'prompt' is a dict"),
        ('{"path": "a.jpg", "prompt": [["a cat", "x"]]}', Cause.VALUE, r"'prompt'\[0\] has the weight 'x'"),
    ],
)
def test_a_bad_line_is_one_bad_record_with_its_number(tmp_path: Path, line: str, cause: Cause, reason: str) -> None:
    path = tmp_path / "list.jsonl"
    good = json.dumps(PLAIN)
    path.write_text(f"{good}\n{line}\n{good}\n")
    source = open_source(path)
    assert len(source) == 3
    assert source[2].captions[0].text == PLAIN["prompt"]
    with pytest.raises(BadRecord, match=f"{path}:2 {reason}") as caught:
        source[1]
    assert caught.value.cause is cause
    assert len(str(caught.value)) < 500


def test_bytes_that_are_not_utf8_are_a_bad_record(tmp_path: Path) -> None:
    path = tmp_path / "list.jsonl"
    path.write_bytes(b'{"path": "a.jpg", "prompt": "caf\xe9"}\n')
    with pytest.raises(BadRecord, match=f"{path}:1 is not UTF-8 text .*save the list as UTF-8") as caught:
        open_source(path)[0]
    assert caught.value.cause is Cause.ENCODING


def test_a_line_without_end_is_not_read_into_memory(tmp_path: Path) -> None:
    path = tmp_path / "list.jsonl"
    with path.open("wb") as file:
        file.write(b'{"path": "a.jpg"}\n')
        file.truncate(1 << 27)  # zeros, without taking space on the disk
    with pytest.raises(BadRecord, match=f"{path}:2 is a line of {(1 << 27) - 18} bytes") as caught:
        open_source(path)[1]
    assert caught.value.cause is Cause.TOO_LARGE


def test_a_list_that_disappears_is_a_bad_record_for_each_read(tmp_path: Path) -> None:
    path = tmp_path / "list.jsonl"
    path.write_text(json.dumps(PLAIN))
    source = open_source(path)
    path.unlink()
    with pytest.raises(BadRecord, match="cannot be read") as caught:
        source[0]
    assert caught.value.cause is Cause.STORE


def test_a_bad_record_of_a_json_list_names_its_number(tmp_path: Path) -> None:
    path = tmp_path / "list.json"
    path.write_text(json.dumps([PLAIN, {"prompt": "a cat"}]))
    with pytest.raises(BadRecord, match=f"{path} record 2 names no image"):
        open_source(path)[1]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", b"", "is empty"),
        ("a.json", b"[]", "holds an empty list"),
        ("a.json", b'{"path": "a.jpg", "prompt": "a cat"}', "holds a dict; expected a list"),
        ("a.json", b'{"path": "a.jpg"}\n{"path": "b.jpg"}', r"is not JSON .*line 2.*must end in \.jsonl"),
        ("a.json", b'["caf\xe9"]', "is not UTF-8 text"),
    ],
)
def test_a_list_that_is_no_list_is_fatal(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} {reason}"):
        open_source(tmp_path / name)


@pytest.mark.parametrize("scan_bytes", [1, 3, 1 << 20])
@pytest.mark.parametrize("content", [b"", b"\n", b"one", b"one\n", b"one\ntwo", b"\n\nthree\r\nfour\n\n"])
def test_the_ends_of_lines_split_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, scan_bytes: int
) -> None:
    monkeypatch.setattr(lists, "_SCAN_BYTES", scan_bytes)
    path = tmp_path / "list"
    path.write_bytes(content)
    ends = np.concatenate([np.zeros(1, np.int64), *line_ends(path)])
    assert ends.dtype == np.int64
    lines = [content[start:end] for start, end in itertools.pairwise(ends)]
    assert lines == content.splitlines(keepends=True)


def write_lines(path: Path, prompts: list[str]) -> None:
    path.write_text("".join(json.dumps({"path": "a.jpg", "prompt": prompt}) + "\n" for prompt in prompts))


def test_the_index_is_built_once_and_mapped_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "list.jsonl"
    write_lines(path, [f"number {i}" for i in range(100)])
    open_source(path)
    monkeypatch.setattr(lists, "line_ends", lambda path: pytest.fail("the list is read again"))
    source = open_source(path)
    assert isinstance(source, lists.JsonLines)
    assert isinstance(source._ends, np.memmap)
    assert [source[i].captions[0].text for i in (0, 57, 99)] == ["number 0", "number 57", "number 99"]
    assert len(pickle.dumps(source)) < 500  # the index stays where it is
    assert pickle.loads(pickle.dumps(source))[57] == source[57]


def test_the_index_follows_the_list(tmp_path: Path) -> None:
    path = tmp_path / "list.jsonl"
    write_lines(path, ["a cat", "a dog"])
    assert len(open_source(path)) == 2
    status = path.stat()
    write_lines(path, ["an ox", "a hen", "a pig"])
    assert open_source(path)[2].captions[0].text == "a pig"
    write_lines(path, ["a hen", "a pig", "an ox"])  # of the same size, later
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))
    assert [record.captions[0].text for record in map(open_source(path).__getitem__, range(3))] == [
        "a hen", "a pig", "an ox",
    ]  # fmt: skip
