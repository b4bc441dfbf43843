"""The door, end to end: a tiny Autoencoder-R of random weights, a folder of pictures, small networks as judges."""

from __future__ import annotations

import base64
import csv
import dataclasses
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from svg_jax import distributed
from svg_jax.checkpoint import save_params
from svg_jax.evaluate import networks
from svg_jax.evaluate.__main__ import main
from svg_jax.evaluate.fid.moments import Moments, frechet_distance
from svg_jax.evaluate.image_metrics import compared, psnr, ssim, stored
from svg_jax.evaluate.images import centre_square
from svg_jax.evaluate.reconstruction import pictures
from svg_jax.evaluate.reconstruction_report import rank, summarise, write_report
from svg_jax.evaluate.results import Results
from svg_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from svg_jax.models.decoder import DecoderConfig
from svg_jax.models.lpips import LPIPS, LPIPSConfig
from svg_jax.models.residual import ResidualConfig
from svg_jax.models.vit import ViTConfig
from svg_jax.nn.functional import Network
from tests.tiny import random_params
from tests.vectors import assert_close

SIDE, IMAGES, BATCH, AT_ONCE = 16, 20, 9, 8  # the last batch is not full, the others are decoded in two parts
BATCHES = ((0, 9), (9, 17), (17, 19))  # of the images that can be read
BROKEN = "b/10.png"
SIZES = AutoencoderConfig(
    ViTConfig(dim=16, num_layers=1, num_heads=2, hidden_dim=16, num_storage_tokens=0, patch_size=2),
    DecoderConfig(z_channels=18, channels=32, channel_multipliers=(1, 1), num_res_blocks=0),
    ResidualConfig(dim=16, num_layers=1, num_heads=2, hidden_dim=16, out_channels=2, patch_size=2),
)
NETWORK = Network(lambda rngs: Autoencoder(SIZES, rngs=rngs))


