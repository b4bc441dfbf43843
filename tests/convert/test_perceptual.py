"""The networks that compare pictures: LPIPS from its two public files, Inception from its one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from svg_jax.checkpoint import load_config, open_params
from svg_jax.convert.kinds import kind_of, recognise, restored
from svg_jax.convert.rules import carried, release_shapes, to_jax, to_release
from svg_jax.models.inception import Inception
from svg_jax.models.lpips import LPIPS, LPIPSConfig
from svg_jax.nn.functional import Network
from tests.convert.release import WIDTHS, assert_same, load, lpips, run, tensors
from tests.convert.test_bad_input import error
from tests.convert.test_roundtrip import data as data

VGG16, HEADS = lpips(slices=False, heads=False), lpips(slices=False, net=False)
CLASSIFIER = {"classifier.0.weight": np.ones((5, 6), np.float32), "classifier.6.bias": np.ones(5, np.float32)}
NETWORK = Network(lambda rngs: LPIPS(LPIPSConfig(WIDTHS), rngs=rngs))


@pytest.fixture
def files(tmp_path: Path) -> Path:
    torch.save(tensors(VGG16 | CLASSIFIER), tmp_path / "vgg16.pth")
    torch.save(tensors(HEADS), tmp_path / "vgg.pth", _use_new_zipfile_serialization=False)
    return tmp_path


def check(workdir: Path) -> None:
    """It holds the network whole, and comes out as one file."""
    assert "lacks" not in load_config(str(workdir))
    params = load(workdir, NETWORK)
    np.testing.assert_array_equal(params["lin3.model.1.kernel"][0, 0, :, 0], HEADS["lin3.model.1.weight"][0, :, 0, 0])
    kernel = VGG16["features.12.weight"].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(params["net.slice3.12.kernel"], kernel)
    run("export", workdir, "--to", workdir.parent / "out.pth", "--overwrite")
    assert_same(workdir.parent / "out.pth", VGG16 | HEADS)


def test_both_files_together(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("import", files / "vgg.pth", files / "vgg16.pth", "--to", files)
    said = capsys.readouterr().out
    assert "dropped: classifier.0.weight, classifier.6.bias (VGG16's classifier, which LPIPS does not have)" in said
    assert "perceptual distance (LPIPS, VGG16)" in said
    check(files / "lpips")
    assert load_config(str(files / "lpips"))["origin"]["sources"] == ["vgg.pth", "vgg16.pth"]
    run("import", files / "out.pth", "--to", files / "again")
    check(files / "again/lpips")


@pytest.mark.parametrize("first", ["vgg16.pth", "vgg.pth"])
def test_one_after_the_other(files: Path, capsys: pytest.CaptureFixture[str], first: str) -> None:
    second = {"vgg16.pth": "vgg.pth", "vgg.pth": "vgg16.pth"}[first]
    lacking = {"vgg16.pth": "the five heads (vgg.pth", "vgg.pth": "the weights of VGG16 (torchvision's"}[first]
    run("import", files / first, "--to", files)
    assert lacking in capsys.readouterr().out
    lacks = load_config(str(files / "lpips"))["lacks"]
    assert lacks.startswith(f"this is one half of LPIPS, and {lacking}")
    run("inspect", files / "lpips")
    assert lacking in capsys.readouterr().out
    assert "lpips already" in error(capsys, "import", files / first, "--to", files)
    run("import", files / second, "--to", files)
    check(files / "lpips")
    assert load_config(str(files / "lpips"))["origin"]["sources"] == [first, second]
    assert "lpips already" in error(capsys, "import", files / second, "--to", files)


def test_halves_that_do_not_fit(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    twice = (files / "vgg16.pth", files / "vgg16.pth")
    assert "are both a perceptual distance" in error(capsys, "import", *twice, "--to", files)
    wider = {name: np.repeat(value, 2, axis=1) for name, value in HEADS.items()}
    torch.save(tensors(wider), files / "wider.pth")
    run("import", files / "vgg16.pth", "--to", files)
    message = error(capsys, "import", files / "wider.pth", "--to", files)
    assert f"its widths are {[2 * w for w in WIDTHS]} and those of the other half" in message
    assert "lpips/" not in str(list((files / "lpips").glob(".*")))
    assert "of another shape" in error(capsys, "import", files / "vgg16.pth", files / "wider.pth", "--to", files / "x")
    batch_norm = {f"features.{n}.weight": np.ones(4, np.float32) for n in (1, 28)}
    torch.save(tensors(VGG16 | batch_norm), files / "bn.pth")
    assert "bn.pth: " in error(capsys, "import", files / "bn.pth", "--to", files / "x")
    assert not (files / "x").exists()


def test_names_of_lpips_as_a_whole(tmp_path: Path) -> None:
    state = lpips(slices=True)
    torch.save(tensors(state), tmp_path / "in.pth")
    run("import", tmp_path / "in.pth", "--to", tmp_path)
    assert load(tmp_path / "lpips", NETWORK).keys() == NETWORK.shapes.keys()
    run("export", tmp_path / "lpips", "--to", tmp_path / "out.pth")
    assert_same(tmp_path / "out.pth", state)


def test_the_real_heads(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the old format, saved on a GPU."""
    file = data / "lpips_vgg_heads_v0.1.pth"
    run("import", file, "--to", tmp_path)
    assert load_config(str(tmp_path / "lpips"))["lpips"]["channels"] == [64, 128, 256, 512, 512]
    saved = open_params(str(tmp_path / "lpips"))["frozen"]
    assert all((value >= 0).all() for value in saved.values())
    run("export", tmp_path / "lpips", "--to", tmp_path / "out.pth")
    assert_same(tmp_path / "out.pth", {k: v.numpy() for k, v in torch.load(file, map_location="cpu").items()})
    run("inspect", file)
    assert "perceptual distance (LPIPS, VGG16)" in capsys.readouterr().out


