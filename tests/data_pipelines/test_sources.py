"""JSON Lines and JSON lists: what is fatal, what is one bad record, and what each message names."""

from __future__ import annotations

import itertools
import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from data_pipelines import sources
from data_pipelines.records import BadRecord
from data_pipelines.sources import line_offsets, open_source

PLAIN = {"path": "pictures/a.jpg", "prompt": "a cat — eine Katze"}
DETAILED = {"image_path": "/data/b.jpg", "super_high_quality_caption": "a dog"}


@pytest.fixture(params=["jsonl", "json"])
def both_forms(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / f"list.{request.param}"
    records = [PLAIN, DETAILED]
    lines = "\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    path.write_text(lines if request.param == "jsonl" else json.dumps(records), encoding="utf-8")
    return path


def test_both_forms_of_record_are_read(both_forms: Path) -> None:
    source = open_source(both_forms)
    assert len(source) == 2
    first, second = source[0], source[1]
    assert (first.index, first.caption, first.system_prompt) == (0, PLAIN["prompt"], "base")
    assert first.path == str(both_forms.parent / "pictures/a.jpg")
    assert (second.index, second.caption, second.system_prompt) == (1, "a dog", "align")
    assert second.path == "/data/b.jpg"
    assert str(both_forms) in second.where
    assert second.where.endswith("2")


def test_relative_paths_start_at_the_root(both_forms: Path) -> None:
    assert open_source(both_forms, root="/elsewhere")[0].path == "/elsewhere/pictures/a.jpg"


def test_a_source_can_be_sent_to_another_process(both_forms: Path) -> None:
    copy = pickle.loads(pickle.dumps(open_source(both_forms)))
    assert copy[1].caption == "a dog"


def test_reading_past_the_end_is_an_index_error(both_forms: Path) -> None:
    with pytest.raises(IndexError):
        open_source(both_forms)[2]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("", "is an empty line"),
        ("   ", "is an empty line"),
        ('{"path": "a.jpg", "prom', "is not JSON"),
        ("a.jpg\ta cat", "is not JSON .*found 'a.jpg"),
        ("[" * 100_000, "is not JSON"),
        ("[1, 2]", "is a list; expected an object"),
        ('{"path": "a.jpg"}', r"lacks \['prompt'\]; found the keys \['path'\]"),
        ('{"prompt": "a cat"}', r"lacks \['path'\]"),
        ('{"image_path": "a.jpg", "prompt": "a cat"}', r"lacks \['super_high_quality_caption'\]"),
        ('{"file": "a.jpg", "text": "a cat"}', r"lacks \['path', 'prompt'\]; found the keys \['file', 'text'\]"),
        ('{"path": 3, "prompt": "a cat"}', "has a int under 'path'; expected a string"),
        ('{"path": "a.jpg", "prompt": ["a cat"]}', "has a list under 'prompt'; expected a string"),
        ('{"path": "a.jpg", "prompt": null}', "has a NoneType under 'prompt'"),
        ('{"path": "", "prompt": "a cat"}', "has an empty string under 'path'"),
    ],
)
def test_a_bad_line_is_one_bad_record_with_its_number(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "list.jsonl"
    good = json.dumps(PLAIN)
    path.write_text(f"{good}\n{line}\n{good}\n")
    source = open_source(path)
    assert len(source) == 3
    assert source[2].caption == PLAIN["prompt"]
    with pytest.raises(BadRecord, match=f"{path}:2 {reason}"):
        source[1]


def test_bytes_that_are_not_utf8_are_a_bad_record(tmp_path: Path) -> None:
    path = tmp_path / "list.jsonl"
    path.write_bytes(b'{"path": "a.jpg", "prompt": "caf\xe9"}\n')
    with pytest.raises(BadRecord, match=f"{path}:1 is not JSON"):
        open_source(path)[0]


def test_a_bad_record_of_a_json_list_names_its_number(tmp_path: Path) -> None:
    path = tmp_path / "list.json"
    path.write_text(json.dumps([PLAIN, {"path": "a.jpg"}]))
    with pytest.raises(BadRecord, match=rf"{path} record 2 lacks \['prompt'\]"):
        open_source(path)[1]


def test_a_missing_list_is_fatal(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl does not exist"):
        open_source(tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", "", "is empty"),
        ("a.json", "[]", "holds an empty list"),
        ("a.json", '{"path": "a.jpg", "prompt": "a cat"}', "holds a dict; expected a list"),
        ("a.json", '{"path": "a.jpg"}\n{"path": "b.jpg"}', r"is not JSON .*line 2.*must end in \.jsonl"),
        ("a.csv", "a.jpg,a cat", r"ends in '\.csv'; expected \.jsonl"),
    ],
)
def test_a_list_that_is_no_list_is_fatal(tmp_path: Path, name: str, content: str, reason: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"{name} {reason}"):
        open_source(tmp_path / name)


@pytest.mark.parametrize("scan_bytes", [1, 3, 1 << 20])
@pytest.mark.parametrize("content", [b"", b"\n", b"one", b"one\n", b"one\ntwo", b"\n\nthree\r\nfour\n\n"])
def test_offsets_split_a_file_into_its_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, scan_bytes: int
) -> None:
    monkeypatch.setattr(sources, "_SCAN_BYTES", scan_bytes)
    path = tmp_path / "list"
    path.write_bytes(content)
    offsets = line_offsets(path)
    assert offsets.dtype == np.int64
    lines = [content[start:end] for start, end in itertools.pairwise(offsets)]
    assert lines == content.splitlines(keepends=True)
