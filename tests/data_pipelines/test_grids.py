"""Batches of one grid: which grid and records a step has, on any number of processes, and sizes read from headers."""

from __future__ import annotations

import itertools
import json
import logging
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image

from data_pipelines import grids, images, order
from data_pipelines.broken import CAUSES
from data_pipelines.fingerprint import difference
from data_pipelines.grids import Draw, GridBatches, by_grid, nearest_sizes
from data_pipelines.loader import make_loader
from data_pipelines.records import BadRecord, Cause
from data_pipelines.sizes import image_sizes
from data_pipelines.sources import open_source

SIZES = [(64, 64), (120, 40), (64, 66), (40, 120), (70, 70), (65, 60)]
NUM_RECORDS = 23


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of several shapes; record i has red channel 10 * i, and green from left to right."""
    folder = tmp_path_factory.mktemp("data")
    lines = []
    for i in range(NUM_RECORDS):
        width, height = SIZES[i % len(SIZES)]
        pixels = np.zeros((height, width, 3), np.uint8)
        pixels[..., 0], pixels[..., 1] = 10 * i, np.arange(width)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        lines.append(json.dumps({"path": f"{i}.png", "prompt": ""}))
    (folder / "list.jsonl").write_text("\n".join(lines))
    return folder / "list.jsonl"


def make(path: Path, **options: Any) -> GridBatches:
    settings: dict[str, Any] = {"batch_size": 4, "resolution": 32, "patch_size": 4, "seed": 7, "max_ratio": 4.0}
    return GridBatches(open_source(path), **(settings | options))


def steps_of(batches: GridBatches, epochs: int) -> int:
    return sum(batches._full(epochs))


def test_a_batch_has_one_grid_and_its_records(data: Path) -> None:
    batches, crop_sizes = make(data), images.crop_sizes(32, 4, 4.0)
    seen = set()
    for step in range(20):
        batch = batches[step]
        height, width = batch["images"].shape[1:3]
        seen.add((width, height))
        assert batch["images"].dtype == np.uint8
        assert batch["valid"].all()
        assert not batch["cause"].any()
        for pixels, record in zip(batch["images"], batch["record"], strict=True):
            assert (pixels[..., 0] == 10 * record).all()
            assert images.nearest_size(SIZES[record % len(SIZES)], crop_sizes) == (width, height)
        assert batch["record"].tolist() == batches.records(step)
    assert len(seen) == 3  # wide, square, tall


@pytest.mark.parametrize("batch_size", [1, 4, 7, 100])
def test_every_record_is_drawn_once_an_epoch_and_none_is_lost(data: Path, batch_size: int) -> None:
    batches = make(data, batch_size=batch_size)
    epochs = 20
    draws = [draw for step in range(steps_of(batches, epochs)) for draw in batches.draws(step)[1]]
    counts = Counter(draws)
    assert max(counts.values()) == 1
    left = {Draw(epoch, record) for epoch in range(epochs) for record in range(NUM_RECORDS)} - set(counts)
    assert len(left) < len(batches.grids) * batch_size  # of each grid, less than a batch that is still to come
    assert len(draws) + len(left) == epochs * NUM_RECORDS


def test_what_is_left_of_an_epoch_comes_first_in_the_next(data: Path) -> None:
    batches = make(data, shuffle=False)
    by_size: dict[tuple[int, int], list[int]] = {}
    for step in range(steps_of(batches, 8)):
        size, draws = batches.draws(step)
        by_size.setdefault(size, []).extend(draw.record for draw in draws)
    for size, records in batches.grids:
        order = list(itertools.islice(itertools.cycle(np.asarray(records).tolist()), len(by_size[size])))
        assert by_size[size] == order


def test_grids_come_as_often_as_their_records_and_mixed(data: Path) -> None:
    batches = make(data, batch_size=2)
    steps = steps_of(batches, 40)
    grids = [batches.draws(step)[0] for step in range(steps)]
    share = {size: len(records) / NUM_RECORDS for size, records in batches.grids}
    for size, count in Counter(grids).items():
        assert abs(count / steps - share[size]) < 2 * len(share) / steps
    changes = sum(a != b for a, b in itertools.pairwise(grids))
    assert changes > 0.3 * steps


@pytest.mark.parametrize("process_count", [2, 4])
@pytest.mark.parametrize("max_ratio", [1.0, 4.0])
def test_processes_hold_slices_of_the_same_batches(data: Path, process_count: int, max_ratio: float) -> None:
    options = {"max_ratio": max_ratio, "random_crop": True}
    whole = make(data, **options)
    parts = [make(data, process_index=i, process_count=process_count, **options) for i in range(process_count)]
    assert all(part.fingerprint == whole.fingerprint for part in parts)
    for step in (0, 3, 11, 12, 50):
        expected, slices = whole[step], [part[step] for part in parts]
        for key in ("images", "valid", "cause", "record"):
            joined = np.concatenate([part[key] for part in slices])  # type: ignore[literal-required]
            np.testing.assert_array_equal(joined, expected[key])  # type: ignore[literal-required]


def test_a_process_reckons_its_own_slots_alone(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []

    def shuffled_index(place: int, *arguments: int) -> int:
        drawn.append(place)
        return order.shuffled_index(place, *arguments)

    monkeypatch.setattr(grids, "shuffled_index", shuffled_index)
    part = make(data, batch_size=8, process_index=1, process_count=4)
    part.read(0)
    assert len(drawn) == 1 + 8 // 4  # the grid of the step, and two slots
    assert part.draws(0)[1][2:4] == part.draws(0, range(2, 4))[1]


def test_other_sizes_of_the_same_files_are_other_data(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that sees other shapes would form other batches, though the list is the same."""
    before = make(data).fingerprint
    monkeypatch.setattr(grids, "image_sizes", lambda source: np.full((len(source), 2), 9, np.int32))
    found = difference(before, make(data).fingerprint)
    assert found
    assert found[1].startswith("1 grids ")


