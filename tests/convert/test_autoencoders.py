"""Checkpoints of Autoencoder-P and Autoencoder-R as the release saves them, losses included: in, and out again."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch

from svg_jax.checkpoint import load_config, open_params
from svg_jax.convert.kinds import recognise, restored
from svg_jax.convert.model import Model, shapes_of
from svg_jax.convert.rules import below, carried, release_shapes, to_jax, to_release
from svg_jax.convert.tables import DECODER
from svg_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from svg_jax.models.decoder import DecoderConfig
from svg_jax.models.decoder_hy import HyDecoderConfig
from svg_jax.models.residual import ResidualConfig
from svg_jax.models.vit import ViTConfig, rope_periods
from svg_jax.nn.functional import Network
from tests.convert import release
from tests.convert.release import assert_same, load, of_loss, run, state_dict, tensors
from tests.vectors import Case, assert_close, cases

ROPE = ResidualConfig(dim=16, num_layers=2, num_heads=2, hidden_dim=32, patch_size=4)
LEARNT = dataclasses.replace(ROPE, family="learnt", grid=(4, 4))
CONV = dataclasses.replace(release.DECODER, z_channels=24)
HY = HyDecoderConfig(z_channels=24, channels=(64, 32, 32), num_res_blocks=0, factor=4)
SIZES = {
    "p": AutoencoderConfig(release.VIT, release.DECODER),
    "r": AutoencoderConfig(release.VIT, CONV, ROPE),
    "r_learnt": AutoencoderConfig(release.VIT, CONV, LEARNT),
    "r_hy": AutoencoderConfig(release.VIT, HY, ROPE),
}
HEADS = {"extra_vit": {"output_dim": 8, "use_outnorm": True, "num_heads": 2}}


def model_of(config: AutoencoderConfig) -> Model:
    return restored({"autoencoder": dataclasses.asdict(config)})


def unused(config: AutoencoderConfig) -> dict[str, np.ndarray]:
    """Keys of the release that nothing reads."""
    state = {"colorize": np.ones((3, 5, 1, 1), np.float32)}
    if config.residual is not None:
        channels = config.latent_channels
        state |= {"norm_vit.weight": np.ones(channels, np.float32), "norm_vit.bias": np.zeros(channels, np.float32)}
        if config.residual.family == "rope":
            places = np.arange(64, dtype=np.float32)
            state |= {"extra_vit.freqs_t_x": places % 8, "extra_vit.freqs_t_y": places // 8}
            state |= {
                "extra_vit.head.weight": np.ones((5, 16), np.float32),
                "extra_vit.head.bias": np.ones(5, np.float32),
            }
    return state


def write(path: Path, config: AutoencoderConfig, **changes: Any) -> dict[str, np.ndarray]:
    """A Lightning file of all that the release keeps; its tensors. `changes` of None take keys out."""
    state = state_dict(model_of(config)) | of_loss() | unused(config) | changes
    state = {name: value for name, value in state.items() if value is not None}
    (path.parent / "a.json").write_text(json.dumps(HEADS))
    torch.save({"state_dict": tensors(state), "epoch": 3, "global_step": 12, "optimizer_states": [{}]}, path)
    return state


def import_(path: Path, to: Path) -> Path:
    run("import", path, "--to", to, "--architecture", path.parent / "a.json")
    return to / "autoencoder"


@pytest.mark.parametrize("name", ["p", "r"])
def test_everything_of_a_checkpoint_comes_in_and_goes_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    config = SIZES[name]
    state = write(tmp_path / "in.ckpt", config)
    workdir = import_(tmp_path / "in.ckpt", tmp_path / "one")
    said = capsys.readouterr().out
    assert "with its discriminator: adversarial training goes on with that" in said
    assert "guessed" not in said

    saved = open_params(str(workdir))
    trained = {"decoder", "loss"} if config.residual is None else {"decoder", "loss", "extra_vit"}
    assert {n.split(".")[0] for n in saved["ema"]} == trained
    of_losses = {n for n in saved["ema"] if n.startswith("loss.")}
    assert {"loss.logvar", "loss.discriminator.main.0.kernel", "loss.discriminator.main.9.scale"} <= of_losses
    assert not any("running" in n or "perceptual" in n for n in of_losses)
    frozen = set(saved["frozen"])
    assert {"loss.discriminator.main.9.running_var", "loss.perceptual_loss.lin4.model.1.kernel"} <= frozen
    counts = {f"loss.discriminator.main.{n}.num_batches_tracked" for n in (3, 6, 9)}
    constants = {f"loss.perceptual_loss.scaling_layer.{n}" for n in ("shift", "scale")}
    assert set(saved["carried"]) == counts | constants | unused(config).keys()
    np.testing.assert_array_equal(saved["ema"]["loss.logvar"], state["loss.logvar"])
    for path in (workdir, tmp_path / "in.ckpt"):
        run("inspect", path)
        said = capsys.readouterr().out
        assert [line.split()[1] for line in said.splitlines() if line.startswith("kind")] == ["autoencoder"]
        assert ("out_channels 8" in said) == (config.residual is not None)

    run("export", workdir, "--to", tmp_path / "out.ckpt")
    assert_same(tmp_path / "out.ckpt", state, "state_dict")


@pytest.mark.parametrize("name", SIZES)
def test_every_key_has_its_place_and_the_sizes_are_told(name: str) -> None:
    config = SIZES[name]
    state = state_dict(model_of(config)) | of_loss() | unused(config)
    model = recognise(state, state, arguments=HEADS)
    assert not any(model.differences(state).values())
    params = to_jax(state, model.table, model.shapes)
    back = to_release(params, model.table) | {key: state[key] for key in carried(state, model.table)}
    assert back.keys() == state.keys()
    for key, value in state.items():
        assert back[key].tobytes() == value.tobytes(), key
    for key in (*state_dict(model_of(config)), "loss.logvar"):
        assert key not in carried(state, model.table)

    section, expected = model.sections["autoencoder"], dataclasses.asdict(config)
    assert section.keys() == expected.keys()
    for part, values in expected.items():
        if not isinstance(values, dict):
            assert section[part] == values
            continue
        not_told = {"dtype", "layer_scale"} | ({"grid"} if values["family"] == "rope" else set())
        for name in values.keys() - not_told:
            assert section[part][name] == values[name], (part, name)


@pytest.mark.parametrize(
    "config",
    [
        AutoencoderConfig.svg_r(),
        dataclasses.replace(AutoencoderConfig.svg_r(), decoder=HyDecoderConfig()),
        dataclasses.replace(
            AutoencoderConfig.svg_r(), residual=ResidualConfig.from_release({"output_dim": 8, "vit_type": "vit-s"})
        ),
    ],
    ids=["r", "r_hy3", "r_vit_s"],
)
def test_the_published_residual_autoencoders_are_told_by_their_weights(config: AutoencoderConfig) -> None:
    model = model_of(config)
    found = recognise(
        {"encoder.rope_embed.periods": rope_periods(16, 100.0)}, release_shapes(model.shapes, model.table)
    )
    residual = dataclasses.replace(config.residual or ResidualConfig(), match="batch")
    assert found.networks == {"encoder": config.encoder, "decoder": config.decoder, "residual": residual}
    assert "no published size" not in found.size
    assert not any("guessed" in note for note in found.notes)


def network_sizes(workdir: Path) -> AutoencoderConfig:
    networks = restored(load_config(str(workdir))).networks
    return AutoencoderConfig(**{name: dataclasses.replace(part, dtype="float32") for name, part in networks.items()})


def network_of(workdir: Path) -> tuple[Network[Autoencoder], Any]:
    """An imported autoencoder, without what else lies beside it."""
    config = network_sizes(workdir)
    network = Network(lambda rngs: Autoencoder(config, rngs=rngs))
    return network, load(workdir, network)


@pytest.mark.golden
@pytest.mark.parametrize("name", [name for name in cases("residual") if "dino" in Case.load(name).config])
def test_latents_of_a_golden_residual_autoencoder(tmp_path: Path, name: str) -> None:
    """Its decoder makes one pixel of a feature, as no real one does: another takes its place."""
    case = Case.load(name)
    state = {key: value for key, value in case.weights().items() if not key.startswith("decoder.")}
    vit = case.config["extra_vit"] | {"num_heads": case.config["rope_vit"]["num_heads"]}
    channels = case.config["ddconfig"]["z_channels"]
    decoder = DecoderConfig(z_channels=channels, channels=32, channel_multipliers=(1,) * 5, num_res_blocks=0)
    shapes = {f"decoder.{key}": value for key, value in shapes_of(decoder).items()}
    state |= {
        key: np.ones(s.shape, np.float32) for key, s in release_shapes(shapes, below("decoder.", DECODER)).items()
    }
    (tmp_path / "a.json").write_text(json.dumps({"encoder": case.config["dino"], "extra_vit": vit}))
    torch.save({"state_dict": tensors(state)}, tmp_path / "in.ckpt")
    workdir = import_(tmp_path / "in.ckpt", tmp_path)
    network, params = network_of(workdir)
    size = "x".join(map(str, case.config["sizes"][0]))
    images = (case.inputs[f"image_pm1_{size}"] + 1.0) * 127.5
    found = jax.jit(lambda params, images: network(params).features_of_images(images))(params, images)
    assert_close(found.transpose(0, 3, 1, 2), case.outputs[f"{size}.z"], 1e-4)


@pytest.mark.golden
@pytest.mark.parametrize("name", [n for n in cases("decoder_hy3") if "z_channels" in Case.load(n).config["model"]])
def test_pixels_of_a_golden_hy_decoder(tmp_path: Path, name: str) -> None:
    case = Case.load(name)
    decoder = HyDecoderConfig.from_release(case.config["model"])
    vit = ViTConfig(dim=decoder.z_channels, num_layers=1, num_heads=1, hidden_dim=8, patch_size=decoder.factor)
    state = state_dict(model_of(AutoencoderConfig(vit, decoder)))
    state |= {f"decoder.{key}": value for key, value in case.weights().items()}
    torch.save({"state_dict": tensors(state)}, tmp_path / "in.ckpt")
    run("import", tmp_path / "in.ckpt", "--to", tmp_path)
    network, params = network_of(tmp_path / "autoencoder")
    assert network_sizes(tmp_path / "autoencoder").decoder == decoder
    height, width = case.config["sizes"][0]
    z = case.inputs[f"z_{height}x{width}"]
    z = z.reshape(*z.shape[:2], height, width).transpose(0, 2, 3, 1)
    y = jax.jit(lambda params, z: network(params).decoder(z))(params, z).transpose(0, 3, 1, 2)
    assert_close(y, case.outputs[f"{height}x{width}.y"].reshape(y.shape), 1e-4)


def test_statistics_of_the_encoder_alone_serve_a_residual_autoencoder(tmp_path: Path) -> None:
    """As in the release: each further channel gets the average of the others."""
    state = state_dict(model_of(SIZES["r"]))
    torch.save({"state_dict": tensors(state)}, tmp_path / "in.ckpt")
    (tmp_path / "a.json").write_text(json.dumps(HEADS))
    rows = np.random.default_rng(0).uniform(0.5, 1.5, (2, 3, 16)).astype(np.float32)
    torch.save(tensors({"mean": rows[0], "std": rows[1]}), tmp_path / "s.pt")
    run("import", tmp_path / "s.pt", "--to", tmp_path)
    frozen = open_params(str(import_(tmp_path / "in.ckpt", tmp_path)))["frozen"]
    for name, row in zip(("mean", "std"), rows[:, -1], strict=True):
        np.testing.assert_array_equal(frozen[f"latents.{name}"][:16], row)
        np.testing.assert_allclose(frozen[f"latents.{name}"][16:], row.mean(), rtol=1e-6)
    run("export", tmp_path / "autoencoder", "--to", tmp_path / "out.pt", "--as", "statistics")
    assert_same(tmp_path / "out.pt", {"mean": rows[0, -1:], "std": rows[1, -1:]})


def test_what_of_the_losses_is_there_is_said() -> None:
    state = state_dict(model_of(SIZES["p"])) | of_loss()
    bare = {name: value for name, value in state.items() if not name.startswith("loss.discriminator.")}
    model = recognise(bare, bare)
    assert "without a discriminator: adversarial training that goes on from here begins with a fresh one" in model.notes
    assert not any(name.startswith("loss.discriminator.") for name in model.shapes)
    assert "loss.perceptual_loss.net.slice5.28.kernel" in model.shapes
    assert not any(model.differences(bare).values())

    key = "loss.discriminator.main.0.weight"
    foreign = state | {key: np.ones((4, 6, 4, 4), np.float32)}  # of pictures of six channels
    model = recognise(foreign, foreign)
    assert model.notes[0].startswith(
        "its discriminator is of another kind than those here, and only carried along (1 of"
    )
    assert set(carried(foreign, model.table)) >= {name for name in state if name.startswith("loss.discriminator.")}
    assert not any(model.differences(foreign).values())


def test_a_learnt_mask_token_is_used_where_masking_is_asked_for() -> None:
    state = state_dict(model_of(SIZES["r"])) | {"mask_token": np.ones((1, 8, 1), np.float32)}
    plain = recognise(state, state, arguments=HEADS)
    assert "mask_token" in carried(state, plain.table)
    asked = recognise(state, state, arguments={"extra_vit": HEADS["extra_vit"] | {"mask_ratio": 0.3}})
    assert asked.networks["residual"].mask_ratio == 0.3
    assert asked.part("mask_token") == "ema"
    assert "mask_token" not in carried(state, asked.table)


def test_a_branch_that_the_decoder_does_not_read_is_carried() -> None:
    """The release has configs of Autoencoder-R whose decoder reads the vision model's channels alone."""
    branch = {name: value for name, value in state_dict(model_of(SIZES["r"])).items() if name.startswith("extra_vit.")}
    state = state_dict(model_of(SIZES["p"])) | branch
    model = recognise(state, state)
    assert "residual" not in model.networks
    assert set(carried(state, model.table)) == branch.keys()


