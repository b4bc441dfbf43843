"""The packing command, on files of many kinds: what is written, what is reported, and what a kill leaves behind."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from PIL import Image

pytest.importorskip("apache_beam")

from data_pipelines import cache, images
from data_pipelines.pack import main, runner_flags
from data_pipelines.pack_shard import encode
from data_pipelines.records import Caption
from data_pipelines.sources import open_source
from tests.data_pipelines import torture
from tests.data_pipelines.servers import serve

ROOT = Path(__file__).parents[2]
SIZES = images.crop_sizes(64, 16, 4.0)
FLAGS = ["--resolution=64", "--shard-size=4", "--workers=1"]
COUNT, BROKEN = 30, {5: "missing", 12: "empty", 13: "keys"}


def scene(i: int) -> Image.Image:
    """Smooth, as photographs are; wide, tall and square, some large enough to be halved, some to be enlarged."""
    width, height = [(300, 200), (150, 310), (64, 64), (40, 30), (700, 180)][i % 5]
    coarse = np.random.default_rng(i).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A list of images of several formats and modes, some of its records broken."""
    folder = tmp_path_factory.mktemp("pack")
    lines = []
    for i in range(COUNT):
        extension, mode = [("jpg", "RGB"), ("png", "RGBA"), ("webp", "RGB"), ("png", "L"), ("gif", "P")][i // 2 % 5]
        name = f"{i}.{extension}"
        if i not in BROKEN:
            scene(i).convert(mode).save(folder / name)
        record = {"path": name, "prompt": [f"scene {i}", ["another", 0.5]] if i % 7 == 0 else f"scene {i}"}
        lines.append("[]" if i == 13 else json.dumps(record))
    (folder / "12.png").touch()
    (folder / "records.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def packed(folder: Path) -> Path:
    main([str(folder / "records.jsonl"), str(folder / "packed"), *FLAGS, "--quality=lossless"])
    return folder / "packed"


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def usable() -> list[int]:
    return [i for i in range(COUNT) if i not in BROKEN]


def test_a_lossless_pack_holds_the_very_crops_and_captions_of_its_source(folder: Path, packed: Path) -> None:
    before, after = open_source(folder / "records.jsonl"), open_source(packed)
    assert len(after) == len(usable())
    assert after.has_captions
    for place, i in enumerate(usable()):
        old, new = before[i], after[place]
        crop = images.read_for(new, SIZES)
        np.testing.assert_array_equal(np.asarray(crop), np.asarray(images.read_for(old, SIZES)))
        assert (new.captions, new.size, new.path) == (old.captions, crop.size, old.where)
    assert after[0].captions == (Caption("scene 0"), Caption("another", 0.5))


@pytest.mark.parametrize("resolution", [64, 256, 1024])
def test_a_crop_is_its_own_crop(resolution: int) -> None:
    sizes = images.crop_sizes(resolution, 16, 4.0)
    assert [images.nearest_size(size, sizes) for size in sizes] == sizes


def test_jpeg_stays_within_the_tolerance_that_is_stated() -> None:
    pytest.importorskip("skimage")
    from data_pipelines.photographs import load_photograph

    sizes = images.crop_sizes(256, 16, 4.0)
    for name in ("astronaut", "colorwheel", "grass", "text"):
        photograph = load_photograph(name).convert("RGB")
        crop = images.crop(photograph, images.nearest_size(photograph.size, sizes))
        read = np.asarray(Image.open(io.BytesIO(encode(crop, 95))), np.float64)
        difference = read - np.asarray(crop, np.float64)
        assert np.abs(difference).mean() <= 2
        assert 10 * np.log10(255**2 / np.square(difference).mean()) >= 38


def test_broken_records_are_reported_by_cause(folder: Path, packed: Path) -> None:
    report = json.loads((packed / "report.json").read_text())
    assert report["broken"] == {"missing": 1, "empty": 1, "keys": 1}
    assert (report["records"], report["written"], report["shards"]) == (COUNT, COUNT - 3, 8)
    lines = [json.loads(line) for line in (packed / "report.jsonl").read_text().splitlines()]
    assert {line["index"]: line["cause"] for line in lines} == BROKEN
    assert lines[0]["message"] == f"{folder}/records.jsonl:6: image {folder}/5.webp does not exist"


def test_every_kind_of_the_torture_set_is_under_its_cause(tmp_path: Path) -> None:
    source = torture.write(tmp_path)
    main([str(source), str(tmp_path / "out"), "--resolution=64", "--shard-size=50"])
    lines = map(json.loads, (tmp_path / "out" / "report.jsonl").read_text().splitlines())
    found = {line["index"]: line["cause"] for line in lines}
    assert found == {i: kind.cause for i, kind in enumerate(torture.KINDS) if kind.cause}


def test_the_torture_set_as_an_archive(tmp_path: Path) -> None:
    torture.write(tmp_path)
    path, causes = torture.write_tar(tmp_path)
    main([str(path), str(tmp_path / "out"), "--resolution=64"])
    lines = map(json.loads, (tmp_path / "out" / "report.jsonl").read_text(encoding="utf-8").splitlines())
    assert {line["index"]: line["cause"] for line in lines} == {i: cause for i, cause in enumerate(causes) if cause}
    source = open_source(tmp_path / "out")
    assert source[len(source) - 1].path.endswith(r"/no utf-8 \udcff.png")


def test_file_names_that_are_no_text_are_packed_and_reported(tmp_path: Path) -> None:
    (folder := tmp_path / "images").mkdir()
    scene(0).save(folder / torture.NO_TEXT)
    (folder / f"empty {torture.NO_TEXT}").touch()
    main([str(folder), str(tmp_path / "out"), "--resolution=64"])
    [line] = map(json.loads, (tmp_path / "out" / "report.jsonl").read_text(encoding="utf-8").splitlines())
    assert line["cause"] == "empty"
    assert r"empty no utf-8 \udcff.png" in line["message"]
    assert open_source(tmp_path / "out")[0].path == rf"{folder}/no utf-8 \udcff.png"


def test_the_number_of_workers_changes_nothing(folder: Path, packed: Path, tmp_path: Path) -> None:
    flags = [*FLAGS[:2], "--workers=3", "--quality=lossless"]
    main([str(folder / "records.jsonl"), str(tmp_path / "out"), *flags])
    assert content(tmp_path / "out") == content(packed)


def test_killed_half_way_and_run_again_the_result_is_the_same_to_the_byte(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    killed = tmp_path / "killed"
    with serve(folder) as server:
        lines = (folder / "records.jsonl").read_text().splitlines()
        lines[21] = json.dumps({"path": f"{server.url}/wait/21.jpg", "prompt": "an image that is awaited"})
        (source := folder / "slow.jsonl").write_text("\n".join(lines))
        command = [sys.executable, "-m", "data_pipelines.pack", str(source), str(killed), *FLAGS]
        with (tmp_path / "log").open("w") as log:
            process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
        try:
            # Five shards are finished, the sixth is begun.
            deadline = time.monotonic() + 60
            while not server.asked["/wait/21.jpg"] or not list(killed.glob("*.partial")):
                assert process.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.02)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        first = {file.name: file.stat().st_mtime_ns for file in killed.glob("*.array_record")}
        assert len(first) == 5
        assert not (killed / "report.json").exists()
        for unfinished in (killed, killed / "*.array_record"):
            with pytest.raises(ValueError, match=r"the packing of .*killed.* is not finished: run the same command"):
                open_source(unfinished)

        server.awaited.set()
        main([str(source), str(killed), *FLAGS])
        main([str(source), str(tmp_path / "whole"), *FLAGS])
    assert content(killed) == content(tmp_path / "whole")
    assert len(content(killed)) == 8 + 8 + 3
    assert {name: (killed / name).stat().st_mtime_ns for name in first} == first  # they were not made again


def test_what_another_living_pack_writes_is_left_alone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (out := tmp_path / "out").mkdir()
    with subprocess.Popen(["sleep", "60"]) as other, contextlib.ExitStack() as writers:
        for process in (other.pid, 2**30):  # a living one, and one that was killed
            monkeypatch.setattr(os, "getpid", lambda process=process: process)
            writers.enter_context(cache.writing(out / "shard")).touch()
        monkeypatch.undo()
        for age, name in ((0, "shard.elsewhere.1-00000000.partial"), (10**6, "shard.elsewhere.2-00000000.partial")):
            (out / name).touch()
            os.utime(out / name, (time.time() - age,) * 2)
        main([str(folder / "records.jsonl"), str(out), *FLAGS])
        left = sorted(file.name for file in out.rglob("*.partial"))
        writers.pop_all()
        other.kill()
    assert len(left) == 2
    assert left[0] == "shard.elsewhere.1-00000000.partial"
    assert f".{other.pid}-" in left[1]


def test_a_shard_that_was_cut_or_lost_is_made_again(folder: Path, packed: Path, tmp_path: Path) -> None:
    before = content(packed)
    os.truncate(packed / "pack-00002-of-00008.array_record", 1000)
    (packed / "pack-00004-of-00008.array_record").unlink()
    (packed / "reports" / "00006.json").write_text("{")
    main([str(folder / "records.jsonl"), str(packed), *FLAGS, "--quality=lossless"])
    assert content(packed) == before


def test_a_pack_that_loses_shards_is_unfinished_until_they_are_made(
    folder: Path, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost, runs = packed / "pack-00002-of-00008.array_record", []
    content = lost.read_bytes()
    lost.unlink()

    def killed(*_: object) -> None:
        runs.append(packed)
        raise KeyboardInterrupt

    monkeypatch.setattr("data_pipelines.pack.run", killed)
    command = [str(folder / "records.jsonl"), str(packed), *FLAGS, "--quality=lossless"]
    with pytest.raises(KeyboardInterrupt):
        main(command)
    with pytest.raises(ValueError, match="is not finished"):
        open_source(packed)
    monkeypatch.undo()
    main(command)
    assert lost.read_bytes() == content
    assert runs == [packed]
    open_source(packed)


def test_one_source_has_one_pack_however_it_is_written(
    folder: Path, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_pipelines.pack.run", lambda *_: pytest.fail("there is nothing to be made"))
    monkeypatch.chdir(folder)
    for source, out in (("records.jsonl", "packed"), ("./../" + folder.name + "/records.jsonl", packed.as_uri())):
        main([source, out, *FLAGS, "--quality=lossless"])


def test_a_mixture_with_weights_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "m.yaml").write_text("META: [{path: records.jsonl, weight: 3}, {path: records.jsonl, weight: 1}]")
    with pytest.raises(SystemExit, match=r"m\.yaml is a mixture with weights, .* pack each of its lists"):
        main([str(folder / "m.yaml"), str(tmp_path / "out"), *FLAGS])
    assert not (tmp_path / "out").exists()
    (folder / "m.yaml").write_text("META: [{path: records.jsonl, ratio: 0.5}, {path: records.jsonl}]")
    main([str(folder / "m.yaml"), str(tmp_path / "out"), "--resolution=64"])
    assert json.loads((tmp_path / "out" / "report.json").read_text())["records"] == COUNT * 3 // 2


def test_without_captions_a_folder_is_packed_and_stays_without(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for i in range(3):
        scene(i).save(tmp_path / "images" / f"{i}.png")
    main([str(tmp_path / "images"), str(tmp_path / "out"), "--resolution=64"])
    source = open_source(tmp_path / "out")
    assert len(source) == 3
    assert not source.has_captions


def test_what_is_wrong_is_said_in_one_sentence(
    folder: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = str(folder / "records.jsonl"), str(tmp_path / "out")
    with pytest.raises(SystemExit, match=r"error: .*packed was begun with resolution=64 and now 128.*quality=lossless"):
        main([source, str(packed), "--resolution=128", "--shard-size=4"])
    with pytest.raises(SystemExit, match="holds other files than those of a pack"):
        main([source, str(folder), *FLAGS])
    with pytest.raises(SystemExit, match="resolution=100 is not a multiple of the patch size 16"):
        main([source, out, "--resolution=100"])
    with pytest.raises(SystemExit, match=f"error: data {tmp_path}/none does not exist"):
        main([str(tmp_path / "none"), out, *FLAGS])
    with pytest.raises(SystemExit):
        main([source, out, *FLAGS, "--max_ratio=2"])
    assert "unknown flags --max_ratio=2" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([source, out, *FLAGS, "--quality=101"])
    assert "'101' is neither a number from 1 to 100 nor 'lossless'" in capsys.readouterr().err
    for flag, said in (
        ("--patch-size=0", "'0' is no"),
        ("--workers=1000000000000", "from 1 to 1024"),
        ("--shard-size=x", "'x' is no"),
    ):
        with pytest.raises(SystemExit):
            main([source, out, *FLAGS, flag])
        assert said in capsys.readouterr().err
    for address in ("memory://a/packed", "https://a/packed"):
        with pytest.raises(SystemExit, match=f"error: OUT {address} is no place to write to: expected a folder"):
            main([source, address, *FLAGS])
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(SystemExit, match=r'OUT gs://a/packed is remote: run `pip install "svg_jax\[remote\]"`'):
        main([source, "gs://a/packed", *FLAGS])
    (tmp_path / "damaged").mkdir()
    for text in ('{"source": ', "[]"):
        (tmp_path / "damaged" / "pack.json").write_text(text)
        with pytest.raises(SystemExit, match=r"damaged/pack\.json is damaged \(.*choose another OUT"):
            main([source, str(tmp_path / "damaged"), *FLAGS])
    (tmp_path / "broken.jsonl").write_text("{}\n[]")
    with pytest.raises(SystemExit, match=r"not one of the 2 records could be used: .*broken\.jsonl:1 names no image"):
        main([str(tmp_path / "broken.jsonl"), out, *FLAGS])
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(SystemExit, match=r'packing runs on Apache Beam: run `pip install "svg_jax\[pack\]"`'):
        main([source, str(tmp_path / "other"), *FLAGS])


def test_another_runner_of_beam_gets_its_own_flags(folder: Path, packed: Path, tmp_path: Path) -> None:
    more = ["--quality=lossless", "--runner=BundleBasedDirectRunner", "--direct_runner_bundle_repeat=1"]
    main([str(folder / "records.jsonl"), str(tmp_path / "out"), *FLAGS, *more])
    assert content(tmp_path / "out") == content(packed)
    assert runner_flags("SparkRunner", 4, ["--environment_type=DOCKER"]) == [
        "--runner=SparkRunner",
        "--environment_type=DOCKER",
    ]


def test_shards_go_to_a_bucket_and_a_second_run_finds_them(
    folder: Path, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsspec = pytest.importorskip("fsspec")
    bucket = fsspec.filesystem("memory")  # stands for a bucket
    monkeypatch.setattr(epath.backend.fsspec_backend, "_get_filesystem", lambda name: bucket)
    command = [str(folder / "records.jsonl"), "gs://bucket/packed", *FLAGS, "--quality=lossless"]
    main(command)

    def written() -> dict[str, bytes]:
        return {path.partition("bucket/packed/")[2]: bucket.cat(path) for path in bucket.find("gs://bucket/packed")}

    assert written() == content(packed)
    monkeypatch.setattr("data_pipelines.pack.run", lambda *_: pytest.fail("there is nothing to be made"))
    main(command)
    assert written() == content(packed)
