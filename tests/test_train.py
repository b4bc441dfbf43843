"""Training end to end on a tiny model: through the door, interrupted and resumed, and on several meshes."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from ml_collections import ConfigDict
from PIL import Image

from configs import tiny_autoencoder, tiny_scenes
from data_pipelines.batches import TextToImageBatches
from data_pipelines.scenes import write_scenes
from data_pipelines.sources import open_source
from data_pipelines.text import ByteTokenizer
from svg_jax import assemble, loading, programs, sample, train, train_autoencoder
from svg_jax.loop import device_batch
from svg_jax.nn.functional import Network
from svg_jax.parallel import make_mesh, shardings_of
from svg_jax.state import TrainState

SMALL = {  # overrides that make a run of seconds
    "batch_size": 8,
    "log_every": 1,
    "checkpoint.every": 3,
    "sample.every": 0,
    "data.num_threads": 0,
    "model.dim": 32,
    "model.num_layers": 2,
    "model.axes_dims": (4, 2, 2),
    "text.max_tokens": 16,
    "autoencoder.decoder.channel_multipliers": (1, 1, 1, 1),
    "autoencoder.residual.num_layers": 1,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("scenes"), 32, seed=0)


def small_config(data: Path, **overrides: Any) -> ConfigDict:
    config = tiny_scenes.get_config()
    config.update_from_flattened_dict(SMALL | {"data.path": str(data)} | overrides)
    return config


def scalars(workdir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


OF_AUTOENCODER = {  # of the same, for an autoencoder with a residual branch and a discriminator
    **{key: value for key, value in SMALL.items() if not key.startswith(("model", "text"))},
    "statistics.num_images": 16,
    "loss.disc_weight": 0.5,
    "loss.disc_channels": 8,
    "loss.disc_num_layers": 1,
    "loss.disc_start": 2,
}


def command(door: str, workdir: Path, data: Path, **overrides: Any) -> list[str]:
    config, small = {"train": (tiny_scenes, SMALL), "train_autoencoder": (tiny_autoencoder, OF_AUTOENCODER)}[door]
    values = small | {"data.path": str(data)} | overrides
    flags = [f"--config.{key}={value}" for key, value in values.items()]
    return [sys.executable, "-m", f"svg_jax.{door}", f"--config={config.__file__}", f"--workdir={workdir}", *flags]


def environment() -> dict[str, str]:
    return {**os.environ, "XLA_FLAGS": "", "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir)}


def arrays(workdir: Path, step: int) -> Any:
    """All that a checkpoint holds of a state: parameters, average, optimiser, counters."""
    folder, handler = workdir / "checkpoints" / str(step) / "state", ocp.PyTreeCheckpointHandler()
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), handler.metadata(folder).tree)
    return handler.restore(folder, args=ocp.args.PyTreeRestore(restore_args=as_numpy))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("door", "exact"),
    [
        ("train", ("loss", "grad_norm")),
        ("train_autoencoder", ("loss", "grad_norm", "loss/adaptive_weight", "logits/real", "logits/fake")),
    ],
)
def test_killed_at_any_step_and_started_again_gives_the_same_losses(
    data: Path, tmp_path: Path, door: str, exact: tuple[str, ...]
) -> None:
    """SIGKILL before the first checkpoint, and again after one: bit for bit as a run never interrupted."""
    steps = {"num_train_steps": 8}
    subprocess.run(command(door, tmp_path / "whole", data, **steps), env=environment(), check=True, timeout=300)
    whole = scalars(tmp_path / "whole")
    assert [line["step"] for line in whole] == list(range(8))

    log = tmp_path / "killed" / "metrics.jsonl"
    for kill_at in (1, 5):
        process = subprocess.Popen(command(door, tmp_path / "killed", data, **steps), env=environment())
        deadline = time.monotonic() + 300
        while not log.exists() or len(log.read_text().splitlines()) <= kill_at:
            assert process.poll() is None, "ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command(door, tmp_path / "killed", data, **steps), env=environment(), check=True, timeout=300)

    np.testing.assert_equal(arrays(tmp_path / "killed", 8), arrays(tmp_path / "whole", 8))
    killed = scalars(tmp_path / "killed")
    assert [[line[k] for k in ("step", *exact)] for line in killed] == [
        [line[k] for k in ("step", *exact)] for line in whole
    ]


MESHES = (
    {"fsdp": 1},
    {"fsdp": 8},
    {"data": 2, "fsdp": 4},
    {"fsdp": 4, "tensor": 2},
    {"data": 2, "fsdp": 2, "context": 2},
)


@pytest.fixture(scope="module")
def losses_by_mesh(data: Path) -> dict[str, tuple[list[float], TrainState, Any]]:
    """Three steps of the same training on each mesh."""
    config = small_config(data)
    batches = TextToImageBatches(
        open_source(data), ByteTokenizer(), batch_size=8, resolution=64, patch_size=8, max_text_tokens=16, seed=0
    )
    results = {}
    for sizes in MESHES:
        mesh = make_mesh(sizes, jax.devices()[: math.prod(sizes.values())])
        program = programs.train_program(config, mesh)
        params = loading.fresh(program.networks.dit, mesh, jax.random.key(0))
        state = jax.jit(program.create, out_shardings=shardings_of(program.state))(params)
        frozen = loading.frozen(config, program.networks, mesh)
        with jax.set_mesh(mesh):
            step = program.jit()
            losses = []
            for i in range(3):
                state, metrics = step(state, frozen, device_batch(batches[i], mesh))
                losses.append(float(metrics["loss"]))
        results[str(sizes)] = losses, state, mesh
    return results


def test_losses_are_the_same_on_every_mesh(losses_by_mesh) -> None:
    one = losses_by_mesh[str(MESHES[0])][0]
    assert len(set(one)) == 3
    for sizes in MESHES[1:]:
        np.testing.assert_allclose(losses_by_mesh[str(sizes)][0], one, rtol=1e-5)


@pytest.mark.parametrize("sizes", MESHES[1:], ids=str)
def test_no_device_holds_more_of_a_weight_matrix_than_its_share(losses_by_mesh, sizes) -> None:
    _, state, mesh = losses_by_mesh[str(sizes)]
    moments = state.opt_state[1][0]
    matrices = 0
    for name, value in state.params.items():
        if not name.endswith(".kernel"):
            continue
        matrices += 1
        for kind, array in {
            "params": value,
            "ema": state.ema[name],
            "m": moments.mu[name],
            "v": moments.nu[name],
        }.items():
            for shard in array.addressable_shards:
                assert shard.data.size * mesh.shape["fsdp"] <= array.size, f"{kind} {name}"
    assert matrices > 20


def test_autoencoder_then_diffusion_then_pictures(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The three doors one after the other: the second reads the first's checkpoint, the third both."""
    config = tiny_autoencoder.get_config()
    config.update_from_flattened_dict(OF_AUTOENCODER | {"data.path": str(data), "num_train_steps": 3})
    train_autoencoder.main(config, str(tmp_path / "autoencoder"))
    assert scalars(tmp_path / "autoencoder")[-1]["step"] == 2

    config = small_config(data, num_train_steps=2, **{"sample.every": 2, "sample.num_steps": 2})
    config.autoencoder.checkpoint = str(tmp_path / "autoencoder")
    train.main(config, str(tmp_path / "dit"))
    assert scalars(tmp_path / "dit")[-1]["compilations"] == 1
    assert list((tmp_path / "dit" / "samples").glob("*.png"))

    arguments = ["--checkpoint", str(tmp_path / "dit"), "--out", str(tmp_path / "out"), "--num-steps", "2"]
    sample.main([*arguments, "--prompt", "a red circle", "--resolution", "96x32", "--seed", "7"])
    with Image.open(tmp_path / "out" / "images" / "00000_0_96x32.png") as picture:
        assert picture.size == (96, 32)
    with pytest.raises(SystemExit, match=r"no run of svg_jax\.train"):
        sample.main(["--checkpoint", str(tmp_path / "autoencoder"), "--prompt", "a red circle"])

    # Latents of other channels than the model's are refused, and where to go from there is said.
    weights = {"autoencoder.checkpoint": str(tmp_path / "autoencoder"), "model.in_channels": 12}
    config = small_config(data, num_train_steps=1, **weights)
    with pytest.raises(SystemExit, match=r"have 16 channels, and the config is for 12: .* svg_jax\.latent_stats"):
        train.main(config, str(tmp_path / "other"))

    # The same architecture begins from the averaged weights; another one is refused, with names and shapes.
    config = small_config(data, num_train_steps=1, init_from=str(tmp_path / "dit"))
    train.main(config, str(tmp_path / "next"))
    assert scalars(tmp_path / "next")[-1]["step"] == 0
    with pytest.raises(SystemExit, match="batch_size was 8 when this run began and is 16 now"):
        train.main(small_config(data, num_train_steps=2, batch_size=16), str(tmp_path / "next"))

    # Other data are refused; the same ones elsewhere are not.
    write_scenes(tmp_path / "more", 33, seed=0)
    config = small_config(tmp_path / "more" / data.name, num_train_steps=2)
    with pytest.raises(SystemExit, match=r"32 records then, 33 records now.* begin a new --workdir"):
        train.main(config, str(tmp_path / "next"))
    config = tiny_autoencoder.get_config()
    more = {"data.path": str(tmp_path / "more" / data.name), "num_train_steps": 4}
    config.update_from_flattened_dict(OF_AUTOENCODER | more)
    with pytest.raises(SystemExit, match=r"32 records then, 33 records now"):
        train_autoencoder.main(config, str(tmp_path / "autoencoder"))
    shutil.copytree(data.parent, tmp_path / "copied")
    train.main(small_config(tmp_path / "copied" / data.name, num_train_steps=2), str(tmp_path / "next"))
    assert scalars(tmp_path / "next")[-1]["step"] == 1

    config = small_config(data, num_train_steps=1, init_from=str(tmp_path / "dit"), **{"model.num_layers": 1})
    with pytest.raises(SystemExit, match=r"another architecture: shapes differ: layers\..* instead of"):
        train.main(config, str(tmp_path / "other"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"data.path": "missing.jsonl"}, "missing.jsonl"),
        ({"data.resolution": 60}, "resolution.*60.*multiple"),
        ({"batch_size": 12}, r"batch_size 12 .* multiple of 8"),
        ({"model.in_channels": 9}, "in_channels is 9 .* 16 channels"),
        ({"mesh.tensor": 3}, "tensor=3 does not fit 8 devices"),
        ({"flow.path": "Linea"}, "Linear"),
        ({"flow.times": "lognormal"}, "lognorm"),
        ({"optim.schedule": "cosin"}, "cosine"),
        ({"init_from": "nowhere"}, "no checkpoint in .*nowhere"),
        ({"text.tokenizer": "nowhere"}, "nowhere"),
        ({"micro_batches": 0}, r"config\.micro_batches is 0: it must be above zero"),
        ({"num_train_steps": -5}, r"config\.num_train_steps is -5"),
        ({"log_every": 0}, r"config\.log_every is 0"),
        ({"optim.lr": float("nan")}, r"config\.optim\.lr is nan"),
        ({"optim.b1": 1.0}, r"config\.optim\.b1 is 1\.0"),
        ({"data.num_threads": -1}, r"config\.data\.num_threads is -1: it must be zero or above"),
        ({"data.num_workers": -1}, r"config\.data\.num_workers is -1: it must be zero or above"),
        ({"data.remote.timeout": 0.0}, r"config\.data\.remote\.timeout is 0\.0: it must be above zero"),
        ({"data.resolution": 10**12}, r"config\.data\.resolution is 1000000000000: it must be at most 8192"),
        ({"data.num_workers": 10**12}, r"config\.data\.num_workers is 1000000000000: it must be at most 1024"),
        ({"data.prefetch": 10**12}, r"config\.data\.prefetch is 1000000000000: it must be at most 4096"),
        ({"data.remote.retries": 10**12}, r"config\.data\.remote\.retries is 1000000000000: it must be at most 10"),
        ({"model.remat": "dot"}, "dots"),
        ({"model.dtype": "bf16"}, "bfloat16"),
        ({"sample.solver": "heun"}, "did you mean 'heun"),
        ({"text.system_prompt": "bse"}, "base"),
        ({"text.max_tokens": 64}, "64 caption positions"),
        ({"data.resolution": 512}, r"a side of \d+ pixels is \d+ tokens and config\.model\.axes_lens allows 16"),
        ({"text.checkpoint": "gemma"}, r"without its tokeniser"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(data: Path, tmp_path: Path, overrides, message: str) -> None:
    config = small_config(data, **({"num_train_steps": 1} | overrides))
    with pytest.raises(SystemExit, match=message) as error:
        train.main(config, str(tmp_path / "run"))
    assert "\n" not in str(error.value)


def test_a_workdir_that_cannot_be_written_is_said_in_one_sentence(data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SystemExit, match=r"cannot write.*file.*choose another --workdir"):
        train.main(small_config(data, num_train_steps=1), str(tmp_path / "file" / "run"))


def test_broken_images_are_skipped_and_counted_and_too_many_stop_the_run(tmp_path: Path) -> None:
    data = write_scenes(tmp_path, 16, seed=0)
    lines = data.read_text().splitlines()
    (tmp_path / "images" / "000003.png").write_bytes(b"no picture")
    lines[5] = "not json"
    data.write_text("\n".join(lines) + "\n")
    config = small_config(data, num_train_steps=2, **{"data.max_bad_fraction": 0.5})
    train.main(config, str(tmp_path / "run"))
    line = scalars(tmp_path / "run")[-1]
    assert line["data/bad_fraction"] == pytest.approx(2 / 16)
    assert (line["data/bad/not_an_image"], line["data/bad/not_json"]) == (1, 1)
    assert 0 <= line["time/data_wait_fraction"] <= 1
    assert np.isfinite(line["loss"])

    config = small_config(data, num_train_steps=30, **{"data.max_bad_fraction": 0.01})
    with pytest.raises(SystemExit, match=r"max_bad_fraction=0\.01"):
        train.main(config, str(tmp_path / "stopped"))


def test_released_stages_fit_together() -> None:
    """The configs of the four stages build their networks, abstractly, at full size."""
    from configs import stage1, stage2, stage3, stage4

    resolutions = []
    for stage in (stage1, stage2, stage3, stage4):
        config = stage.get_config()
        networks = assemble.networks(config)
        assert isinstance(networks.dit, Network)
        parameters = sum(int(np.prod(shape.shape)) for shape in networks.dit.shapes.values())
        assert 2.5e9 < parameters < 2.7e9
        resolutions.append(config.data.resolution)
    assert resolutions == [256, 512, 1024, 1024]
