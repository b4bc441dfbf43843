"""The sampling door: files, flags, what is drawn again and what is not, and one picture whatever the processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from data_pipelines.text import train_word_tokenizer
from svg_jax import sample, sampling_flags
from svg_jax.flow.solvers import Solver
from tests.tiny import SIDE, write_tiny_weights


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    write_tiny_weights(folder)
    return folder


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "a fox"}, "a hen", {"refined_prompt": "two owls", "prompt": "owls"}, ""]
    file.write_text("\n".join(map(json.dumps, lines)))
    return file


def arguments(weights: Path, out: Path, *more: object) -> list[str]:
    return ["--checkpoint", str(weights), "--out", str(out), "--num-steps", "2", *map(str, more)]


def pictures(out: Path) -> dict[str, np.ndarray]:
    return {file.name: np.asarray(Image.open(file)) for file in sorted((out / "images").glob("*.png"))}


def test_prompts_of_a_file_at_two_sizes(weights: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sizes = ("--resolution", "48x32", "--resolution", "1024:32x32")
    sample.main(arguments(weights, out, "--prompts", prompts, "--prompt", "first", *sizes))
    drawn = pictures(out)
    assert len(drawn) == 10
    assert drawn["00000_0_48x32.png"].shape == (32, 48, 3)  # width before height
    entries = json.loads((out / "data.json").read_text())
    assert [entry["caption"] for entry in entries if entry["resolution"] == "32x32"] == [
        "first", "a fox", "a hen", "two owls", "",
    ]  # fmt: skip
    assert entries[0]["settings"]["seed"] == 0
    assert entries[0]["solver"] == "euler"
    assert (out / "index.html").read_text().count("data:image/jpeg") == 10


def test_what_is_there_is_not_drawn_again(weights: Path, prompts: Path, tmp_path: Path, monkeypatch) -> None:
    out, call = tmp_path / "out", arguments(weights, tmp_path / "out", "--prompts", prompts)
    sample.main(call)
    before = pictures(out)
    gone = out / "images" / f"00002_0_{SIDE}x{SIDE}.png"
    gone.unlink()
    drawn: list[str] = []
    stream = sample.SVGPipeline.stream

    def counted(self, jobs, settings):
        drawn.extend(job.prompt for job in jobs)
        return stream(self, jobs, settings)

    monkeypatch.setattr(sample.SVGPipeline, "stream", counted)
    sample.main(call)
    assert drawn == ["two owls"]
    assert (pictures(out)[gone.name] == before[gone.name]).all()
    with pytest.raises(SystemExit, match=r"holds pictures of seed = 0, and now it is 3: choose another --out"):
        sample.main([*call, "--seed", "3"])
    prompts.write_text('"an ox"')
    with pytest.raises(SystemExit, match=r"was drawn for another prompt \('a fox'\)"):
        sample.main(call)
    assert len(pictures(out)) == 4


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_the_same_pictures_from_any_number_of_processes(
    weights: Path, prompts: Path, tmp_path: Path, processes: int
) -> None:
    """Real processes side by side, one device each, against this one with eight; batches of other sizes."""
    together, apart = tmp_path / "together", tmp_path / "apart"
    more = ("--prompts", prompts, "--num-images", 2)
    sample.main(arguments(weights, together, *more, "--batch-size", 8))
    flags = arguments(weights, apart, *more, "--batch-size", 3)
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    environment["JAX_COMPILATION_CACHE_DIR"] = str(jax.config.jax_compilation_cache_dir)
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "svg_jax.sample", *flags, "--shard", f"{i}/{processes}"],
            env=environment,
            stdout=subprocess.DEVNULL,
        )
        for i in range(processes)
    ]
    assert [process.wait() for process in running] == [0] * processes
    expected, found = pictures(together), pictures(apart)
    assert list(found) == list(expected)
    for name in expected:  # other batch sizes may round a pixel the other way
        assert np.abs(found[name].astype(int) - expected[name]).max() <= 1, name
    assert len(json.loads((apart / "data.json").read_text())) == 8
    assert (expected[f"00000_0_{SIDE}x{SIDE}.png"] != expected[f"00000_1_{SIDE}x{SIDE}.png"]).any()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ((), "nothing to draw: give --prompt or --prompts"),
        (("--prompt", "a", "--num-steps", 0), "num_steps is 0: .*1"),
        (("--prompt", "a", "--num-images", 0), "--num-images is 0"),
        (("--prompt", "a", "--resolution", "33x32"), "width 33 is not a multiple of the patch size 8: choose 32"),
        (("--prompt", "a", "--resolution", "large"), "'large' is not WIDTHxHEIGHT, as in 1440x720"),
        (("--prompt", "a", "--solver", "heun"), "unknown solver 'heun': did you mean 'heun"),
        (("--prompt", "a", "--system-prompt", "bse"), "unknown system prompt 'bse'; did you mean 'base'"),
        (("--prompt", "a", "--shard", "2/2"), "--shard '2/2' is not I/N"),
        (("--prompt", "a", "--dtype", "bf16"), "unknown dtype 'bf16'"),
        (("--prompt", "a", "--last-step", "Mean"), "--last-step is for --solver sde_euler"),
        (("--prompt", "a", "--no-ema"), "another architecture: missing|no raw weights|holds no"),
        (("--prompt", "a", "--guidance-interval", 0.9, 0.1), "ends before it begins"),
        (("--prompts", "none.txt"), "there is no file of prompts 'none.txt'"),
        (("--prompt", "a", "--autoencoder", "nowhere"), "no checkpoint in .*nowhere"),
    ],
)
def test_bad_flags_end_in_one_sentence(weights: Path, tmp_path: Path, more: tuple[object, ...], message: str) -> None:
    with pytest.raises(SystemExit, match=message) as error:
        sample.main(arguments(weights, tmp_path / "out", *more))
    assert "\n" not in str(error.value)


def test_weights_that_are_not_complete(tmp_path: Path) -> None:
    write_tiny_weights(tmp_path)
    (tmp_path / "text_encoder").rename(tmp_path / "away")
    with pytest.raises(
        SystemExit, match=r"has a diffusion transformer and no text encoder: .*svg_jax\.convert import FILE"
    ):
        sample.main(arguments(tmp_path, tmp_path / "out", "--prompt", "a"))


def test_a_text_encoder_needs_its_own_tokeniser(weights: Path, tmp_path: Path) -> None:
    write_tiny_weights(tmp_path)
    train_word_tokenizer(["a fox"], tmp_path / "large", vocab_size=300)
    call = arguments(tmp_path, tmp_path / "out", "--prompt", "a")
    with pytest.raises(SystemExit, match=r"the tokeniser has \d+ tokens and the text encoder 264"):
        sample.main([*call, "--tokenizer", str(tmp_path / "large")])
    shutil.rmtree(tmp_path / "text_encoder" / "tokenizer")
    with pytest.raises(SystemExit, match=r"is given without its tokeniser: .* --tokenizer in sampling"):
        sample.main(call)


def test_out_of_memory_names_the_knobs(weights: Path, tmp_path: Path, monkeypatch) -> None:
    def full(*arrays: object) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes")

    monkeypatch.setattr(sample.SVGPipeline, "_jit", lambda *args, **static: full)
    with pytest.raises(SystemExit, match="out of device memory: lower batch_size, decode in tiles"):
        sample.main(arguments(weights, tmp_path / "out", "--prompt", "a"))


def test_options_of_the_sde_solvers(weights: Path, tmp_path: Path) -> None:
    options = {"solver": "sde_heun", "diffusion_form": "linear", "last_step": "none"}
    assert sampling_flags.solver_of(options) == Solver("sde_heun", diffusion_form="linear", last_step=None)
    out = tmp_path / "out"
    sample.main(arguments(weights, out, "--prompt", "a", "--solver", "sde_euler", "--diffusion-form", "linear"))
    (entry,) = json.loads((out / "data.json").read_text())
    assert entry["solver"] == "sde_euler"
    assert entry["settings"]["solver"]["diffusion_form"] == "linear"