def test_a_worker_maps_the_grids_instead_of_getting_them(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = make(data)
    assert batches.__getstate__()["grids"] is None
    sent = pickle.dumps(batches)
    monkeypatch.setattr(grids, "_grid_index", None)  # nor are they found anew
    monkeypatch.setattr(grids, "image_sizes", None)
    received = pickle.loads(sent)
    assert [received.records(step) for step in range(9)] == [batches.records(step) for step in range(9)]
    np.testing.assert_array_equal(received[5]["images"], batches[5]["images"])


def test_grids_that_cannot_be_kept_are_sent(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mapped = make(data)
    monkeypatch.setattr(grids, "image_sizes", lambda source: np.array(image_sizes(source)))  # in memory
    sent = pickle.dumps(make(data))
    monkeypatch.setattr(grids, "image_sizes", None)
    received = pickle.loads(sent)
    assert [received.records(step) for step in range(9)] == [mapped.records(step) for step in range(9)]


def test_a_loader_from_any_step_goes_on_as_if_uninterrupted(data: Path) -> None:
    batches = make(data)
    expected = [batches[step] for step in range(8)]
    loader = make_loader(make(data), start_step=5, num_threads=2, prefetch=2)
    for batch, step in zip(loader, range(5, 8), strict=False):
        np.testing.assert_array_equal(batch["images"], expected[step]["images"])
        np.testing.assert_array_equal(batch["record"], expected[step]["record"])
    loader.close()


def test_another_seed_or_epoch_is_another_order(data: Path) -> None:
    per_epoch = [make(data, batch_size=1).records(step)[0] for step in range(2 * NUM_RECORDS)]
    assert sorted(per_epoch[:NUM_RECORDS]) == sorted(per_epoch[NUM_RECORDS:]) == list(range(NUM_RECORDS))
    assert per_epoch[:NUM_RECORDS] != per_epoch[NUM_RECORDS:]
    assert [make(data, batch_size=1, seed=8).records(step)[0] for step in range(NUM_RECORDS)] != per_epoch[:NUM_RECORDS]


def test_the_order_is_pinned(data: Path) -> None:
    """A change of these numbers changes the data order of every run that resumes: it must not happen unnoticed."""
    batches = make(data)
    assert [batches.draws(step)[0] for step in range(6)] == [
        (32, 32), (16, 48), (32, 32), (48, 16), (32, 32), (32, 32)
    ]  # fmt: skip
    assert [batches.records(step) for step in range(3)] == [[14, 12, 11, 16], [9, 21, 3, 15], [20, 17, 8, 10]]


def test_the_square_needs_no_sizes(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipelines.grids.image_sizes", None)
    batches = make(data, max_ratio=1.0, shuffle=False)
    assert [batches.records(step) for step in range(2)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert batches[0]["images"].shape == (4, 32, 32, 3)


def test_random_crops_move_with_the_epoch_and_the_centre_does_not(data: Path) -> None:
    def wide(random_crop: bool) -> list[bytes]:
        batches = make(data, max_ratio=1.0, random_crop=random_crop, shuffle=False, batch_size=1)
        return [batches[1 + epoch * NUM_RECORDS]["images"].tobytes() for epoch in range(6)]

    assert len(set(wide(False))) == 1
    assert len(set(wide(True))) > 3
    centre = np.asarray(images.crop(images.decode(data.parent / "1.png"), (32, 32)))
    assert wide(False)[0] == centre.tobytes()


def test_crop_windows_reach_both_ends() -> None:
    image = Image.fromarray(np.broadcast_to(np.arange(10, dtype=np.uint8)[None, :, None], (4, 10, 3)))
    lefts = {np.asarray(images.crop(image, (4, 4), (word, 0)))[0, 0, 0].item() for word in range(50)}
    assert lefts == set(range(7))


# Sizes.


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_the_header_gives_the_size_that_decoding_gives(tmp_path: Path, kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.new("RGB", (40, 20)).save(tmp_path / "image", kind, exif=exif)
    expected = images.decode(tmp_path / "image").size
    assert images.upright_size(tmp_path / "image") == expected == ((20, 40) if orientation > 4 else (40, 20))


def test_only_headers_are_read(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (60, 40, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:200])
    assert images.upright_size(tmp_path / "a.png") == (40, 60)
    with pytest.raises(BadRecord):
        images.decode(tmp_path / "a.png")


@pytest.fixture
def with_bad(data: Path, tmp_path: Path) -> Path:
    (tmp_path / "cut.png").write_bytes((data.parent / "0.png").read_bytes()[:100])
    (tmp_path / "text.png").write_text("no image")
    paths = [str(data.parent / "0.png"), "text.png", "cut.png", "none.png", str(data.parent / "1.png")]
    lines = [json.dumps({"path": path, "prompt": ""}) for path in paths]
    (tmp_path / "list.jsonl").write_text("\n".join([*lines, "{no json"]))
    return tmp_path / "list.jsonl"


def test_images_without_a_size_are_in_no_grid_counted_and_named(
    with_bad: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for again in (False, True):  # from the headers, then from the file beside
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="absl"):
            batches = make(with_bad, batch_size=1)
        assert batches.num_without_size == 3
        assert sorted(int(r) for grid in batches.grids for r in grid.records) == [0, 2, 4]
        assert "3 of 6 images" in caplog.text
        assert again or "not_an_image 1, missing 1, not_json 1" in caplog.text
        assert again or ("text.png" in caplog.text and "none.png" in caplog.text)


def test_too_many_images_without_a_size_are_fatal(with_bad: Path) -> None:
    with pytest.raises(ValueError, match=r"3 of 6 images of .*cannot be opened, above max_bad_fraction=0\.1"):
        make(with_bad, max_bad_fraction=0.1)


def test_an_image_with_a_broken_body_leaves_its_slot_empty(with_bad: Path) -> None:
    batches = make(with_bad, batch_size=1)
    bad = [batches[step] for step in range(3) if batches.records(step) == [2]]
    (batch,) = bad
    assert [CAUSES[number - 1] for number in batch["cause"]] == [Cause.TRUNCATED]
    assert batch["valid"].tolist() == [False]
    assert not batch["images"].any()


def test_a_mixture_keeps_its_weights_or_says_that_it_cannot(data: Path, tmp_path: Path) -> None:
    for name, records in (("a", range(6)), ("b", range(6, 12))):
        lines = [json.dumps({"path": str(data.parent / f"{i}.png"), "prompt": ""}) for i in records]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    (tmp_path / "mix.yaml").write_text("META:\n- {path: a.jsonl, weight: 3}\n- {path: b.jsonl, weight: 1}\n")
    batches = make(tmp_path / "mix.yaml", max_ratio=1.0)
    drawn = [record for step in range(3 * 4) for record in batches[step]["record"]]  # 48 draws
    assert sum(record < 6 for record in drawn) == 36
    with pytest.raises(ValueError, match=r"mix\.yaml gives weights, which batches by grid cannot keep"):
        make(tmp_path / "mix.yaml")


@pytest.mark.parametrize(("resolution", "patch_size", "max_ratio"), [(256, 16, 4.0), (1024, 16, 4.0), (64, 8, 2.0)])
def test_the_nearest_sizes_of_many_are_those_of_each(resolution: int, patch_size: int, max_ratio: float) -> None:
    """Ties too: images halfway between two sizes, of their ratios, and of a few pixels."""
    crop_sizes = images.crop_sizes(resolution, patch_size, max_ratio)
    side = np.arange(1, 30)
    few = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)
    halfway = (np.array(crop_sizes)[:, None] + np.array(crop_sizes)).reshape(-1, 2)
    drawn = np.random.default_rng(0).integers(1, 5000, (1000, 2))
    of = np.concatenate([few, halfway, drawn]).astype(np.int32)
    expected = [images.nearest_size((int(width), int(height)), crop_sizes) for width, height in of]
    assert [crop_sizes[place] for place in nearest_sizes(of, crop_sizes)] == expected


def test_grids_without_an_image_are_left_out() -> None:
    grids = by_grid(np.array([[10, 10], [0, 0], [40, 10], [11, 10]], np.int32), [(8, 2), (4, 4), (2, 8)])
    assert [(grid.size, list(grid.records)) for grid in grids] == [((8, 2), [2]), ((4, 4), [0, 3])]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"batch_size": 6, "process_count": 4}, "batch_size=6 does not divide over 4 processes"),
        ({"process_index": 1}, "process_index=1 is not in 0 to 0"),
        ({"resolution": 30}, "resolution=30 is not a multiple of the patch size 4"),
        ({"max_ratio": 0.5}, r"max_ratio=0\.5 is not at least 1"),
        ({"seed": -1}, "seed=-1 is not in"),
    ],
)
def test_settings_that_cannot_work_are_named(data: Path, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        make(data, **options)
