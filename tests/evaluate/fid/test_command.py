"""The door, end to end: folders of small pictures, a small network in Inception's place."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from svg_jax import distributed
from svg_jax.evaluate import networks
from svg_jax.evaluate.__main__ import main
from svg_jax.evaluate.fid import features, sides
from svg_jax.evaluate.fid.moments import Moments, frechet_distance
from tests.evaluate.fid.small_inception import NETWORK, SmallInception, write_inception

IMAGES, REAL, PART = 23, 17, 8
BROKEN = "b/13.png"
DRAWN_WITH = {"pipeline": {"num_steps": 4}, "ema": True}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "Inception", SmallInception)
    monkeypatch.setattr(sides, "PART", PART)


def picture(generator: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    coarse = Image.fromarray(generator.integers(0, 256, (3, 3, 3), np.uint8))
    return coarse.resize(size, Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`inception`, `other` of other weights, `pictures` of many sizes and how they were drawn, `real`."""
    folder = tmp_path_factory.mktemp("fid")
    write_inception(folder / "inception")
    write_inception(folder / "other", seed=1)
    generator = np.random.default_rng(3)
    for i in range(IMAGES):
        file = folder / "pictures" / "ab"[i // 10 % 2] / f"{i:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        picture(generator, (20 + i, 24)).save(file)
    (folder / "pictures" / BROKEN).write_bytes(b"no picture")
    (folder / "pictures" / "settings.json").write_text(json.dumps(DRAWN_WITH))
    (folder / "real").mkdir()
    for i in range(REAL):
        picture(generator, (32, 32)).save(folder / "real" / f"{i}.png")
    return folder


def evaluate(folder: Path, out: Path, *more: str, inception: bool = True) -> dict[str, Any] | None:
    given = {flag.partition("=")[0] for flag in more}
    flags = {"--images": "pictures", "--reference": "real", **({"--inception": "inception"} if inception else {})}
    arguments = [f"{flag}={folder / name}" for flag, name in flags.items() if flag not in given]
    main(["fid", *arguments, f"--out={out}", "--num-threads=2", *more])
    file = out / "results.json"
    return json.loads(file.read_text()) if file.exists() else None


@pytest.fixture(scope="module")
def out(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run of everything, which keeps the statistics too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(networks, "Inception", SmallInception)
        patch.setattr(sides, "PART", PART)
        out = tmp_path_factory.mktemp("results")
        evaluate(folder, out, "--metrics=fid,is,precision_recall", f"--save-statistics={out / 'real.npz'}")
    return out


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "images.jsonl").read_text().splitlines()]


def test_scores_are_those_of_the_formulas(folder: Path, out: Path) -> None:
    params = write_inception(folder / "again")

    def of(name: str) -> np.ndarray:
        files = sorted(path for path in (folder / name).rglob("*.png") if not path.match(BROKEN))
        images = [features.to_inception(np.asarray(Image.open(file).convert("RGB"))) for file in files]
        return np.asarray(NETWORK(params).pooled(jnp.asarray(np.stack(images))))

    found, real = of("pictures"), of("real")
    report = json.loads((out / "results.json").read_text())
    scores = report["scores"]
    assert scores["fid"] == pytest.approx(frechet_distance(Moments.of(found), Moments.of(real)), rel=1e-3)

    p = np.asarray(jax.nn.softmax(NETWORK(params).logits(jnp.asarray(found)), axis=-1), np.float64)
    divergence = np.mean(np.sum(p * (np.log(p) - np.log(p.mean(axis=0, keepdims=True))), axis=1))
    assert scores["is_one_split"] == pytest.approx(np.exp(divergence), rel=1e-4)
    assert 1 < scores["is"] < scores["is_one_split"]
    assert scores["is_std"] > 0

    between = np.linalg.norm(real[:, None] - real[None], axis=2)
    reach = np.sort(between, axis=1)[:, 3]
    inside = (np.linalg.norm(found[:, None] - real[None], axis=2) <= reach[None]).any(axis=1)
    assert scores["precision"] == pytest.approx(inside.mean())
    assert [line["in_manifold"] for line in lines(out) if "name" in line] == inside.tolist()
    assert 0 < scores["recall"] <= 1


