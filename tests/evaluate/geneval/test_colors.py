from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from PIL import Image

from svg_jax.evaluate.geneval.colors import ColorClassifier, cut_out, texts
from svg_jax.evaluate.geneval.rules import Detection, Options, judge, judged, kept
from svg_jax.evaluate.prompt_sets import COLORS
from tests.evaluate.vectors import arrays, facts


def options_of(case: dict[str, Any]) -> Options:
    """Under our names."""
    given = dict(case["options"])
    crop = given.pop("crop", "1") == "1"
    background = given.pop("bgcolor", Options.background)
    return Options(**given, crop=crop, background=background)


@pytest.mark.golden
def test_colours_from_pixels() -> None:
    given, data = facts("geneval_color"), arrays("geneval_color")
    embeddings = {text: np.array(vector, np.float32) for text, vector in given["text_embeddings"].items()}
    height, width = given["image_hw"]
    masks = np.unpackbits(data["masks"], axis=-1, count=width).astype(bool)
    assert masks.shape[1:] == (height, width)

    def embed_images(images: Sequence[Image.Image]) -> np.ndarray:
        means = [np.asarray(image, np.float64).reshape(-1, 3).mean(axis=0) / 255 - 0.5 for image in images]
        return (np.array(means) @ data["projection"]).astype(np.float32)

    classifier = ColorClassifier(lambda asked: np.stack([embeddings[text] for text in asked]), embed_images)
    assert given["cases"]
    for number, case in enumerate(given["cases"]):
        options, metadata, expected = options_of(case), case["metadata"], case["expected"]
        image = Image.fromarray(data["images"][case["image"]])
        indices = case["mask_index"] or [None] * len(case["detections"])
        name = case["class_name"]
        detections = [
            Detection(np.array(one["box"], np.float32), one["score"], mask=None if index is None else masks[index])
            for one, index in zip(case["detections"], indices, strict=True)
        ]
        objects = kept({name: detections}, metadata["tag"], options)
        best = objects.get(name, [])[: judged(objects, metadata, color=True).get(name, 0)]
        assert [detections.index(one) for one in best] == expected["judged_order"], number

        crops = [cut_out(image, one, options) for one in best]
        for crop, wanted in zip(crops, expected["crops"], strict=True):
            assert list(crop.size) == wanted["size"], number
            assert zlib.crc32(crop.tobytes()) == wanted["crc32"], number
            np.testing.assert_allclose(np.asarray(crop).reshape(-1, 3).mean(axis=0), wanted["mean"], rtol=1e-6)
        logits = classifier(crops, name)
        np.testing.assert_allclose(logits, expected["logits"], rtol=1e-4, atol=1e-4)
        colors = [COLORS[i] for i in logits.argmax(axis=1)]
        assert colors == expected["colors"], number
        coloured = [Detection(one.box, one.score, color) for one, color in zip(best, colors, strict=True)]
        verdict = judge({name: coloured + objects[name][len(best) :]}, metadata, options)
        assert verdict == (expected["correct"], expected["reason"]), number


def test_texts_come_colour_by_colour() -> None:
    asked = texts("tv remote")
    assert asked[:3] == ["a photo of a red tv remote", "a photo of a red-colored tv remote", "a photo of a red object"]
    assert len(asked) == 30
    assert asked[-1] == "a photo of a white object"


def test_texts_are_embedded_once_a_class() -> None:
    asked: list[str] = []

    def embed_texts(some: Sequence[str]) -> np.ndarray:
        asked.extend(some)
        return np.random.default_rng(0).standard_normal((len(some), 8)).astype(np.float32)

    classifier = ColorClassifier(embed_texts, lambda images: np.ones((len(images), 8), np.float32))
    crops = [Image.new("RGB", (4, 4))] * 2
    logits = classifier(crops, "cat")
    assert logits.shape == (2, 10)
    assert logits.dtype == np.float32
    assert np.abs(logits).max() <= 100
    classifier(crops, "cat")
    assert len(asked) == 30
    classifier(crops, "dog")
    assert len(asked) == 60


def test_an_object_is_pasted_on_grey_and_beyond_the_picture_is_black() -> None:
    image = Image.new("RGB", (8, 8), (200, 0, 0))
    mask = np.zeros((8, 8), bool)
    mask[:, :2] = True
    cut = np.asarray(cut_out(image, Detection(np.array([-2, 0, 4, 8], np.float32), 0.9, mask=mask), Options()))
    assert cut.shape == (8, 6, 3)
    assert [cut[0, x].tolist() for x in (0, 2, 4)] == [[0, 0, 0], [200, 0, 0], [0x99, 0x99, 0x99]]
