"""GenEval's detector: what stands before and after the network, and the whole at a tiny size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file
from transformers import Mask2FormerForUniversalSegmentation

from svg_jax.evaluate.geneval import detector
from svg_jax.evaluate.geneval.detector import MEAN, STD, Detector, Sizes, postprocess, preprocess, resized_size
from svg_jax.evaluate.geneval.rules import CLASSES
from tests.evaluate.tiny_networks import tiny_clip, tiny_detector
from tests.evaluate.vectors import arrays, facts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_detector(tmp_path_factory.mktemp("detector"))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a tiny network's test takes no time on large images."""
    monkeypatch.setattr(detector, "LONG", 533)
    monkeypatch.setattr(detector, "SHORT", 320)


def pictures() -> list[Image.Image]:
    """Of three sizes."""
    rng = np.random.default_rng(0)
    sizes = ((48, 64), (40, 40), (61, 33))
    blocks = [rng.integers(0, 256, (4, 4, 3), np.uint8) for _ in sizes]
    return [Image.fromarray(block).resize(size[::-1]) for block, size in zip(blocks, sizes, strict=True)]


@pytest.mark.golden
def test_postprocessing_is_the_official_detectors() -> None:
    given = arrays("detector_postprocess")
    for case in facts("detector_postprocess")["cases"]:
        k = case["index"]
        sizes = Sizes(*(tuple(case[name]) for name in ("padded", "resized", "original")))
        logits = torch.from_numpy(given[f"class_logits{k}"]), torch.from_numpy(given[f"mask_logits{k}"])
        found = postprocess(*logits, sizes, -1.0)
        boxes, masks = given[f"boxes{k}"], np.unpackbits(given[f"masks{k}"], axis=-1)[..., : sizes.original[1]]
        assert len(found.scores) == case["detections"]
        assert (found.scores > np.float32(0.3)).sum() == case["above_0_3"]
        np.testing.assert_allclose(found.scores, boxes[:, 4], rtol=1e-5, atol=1e-7)
        # Equal scores stand in any order, and scores that agree to rounding too.
        for i in range(len(boxes)):
            alike = np.flatnonzero(np.abs(boxes[:, 4] - found.scores[i]) <= 2e-6)
            assert any(
                found.labels[i] == given[f"labels{k}"][j]
                and (found.boxes[i] == boxes[j, :4]).all()
                and (found.masks[i] == masks[j]).all()
                for j in alike
            ), (k, i)


@pytest.mark.golden
def test_a_lowest_score_only_leaves_out() -> None:
    given = arrays("detector_postprocess")
    for case in facts("detector_postprocess")["cases"]:
        k = case["index"]
        sizes = Sizes(*(tuple(case[name]) for name in ("padded", "resized", "original")))
        logits = torch.from_numpy(given[f"class_logits{k}"]), torch.from_numpy(given[f"mask_logits{k}"])
        everything, some = postprocess(*logits, sizes, -1.0), postprocess(*logits, sizes, 0.3)
        assert len(some.scores) == case["above_0_3"]
        for whole, part in zip(everything, some, strict=True):
            np.testing.assert_array_equal(part, whole[: len(part)])
        assert len(postprocess(*logits, sizes, 1.0).masks) == 0


def test_box_and_score_of_a_mask_made_by_hand() -> None:
    sizes = Sizes((8, 8), (8, 8), (8, 8))
    classes = torch.full((1, 81), -50.0)
    classes[0, 16] = 50.0
    masks = torch.full((1, 8, 8), -3.0)
    masks[0, 2:5, 1:7] = 3.0
    found = postprocess(classes, masks, sizes, 0.5)
    assert found.labels.tolist() == [16]
    assert found.boxes.tolist() == [[1, 2, 7, 5]]
    assert found.masks.sum() == 18
    np.testing.assert_allclose(found.scores, 1 / (1 + np.exp(-3)), rtol=1e-6)
    empty = postprocess(classes, masks - 10, sizes, -1.0)
    assert not empty.scores.any()
    assert not empty.boxes.any()


@pytest.mark.parametrize(
    ("size", "expected"),
    [((1024, 1024), (800, 800)), ((480, 640), (800, 1067)), ((500, 1500), (444, 1333)), ((64, 64), (800, 800))],
)
def test_size_of_the_input(size: tuple[int, int], expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detector, "LONG", 1333)
    monkeypatch.setattr(detector, "SHORT", 800)
    assert resized_size(*size) == expected


