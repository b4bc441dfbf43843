"""Batches: their contents, their order, resuming, slicing over processes, and records that cannot be used."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipelines import images, packing, text
from data_pipelines.batches import Batch, TextToImageBatches
from data_pipelines.broken import CAUSES
from data_pipelines.order import shuffled_index
from data_pipelines.records import Cause
from data_pipelines.sources import open_source

NUM_RECORDS = 11
SIZES = [(64, 64), (120, 40), (40, 120), (90, 70), (33, 31)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSON Lines list of small images of several shapes; record i has red channel 20 * i."""
    folder = tmp_path_factory.mktemp("data")
    lines = []
    for i in range(NUM_RECORDS):
        Image.new("RGB", SIZES[i % len(SIZES)], (20 * i, 0, 0)).save(folder / f"{i}.png")
        lines.append(json.dumps({"path": f"{i}.png", "prompt": f"number {i}"}))
    (folder / "list.jsonl").write_text("\n".join(lines))
    return folder / "list.jsonl"


def make(path: Path, **options: Any) -> TextToImageBatches:
    settings: dict[str, Any] = {
        "batch_size": 4, "resolution": 64, "patch_size": 8, "max_text_tokens": 160, "seed": 7, "caption_dropout": 0.3
    }  # fmt: skip
    return TextToImageBatches(open_source(path), text.ByteTokenizer(), **(settings | options))


def assert_equal(a: Batch, b: Batch) -> None:
    for key in Batch.__annotations__:
        np.testing.assert_array_equal(a[key], b[key], err_msg=key)  # type: ignore[literal-required]


def caption(batch: Batch, slot: int) -> str:
    ids = batch["tokens"][slot, 1 : batch["num_tokens"][slot]] - 3
    return bytes(ids.tolist()).decode()


def test_a_batch_keeps_the_contract(data: Path) -> None:
    batch = make(data)[3]
    assert {key: (value.shape, value.dtype) for key, value in batch.items() if isinstance(value, np.ndarray)} == {
        "patches": ((4, 64, 192), np.uint8),
        "grid": ((4, 2), np.int32),
        "tokens": ((4, 160), np.int32),
        "num_tokens": ((4,), np.int32),
        "cause": ((4,), np.int32),
        "record": ((4,), np.int64),
    }
    assert not batch["cause"].any()
    assert batch["num_truncated"] == 0