def test_the_report_names_settings_and_what_was_left_out(folder: Path, out: Path) -> None:
    report = json.loads((out / "results.json").read_text())
    settings = report["settings"]
    assert settings["images"]["origin"] == {"path": str(folder / "pictures")}
    assert settings["inception"]["origin"] == {"checkpoint": str(folder / "inception")}
    assert settings["images"]["drawn_with"] == DRAWN_WITH
    assert settings["reference"]["num_images"] == report["num_reference"] == REAL
    assert (settings["images"]["num_images"], report["num_images"]) == (IMAGES, IMAGES - 1)
    assert len(settings["inception"]["weights"]) == 16
    warnings = " ".join(report["warnings"])
    assert f"--images: FID of {IMAGES} images is biased upward" in warnings
    assert f"--reference: FID of {REAL} images is biased upward" in warnings
    assert f"1 of {IMAGES} images of --images could not be read and are left out" in warnings
    (bad,) = (line for line in lines(out) if "error" in line)
    assert (bad["set"], bad["index"]) == ("images", 16)  # behind the thirteen of the first folder
    assert BROKEN in bad["error"]
    assert [line["index"] for line in lines(out)] == list(range(IMAGES))
    assert "fid" in (out / "results.md").read_text()
    assert (out / "index.html").exists()


REPORT = ("results.json", "images.jsonl", "results.md", "index.html")


