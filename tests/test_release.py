"""From the files of the release to pictures, and to the start of a training run, by the README's commands."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from ml_collections import ConfigDict
from PIL import Image

from configs import autoencoder_base
from data_pipelines.text import train_word_tokenizer
from svg_jax import assemble, loading, reconstruct, sample, train_autoencoder
from svg_jax.checkpoint import WrongArchitecture, load_config, load_params, save_params
from svg_jax.convert.kinds import restored
from svg_jax.convert.model import Model
from svg_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from svg_jax.models.decoder import DecoderConfig
from svg_jax.models.residual import ResidualConfig
from svg_jax.nn.functional import Network
from svg_jax.parallel import make_mesh
from svg_jax.pipeline import SVGPipeline
from tests.convert import release
from tests.tiny_autoencoders import write_pictures
from tests.vectors import assert_close

TEXT = dataclasses.replace(release.GEMMA, vocab_size=300)
DIT = dataclasses.replace(release.DIT, text_dim=TEXT.dim)
AUTOENCODER = {"encoder": vars(release.VIT), "decoder": vars(release.DECODER)}
SCALAR = jax.ShapeDtypeStruct((), np.float32)
AUTOENCODERS = {
    "p": AutoencoderConfig(release.VIT, release.DECODER),
    "r": AutoencoderConfig(
        release.VIT,
        dataclasses.replace(release.DECODER, z_channels=24),
        ResidualConfig(dim=16, num_layers=1, num_heads=2, hidden_dim=32, patch_size=4),
    ),
}


def scaled(model: Model, seed: int) -> dict[str, np.ndarray]:
    """Random weights, small enough that a picture comes out."""
    state = release.state_dict(model, seed=seed)
    return {name: a if name.endswith(("bias_mask", "periods")) else 0.1 * a for name, a in state.items()}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("release")
    dit, autoencoder, text = (
        restored(config)
        for config in (
            {"kind": "dit", "model": vars(DIT)},
            {"kind": "autoencoder", "autoencoder": AUTOENCODER},
            {"kind": "text_encoder", "text": {"encoder": vars(TEXT)}, "origin": {"layout": "model."}},
        )
    )
    torch.save({"model": release.tensors(scaled(dit, 0))}, folder / "consolidated_ema.00-of-01.pth")
    torch.save({"state_dict": release.tensors(scaled(autoencoder, 1)), "epoch": 3}, folder / "svg_autoencoder.ckpt")
    rows = np.random.default_rng(2).uniform(0.5, 1.5, (2, 12, release.VIT.dim)).astype(np.float32)
    torch.save(release.tensors({"mean": rows[0], "std": rows[1]}), folder / "stats.pt")
    release.transformers_folder(folder / "gemma-2-2b", scaled(text, 3), release.gemma_config(TEXT), shards=2)
    train_word_tokenizer(["a red fox asleep in fresh snow"], folder / "gemma-2-2b", vocab_size=TEXT.vocab_size)
    files = ("consolidated_ema.00-of-01.pth", "svg_autoencoder.ckpt", "stats.pt", "gemma-2-2b")
    release.run("import", *(folder / file for file in files), "--to", folder / "weights")
    return folder / "weights"


def test_three_commands_to_a_picture(weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "samples"
    flags = ["--checkpoint", str(weights), "--out", str(out), "--resolution", "48x32", "--dtype", "float32"]
    sample.main([*flags, "--prompt", "a red fox asleep in fresh snow"])
    (entry,) = json.loads((out / "data.json").read_text())
    settings = entry["settings"]
    assert (settings["solver"], settings["num_steps"], settings["shift"]) == ("dpm++2m", 50, 10.0)
    assert (settings["guidance_scale"], settings["renorm"], settings["system_prompt"]) == (4.0, 1.0, "base")
    with Image.open(out / entry["image_url"]) as image:
        assert image.size == (48, 32)
        assert np.asarray(image).std() > 1


def test_statistics_reach_the_latents(weights: Path) -> None:
    pipe = SVGPipeline.from_checkpoint(str(weights), dtype="float32")
    stored = torch.load(weights.parent / "stats.pt", weights_only=True)
    for name in ("mean", "std"):
        assert (np.asarray(pipe.frozen["autoencoder"][f"latents.{name}"]) == stored[name][-1].numpy()).all()


def test_a_vision_model_alone_begins_an_autoencoder(tmp_path: Path) -> None:
    model = restored({"kind": "encoder", "encoder": vars(release.VIT)})
    state = scaled(model, 5)
    torch.save(release.tensors(state), tmp_path / "dinov3.pth")
    release.run("import", tmp_path / "dinov3.pth", "--to", tmp_path)

    section = ConfigDict({name: dict(values) for name, values in AUTOENCODER.items()})
    section.checkpoint = str(tmp_path / "encoder")
    sizes = assemble.autoencoder_config(section)
    network = Network(lambda rngs: Autoencoder(sizes, rngs=rngs))
    params = loading.load_autoencoder(section, network, make_mesh({"fsdp": -1}))
    assert params.keys() == network.shapes.keys()
    assert_close(params["encoder.norm.scale"], state["norm.weight"], 1e-7)
    assert float(jax.numpy.std(params["decoder.conv_in.kernel"])) > 0
    wrong = ConfigDict({**section.to_dict(), "decoder": vars(DecoderConfig(**vars(release.DECODER)))})
    wrong.encoder.num_layers = 1
    sizes_of_wrong = assemble.autoencoder_config(wrong)
    other = Network(lambda rngs: Autoencoder(sizes_of_wrong, rngs=rngs))
    with pytest.raises(ValueError, match=r"another architecture: shapes differ: blocks\."):
        loading.load_autoencoder(wrong, other, make_mesh({"fsdp": -1}))


def lightning(path: Path, config: AutoencoderConfig, loss: dict[str, np.ndarray]) -> None:
    """An autoencoder as the release saves it."""
    state = scaled(restored({"autoencoder": dataclasses.asdict(config)}), 6) | loss
    torch.save({"state_dict": release.tensors(state), "epoch": 3}, path)
    (path.parent / "heads.json").write_text('{"extra_vit": {"output_dim": 8, "use_outnorm": true, "num_heads": 2}}')


def training(folder: Path, imported: Path, *, as_run: bool) -> ConfigDict:
    """Two steps on eight pictures, from what was imported, named as a run's workdir or as an autoencoder's."""
    config = autoencoder_base.get_config()
    config.autoencoder = {**load_config(str(imported))["autoencoder"], "checkpoint": None if as_run else str(imported)}
    config.init_from = str(imported) if as_run else None
    config.data.update(path=str(write_pictures(folder / "pictures", 8)), resolution=32, num_threads=1)
    config.num_train_steps, config.batch_size, config.log_every, config.sample.every = 2, 8, 1, 0
    config.checkpoint.every = 2
    config.statistics.num_images = 8
    config.loss.update(perceptual_channels=release.WIDTHS, disc_channels=4, disc_num_layers=1, disc_start=1)
    return config


def reconstructed(folder: Path, workdir: Path) -> np.ndarray:
    """A picture as the raw weights of a workdir reconstruct it."""
    out = folder / "reconstructed" / workdir.parent.name / workdir.name
    raw = ["--no-ema"] if workdir.name == "run" else []
    reconstruct.main([str(folder / "pictures/0/00.png"), "--checkpoint", str(workdir), "--out", str(out), *raw])
    return np.asarray(Image.open(out / "reconstructions" / "00.png"))


def test_another_architecture_says_what_to_do(tmp_path: Path) -> None:
    """Between Autoencoder-P and -R, and with losses, the part that one has and the other has not is named."""
    advice = "give the config the checkpoint's sizes, or name another checkpoint"
    shapes = {kind: Network(lambda rngs, c=c: Autoencoder(c, rngs=rngs)).shapes for kind, c in AUTOENCODERS.items()}
    for kind, found in shapes.items():
        arrays = {name: np.zeros(shape.shape, np.float32) for name, shape in found.items()}
        save_params(str(tmp_path / kind), {"ema": arrays}, {})

    def message(workdir: str, wanted: dict[str, jax.ShapeDtypeStruct]) -> str:
        with pytest.raises(WrongArchitecture) as error:
            load_params(str(tmp_path / workdir), wanted, {})
        assert "\n" not in str(error.value)
        return str(error.value)

    branch = "has a residual branch (Autoencoder-R)"
    assert message("p", shapes["r"]).endswith(f" (only the config {branch}): {advice}")
    assert message("r", shapes["p"]).endswith(f" (only the checkpoint {branch}): {advice}")
    loss = dict.fromkeys(("loss.discriminator.main.0.kernel", "loss.perceptual_loss.lin0.model.1.kernel"), SCALAR)
    both = "(only the config has a discriminator, only the config has LPIPS)"
    assert message("p", shapes["p"] | loss).endswith(f"{both}: {advice}")
    for wanted in ({"other": SCALAR}, dict.fromkeys(shapes["p"], SCALAR)):
        assert message("p", wanted).endswith(f": {advice}")
        assert "only the" not in message("p", wanted)


@pytest.mark.parametrize("kind", ["p", "r"])
def test_training_goes_on_from_the_release_and_back_to_it(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Autoencoder-P without anything of its losses, Autoencoder-R with all of them; both compute in bfloat16."""
    loss = release.of_loss(layers=1) if kind == "r" else {}
    lightning(tmp_path / "in.ckpt", AUTOENCODERS[kind], loss)
    flags = ("--architecture", tmp_path / "heads.json")
    release.run("import", tmp_path / "in.ckpt", "--to", tmp_path, *flags)
    imported, run = tmp_path / "autoencoder", tmp_path / "run"
    config = training(tmp_path, imported, as_run=kind == "r")
    parts = [config.autoencoder[name] for name in ("encoder", "decoder", "residual")]
    assert {part.dtype for part in parts if part} == {"bfloat16"}
    if kind == "p":
        config.loss.perceptual_weight = 0.0
    with caplog.at_level("WARNING", logger="svg_jax"):
        train_autoencoder.main(config, str(run))
    assert ("has no discriminator: training begins with a new one" in caplog.text) == (kind == "p")

    release.run("export", run, "--to", tmp_path / "out.ckpt", "--part", "params")
    before, after = (
        {name: tensor.numpy() for name, tensor in torch.load(tmp_path / file)["state_dict"].items()}
        for file in ("in.ckpt", "out.ckpt")
    )
    assert ("loss.perceptual_loss.net.slice5.28.weight" in after) == (kind == "r")
    for name in before.keys() & after.keys():
        moved = np.abs(after[name] - before[name]).max()
        if name.startswith(("decoder.", "extra_vit.", "loss.discriminator.")) and "running" not in name:
            assert moved < 4 * config.optim.lr, name  # two steps of Adam, from the weights of the release
            assert moved > 0 or not name.endswith("weight"), name
        elif "running" not in name:
            assert moved == 0, name
    lost = {name for name in before.keys() - after.keys() if "tracked" not in name and "scaling" not in name}
    assert not lost

    release.run("import", tmp_path / "out.ckpt", "--to", tmp_path / "again", *flags)
    first, trained, again = (
        reconstructed(tmp_path, workdir) for workdir in (imported, run, tmp_path / "again/autoencoder")
    )
    np.testing.assert_array_equal(trained, again)
    assert np.any(trained != first)
    release.run("export", tmp_path / "again/autoencoder", "--to", tmp_path / "last.ckpt")
    release.assert_same(tmp_path / "last.ckpt", after, "state_dict")