def test_parts_that_do_not_fit_together() -> None:
    whole = state_dict(model_of(SIZES["r"]))
    bare = {name: value for name, value in whole.items() if not name.startswith("extra_vit.")}
    five = {"extra_vit.heads.2.weight": np.ones((5, 16), np.float32), "extra_vit.heads.2.bias": np.ones(5, np.float32)}
    deeper = dataclasses.replace(release.DECODER, channel_multipliers=(1, 1, 1, 1))
    other_stride = state_dict(model_of(AutoencoderConfig(release.VIT, deeper, resize=True)))
    no_size = {name: value for name, value in whole.items() if name != "extra_vit.heads.2.weight"}
    narrow = {"decoder.conv_in.weight": whole["decoder.conv_in.weight"][:, :12]}
    wrong: list[tuple[dict[str, np.ndarray], str]] = [
        (bare, r"reads 8 channels beside .* residual branch that makes them \(extra_vit\.\*\) is missing"),
        (bare | {"extra_vit.stages.0.weight": np.ones((2, 2))}, "is none of the two ViTs that are known here"),
        (no_size, "1 missing: heads.2.weight, which tells the size"),
        (whole | five, "the encoder makes 16 channels and the residual branch 5 more and the decoder reads 24"),
        (whole | narrow, "the encoder makes 16 channels and the decoder reads 12"),
        (other_stride, "a patch has 4 pixels a side and the decoder makes 8 of each feature"),
    ]
    for state, message in wrong:
        with pytest.raises(ValueError, match=message):
            recognise(state, state, arguments=HEADS)
    assert recognise(other_stride, other_stride, arguments={"resize": True}).sections["autoencoder"]["resize"] is True
    without = {name: value for name, value in whole.items() if name != "extra_vit.blocks.1.gamma_2"}
    assert recognise(without, without, arguments=HEADS).differences(without)["missing"] == [
        "extra_vit.blocks.1.gamma_2"
    ]