def test_input_is_resized_without_a_filter_filled_and_normalised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detector, "LONG", 133)
    monkeypatch.setattr(detector, "SHORT", 80)
    rng = np.random.default_rng(1)
    values = rng.integers(0, 256, (200, 100, 3), np.uint8)
    pixels, sizes = preprocess(Image.fromarray(values))
    assert sizes == Sizes((160, 96), (133, 67), (200, 100))

    def axis(size: int, original: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        place = np.clip((np.arange(size) + 0.5) * original / size - 0.5, 0, original - 1)
        low = place.astype(int)
        return low, np.minimum(low + 1, original - 1), place - low

    (top, bottom, v), (left, right, u) = axis(133, 200), axis(67, 100)
    rows = values[top] * (1 - v)[:, None, None] + values[bottom] * v[:, None, None]
    expected = rows[:, left] * (1 - u)[:, None] + rows[:, right] * u[:, None]
    whole = pixels.permute(1, 2, 0).double().numpy() * STD + MEAN
    difference = np.abs(whole[:133, :67] - np.floor(expected + 0.5))
    assert (difference < 1e-3).mean() > 0.999  # but for values halfway between two whole numbers
    np.testing.assert_allclose(whole[133:], 128, atol=1e-4)
    np.testing.assert_allclose(whole[:, 67:], 128, atol=1e-4)


def test_detections_of_a_tiny_network(folder: str) -> None:
    detect = Detector.load(folder, device="cpu")
    images = pictures()
    found = detect(images, min_score=0.3)
    assert sum(len(objects) for image in found for objects in image.values()) > 5
    for image, classes in zip(images, found, strict=True):
        assert set(classes) <= set(CLASSES)
        for objects in classes.values():
            scores = [float(one.score) for one in objects]
            assert scores == sorted(scores, reverse=True)
            assert min(scores) > np.float32(0.3)
            for one in objects:
                assert one.mask.shape == (image.height, image.width)
                rows, cols = np.nonzero(one.mask)
                assert one.box.tolist() == [cols.min(), rows.min(), cols.max() + 1, rows.max() + 1]


def test_detections_do_not_depend_on_the_batch(folder: str) -> None:
    detect = Detector.load(folder, device="cpu")
    images = pictures()
    together = detect([images[0], *images], min_score=0.3)
    assert [list(found) for found in together[:1]] == [list(found) for found in together[1:2]]
    for image, found in zip(images, together[1:], strict=True):
        (alone,) = detect([image], min_score=0.3)
        assert list(alone) == list(found)
        for name, objects in alone.items():
            for one, other in zip(objects, found[name], strict=True):
                assert one.score == other.score
                np.testing.assert_array_equal(one.box, other.box)
                np.testing.assert_array_equal(one.mask, other.mask)
    assert detect([]) == []


def test_detections_do_not_depend_on_the_number_of_threads(folder: str) -> None:
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(Detector.load(folder, device="cpu")(pictures()[:1])[0])
        assert torch.get_num_threads() == threads
    torch.set_num_threads(before)
    scores = [[one.score for some in image.values() for one in some] for image in found]
    assert scores[0] == scores[1]


def test_outputs_that_are_not_finite_are_refused(folder: str, tmp_path: Path) -> None:
    """Of which none passes a threshold: the picture would count as empty."""
    for part in ("class_predictor.weight", "model.pixel_level_module.decoder.mask_projection.weight"):
        network = Mask2FormerForUniversalSegmentation.from_pretrained(folder)
        with torch.no_grad():
            network.get_parameter(part)[0] = 3e38
        network.save_pretrained(tmp_path / part)
        with pytest.raises(ValueError, match=f"the network of .*{part} gives numbers that are not finite"):
            Detector.load(str(tmp_path / part), device="cpu")(pictures()[:1])
        with torch.no_grad():
            network.get_parameter(part)[0] = torch.inf
        network.save_pretrained(tmp_path / "damaged")
        assert f"1 not finite: {part}" in refusal(tmp_path / "damaged")


def refusal(path: Path | str, error: type[Exception] = ValueError) -> str:
    with pytest.raises(error) as told:
        Detector.load(str(path), device="cpu")
    assert "\n" not in str(told.value)
    return str(told.value)


def test_what_is_no_detector_is_refused(folder: str, tmp_path: Path) -> None:
    missing = refusal(tmp_path / "none", FileNotFoundError)
    assert "facebook/mask2former-swin-small-coco-instance" in missing
    assert "mask2former_swin-s-p4-w7-224_8xb2-lsj-50e_coco_20220504_001756-c9d0c4f2.pth" in missing
    assert missing.index("openmmlab") < missing.index("facebook")  # first the one that the official evaluator has
    (tmp_path / "empty").mkdir()
    assert "no folder of transformers" in refusal(tmp_path / "empty")
    assert "of the type clip, and a mask2former is needed" in refusal(tiny_clip(tmp_path / "clip"))
    assert "tells 133 classes apart" in refusal(tiny_detector(tmp_path / "panoptic", num_labels=133))
    torch.save({"state_dict": {"backbone.conv1.weight": torch.zeros(2)}}, tmp_path / "other.pth")
    assert "no Mask2Former of mmdet" in refusal(tmp_path / "other.pth")


def test_weights_that_lack_something_are_refused(folder: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((Path(folder) / "config.json").read_text())
    weights = load_file(Path(folder) / "model.safetensors")
    save_file({k: v for k, v in weights.items() if k != "class_predictor.bias"}, tmp_path / "model.safetensors")
    assert "1 missing: class_predictor.bias" in refusal(tmp_path)
    other = weights | {"class_predictor.bias": np.zeros(7, np.float32)}
    save_file(other, tmp_path / "model.safetensors")
    assert "class_predictor.bias" in refusal(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not weights at all")
    assert "cannot be loaded" in refusal(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "mask2former"


def test_without_torch_the_extra_is_named(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert 'pip install "svg_jax[eval]"' in refusal(folder, ImportError)


def test_torch_is_imported_where_it_is_used_only() -> None:
    code = "import sys; from svg_jax.evaluate.geneval import clip, detector; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_device_that_is_not_there(folder: str) -> None:
    with pytest.raises(ValueError, match="--device warp cannot be used"):
        Detector.load(folder, device="warp")