def test_a_slot_holds_its_record_cropped_and_its_caption(data: Path) -> None:
    sizes = images.crop_sizes(64, 8)
    batches = make(data, caption_dropout=0.0)
    for batch in (batches[step] for step in range(3)):
        for slot, record in enumerate(batch["record"]):
            width, height = images.nearest_size(SIZES[record % len(SIZES)], sizes)
            assert batch["grid"][slot].tolist() == [height // 8, width // 8]
            pixels = images.unpatchify(batch["patches"][slot], batch["grid"][slot])
            assert (pixels == [20 * record, 0, 0]).all()
            assert not batch["patches"][slot, batch["grid"][slot].prod() :].any()
            assert caption(batch, slot) == text.full_prompt(f"number {record}", "base")
            assert (batch["tokens"][slot, batch["num_tokens"][slot] :] == text.ByteTokenizer.pad_id).all()


def test_every_record_comes_once_an_epoch_in_another_order_each(data: Path) -> None:
    batches = make(data)
    draws = [batches.draw(k) for k in range(5 * NUM_RECORDS)]
    epochs = [[record for _, record in draws[e * NUM_RECORDS : (e + 1) * NUM_RECORDS]] for e in range(5)]
    assert [epoch for epoch, _ in draws] == [e for e in range(5) for _ in range(NUM_RECORDS)]
    assert all(sorted(order) == list(range(NUM_RECORDS)) for order in epochs)
    assert len({tuple(order) for order in epochs}) == 5
    assert make(data, seed=8).draw(0) != batches.draw(0) or make(data, seed=9).draw(0) != batches.draw(0)


def test_batches_run_over_the_end_of_an_epoch(data: Path) -> None:
    batches = make(data)
    seen = Counter(np.concatenate([batches[step]["record"] for step in range(NUM_RECORDS)]).tolist())
    assert seen == dict.fromkeys(range(NUM_RECORDS), 4)  # 11 steps of 4 slots are 4 epochs of 11 records


def test_order_without_shuffling_is_the_order_of_the_file(data: Path) -> None:
    batches = make(data, shuffle=False)
    assert [batches.draw(k)[1] for k in range(13)] == [*range(11), 0, 1]


def test_the_permutation_is_pinned() -> None:
    """A change of these numbers changes the data order of every run that resumes: it must not happen unnoticed."""
    assert [shuffled_index(i, 12, seed=0, epoch=0) for i in range(12)] == [5, 8, 11, 7, 4, 2, 1, 0, 3, 6, 10, 9]
    assert [shuffled_index(i, 60_000_000, seed=1, epoch=2) for i in range(3)] == [14910378, 49252016, 16744472]


@pytest.mark.parametrize("n", [1, 2, 3, 255, 4097])
def test_the_permutation_reaches_every_record(n: int) -> None:
    assert sorted(shuffled_index(i, n, seed=3, epoch=4) for i in range(n)) == list(range(n))


@pytest.mark.parametrize("process_count", [2, 4])
def test_processes_hold_slices_of_the_same_batches(data: Path, process_count: int) -> None:
    whole = make(data)
    slices = [make(data, process_index=i, process_count=process_count) for i in range(process_count)]
    for step in range(4):
        expected = whole[step]
        parts = [part[step] for part in slices]
        for key in ("patches", "grid", "tokens", "num_tokens", "cause", "record"):
            joined = np.concatenate([part[key] for part in parts])  # type: ignore[literal-required]
            np.testing.assert_array_equal(joined, expected[key])  # type: ignore[literal-required]
        assert sum(part["num_truncated"] for part in parts) == expected["num_truncated"]


def test_every_process_knows_the_records_of_all(data: Path) -> None:
    slices = [make(data, process_index=i, process_count=2) for i in range(2)]
    for step in (0, 3):
        records = [record for part in slices for record in part[step]["record"].tolist()]
        assert slices[0].records(step) == slices[1].records(step) == records


def test_dropped_captions_are_the_start_token_alone(data: Path) -> None:
    batches = make(data, caption_dropout=0.3)
    dropped: dict[tuple[int, int], bool] = {}
    for step in range(3 * NUM_RECORDS):
        batch = batches[step]
        for slot in range(4):
            epoch, record = batches.draw(4 * step + slot)
            dropped[epoch, record] = batch["num_tokens"][slot] == 1
            assert batch["tokens"][slot, 0] == text.ByteTokenizer.bos_id
    assert 0.15 < np.mean(list(dropped.values())) < 0.45
    by_epoch = [tuple(dropped[epoch, record] for record in range(NUM_RECORDS)) for epoch in range(12)]
    assert len(set(by_epoch)) > 6  # drawn anew each epoch
    # Of the epoch and the record alone: another batch size drops the same captions.
    single = make(data, caption_dropout=0.3, batch_size=1)
    assert all((single[k]["num_tokens"][0] == 1) == dropped[single.draw(k)] for k in range(NUM_RECORDS))


def test_long_captions_are_cut_and_counted(data: Path) -> None:
    budget = len(text.full_prompt("number 9", "base")) + 1  # "number 10" is one byte longer
    batches = make(data, batch_size=NUM_RECORDS, caption_dropout=0.0, max_text_tokens=budget)
    batch = batches[0]
    assert batch["num_truncated"] == 1
    assert batch["num_tokens"].tolist() == [budget] * NUM_RECORDS


def test_the_autoencoder_has_one_grid_and_no_captions(data: Path) -> None:
    batch = make(data, max_ratio=1.0, caption_dropout=1.0, max_text_tokens=1)[0]
    assert (batch["grid"] == 8).all()
    assert batch["tokens"].tolist() == [[text.ByteTokenizer.bos_id]] * 4
    assert batch["num_truncated"] == 0


def test_captions_of_a_pack_share_a_row_and_the_rest_is_as_without(data: Path) -> None:
    plain, packed = make(data, caption_dropout=0.0), make(data, caption_dropout=0.0, pack=2, max_packed_tokens=200)
    for step in range(3):
        one, two = plain[step], packed[step]
        for key in ("patches", "grid", "cause", "record"):
            np.testing.assert_array_equal(two[key], one[key])  # type: ignore[literal-required]
        ids = [one["tokens"][slot, : one["num_tokens"][slot]].tolist() for slot in range(4)]
        tokens, num_tokens, cut = packing.pack_tokens(ids, 2, 200, text.ByteTokenizer.pad_id)
        assert two["tokens"].shape == (2, 200)
        np.testing.assert_array_equal(two["tokens"], tokens)
        np.testing.assert_array_equal(two["num_tokens"], num_tokens)
        assert two["num_truncated"] == cut.sum() > 0


def test_several_captions_are_drawn_anew_each_epoch_and_by_their_index_alone(data: Path, tmp_path: Path) -> None:
    lines = [{"path": str(data.parent / f"{i}.png"), "prompt": ["a", ["b", 3.0], "c"]} for i in range(NUM_RECORDS)]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    batches = make(tmp_path / "list.jsonl", caption_dropout=0.0, system_prompt="empty")
    drawn = {}
    for step in range(2 * NUM_RECORDS):
        batch = batches[step]
        drawn |= {batches.draw(4 * step + slot): caption(batch, slot) for slot in range(4)}
    assert len(drawn) == 8 * NUM_RECORDS
    counts = Counter(drawn.values())
    assert set(counts) == {"a", "b", "c"}
    assert 0.4 < counts["b"] / len(drawn) < 0.8
    single = make(tmp_path / "list.jsonl", caption_dropout=0.0, system_prompt="empty", batch_size=1)
    assert all(caption(single[k], 0) == drawn[single.draw(k)] for k in range(2 * NUM_RECORDS))


BROKEN = {  # after one good record, one for each way in which a record can be broken
    "cut.png": Cause.TRUNCATED,
    "text.png": Cause.NOT_AN_IMAGE,
    "none.png": Cause.MISSING,
    "float.tiff": Cause.MODE,
    "empty.png": Cause.EMPTY,
    "": Cause.VALUE,
}


@pytest.fixture
def bad_data(data: Path, tmp_path: Path) -> Path:
    (tmp_path / "cut.png").write_bytes((data.parent / "0.png").read_bytes()[:60])
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.png").touch()
    Image.fromarray(np.ones((8, 8), np.float32)).save(tmp_path / "float.tiff")
    lines = [{"path": str(data.parent / "0.png"), "prompt": "good"}]
    lines += [{"path": name, "prompt": "a caption"} for name in BROKEN]
    (tmp_path / "list.jsonl").write_text("\n".join([*map(json.dumps, lines), "{not json", '{"path": "0.png"}']))
    return tmp_path / "list.jsonl"


@pytest.mark.parametrize("num_threads", [0, 3])
def test_bad_records_leave_their_slot_empty_with_a_cause(bad_data: Path, num_threads: int) -> None:
    batches = make(bad_data, batch_size=9, caption_dropout=0.0, shuffle=False)
    with ThreadPoolExecutor(max(num_threads, 1)) as threads:
        batch = batches.read(0, threads if num_threads else None)
    expected = [*BROKEN.values(), Cause.NOT_JSON, Cause.CAPTION]
    assert [CAUSES[number - 1] for number in batch["cause"][1:]] == expected
    assert batch["cause"][0] == 0
    assert batch["record"].tolist() == list(range(9))
    assert batch["grid"].tolist() == [[8, 8]] + 8 * [[0, 0]]
    assert caption(batch, 0).endswith("good")
    assert batch["num_tokens"].tolist()[1:] == 8 * [1]
    assert (batch["tokens"][1:, 0] == text.ByteTokenizer.bos_id).all()
    assert not batch["patches"][1:].any()


def test_a_record_without_a_caption_is_fine_where_all_are_dropped(bad_data: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "list.jsonl").write_text(json.dumps({"path": str(data.parent / "1.png")}))
    batch = make(tmp_path / "list.jsonl", batch_size=1, caption_dropout=1.0)[0]
    assert (batch["cause"].tolist(), batch["num_tokens"].tolist()) == ([0], [1])


def test_threads_read_what_one_reads(data: Path) -> None:
    batches = make(data)
    with ThreadPoolExecutor(3) as threads:
        for step in range(4):
            assert_equal(batches.read(step, threads), batches[step])


def test_batches_travel_to_other_processes(data: Path) -> None:
    batches = make(data)
    assert_equal(pickle.loads(pickle.dumps(batches))[3], batches[3])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"batch_size": 6, "process_count": 4}, "batch_size=6 does not divide over 4 processes; choose 4 or"),
        ({"batch_size": 0}, "batch_size=0 is no number of records; choose 1 or a multiple of it"),
        ({"batch_size": -4, "process_count": 2}, "batch_size=-4 is no number of records; choose 2 or"),
        ({"process_index": 1}, "process_index=1 is not in 0 to 0"),
        ({"resolution": 60}, "resolution=60 is not a multiple of the patch size 8; choose 56 or 64"),
        ({"max_text_tokens": 0}, "max_text_tokens=0 leaves no room for the start token"),
        ({"caption_dropout": 1.5}, r"caption_dropout=1\.5 is not a share"),
        ({"seed": -1}, "seed=-1 is not in"),
        ({"pack": 3, "max_packed_tokens": 99}, "4 captions do not fill rows of 3"),
        ({"pack": 0}, "pack=0 is no number of images in a sequence; it is at least 1"),
        ({"pack": -1}, "pack=-1 is no number of images"),
        ({"pack": 2}, "0 tokens have no room for the start tokens of 2 captions"),
    ],
)
def test_settings_that_cannot_work_are_named(data: Path, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        make(data, **options)
