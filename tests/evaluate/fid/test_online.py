"""FID while training: on one device and on eight, against what is found in files, and inside the loop."""

from __future__ import annotations

import itertools
import json
import logging
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from data_pipelines.records import BadRecord, Cause, Record, Source
from data_pipelines.scenes import write_scenes
from data_pipelines.sources import open_source
from svg_jax import distributed, train
from svg_jax.checkpoint import newest_step
from svg_jax.evaluate import networks
from svg_jax.evaluate.__main__ import main
from svg_jax.evaluate.fid.moments import Moments
from svg_jax.evaluate.fid.online import captions, check_agreed, moments_of, online_fid, plan_fid
from svg_jax.evaluate.fid.statistics_file import Statistics, write_statistics
from svg_jax.nn.functional import Params
from svg_jax.parallel import make_mesh
from svg_jax.pipeline import Job, SVGPipeline
from tests.cluster import PATIENCE, job
from tests.evaluate.fid.small_inception import CHANNELS, SmallInception, write_inception
from tests.test_guards import lines
from tests.test_guards import run as run_loop
from tests.test_train import scalars, small_config
from tests.tiny import SIDE, random_params, write_tiny_weights

COUNT = 11  # pictures; a batch holds sixteen, or eight
PROMPTS = ["a fox", "a hen", "two owls"]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "Inception", SmallInception)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of everything, `scenes`, `prompts.txt`, and `real.npz` with statistics of those weights."""
    folder = tmp_path_factory.mktemp("online")
    write_tiny_weights(folder / "weights")
    write_scenes(folder / "scenes", 16, seed=0)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    write_inception(folder / "inception")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(networks, "Inception", SmallInception)
        arguments = [f"--reference={folder / 'scenes' / 'images'}", f"--inception={folder / 'inception'}"]
        main(["fid", *arguments, f"--out={folder / 'out'}", f"--save-statistics={folder / 'real.npz'}"])
    return folder


def settings(folder: Path, **changes: Any) -> ConfigDict:
    config = ConfigDict({
        "fid_every": 1,
        "fid_samples": COUNT,
        "fid_reference": str(folder / "real.npz"),
        "fid_inception": str(folder / "inception"),
        "fid_prompts": str(folder / "prompts.txt"),
        "fid_batch_size": 0,
    })  # fmt: skip
    with config.unlocked(), config.ignore_type():
        config.update(changes)
    return ConfigDict({"eval": config, "data": {"resolution": SIDE}, "cluster": {"start_timeout": 10.0}})


def online(config: ConfigDict, pipe: SVGPipeline, source: Source) -> Callable[[Params], dict[str, float]]:
    return online_fid(plan_fid(config, pipe.mesh, source), pipe)


@pytest.fixture(scope="module")
def pipe(folder: Path) -> SVGPipeline:
    return SVGPipeline.from_checkpoint(str(folder / "weights"))


def test_it_is_the_number_that_is_found_in_files_of_the_same_pictures(
    folder: Path, pipe: SVGPipeline, tmp_path: Path
) -> None:
    before = SmallInception.traced
    evaluate = online(settings(folder), pipe, open_source(folder / "scenes" / "records.jsonl"))
    found = evaluate(pipe.params)
    jobs = [Job(PROMPTS[k % 3], k % 3, k // 3) for k in range(COUNT)]
    for batch in pipe.stream(jobs, pipe.settings(batch_size=4 * jax.device_count())):
        for drawn in batch:
            drawn.image.save(tmp_path / f"{drawn.job.index}_{drawn.job.sample}.png")
    flags = [f"--images={tmp_path}", f"--reference={folder / 'real.npz'}", f"--inception={folder / 'inception'}"]
    main(["fid", *flags, "--metrics=fid", f"--out={tmp_path / 'out'}"])
    offline = json.loads((tmp_path / "out" / "results.json").read_text())["scores"]["fid"]
    assert found == {"eval/fid": pytest.approx(offline, rel=1e-4)}

    # Other weights, another number; and all programs are compiled once.
    values = random_params(pipe.networks.dit.shapes, 7)
    other = {name: jax.device_put(value, pipe.params[name].sharding) for name, value in values.items()}
    assert evaluate(other)["eval/fid"] != pytest.approx(found["eval/fid"], rel=1e-3)
    assert evaluate(pipe.params) == found
    assert SmallInception.traced == before + 2  # here, and in the command
    assert all(program._cache_size() == 1 for program in pipe._compiled.values())


def test_one_device_finds_what_eight_do(folder: Path, pipe: SVGPipeline) -> None:
    mesh = make_mesh({"fsdp": 1}, jax.devices()[:1])
    single = SVGPipeline.from_checkpoint(str(folder / "weights"), mesh=mesh)
    source = open_source(folder / "scenes" / "records.jsonl")
    one, eight = (online(settings(folder), p, source)(p.params)["eval/fid"] for p in (single, pipe))
    assert one == pytest.approx(eight, rel=1e-6)


def test_prompts_are_captions_where_none_are_named(folder: Path, pipe: SVGPipeline) -> None:
    source = open_source(folder / "scenes" / "records.jsonl")
    every = [source[i].captions[0].text for i in range(16)]
    assert captions(source, 100) == every
    assert captions(source, 5) == [every[i] for i in (0, 3, 6, 9, 12)]
    found = online(settings(folder, fid_prompts=None), pipe, source)(pipe.params)
    assert np.isfinite(found["eval/fid"])
    images = open_source(folder / "scenes" / "images")
    with pytest.raises(ValueError, match=r"images has no captions to draw for FID: name prompts with --config\.eval"):
        online(settings(folder, fid_prompts=None), pipe, images)


class Broken:
    """Records of which the second cannot be read."""

    name, has_captions, signature = "broken", True, ""

    def __init__(self, source: Source, cause: Cause) -> None:
        self._source, self._cause = source, cause

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Record:
        if index == 1:
            raise BadRecord(self._cause, "records.jsonl, line 2: no answer")
        return self._source[index]


def test_all_processes_draw_the_same_prompts(folder: Path, pipe: SVGPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """A damaged record is damaged for all of them; a store that does not answer may answer the others."""
    source = open_source(folder / "scenes" / "records.jsonl")
    assert captions(Broken(source, Cause.DAMAGED), 4) == [source[i].captions[0].text for i in (0, 2, 3)]
    for cause in (Cause.TIMEOUT, Cause.REMOTE):
        with pytest.raises(BadRecord, match="line 2: no answer"):
            plan_fid(settings(folder, fid_prompts=None), pipe.mesh, Broken(source, cause))
    monkeypatch.setattr(distributed, "everyone", lambda name, says, timeout: [says, says, "other"])
    with pytest.raises(ValueError, match="process 2 has read other prompts for FID than process 0: give all of them"):
        plan_fid(settings(folder), pipe.mesh, source)
    monkeypatch.setattr(distributed, "everyone", lambda name, says, timeout: [says, says])
    check_agreed(PROMPTS, 1.0)


def test_several_pictures_a_device_are_drawn_at_a_time(
    folder: Path, pipe: SVGPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(folder / "scenes" / "records.jsonl")
    asked = []
    original = SVGPipeline.on_devices

    def on_devices(self: SVGPipeline, jobs: Any, settings: Any) -> Any:
        asked.append(settings.batch_size)
        return original(self, jobs, settings)

    monkeypatch.setattr(SVGPipeline, "on_devices", on_devices)
    some, few = (online(settings(folder, fid_batch_size=size), pipe, source)(pipe.params) for size in (0, 8))
    assert asked == [4 * jax.device_count(), 8]
    assert some["eval/fid"] == pytest.approx(few["eval/fid"], rel=1e-6)


def test_features_are_summed_as_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("svg_jax.evaluate.fid.online.BLOCK", 8)
    every = np.random.default_rng(0).standard_normal((103, 4)).astype(np.float32)
    living: list[weakref.ref] = []

    class Rows(np.ndarray):
        """Which can be referred to weakly."""

    def batches() -> Iterator[np.ndarray]:
        for first in range(0, len(every), 5):
            assert sum(ref() is not None for ref in living) <= 3
            rows = every[first : first + 5].copy().view(Rows)
            living.append(weakref.ref(rows))
            yield rows

    found, expected = moments_of(batches()), Moments.of(every)
    assert found.count == 103
    np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-12)
    np.testing.assert_allclose(found.scatter, expected.scatter, rtol=1e-12)


def test_what_is_missing_is_said_before_anything_is_drawn(
    folder: Path, pipe: SVGPipeline, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = open_source(folder / "scenes" / "records.jsonl")
    small = Statistics.of(Moments.of(np.eye(CHANNELS)), resolution=2 * SIDE, extractor="ab12")
    write_statistics(str(tmp_path / "other.npz"), small)
    for changes, message in (
        ({"fid_samples": 1}, "fid_samples is 1: FID needs at least 2 pictures"),
        ({"fid_reference": None}, r"nothing to compare with: make statistics with .* --config\.eval\.fid_reference"),
        ({"fid_reference": str(tmp_path / "none.npz")}, r"there is no file of statistics .*none\.npz"),
        ({"fid_reference": str(tmp_path / "other.npz")}, r"other\.npz holds statistics of another extractor"),
        ({"fid_inception": None}, r"FID needs weights: download .* --config\.eval\.fid_inception weights/inception$"),
        ({"fid_inception": str(folder / "weights" / "dit")}, r"--config\.eval\.fid_inception .* holds no inception"),
        ({"fid_prompts": str(tmp_path / "none.txt")}, r"there is no file of prompts '.*none\.txt'"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            plan_fid(settings(folder, **changes), pipe.mesh, source)
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="svg_jax"):
        plan_fid(settings(folder), pipe.mesh, source)
    assert f"FID of {COUNT} images is biased upward" in caplog.text


def training(folder: Path, **changes: Any) -> ConfigDict:
    section = {f"eval.{key}": value for key, value in settings(folder).eval.items()} | {"eval.fid_samples": 8}
    # Steps so long that pictures of eight bits change.
    overrides = {
        "optim.lr": 0.05,
        "optim.warmup_steps": 0,
        "optim.ema": 0.0,
        "sample.num_steps": 2,
        "data.resolution": 32,
        "num_train_steps": 3,
        "eval.fid_every": 2,
    }
    return small_config(folder / "scenes" / "records.jsonl", **(overrides | section | overrides | changes))


def test_training_writes_it_and_goes_on_as_without(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train.main(training(folder), str(tmp_path / "with"))

    def too_little(*_: Any) -> float:
        raise MemoryError

    # All is trained and saved before the devices run out of memory.
    monkeypatch.setattr("svg_jax.evaluate.fid.online.frechet_distance", too_little)
    with pytest.raises(
        SystemExit, match=r"error: out of device memory while 32 .* lower --config\.eval\.fid_batch_size"
    ):
        train.main(training(folder, **{"eval.fid_every": 99}), str(tmp_path / "without"))
    assert newest_step(str(tmp_path / "without")) == 3
    found = [(line["step"], line["eval/fid"]) for line in scalars(tmp_path / "with") if "eval/fid" in line]
    assert [step for step, _ in found] == [1, 2]  # every second step, and the last
    assert all(np.isfinite(value) and value > 0 for _, value in found)
    assert found[0][1] != found[1][1]
    losses = [[line["loss"] for line in scalars(tmp_path / name) if "loss" in line] for name in ("with", "without")]
    assert losses[0] == losses[1]
    assert scalars(tmp_path / "with")[-1 - 1]["compilations"] == 1
    assert not any("eval/fid" in line for line in scalars(tmp_path / "without"))


def test_what_is_wrong_is_found_before_anything_is_compiled(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(*_: Any) -> None:
        raise AssertionError("too late")

    monkeypatch.setattr("svg_jax.loading.fresh", late)
    monkeypatch.setattr("svg_jax.loading.frozen", late)
    for changes, message in (
        ({"eval.fid_samples": 1}, "fid_samples is 1: FID needs at least 2"),
        ({"eval.fid_every": -1}, r"config\.eval\.fid_every is -1: it must be zero or above"),
        ({"eval.fid_batch_size": -1}, r"config\.eval\.fid_batch_size is -1: it must be zero or above"),
        ({"eval.fid_reference": "/nowhere.npz"}, r"there is no file of statistics /nowhere\.npz"),
        ({"eval.fid_prompts": "/nowhere.txt"}, r"there is no file of prompts '/nowhere\.txt'"),
        ({"eval.fid_inception": str(folder / "weights" / "dit")}, "holds no inception weights"),
    ):
        with pytest.raises(SystemExit, match=message):
            train.main(training(folder, **changes), str(tmp_path / "bad"))


def test_what_is_due_is_saved_before(tmp_path: Path) -> None:
    def evaluate(state: Any) -> dict[str, float]:
        raise MemoryError

    changes = {"eval": {"fid_every": 3}, "checkpoint.every": 3}
    with pytest.raises(MemoryError):
        run_loop(tmp_path / "due", {}, settings=loop_config(**changes), evaluate=evaluate)
    assert newest_step(str(tmp_path / "due")) == 3
    with pytest.raises(MemoryError):
        run_loop(tmp_path / "last", {}, settings=loop_config(**{"eval": {"fid_every": 99}}), evaluate=evaluate)
    assert newest_step(str(tmp_path / "last")) == 8


def test_it_is_no_part_of_the_time_of_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that moves a millisecond each time it is read, and by an hour at each evaluation."""
    ticks, hours = itertools.count(), 0

    def evaluate(state: Any) -> dict[str, float]:
        nonlocal hours
        hours += 1
        return {"eval/fid": float(hours)}

    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks) * 1e-3 + hours * 3600.0)
    run_loop(tmp_path, {}, settings=loop_config(), evaluate=evaluate)
    monkeypatch.undo()
    written = lines(tmp_path)
    assert [(line["step"], line["eval/fid"]) for line in written if "eval/fid" in line] == [
        (2, 1.0),
        (5, 2.0),
        (7, 3.0),
    ]
    logged = [line for line in written if "loss" in line]
    assert [line["step"] for line in logged] == [1, 3, 5, 7]
    assert all(line["time/step"] < 1.0 for line in logged)
    assert sum(line.get("time/eval", 0.0) for line in logged) == pytest.approx(7200.0, abs=1.0)  # the last comes after
    assert all(line["images_per_second"] > 1.0 for line in written if "images_per_second" in line)