class SmallInception(nnx.Module):
    """Stands for `models.inception`, which takes half a second an image on a CPU."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.fc = nnx.Linear(12, 3, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        corners = images.astype(jnp.float32)[:, :: SIDE // 2, :: SIDE // 2].reshape(len(images), 12)
        return jnp.tanh(self.fc(corners / 255.0))


class SmallLPIPS(LPIPS):
    """With few channels."""

    def __init__(self, config: LPIPSConfig, *, rngs: nnx.Rngs) -> None:
        super().__init__(LPIPSConfig((2, 2, 2, 2, 2)), rngs=rngs)


@pytest.fixture(autouse=True)
def _small_judges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "Inception", SmallInception)
    monkeypatch.setattr(networks, "LPIPS", SmallLPIPS)


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    return random_params(NETWORK.shapes, 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, weights: dict[str, np.ndarray]) -> Path:
    """`autoencoder` with its own LPIPS, `raw` with raw weights too, `inception`, `lpips`, and `pictures`."""
    folder = tmp_path_factory.mktemp("evaluate")
    trained = {name: value for name, value in weights.items() if SIZES.trained(name)}
    frozen = {name: value for name, value in weights.items() if name not in trained}
    judges = {
        "lpips": random_params(Network(lambda rngs: SmallLPIPS(LPIPSConfig(), rngs=rngs)).shapes, 1),
        "inception": random_params(Network(lambda rngs: SmallInception(rngs=rngs)).shapes, 2),
    }
    judges["lpips"] = {name: np.abs(v) if name.startswith("lin") else v for name, v in judges["lpips"].items()}
    own = {f"loss.perceptual_loss.{name}": value for name, value in judges["lpips"].items()}
    config = {"autoencoder": dataclasses.asdict(SIZES)}
    save_params(str(folder / "autoencoder"), {"ema": trained, "frozen": {**frozen, **own}}, config)
    raw = {name: value * np.float32(1.1) for name, value in trained.items()}
    save_params(str(folder / "raw"), {"params": raw, "ema": trained, "frozen": frozen}, config)
    for kind, values in judges.items():
        save_params(str(folder / kind), {"frozen": values}, {"kind": kind})
    generator = np.random.default_rng(3)
    for i in range(IMAGES):
        file = folder / "pictures" / "ab"[i // 10] / f"{i:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(generator.integers(0, 256, (3, 3, 3), np.uint8))
        coarse.resize((20 + i, 24), Image.Resampling.BICUBIC).save(file)
    (folder / "pictures" / BROKEN).write_bytes(b"no picture")
    return folder


def evaluate(folder: Path, out: Path, *more: str, metrics: str = "psnr,ssim,lpips,rfid") -> dict[str, Any] | None:
    arguments = ["reconstruction", f"--checkpoint={folder / 'autoencoder'}", f"--data={folder / 'pictures'}"]
    arguments += [f"--inception={folder / 'inception'}", f"--metrics={metrics}", f"--out={out}"]
    main(
        [*arguments, f"--resolution={SIDE}", f"--batch-size={BATCH}", f"--at-once={AT_ONCE}", "--num-threads=2", *more]
    )
    file = out / "results.json"
    return json.loads(file.read_text()) if file.exists() else None


@pytest.fixture(scope="module")
def out(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run over everything."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(networks, "Inception", SmallInception)
        patch.setattr(networks, "LPIPS", SmallLPIPS)
        out = tmp_path_factory.mktemp("results")
        evaluate(folder, out)
    return out


def batch_mean(values: list[float]) -> float:
    """Every batch counts alike."""
    return float(np.mean([np.mean(values[first:last]) for first, last in BATCHES]))


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "images.jsonl").read_text().splitlines()]


def test_scores_are_those_of_the_formulas(folder: Path, out: Path, weights: dict[str, np.ndarray]) -> None:
    """Batch by batch, on one device."""
    names = sorted(file.relative_to(folder / "pictures").as_posix() for file in (folder / "pictures").rglob("*.png"))
    names.remove(BROKEN)
    squares = jnp.stack([centre_square(Image.open(folder / "pictures" / name), SIDE) for name in names])

    @jax.jit
    def run(weights: dict[str, jax.Array], x: jax.Array, valid: jax.Array) -> jax.Array:
        autoencoder = NETWORK(weights)
        return autoencoder.decoder(autoencoder.features_of_images((x + 1.0) * 127.5, valid))

    decoded = []
    for first, last in BATCHES:
        batch = jnp.zeros((BATCH, SIDE, SIDE, 3)).at[: last - first].set(squares[first:last])
        decoded.append(run(weights, batch, jnp.arange(BATCH) < last - first)[: last - first])
    after = jnp.concatenate(decoded)
    values = {"psnr": psnr(stored(after), stored(squares)), "ssim": ssim(compared(after), squares)}
    small = Network(lambda rngs: SmallInception(rngs=rngs))
    judge = small(random_params(small.shapes, 2))
    distance = frechet_distance(*(Moments.of(np.asarray(judge(stored(x)))) for x in (squares, after)))

    scores = json.loads((out / "results.json").read_text())["scores"]
    good = [line for line in lines(out) if "error" not in line]
    assert [line["name"] for line in good] == names
    for name, expected in values.items():
        assert_close([line[name] for line in good], expected, 1e-4, name)
    assert scores["psnr"] == pytest.approx(np.mean(values["psnr"].tolist()), rel=1e-4)
    assert scores["ssim"] == pytest.approx(batch_mean(values["ssim"].tolist()), rel=1e-4)
    assert scores["ssim"] != pytest.approx(np.mean(values["ssim"].tolist()), rel=1e-4)
    assert scores["lpips"] == pytest.approx(batch_mean([line["lpips"] for line in good]))
    assert scores["lpips"] > 0
    assert scores["rfid"] == pytest.approx(distance, rel=1e-3)


def test_the_report_names_settings_and_what_was_left_out(folder: Path, out: Path) -> None:
    report = json.loads((out / "results.json").read_text())
    assert (report["num_images"], report["num_bad"]) == (IMAGES - 1, 1)
    settings = report["settings"]
    assert settings["batch_size"] == BATCH
    assert settings["autoencoder"] == {
        "checkpoint": str(folder / "autoencoder"),
        "step": 0,
        "ema": True,
        "dtype": "float32",
        "match": "batch",
        "weights": settings["autoencoder"]["weights"],
    }
    hashes = {settings[name]["weights"] for name in ("autoencoder", "lpips", "inception")}
    assert len(hashes) == 3
    assert all(len(value) == 16 for value in hashes)
    assert "FID of 19 images is biased" in report["warnings"][0]
    assert report["warnings"][1] == "1 of 20 images could not be read and are left out"
    (bad,) = (line for line in lines(out) if "error" in line)
    assert bad["index"] == 10
    assert BROKEN in bad["error"]
    spread = report["per_image"]["lpips"]
    assert spread["best"] < spread["median"] < spread["worst"]
    table = (out / "results.md").read_text()
    assert f"| PSNR (dB) | {report['scores']['psnr']:.3f} |" in table or f"| {report['scores']['psnr']:.4f} |" in table
    assert "- autoencoder.match: batch" in table
    (row,) = csv.DictReader((out / "metrics.csv").read_text().splitlines())
    assert float(row["SSIM"]) == round(report["scores"]["ssim"], 3)


def test_the_page_shows_worst_and_best_images_and_loads_nothing(out: Path) -> None:
    page = (out / "index.html").read_text()
    found = re.findall(r'<script type="text/plain" class="card">(.*)\n([A-Za-z0-9+/=]+)</script>', page)
    cards = [json.loads(about) for about, _ in found]
    good = sorted((line for line in lines(out) if "error" not in line), key=lambda line: line["lpips"])
    names = [line["name"] for line in good]
    assert [card["name"] for card in cards if card["task"] == "worst"] == names[:-9:-1]
    assert [card["name"] for card in cards if card["task"] == "best"] == names[:8]
    assert [card["task"] for card in cards] == ["worst"] * 8 + ["best"] * 8
    assert f"LPIPS {good[-1]['lpips']:.4f}" in cards[0]["reason"]
    for card, (_, picture) in zip(cards, found, strict=True):
        assert Image.open(io.BytesIO(base64.b64decode(picture))).size == tuple(card["size"])
        assert card["size"][0] >= 3 * card["size"][1]  # input, reconstruction, difference
    assert "http" not in page


def test_shards_give_what_one_run_gives(folder: Path, out: Path, tmp_path: Path) -> None:
    assert evaluate(folder, tmp_path, "--shard=1/2") is None
    evaluate(folder, tmp_path, "--shard=0/2")
    for name in ("results.json", "images.jsonl", "results.md", "metrics.csv", "index.html"):
        assert (tmp_path / name).read_bytes() == (out / name).read_bytes(), name


def test_a_second_run_does_only_what_is_missing(
    folder: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(out, tmp_path, dirs_exist_ok=True)
    (tmp_path / "parts" / "000001.npz").unlink()
    last = tmp_path / "parts" / "000002.npz"
    last.write_bytes(last.read_bytes()[:100])
    first = (tmp_path / "parts" / "000000.npz").stat().st_mtime_ns
    read = []

    def counted(record: Any, side: int) -> np.ndarray:
        read.append(record.index)
        return original(record, side)

    from svg_jax.evaluate import images

    original: Callable[[Any, int], np.ndarray] = images.read
    monkeypatch.setattr(images, "read", counted)
    evaluate(folder, tmp_path)
    assert sorted(read) == list(range(BATCH, IMAGES))
    assert (tmp_path / "parts" / "000000.npz").stat().st_mtime_ns == first
    assert (tmp_path / "results.json").read_bytes() == (out / "results.json").read_bytes()


def test_other_settings_do_not_mix(folder: Path, out: Path) -> None:
    with pytest.raises(
        SystemExit, match=r"results of autoencoder\.match = batch, and now it is none: choose another --out"
    ):
        evaluate(folder, out, "--match=none")


def test_raw_weights_and_matching_change_the_numbers(folder: Path, tmp_path: Path) -> None:
    more = (f"--checkpoint={folder / 'raw'}", f"--max-images={BATCH}")
    scores = {
        options: evaluate(folder, tmp_path / str(i), *more, *options, metrics="psnr")["scores"]["psnr"]
        for i, options in enumerate([(), ("--no-ema",), ("--match=per_image",)])
    }
    assert len({round(value, 4) for value in scores.values()}) == 3
    assert not json.loads((tmp_path / "0" / "results.json").read_text())["warnings"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--metrics=psnr,lpip"], "unknown metric 'lpip': did you mean 'lpips'"),
        (["--metrics=,"], "--metrics names none"),
        (["--shard=2/2"], "--shard '2/2' is not I/N"),
        (["--batch-size=0"], "--batch-size is 0: it must be at least 1"),
        (["--resolution=17"], "--resolution 17 is not a multiple of the patch size 2: choose 16"),
        (["--max-images=1"], "rFID needs at least 2 images and .* has 1"),
        (["--data=/nowhere"], "/nowhere does not exist"),
        (["--checkpoint=/nowhere"], "no checkpoint in /nowhere"),
        (["--checkpoint={}/lpips"], "holds weights of the kind 'lpips' and no autoencoder"),
        (["--checkpoint={}/raw"], "LPIPS needs weights: download .*vgg16-397923af.pth.*or choose --metrics without it"),
        (["--inception={}/lpips"], "lpips holds no inception weights: download .*pt_inception-2015-12-05"),
        (["--no-ema"], "has no raw weights beside the averaged ones: leave --no-ema out"),
        (["--match=all"], "unknown residual match 'all'"),
        (["--dtype=float8"], "unknown dtype 'float8'"),
    ],
)
def test_bad_input_is_one_sentence(folder: Path, tmp_path: Path, options: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        evaluate(folder, tmp_path, *(option.format(folder) for option in options))


def test_rfid_without_weights_says_how_to_get_them(folder: Path, tmp_path: Path) -> None:
    arguments = [f"--checkpoint={folder / 'autoencoder'}", f"--data={folder / 'pictures'}", f"--out={tmp_path}"]
    with pytest.raises(SystemExit, match=r"rFID needs weights: download .*6726825d.pth.*or choose --metrics without"):
        main(["reconstruction", *arguments])


def test_no_image_can_be_read(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.png").write_bytes(b"no picture")
    with pytest.raises(SystemExit, match=r"none of the 1 images of .* could be read: .*a\.png"):
        evaluate(folder, tmp_path / "out", f"--data={tmp_path / 'data'}", metrics="psnr")


def test_sigterm_ends_after_a_batch_and_the_next_run_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "preempted", lambda turn: turn == 1)
    with pytest.raises(SystemExit) as end:
        evaluate(folder, tmp_path, metrics="psnr")
    assert end.value.code == distributed.EXIT_PREEMPTED
    assert sorted(file.name for file in (tmp_path / "parts").iterdir()) == ["000000.npz", "000001.npz"]
    monkeypatch.undo()
    report = evaluate(folder, tmp_path, metrics="psnr")
    assert report is not None
    assert report["num_images"] == IMAGES - 1


def test_reconstructions_that_are_not_finite_are_told_and_shown_as_worst(tmp_path: Path) -> None:
    results = Results(str(tmp_path), {"data": "x", "metrics": ["psnr", "ssim", "rfid"]})
    generator = np.random.default_rng(0)
    part = {
        "index": np.arange(3),
        "name": np.array(["a", "b", "c"]),
        "bad_index": np.array([], np.int64),
        "bad_reason": np.array([], np.str_),
        "psnr": np.array([20.0, 5.0, np.inf]),  # of 8 bits, where a pixel is black that is no number
        "ssim": np.array([0.5, 0.9, 1.0]),
        "finite": np.array([True, False, True]),
        "features_input": generator.standard_normal((3, 2)),
        "features_reconstruction": generator.standard_normal((3, 2)),
    }
    shown = pictures(np.zeros((3, 8, 8, 3), np.uint8), np.full((3, 8, 8, 3), 9, np.uint8), rank(part))
    results.save(0, {**part, **shown})
    summary = summarise(results, 1)
    assert [picture.name for picture in summary.worst] == ["b", "a", "c"]
    assert [picture.name for picture in summary.best] == ["c", "a", "b"]
    _, warning = summary.warnings
    assert warning.startswith("1 of 3 reconstructions hold values that are not finite, so there is no score")
    write_report(results, 1)
    report = json.loads((tmp_path / "results.json").read_text())
    assert report["scores"] == {"rfid": None, "psnr": None, "ssim": None}
    assert report["per_image"]["ssim"] == {"mean": None, "median": 0.5, "worst": None, "best": 1.0}
    assert [line["psnr"] for line in lines(tmp_path)] == [20.0, None, None]
    assert "| PSNR (dB) | nan |" in (tmp_path / "results.md").read_text()


def test_exact_reconstructions_have_infinite_psnr(tmp_path: Path) -> None:
    results = Results(str(tmp_path), {"data": "x", "metrics": ["psnr"]})
    part = {"index": np.arange(2), "name": np.array(["a", "b"]), "bad_index": np.array([]), "bad_reason": np.array([])}
    results.save(0, {**part, "psnr": np.array([20.0, np.inf]), "finite": np.array([True, True])})
    assert summarise(results, 1).warnings == ["PSNR is infinite: at least one image is reconstructed exactly"]
    write_report(results, 1)
    assert json.loads((tmp_path / "results.json").read_text())["scores"] == {"psnr": None}
    assert "| PSNR (dB) | inf |" in (tmp_path / "results.md").read_text()