def test_shards_and_interruptions_give_what_one_run_gives(
    folder: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = "--metrics=fid,is,precision_recall"
    monkeypatch.setattr(distributed, "preempted", lambda turn: turn == 1)
    with pytest.raises(SystemExit) as end:
        evaluate(folder, tmp_path, every, "--shard=1/2")
    assert end.value.code == distributed.EXIT_PREEMPTED
    monkeypatch.setattr(distributed, "preempted", lambda turn: False)
    part = tmp_path / "parts" / "000001.npz"
    written = part.stat().st_mtime_ns
    assert evaluate(folder, tmp_path, every, "--shard=1/2") is None
    evaluate(folder, tmp_path, every, "--shard=0/2")
    assert part.stat().st_mtime_ns == written
    for name in REPORT:
        assert (tmp_path / name).read_bytes() == (out / name).read_bytes(), name


def test_once_all_parts_are_there_no_weights_are_needed(folder: Path, out: Path, tmp_path: Path) -> None:
    shutil.copytree(out, tmp_path, dirs_exist_ok=True)
    for name in REPORT:
        (tmp_path / name).unlink()
    every = "--metrics=fid,is,precision_recall"
    evaluate(folder, tmp_path, every, inception=False)
    for name in REPORT:
        assert (tmp_path / name).read_bytes() == (out / name).read_bytes(), name
    (tmp_path / "parts" / "000002.npz").unlink()
    with pytest.raises(SystemExit, match=r"1 of 6 parts are not in .*, and FID needs weights for them: download"):
        evaluate(folder, tmp_path, every, inception=False)
    for damaged in ("{", "[]", '{"inception": 3}'):
        (tmp_path / "settings.json").write_text(damaged)
        with pytest.raises(SystemExit, match=rf"{tmp_path / 'settings.json'} .*: choose another --out, or remove it"):
            evaluate(folder, tmp_path, every, inception=False)


def test_the_number_of_devices_changes_nothing(
    folder: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    evaluate(folder, tmp_path, "--metrics=fid,is,precision_recall")
    for name in REPORT:
        assert (tmp_path / name).read_bytes() == (out / name).read_bytes(), name


def test_statistics_stand_for_the_images_that_they_are_of(folder: Path, out: Path, tmp_path: Path) -> None:
    fid = json.loads((out / "results.json").read_text())["scores"]["fid"]
    ours = f"--reference={out / 'real.npz'}"
    report = evaluate(folder, tmp_path / "ours", ours, "--metrics=fid")
    assert report is not None
    assert report["scores"] == {"fid": pytest.approx(fid, rel=1e-9)}
    assert report["num_reference"] == REAL
    assert len(report["settings"]["reference"]["statistics"]) == 16

    # Of the same images in pytorch-fid's form, which says nothing else; on both sides, without any network.
    with np.load(out / "real.npz") as arrays:
        np.savez(tmp_path / "theirs.npz", mu=arrays["mu"], sigma=arrays["sigma"])
    theirs = f"--reference={tmp_path / 'theirs.npz'}"
    report = evaluate(folder, tmp_path / "theirs", theirs, "--metrics=fid")
    assert report is not None
    assert report["scores"] == {"fid": pytest.approx(fid, rel=1e-9)}
    assert any("does not say by which network" in text for text in report["warnings"])
    report = evaluate(folder, tmp_path / "files", theirs, f"--images={out / 'real.npz'}", "--metrics=fid")
    assert report is not None
    assert report["scores"]["fid"] == pytest.approx(0.0, abs=1e-9)

    with pytest.raises(SystemExit, match=r"real\.npz holds statistics of another extractor: they were made with"):
        evaluate(folder, tmp_path / "x", ours, "--metrics=fid", f"--inception={folder / 'other'}")
    with pytest.raises(SystemExit, match=r"real\.npz holds statistics of whole images, and now crops of 16 px"):
        evaluate(folder, tmp_path / "x", ours, "--metrics=fid", "--resolution=16")
    with pytest.raises(SystemExit, match=r"precision_recall looks at single images and --reference .*real\.npz holds"):
        evaluate(folder, tmp_path / "x", ours, "--metrics=precision_recall")
    np.savez(tmp_path / "theirs.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(SystemExit, match=r"another extractor: 3 channels instead of 12"):
        evaluate(folder, tmp_path / "x", theirs, "--metrics=fid")


def test_statistics_may_be_made_alone(folder: Path, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = [f"--reference={folder / 'real'}", f"--inception={folder / 'inception'}", f"--out={tmp_path / 'out'}"]
    main(["fid", *arguments, f"--save-statistics={tmp_path / 'real.npz'}"])
    assert f"real.npz: statistics of {REAL} images" in capsys.readouterr().out
    with np.load(tmp_path / "real.npz") as found, np.load(out / "real.npz") as before:
        for name in ("mu", "sigma", "count", "resolution", "extractor"):
            np.testing.assert_array_equal(found[name], before[name])
    assert not (tmp_path / "out" / "results.json").exists()


def test_images_may_come_as_an_array_a_list_or_a_prepared_data_set(
    folder: Path, out: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    files = sorted((folder / "real").iterdir(), key=str)
    np.savez(tmp_path / "real.npz", arr_0=np.stack([np.asarray(Image.open(file)) for file in files]))
    (tmp_path / "real.jsonl").write_text("".join(json.dumps({"path": str(f), "prompt": ""}) + "\n" for f in files))
    write_prepared(tmp_path / "prepared", files)
    with np.load(out / "real.npz") as expected:
        for i, reference in enumerate(("real.npz", "real.jsonl", "tfds:real_pictures/train")):
            path = reference if reference.startswith("tfds:") else tmp_path / reference
            arguments = [f"--reference={path}", f"--inception={folder / 'inception'}", f"--out={tmp_path / str(i)}"]
            arguments += [f"--root={tmp_path / 'prepared'}"] if reference.startswith("tfds:") else []
            main(["fid", *arguments, f"--save-statistics={tmp_path / f'{i}.npz'}"])
            with np.load(tmp_path / f"{i}.npz") as found:
                np.testing.assert_allclose(found["mu"], expected["mu"], rtol=1e-6, err_msg=reference)
                np.testing.assert_allclose(found["sigma"], expected["sigma"], rtol=1e-4, atol=1e-9, err_msg=reference)


def write_prepared(folder: Path, files: list[Path]) -> None:
    tfds = pytest.importorskip("tensorflow_datasets")

    class RealPictures(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> Any:
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict({"image": tfds.features.Image()})
            )

        def _split_generators(self, downloads: Any) -> Any:
            return {"train": self._generate_examples()}

        def _generate_examples(self) -> Any:
            for i, file in enumerate(files):
                yield i, {"image": io.BytesIO(file.read_bytes())}

    RealPictures(data_dir=folder, file_format="array_record").download_and_prepare()


def test_pictures_that_change_are_looked_at_again(folder: Path, out: Path, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    shutil.copytree(folder / "pictures", pictures)
    images = (f"--images={pictures}", "--metrics=fid")
    before = evaluate(folder, tmp_path / "out", *images)
    parts = sorted((tmp_path / "out" / "parts").iterdir())
    times = [part.stat().st_mtime_ns for part in parts]
    picture(np.random.default_rng(9), (50, 60)).save(pictures / "a" / "03.png")
    with pytest.raises(SystemExit, match=r"1 of 6 parts are not in .*, or of pictures that have changed since"):
        evaluate(folder, tmp_path / "out", *images, inception=False)
    with pytest.raises(SystemExit, match=r"1 of 6 parts in .* are of pictures that have changed since: give the comm"):
        evaluate(folder, tmp_path / "out", *images, "--shard=1/2")  # to which that part does not belong
    after = evaluate(folder, tmp_path / "out", *images)
    assert after is not None
    assert before is not None
    assert after["scores"] != before["scores"]
    fresh = evaluate(folder, tmp_path / "fresh", *images)
    assert fresh is not None
    assert after["scores"] == fresh["scores"]
    assert [part.stat().st_mtime_ns == time for part, time in zip(parts, times, strict=True)] == [False] + 5 * [True]


def test_copies_are_what_they_are_copies_of(folder: Path, out: Path, tmp_path: Path) -> None:
    """Of weights, of pictures and of statistics, at another place."""
    for name in ("pictures", "inception"):
        shutil.copytree(folder / name, tmp_path / name)
    shutil.copytree(out, tmp_path / "out")
    copies = (f"--images={tmp_path / 'pictures'}", f"--inception={tmp_path / 'inception'}")
    evaluate(folder, tmp_path / "out", *copies, "--metrics=fid,is,precision_recall")
    moved = json.loads((tmp_path / "out" / "results.json").read_text())
    assert moved["scores"] == json.loads((out / "results.json").read_text())["scores"]
    shutil.copy(out / "real.npz", tmp_path / "copy.npz")
    for reference in (out / "real.npz", tmp_path / "copy.npz"):
        assert evaluate(folder, tmp_path / "statistics", "--metrics=fid", f"--reference={reference}") is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--metrics=fid,kid"], "unknown metric 'kid': did you mean 'fid'"),
        (["--metrics=,"], "--metrics names none"),
        (["--shard=2/2"], "--shard '2/2' is not I/N"),
        (["--num-threads=0"], "--num-threads is 0: it must be at least 1"),
        (["--resolution=-1"], "--resolution is -1: it is a side in pixels up to 8192, or 0"),
        (["--resolution=8193"], "--resolution is 8193: it is a side in pixels up to 8192, or 0"),
        (["--metrics=is", "--reference=/nowhere"], "/nowhere does not exist"),
        (["--images=/nowhere"], "/nowhere does not exist"),
        (["--images={}/one"], r"--images .*one has 1 images, and fid needs at least 2"),
        (["--images={}/one", "--metrics=is"], r"one has 1 images, and is needs at least 10"),
        (["--reference={}/one"], r"--reference .*one has 1 images, and fid needs at least 2"),
        (
            ["--inception={}/lpips"],
            r"--inception .*lpips holds no inception weights: download .*pt_inception-2015-12-05",
        ),
        (["--save-statistics=a.txt"], r"--save-statistics a\.txt: the name must end in \.npz"),
        (
            ["--save-statistics={}/one/a.png/a.npz", "--inception=/nowhere"],
            r"--save-statistics .*a\.npz cannot be writt",
        ),
    ],
)
def test_bad_input_is_one_sentence(folder: Path, tmp_path: Path, options: list[str], message: str) -> None:
    from svg_jax.checkpoint import save_params

    if not (folder / "lpips").exists():
        save_params(str(folder / "lpips"), {"frozen": {"a": np.zeros(1)}}, {"kind": "lpips"})
        (folder / "one").mkdir()
        Image.new("RGB", (8, 8)).save(folder / "one" / "a.png")
    metrics = [] if any(option.startswith("--metrics") for option in options) else ["--metrics=fid"]
    with pytest.raises(SystemExit, match=message):
        evaluate(folder, tmp_path, *metrics, *(option.format(folder) for option in options))


def test_flags_that_lack_one_another(folder: Path, tmp_path: Path) -> None:
    images, out = f"--images={folder / 'pictures'}", f"--out={tmp_path}"
    with pytest.raises(SystemExit, match=r"fid compares with real images: name them with --reference"):
        main(["fid", images, out])
    with pytest.raises(SystemExit, match="nothing to judge: name --images"):
        main(["fid", f"--reference={folder / 'real'}", out])
    with pytest.raises(SystemExit, match="statistics of the reference: name that with --reference"):
        main(["fid", images, out, "--save-statistics=a.npz"])
    with pytest.raises(
        SystemExit, match=r"FID needs weights: download .*6726825d\.pth.* --inception weights/inception$"
    ):
        main(["fid", images, out, "--metrics=is"])


def test_no_image_can_be_read(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name in "ab":
        (tmp_path / "data" / f"{name}.png").write_bytes(b"no picture")
    with pytest.raises(SystemExit, match="FID needs the features of at least 2 images and has 0"):
        evaluate(folder, tmp_path / "out", f"--images={tmp_path / 'data'}", "--metrics=fid")


def test_results_of_other_settings_do_not_mix(folder: Path, out: Path) -> None:
    with pytest.raises(SystemExit, match=r"holds results of resolution = 0, and now it is 16: choose another --out"):
        evaluate(folder, out, "--metrics=fid,is,precision_recall", "--resolution=16")


def test_memory_holds_two_batches_of_images_at_most(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many images there are: those that are read and not yet let go."""
    import weakref

    living, most = 0, 0

    class Pixels(np.ndarray):
        """Which can be referred to weakly."""

    def counted(*arguments: Any) -> np.ndarray:
        nonlocal living, most
        pixels = original(*arguments).view(Pixels)
        weakref.finalize(pixels, let_go)
        living += 1
        most = max(most, living)
        return pixels

    def let_go() -> None:
        nonlocal living
        living -= 1

    monkeypatch.setattr(features, "AT_ONCE", {"cpu": 1})
    monkeypatch.setattr(sides, "PART", IMAGES)
    original = features.prepared
    monkeypatch.setattr("svg_jax.evaluate.fid.command.prepared", counted)
    evaluate(folder, tmp_path, "--metrics=fid")
    assert 0 < most <= 2 * jax.device_count()