def test_the_published_vgg16_is_told_by_its_weights() -> None:
    whole = restored({"lpips": {}})
    structs: dict[str, Any] = release_shapes(whole.shapes, whole.table)
    assert structs["features.28.weight"].shape == (512, 512, 3, 3)
    net = {name: struct for name, struct in structs.items() if name.startswith("features")}
    net["classifier.0.weight"] = jax.ShapeDtypeStruct((4096, 25088), jnp.float32)
    assert kind_of(net) == "lpips"
    found = recognise({}, net)
    assert found.size == "vgg16"
    assert found.notes[0].startswith("this is one half of LPIPS")
    assert not any(found.differences(net).values())


class TestInception:
    shapes = Network(lambda rngs: Inception(rngs=rngs)).shapes

    def state(self) -> dict[str, np.ndarray]:
        """Real names and sizes, no memory."""
        names = release_shapes(self.shapes, restored({"kind": "inception"}).table)
        state = {name: np.broadcast_to(np.float32(i), s.shape) for i, (name, s) in enumerate(names.items())}
        norms = [name.removesuffix("weight") for name in state if name.endswith(".bn.weight")]
        return state | {f"{norm}num_batches_tracked": np.array(0) for norm in norms}

    def test_told_by_its_weights(self) -> None:
        state = self.state()
        assert len(state) == 94 * 6 + 2  # units of a convolution and five arrays of its norm, and the classifier
        assert state["Mixed_6b.branch7x7_2.conv.weight"].shape == (128, 128, 1, 7)
        assert state["fc.weight"].shape == (1008, 2048)
        found = recognise(state, state)
        assert (found.kind, found.shapes) == ("inception", self.shapes)
        assert not any(found.differences(state).values())
        params = to_jax(state, found.table, found.shapes)
        assert {name: value.shape for name, value in params.items()} == {n: s.shape for n, s in self.shapes.items()}
        back = to_release(params, found.table)
        assert back.keys() | carried(state, found.table).keys() == state.keys()
        assert all((value == state[name]).all() for name, value in back.items())

    def test_without_counts(self) -> None:
        state = {name: value for name, value in self.state().items() if not name.endswith("tracked")}
        assert not any(recognise(state, state).differences(state).values())

    def test_the_one_of_torchvision_is_another(self) -> None:
        state = self.state() | {"AuxLogits.fc.weight": np.ones((1000, 768), np.float32)}
        with pytest.raises(ValueError, match=r"Inception v3 of torchvision, .* download pt_inception-2015-12-05"):
            recognise(state, state)


def test_an_inception_workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line, on a network of which only the first and the last unit are left."""
    kept = ("Conv2d_1a_3x3.", "Mixed_7c.branch_pool.")
    few = {name: shape for name, shape in TestInception.shapes.items() if name.startswith(kept)}
    monkeypatch.setattr("svg_jax.convert.kinds.inception_shapes", lambda: few)
    state = {name: np.array(value) for name, value in TestInception().state().items() if name.startswith(kept)}
    torch.save(tensors(state), tmp_path / "in.pth")
    run("import", tmp_path / "in.pth", "--to", tmp_path)
    assert set(open_params(str(tmp_path / "inception"))["frozen"]) == few.keys()
    run("export", tmp_path / "inception", "--to", tmp_path / "out.pth")
    assert_same(tmp_path / "out.pth", state)
