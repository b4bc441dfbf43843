"""The pipeline as a notebook uses it."""

from __future__ import annotations

import logging
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from data_pipelines.text import FolderTokenizer
from svg_jax.parallel import make_mesh
from svg_jax.pipeline import Job, Settings, SVGPipeline
from tests.tiny import SIDE, write_tiny_weights
from tests.vectors import assert_close


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    write_tiny_weights(folder)
    return folder


@pytest.fixture(scope="module")
def pipe(weights: Path) -> SVGPipeline:
    return SVGPipeline.from_checkpoint(str(weights))


def difference(a: Image.Image, b: Image.Image) -> int:
    return int(np.abs(np.asarray(a, int) - np.asarray(b, int)).max())


def test_images_and_latents(pipe: SVGPipeline) -> None:
    images, latents = pipe(["a fox", ""], num_images=2, return_latents=True, width=48)
    assert [image.size for image in images] == [(48, SIDE)] * 4
    assert [z.shape for z in latents] == [(SIDE // 8, 6, 16)] * 4
    assert difference(pipe.decode(latents[1]), images[1]) <= 1
    assert difference(images[0], images[1]) > 0
    assert pipe("a fox", width=48)[0].size == (48, SIDE)


def test_a_picture_does_not_depend_on_batch_or_order(pipe: SVGPipeline) -> None:
    prompts = ["a fox", "a hen", "two owls"]
    alike = pipe(prompts, num_images=3, batch_size=8)
    one_by_one = pipe(prompts, num_images=3, batch_size=1)
    assert max(map(difference, alike, one_by_one)) <= 1  # eight devices make eights of both: the same program
    jobs = [Job(prompt, i, j) for i, prompt in enumerate(prompts) for j in range(3)]
    backward = {drawn.job: drawn.image for batch in pipe.stream(jobs[::-1], pipe.settings()) for drawn in batch}
    assert [difference(backward[job], image) for job, image in zip(jobs, alike, strict=True)] == [0] * 9


def test_one_device_draws_what_eight_do(weights: Path, pipe: SVGPipeline) -> None:
    single = SVGPipeline.from_checkpoint(str(weights), mesh=make_mesh({"fsdp": 1}, jax.devices()[:1]))
    for batch_size in (1, 3):
        pair = single(["a fox"], num_images=3, batch_size=batch_size), pipe(["a fox"], num_images=3)
        assert max(map(difference, *pair)) <= 1


def test_each_part_is_compiled_once(weights: Path) -> None:
    pipe = SVGPipeline.from_checkpoint(str(weights))
    for i, (steps, scale) in enumerate([(1, 4.5), (4, 4), (np.int64(6), np.float32(3))]):
        interval = (0, 1) if i else (0.0, 0.9)
        options = {"guidance_scale": scale, "shift": 1 + i, "renorm": i, "guidance_interval": interval, "seed": i}
        pipe(["a fox", "a hen"], num_steps=steps, num_images=4, **options)
    assert {key[0]: function._cache_size() for key, function in pipe._compiled.items()} == {
        "encode_prompts": 1,
        "draw_latents": 1,
        "decode_latents": 1,
    }


def test_every_setting_changes_the_picture(pipe: SVGPipeline) -> None:
    usual = pipe("a fox")[0]
    changes = [
        {"seed": 1}, {"num_steps": 2}, {"guidance_scale": 1.0}, {"guidance_scale": 9.0}, {"renorm": 0.5},
        {"shift": 9.0}, {"guidance_interval": (0.0, 0.5)}, {"solver": "dpm++2m"}, {"system_prompt": "base"},
        {"negative_prompt": "hens"},
    ]  # fmt: skip
    for change in changes:
        assert difference(pipe("a fox", **change)[0], usual) > 0, change
    assert difference(pipe("a fox", tile=SIDE)[0], usual) == 0
    assert difference(pipe("a fox", width=128, tile=64)[0], pipe("a fox", width=128)[0]) > 0


def test_defaults_are_the_released_recipe() -> None:
    settings = Settings(height=1024, width=1024)
    assert (settings.solver, settings.num_steps, settings.shift) == ("dpm++2m", 50, 10.0)
    assert (settings.guidance_scale, settings.renorm, settings.system_prompt) == (4.0, 1.0, "base")


def test_a_negative_prompt_gets_the_system_prompt_and_an_empty_one_does_not(pipe: SVGPipeline, monkeypatch) -> None:
    seen: list[str] = []
    encode = FolderTokenizer.encode

    def spy(self, texts, max_length):
        seen.extend(texts)
        return encode(self, texts, max_length)

    monkeypatch.setattr(FolderTokenizer, "encode", spy)
    pipe("a fox", negative_prompt="hens", system_prompt="base")
    pipe("a fox", system_prompt="base")
    assert any(text.endswith("<Prompt Start> hens") for text in seen)
    assert "" in seen


def test_a_prompt_that_is_cut_is_said(pipe: SVGPipeline, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="svg_jax"):
        pipe("a fox " * 20)
    assert "a prompt of more than 48 tokens is cut" in caplog.text


def test_enhancement_rewrites_prompts_and_pictures_follow(pipe: SVGPipeline, monkeypatch) -> None:
    from svg_jax import pipeline

    monkeypatch.setitem(pipeline.GENERATION, "max_new_tokens", 6)
    prompts = ["a fox", "a hen"]
    enhanced = pipe.enhance(prompts)
    assert len(enhanced) == 2
    assert all(enhanced)
    assert pipe.enhance(prompts[1:]) == enhanced[1:]
    (batch,) = pipe.stream([Job("a fox"), Job("")], pipe.settings(system_prompt="enhance"))
    assert [drawn.prompt for drawn in batch] == [enhanced[0], ""]


def test_pictures_go_through_the_autoencoder(pipe: SVGPipeline) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (37, 50, 4), np.uint8)
    latents = pipe.encode(Image.fromarray(noise, "RGBA"))
    assert latents.shape == (4, 6, 16)
    assert np.isfinite(latents).all()
    assert pipe.decode(latents).size == (48, 32)


def test_compute_type(weights: Path, pipe: SVGPipeline) -> None:
    low = SVGPipeline.from_checkpoint(str(weights), dtype="bfloat16")
    kernels = {name: value.dtype for name, value in low.params.items() if name.endswith("kernel")}
    assert set(map(str, kernels.values())) == {"bfloat16"}
    assert str(low.params["layers.attention_norm1.scale"].dtype) == "float32"
    (_, a), (_, b) = (p("a fox", return_latents=True, num_steps=2) for p in (low, pipe))
    assert_close(a[0], b[0], 3e-2)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"height": 30}, ValueError, "height 30 is not a multiple of the patch size 8: choose 32"),
        ({"height": 4096}, ValueError, "a side of 4096 pixels is 512 tokens"),
        ({"num_images": 0}, ValueError, "num_images is 0"),
        ({"num_steps": 2000}, ValueError, "num_steps is 2000"),
        ({"guidance_scale": float("nan")}, ValueError, "must be finite"),
        ({"shift": 0.0}, ValueError, "shift is 0: it must be above zero"),
        ({"seed": -1}, ValueError, "seed is -1"),
        ({"batch_size": 0}, ValueError, "batch_size is 0"),
        ({"tile": 8}, ValueError, "tile is 8: decode in squares of at least 32 pixels"),
        ({"num_steps": "4"}, ValueError, "num_steps is '4'"),
        ({"guidance_interval": (0.5,)}, ValueError, r"guidance_interval is \(0\.5,\)"),
        ({"seed": 1.5}, ValueError, "seed is 1.5"),
        ({"steps": 3}, TypeError, "steps"),
    ],
)
def test_bad_settings(pipe: SVGPipeline, options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pipe("a fox", **options)
