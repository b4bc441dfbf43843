"""The colour of an object as GenEval judges it: CLIP, on the object before a grey ground, among ten colour names."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float
from PIL import Image

from svg_jax.evaluate.geneval.rules import Detection, Options
from svg_jax.evaluate.prompt_sets import COLORS

TEMPLATES = ("a photo of a {color} {thing}", "a photo of a {color}-colored {thing}", "a photo of a {color} object")
SCALE = np.float32(100)  # of cosines, the temperature that CLIP was trained to

EmbedTexts = Callable[[Sequence[str]], Float[np.ndarray, "texts channels"]]
EmbedImages = Callable[[Sequence[Image.Image]], Float[np.ndarray, "images channels"]]


def texts(thing: str) -> list[str]:
    """What CLIP is asked of a class, in the order of `COLORS`; in one colour, that of `TEMPLATES`."""
    return [template.format(color=color, thing=thing) for color in COLORS for template in TEMPLATES]


def cut_out(image: Image.Image, detection: Detection, options: Options) -> Image.Image:
    """The picture that the colour is judged on.

    The object by its mask, if it has one, before `options.background`; of that the box, its coordinates rounded half to
    even. Where the box leaves the picture it is black.

    Args:
        image: RGB.
        detection: Its box and mask are in pixels of `image`.
        options: Of the background and the crop.
    """
    shown = image
    if detection.mask is not None and options.background != "original":
        ground = Image.new("RGB", image.size, options.background)
        shown = Image.composite(image, ground, Image.fromarray(detection.mask))
    if options.crop:
        left, top, right, bottom = (round(float(edge)) for edge in detection.box)
        shown = shown.crop((left, top, right, bottom))
    return shown


class ColorClassifier:
    """CLIP as a classifier of colours; the weights of a class are formed when it is first met."""

    def __init__(self, embed_texts: EmbedTexts, embed_images: EmbedImages) -> None:
        self.embed_texts, self.embed_images = embed_texts, embed_images
        self._weights: dict[str, Float[np.ndarray, "10 channels"]] = {}

    def __call__(self, crops: Sequence[Image.Image], thing: str) -> Float[np.ndarray, "crops 10"]:
        """100 times the cosine between each picture and each of `COLORS`, float32; the largest names the colour."""
        if thing not in self._weights:
            self._weights[thing] = self._classify(thing)
        return SCALE * (_unit(self.embed_images(crops)) @ self._weights[thing].T)

    def _classify(self, thing: str) -> Float[np.ndarray, "10 channels"]:
        """The mean of each colour's texts, each of them of length 1, brought to length 1 again."""
        embedded = _unit(self.embed_texts(texts(thing)))
        return _unit(embedded.reshape(len(COLORS), len(TEMPLATES), -1).mean(axis=1))


def _unit(vectors: Float[np.ndarray, "vectors channels"]) -> Float[np.ndarray, "vectors channels"]:
    vectors = np.asarray(vectors, np.float32)
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.maximum(length, np.float32(1e-12))
