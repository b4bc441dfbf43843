"""The door that compiles for absent TPUs: one tiny step for a real topology, one that does not fit, and bad input."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from configs import stage3, stage4, tiny_autoencoder
from svg_jax import aot
from svg_jax.aot import Report, Target
from svg_jax.chips import CHIPS, GIB
from svg_jax.parallel import make_mesh
from svg_jax.programs import train_program
from svg_jax.topologies import topology_devices
from tests.tiny import tiny_config

BATCH = 64
V5E = CHIPS["TPU v5 lite"]
pytestmark = pytest.mark.usefixtures("uncached")
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("aot")


@pytest.fixture(scope="module")
def report(folder: Path, uncached: None) -> Report:
    """The tiny train step on four chips."""
    config = aot.with_batch(tiny_config(), "train", BATCH)
    return aot.main(config, Target("v5e:2x2"), name="tiny", out=str(folder))


@needs_libtpu
def test_the_report_is_saved_as_it_is(report: Report, folder: Path) -> None:
    (path,) = folder.glob(f"tiny-train-1xv5e_2x2-fsdp4-batch{BATCH}-*.json")
    assert json.loads(path.read_text()) == report
    assert report["settings"]["batch_size"] == BATCH
    text = path.with_suffix(".md").read_text()
    assert text.startswith(f"tiny, train, 1 x v5e:2x2 (4 x v5e), mesh fsdp 4, batch {BATCH}: fits, ")
    assert "| model FLOPs utilisation at the roofline | " in text


@needs_libtpu
def test_memory_adds_up(report: Report) -> None:
    memory = report["memory"]
    assert report["fits"]
    assert report["available_bytes"] == 15.75 * GIB
    assert sum(memory.values()) == report["needed_bytes"]
    assert memory["parameters"] == memory["average"]
    assert 2 * memory["parameters"] == pytest.approx(memory["optimiser"], rel=1e-3)
    assert min(memory["frozen"], memory["batch"], report["peak_bytes"]) > 0
    whole = 4 * report["parameters"]
    assert whole / 4 <= memory["parameters"] < whole / 3  # cut over four devices, but for vectors


@needs_libtpu
def test_what_is_sent(report: Report) -> None:
    kinds = report["collectives"]["ici"]
    assert report["collectives"]["dcn"] == {}
    assert kinds["all-gather"] > 0
    assert sum(kinds.values()) == report["sent_bytes"]
    assert 0 <= report["asynchronous_bytes"] <= report["sent_bytes"]
    assert report["ideal"]["recomputation"] == 0  # the tiny config keeps all activations
    assert report["ideal"]["forward"] == report["ideal"]["gradients"]
    assert 0.5 < report["times_ideal"] < 2


@needs_libtpu
def test_flops_and_roofline(report: Report) -> None:
    flops, line = report["flops"], report["roofline"]
    assert 0.9 < flops["executed"] / flops["model"] < 1.5
    assert line["compute"] == pytest.approx(flops["executed"] / 4 / 197e12)
    assert line["bound"] >= line["compute"]
    assert 0 < line["mfu"] < 1
    assert line["mfu"] == pytest.approx(flops["model"] / 4 / 197e12 / line["bound"])
    assert report["compile_seconds"] > 0
    assert report["host_peak_bytes"] > 1e8


@needs_libtpu
def test_a_step_that_does_not_fit_says_how_much_it_needs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = aot.with_batch(tiny_config(), "train", 2**22)
    report = aot.main(config, Target("v5e:2x2"), name="tiny", out=str(tmp_path))
    assert not report["fits"]
    assert report["needed_bytes"] > 100 * GIB
    assert "roofline" not in report
    assert "does not fit, " in capsys.readouterr().out
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("message", "size"),
    [
        (
            "Ran out of memory in memory space hbm. Used 20.32G of 15.75G hbm. Exceeded hbm capacity by 4.57G.",
            20.32 * GIB,
        ),
        ("the total memory required for HLO temporaries (224.00G) exceeds available HBM (15.75G).", 224 * GIB),
        ("Ran out of memory.", None),
    ],
)
def test_needed_bytes(message: str, size: float | None) -> None:
    assert aot.needed_bytes("RESOURCE_EXHAUSTED: " + message) == (None if size is None else round(size))


@pytest.mark.parametrize("limit", [0, 7, 8, 9, 63, 64, 100, 1000])
def test_the_largest_batch_is_bisected(limit: int) -> None:
    tried: list[int] = []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= limit

    assert aot.largest(fits, 64, 8) == limit // 8 * 8
    assert len(set(tried)) == len(tried) <= 12
    assert all(size % 8 == 0 for size in tried)


def test_each_try_for_the_largest_batch_compiles_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_step(config: object, *_: object) -> Report:
        size = config.batch_size  # type: ignore[attr-defined]
        return {"images": size, "fits": size <= 24, "needed_bytes": size * GIB, "compile_seconds": 1.0}

    monkeypatch.setattr(aot, "compile_step", compile_step)
    config, mesh = aot.with_batch(tiny_config(), "train", 16), make_mesh({"fsdp": 8})
    first = compile_step(config)
    found = aot.largest_batch(config, "train", mesh, V5E, first)
    assert found["largest_batch"] == 24
    assert [one["batch"] for one in found["tried"]] == [16, 24, 32]


@needs_libtpu
@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("v5e", "--topology=v5e is not VERSION:SHAPE, as in v5e:16x16"),
        ("v9:2x2", "--topology=v9:2x2: there is no such TPU, choose v4, v5e, v5p, v6e, v7x"),
        ("v5e:1x1", "--topology=v5e:1x1 does not exist: the compiler knows slices of whole hosts"),
        ("v5e:3x3", "--topology=v5e:3x3 does not exist"),
        ("v3:2x2", "--topology=v3:2x2: nothing is known of its chips, choose v4, v5e"),
        ("v5e:2x2x2", "--topology=v5e:2x2x2 does not exist: slices of v5e have 2 sides"),
        ("h100:8", "--topology=h100:8: programs for GPUs compile only where there is one; TPUs are v4, v5e"),
    ],
)
def test_other_topologies_are_refused(topology: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        aot.main(tiny_config(), Target(topology), name="tiny", out=str(tmp_path))


@needs_libtpu
def test_names_and_devices_of_topologies() -> None:
    assert len(topology_devices("v7x:2x2x1")) == 8
    v4 = topology_devices("v4:2x2x1")
    assert [device.device_kind for device in v4] == ["TPU v4"] * 4
    slices = [device.slice_index for device in topology_devices("v5e:2x2", 2)]
    assert slices == [0] * 4 + [1] * 4


@needs_libtpu
def test_a_config_that_does_not_fit_the_topology_is_refused(tmp_path: Path) -> None:
    def attempt(config: object, step: str = "train") -> None:
        aot.main(config, Target("v5e:2x2", step=step), name="tiny", out=str(tmp_path))  # type: ignore[arg-type]

    with pytest.raises(ValueError, match="batch_size 6 does not divide over 4 devices: choose a multiple of 4"):
        attempt(aot.with_batch(tiny_config(), "train", 6))
    config = tiny_config()
    config.mesh.update(aot.parse_mesh("fsdp=8"))
    with pytest.raises(ValueError, match="does not fit 4 devices"):
        attempt(config)
    with pytest.raises(ValueError, match="the config has no section 'model': it belongs to another door"):
        attempt(tiny_autoencoder.get_config())
    with pytest.raises(ValueError, match="--step=draw: choose train, sample, autoencoder"):
        attempt(tiny_config(), "draw")
    config = tiny_config()
    config.sample.solver = "dopri5"
    with pytest.raises(ValueError, match="--step=sample cannot count the loops of the solver 'dopri5'"):
        attempt(config, "sample")
    assert not list(tmp_path.iterdir())


def test_without_libtpu_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'libtpu: run `pip install "svg_jax\[aot\]"`'):
        topology_devices("v5e:2x2")


def test_a_mesh_on_the_command_line() -> None:
    assert aot.parse_mesh("data=16,fsdp=-1") == {"data": 16, "fsdp": -1}
    assert aot.parse_mesh("") == {}
    for wrong in ("16x16", "data=", "data=0", "fsdp=two"):
        with pytest.raises(ValueError, match=f"--mesh={wrong} is not AXIS=SIZE,AXIS=SIZE, as in data=16,fsdp=16"):
            aot.parse_mesh(wrong)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology=v5e:2x2"], "error: flag --config=None: Flag --config must have a value other than None."),
        (["--config=configs/stage9.py"], "error: --config: there is no file 'configs/stage9.py'"),
        (["--config=configs/stage3.py", "--topology=v5e:2x2", "--mesh=big"], "error: --mesh=big is not AXIS=SIZE"),
    ],
)
def test_the_door_ends_with_one_sentence(arguments: list[str], message: str) -> None:
    command = [sys.executable, "-m", "svg_jax.aot", *arguments]
    found = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False)
    assert (found.returncode, found.stdout) == (1, "")
    assert found.stderr.strip().startswith(message)
    assert "\n" not in found.stderr.strip()


@needs_libtpu
def test_stage_4_is_the_program_of_stage_3() -> None:
    """They differ in what they read and in how long they run; so stage 3's report is that of both."""
    devices = topology_devices("v5e:2x2")
    texts = []
    for stage in (stage3, stage4):
        config = aot.with_batch(stage.get_config(), "train", 4)
        mesh = make_mesh(config.mesh, devices)
        program = train_program(config, mesh)
        with jax.set_mesh(mesh):
            texts.append(program.jit().lower(*program.arguments).as_text())
    assert texts[0] == texts[1]


@needs_libtpu
def test_the_train_step_sends_no_more_than_it_must() -> None:
    """Kernels are gathered twice and their gradients scattered once, in bfloat16; all-reduced they would cost 1.36."""
    config = aot.with_batch(tiny_config(), "train", 16)
    config.model.update(dim=512, num_layers=12, num_heads=4, axes_dims=(32, 48, 48), ffn_dim_multiplier=1.0)
    config.model.update(remat="full", dtype="bfloat16")
    mesh = make_mesh({"data": 2, "fsdp": 4}, topology_devices("v5e:2x4"))
    report = aot.compile_step(config, "train", mesh, V5E)
    assert report["times_ideal"] < 1.1
    scattered = report["parameters"] * 2 * 3 / 4
    assert report["collectives"]["ici"]["reduce-scatter"] > 0.7 * scattered  # the rest is outside the layers
    assert report["collectives"]["ici"]["all-gather"] < 2.1 * scattered
