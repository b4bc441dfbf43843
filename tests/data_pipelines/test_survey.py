"""A sample of a source, read as training reads it."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines import images
from data_pipelines.records import Cause
from data_pipelines.sources import open_source
from data_pipelines.survey import sample, survey
from data_pipelines.text import ByteTokenizer, full_prompt
from tests.data_pipelines import torture

SIZES = images.crop_sizes(64, 16, 4.0)


def test_a_sample_is_always_the_same_and_never_names_a_record_twice() -> None:
    assert sample(5, 99) == sample(5, 5)
    assert sorted(sample(5, 99)) == [0, 1, 2, 3, 4]
    some = sample(60_000_000, 300)
    assert some == sample(60_000_000, 500)[:300]
    assert len(set(some)) == 300
    assert np.histogram(some, 4, (0, 60_000_000))[0].min() > 50


def test_what_is_seen_of_a_record(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (90, 100, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    record = {"path": "a.png", "prompt": ["ab", ["cde", 3]], "width": 7, "height": 7}
    (tmp_path / "r.jsonl").write_text(json.dumps(record) + '\n{"path": "none.png", "prompt": "a"}\n{"path": "a.png"}\n')
    source = open_source(tmp_path / "r.jsonl")
    found = survey(source, SIZES, ByteTokenizer(), 10)
    [seen] = found.seen
    assert (seen.index, seen.size, seen.crop) == (0, (100, 90), (64, 64))  # as the file says, not the list
    assert seen.tokens == tuple(1 + len(full_prompt(text, "base")) for text in ("ab", "cde"))
    assert seen.scale == 64 / 90
    assert seen.share_cut == pytest.approx(0.1)
    assert [(each.index, each.cause) for each in found.broken] == [(1, Cause.MISSING), (2, Cause.CAPTION)]
    assert found.spent.computing > 0
    assert 0 < found.spent.waiting < found.spent.total


def test_hashes_and_tokens_take_no_time_from_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (100, 90)).save(tmp_path / "a.png")
    clock = itertools.count()  # a second passes each time it is asked

    def slow(data: bytes) -> bytes:
        for _ in range(1000):
            next(clock)
        return data[:16]

    monkeypatch.setattr("data_pipelines.survey.time.perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr("data_pipelines.survey.content_hash", slow)
    found = survey(open_source(tmp_path), SIZES, ByteTokenizer(), 10)
    assert (found.spent.waiting, found.spent.total) == (1, 2)


def test_the_torture_set_is_surveyed_with_every_cause(tmp_path: Path) -> None:
    found = survey(open_source(torture.write(tmp_path)), SIZES, ByteTokenizer(), 1000)
    causes = {each.index: each.cause for each in found.broken}
    assert causes == {i: kind.cause for i, kind in enumerate(torture.KINDS) if kind.cause}
    assert len(found.seen) + len(found.broken) == len(torture.KINDS)
