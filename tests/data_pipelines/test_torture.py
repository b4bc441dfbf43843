"""The torture set, through sources and batches: every kind is counted under its cause, and nothing stops."""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines import broken, images, text
from data_pipelines.batches import Batch, TextToImageBatches
from data_pipelines.captions import choose
from data_pipelines.grids import GridBatches
from data_pipelines.loader import make_loader
from data_pipelines.records import BadRecord, Cause, Record, Source
from data_pipelines.sizes import image_sizes
from data_pipelines.sources import open_source
from tests.data_pipelines import torture
from tests.data_pipelines.torture import KINDS

# Pillow says on the way that EXIF data are broken and that an image may be a bomb; libtiff's words go to stderr.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*EXIF"),
    pytest.mark.filterwarnings("ignore:Image size"),
    pytest.mark.filterwarnings("ignore:Truncated File Read"),
]

BATCH = 8
NUM_STEPS = -(-len(KINDS) // BATCH)
CAPTIONED = {kind.name: kind.cause for kind in KINDS}
UNCAPTIONED = {kind.name: None if kind.needs_caption else kind.cause for kind in KINDS}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return torture.write(tmp_path_factory.mktemp("torture"))


@pytest.fixture(scope="module")
def source(path: Path) -> Source:
    return open_source(path)


def make(source: Source, **options: int) -> TextToImageBatches:
    return TextToImageBatches(
        source,
        text.ByteTokenizer(),
        batch_size=BATCH,
        resolution=64,
        patch_size=8,
        max_text_tokens=40,
        seed=3,
        **options,
    )


def read(record: Record) -> tuple[Image.Image, str]:
    return images.read_for(record, [(64, 64)]), choose(record, 0, 0).text


def cause_of(number: int) -> Cause | None:
    return broken.CAUSES[number - 1] if number else None


def counts_of(batch: Batch) -> Counter[str]:
    return Counter(str(cause_of(cause)) for cause in batch["cause"] if cause)


def test_the_set_is_large_and_its_names_are_distinct() -> None:
    assert len(CAPTIONED) == len(KINDS)
    assert sum(kind.cause is not None for kind in KINDS) >= 80
    # Those of remote stores and shards have tests of their own.
    assert {kind.cause for kind in KINDS} >= set(Cause) - {Cause.REMOTE, Cause.TIMEOUT, Cause.STORE, Cause.TOO_SMALL}


@pytest.mark.parametrize("index", [i for i, kind in enumerate(KINDS) if kind.cause], ids=lambda i: KINDS[i].name[:40])
def test_a_broken_record_is_explained_in_one_short_sentence(source: Source, index: int) -> None:
    with pytest.raises(BadRecord) as error:
        read(source[index])
    assert error.value.cause is KINDS[index].cause
    message, where = str(error.value), f"{source.name}:{index + 1}"
    assert message.startswith(where)
    assert message.count(where) == 1
    assert "\n" not in message
    assert len(message) < 800 + len(KINDS[index].name)


@pytest.mark.parametrize("index", [i for i, kind in enumerate(KINDS) if not kind.cause], ids=lambda i: KINDS[i].name)
def test_an_unusual_record_is_read(source: Source, index: int) -> None:
    image, caption = read(source[index])
    assert (image.mode, image.size) == ("RGB", (64, 64))
    assert isinstance(caption, str)


@pytest.mark.parametrize("num_threads", [0, 3])
def test_training_counts_every_kind_under_its_cause(source: Source, num_threads: int) -> None:
    counter = broken.BadRecordCounter(max_bad_fraction=1.0)
    found = {}
    with contextlib.closing(make_loader(make(source), num_threads=num_threads)) as loader:
        batches = list(itertools.islice(loader, NUM_STEPS))
    for batch in batches:
        for record, cause, grid, patches, num_tokens in zip(
            batch["record"], batch["cause"], batch["grid"], batch["patches"], batch["num_tokens"], strict=True
        ):
            # The last batch begins a second epoch, in which the same becomes of a record.
            assert found.setdefault(KINDS[record].name, cause_of(cause)) == cause_of(cause)
            assert (grid.prod() == 0) == bool(cause)
            assert not patches[grid.prod() :].any()
            assert num_tokens == 1 or not cause
        counter.update(counts_of(batch), BATCH)
    assert found == CAPTIONED
    expected = Counter(kind.cause for kind in KINDS if kind.cause)
    assert counter.num_records == NUM_STEPS * BATCH
    assert all(counter.counts[cause] >= count for cause, count in expected.items())
    assert set(counter.counts) == set(expected)


def test_two_passes_count_each_kind_twice(source: Source) -> None:
    batches = TextToImageBatches(
        source, text.ByteTokenizer(), batch_size=len(KINDS), resolution=64, patch_size=8, max_text_tokens=40, seed=3
    )
    counts = Counter(cause_of(cause) for step in range(2) for cause in batches[step]["cause"])
    assert counts == Counter({cause: 2 * count for cause, count in Counter(CAPTIONED.values()).items()})


def test_a_run_with_a_limit_stops_and_names_the_causes(source: Source) -> None:
    batch = make(source)[0]
    counter = broken.BadRecordCounter(max_bad_fraction=0.05, min_records=BATCH)
    with pytest.raises(broken.TooManyBadRecords, match=r"could not be used \([a-z_]+ \d+, .*max_bad_fraction=0\.05"):
        counter.update(counts_of(batch), BATCH)


@pytest.mark.parametrize("max_ratio", [1.0, 4.0])
def test_training_the_autoencoder_counts_every_kind_that_has_a_size(source: Source, max_ratio: float) -> None:
    batches = GridBatches(source, batch_size=1, resolution=64, patch_size=8, seed=3, max_ratio=max_ratio)
    num_records = sum(len(grid.records) for grid in batches.grids)
    found = {}
    for step in range(num_records):
        batch = batches[step]
        found[KINDS[batch["record"][0]].name] = cause_of(batch["cause"][0])
        assert bool(batch["valid"][0]) == (batch["cause"][0] == 0)
        assert batch["valid"][0] or not batch["images"].any()
    assert len(found) == num_records == len(KINDS) - batches.num_without_size
    assert found == {name: UNCAPTIONED[name] for name in found}
    assert all(name in found for name, cause in UNCAPTIONED.items() if cause is None)


def test_sizes_are_of_the_images_that_can_be_opened(source: Source) -> None:
    sizes = image_sizes(source)
    unknown = [kind.name for kind, size in zip(KINDS, sizes, strict=True) if not size.all()]
    assert all(CAPTIONED[name] for name in unknown)
    for index, kind in enumerate(KINDS):
        if UNCAPTIONED[kind.name] is None:
            assert images.read(source[index]).size == tuple(sizes[index]), kind.name


def test_a_folder_of_them_trains_too(path: Path) -> None:
    folder = open_source(path.parent)
    batches = GridBatches(folder, batch_size=len(folder), resolution=64, patch_size=8, seed=3)
    batch = batches[0]
    names = [Path(folder[int(index)].path).name for index in batch["record"]]
    found = {name: cause_of(cause) for name, cause in zip(names, batch["cause"], strict=True) if name in CAPTIONED}
    assert len(found) > 60
    assert found == {name: CAPTIONED[name] for name in found}


def test_the_same_batch_comes_again(source: Source) -> None:
    first, again = (make(source)[5] for _ in range(2))
    for key in ("patches", "grid", "tokens", "num_tokens", "cause", "record"):
        np.testing.assert_array_equal(first[key], again[key])  # type: ignore[literal-required]