def loop_config(**changes: Any) -> ConfigDict:
    from tests.test_guards import config

    return config(**({"eval": {"fid_every": 3}} | changes))


CONFIG = """
from svg_jax.evaluate import networks
from tests.evaluate.fid.small_inception import SmallInception
from tests.tiny import tiny_config

networks.Inception = SmallInception

def get_config():
    config = tiny_config()
    config.model.dtype = "float32"
    config.update_from_flattened_dict({{
        "num_train_steps": 2, "batch_size": 8, "log_every": 1, "checkpoint.every": 0, "sample.every": 0,
        "sample.num_steps": 2, "data.path": "{folder}/scenes/records.jsonl", "data.num_threads": 0,
        "cluster.timeout": 10.0, "eval.fid_every": 1, "eval.fid_samples": 11,
        "eval.fid_reference": "{folder}/real.npz", "eval.fid_inception": "{folder}/inception",
        "eval.fid_prompts": "{folder}/prompts.txt",
        "autoencoder.checkpoint": "{folder}/weights/autoencoder",
        "text.checkpoint": "{folder}/weights/text_encoder",
        "text.tokenizer": "{folder}/weights/text_encoder/tokenizer",
    }})
    return config
"""


@pytest.mark.slow
def test_two_processes_find_what_one_does(folder: Path) -> None:
    (folder / "config.py").write_text(CONFIG.format(folder=folder))
    found = {}
    for processes, devices in ((1, 4), (2, 2)):
        workdir = folder / f"on{processes}"
        command = [sys.executable, "-m", "svg_jax.train", f"--config={folder / 'config.py'}", f"--workdir={workdir}"]
        settings = {
            "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
            "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
        }
        with job(folder / f"on{processes}.logs", processes, command, devices=devices, env=settings) as running:
            assert running.wait(PATIENCE) == 0, (folder / f"on{processes}.logs" / "0.log").read_text()
        found[processes] = [line["eval/fid"] for line in scalars(workdir) if "eval/fid" in line]
    assert len(found[1]) == 2
    np.testing.assert_allclose(found[2], found[1], rtol=1e-6)
