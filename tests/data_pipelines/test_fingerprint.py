"""What a data set is known by: it stays when data are moved, and changes with what the order of records depends on."""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from data_pipelines.arrayrecords import write_shard
from data_pipelines.fingerprint import difference, fingerprint
from data_pipelines.records import Record
from data_pipelines.sources import open_source

RECORDS = [{"path": f"images/{i}.png", "prompt": f"a caption {i}"} for i in range(40)]


def write(path: Path, records: list[dict[str, str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def seen(path: Path, root: str | None = None) -> list[str]:
    return fingerprint(open_source(path, root))


def test_data_that_were_copied_elsewhere_are_the_same(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a" / "list.jsonl", RECORDS), write(tmp_path / "b" / "c" / "copy.jsonl", RECORDS)
    os.utime(second, (1, 1))
    assert seen(first) == seen(first) == seen(second) == seen(second, "gs://bucket/mounted")
    assert len(seen(first)) == 1 + 16

    for i in range(3):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(first.parent / f"{i}.png")
    folder = seen(first.parent)
    shutil.copytree(first.parent, tmp_path / "other")
    assert seen(tmp_path / "other") == folder
    (tmp_path / "other" / "2.png").rename(tmp_path / "other" / "3.png")
    assert difference(folder, seen(tmp_path / "other"))


@pytest.mark.parametrize(
    ("records", "line"),
    [
        ([*RECORDS, RECORDS[0]], "41 records"),
        (RECORDS[:-1], "39 records"),
        (RECORDS[::-1], "record 0 "),
        ([RECORDS[1], RECORDS[0], *RECORDS[2:]], "record 0 "),
        ([*RECORDS[:-1], RECORDS[-1] | {"prompt": "another"}], "record 39 "),
        ([*RECORDS[:-1], RECORDS[-1] | {"path": "images/another.png"}], "record 39 "),
    ],
)
def test_other_data_differ(tmp_path: Path, records: list[dict[str, str]], line: str) -> None:
    before, now = seen(write(tmp_path / "a.jsonl", RECORDS)), seen(write(tmp_path / "b.jsonl", records))
    found = difference(before, now)
    assert found
    assert found[1].startswith(line)


def test_a_record_that_cannot_be_read_is_like_any_other(tmp_path: Path) -> None:
    """So that a run goes on after a broken line was mended."""
    whole = seen(write(tmp_path / "a.jsonl", RECORDS))
    broken = write(tmp_path / "b.jsonl", RECORDS)
    broken.write_text(broken.read_text().replace(json.dumps(RECORDS[0]), "{no json"))
    assert seen(broken)[1] == ""
    assert difference(seen(broken), whole) is None
    assert difference(whole, seen(broken)) is None
    assert difference(seen(broken), seen(write(tmp_path / "c.jsonl", RECORDS[1:]))) == ("40 records", "39 records")
    assert difference(whole, whole[:-1]) == (whole[-1], "nothing")


@pytest.mark.parametrize(
    "mixture",
    ["- {path: a.jsonl, weight: 2}\n- {path: b.jsonl, weight: 1}", "- path: b.jsonl\n- path: a.jsonl"],
)
def test_a_mixture_is_known_by_its_shares_and_lists(tmp_path: Path, mixture: str) -> None:
    write(tmp_path / "a.jsonl", RECORDS[:25])
    write(tmp_path / "b.jsonl", RECORDS[25:])
    whole = write(tmp_path / "all.jsonl", RECORDS)
    (tmp_path / "one.yaml").write_text("META:\n- path: a.jsonl\n- path: b.jsonl\n")
    (tmp_path / "two.yaml").write_text(f"META:\n{mixture}\n")
    one, two = seen(tmp_path / "one.yaml"), seen(tmp_path / "two.yaml")
    assert one[:2] == ["40 records", "lists of [25, 15] records, drawn [25, 15] times an epoch"]
    found = difference(one, two)
    assert found
    assert found[1].startswith("lists of ")
    assert difference(one, seen(whole))


def test_an_image_in_a_shard_counts(tmp_path: Path) -> None:
    def shard(name: str, red: int) -> Path:
        file = io.BytesIO()
        Image.new("RGB", (8, 8), (red, 0, 0)).save(file, "PNG")
        write_shard(tmp_path / name, [Record(0, "a.png", "a.png", image=file.getvalue())])
        return tmp_path / name

    first, same, other = shard("a.array_record", 1), shard("b.array_record", 1), shard("c.array_record", 2)
    assert seen(first) == seen(same)
    assert difference(seen(first), seen(other))
