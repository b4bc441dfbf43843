"""Real photographs that ship inside scikit-image and scikit-learn, as files with captions written by us.

For trying a pipeline on real input without a download: pictures of many sizes and aspect ratios in the modes that a
crawl of the web brings along (RGB, grey, palette, RGBA, grey with alpha; PNG and JPEG). Needs the ``demo`` extra.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image


class Photograph(NamedTuple):
    """One picture of a package: where it is found, how we store it and what it shows."""

    name: str
    mode: str  # the Pillow mode of the files
    extension: str
    caption: str


# Names are functions of `skimage.data` whose files are part of the wheel, or images of `sklearn.datasets`.
PHOTOGRAPHS = (
    Photograph("astronaut", "RGB", "jpg", "a smiling astronaut in an orange suit in front of a flag"),
    Photograph("brick", "L", "png", "a wall of bricks"),
    Photograph("camera", "L", "png", "a man in a dark coat looking through a camera on a tripod"),
    Photograph("cell", "L", "png", "a round cell under a microscope"),
    Photograph("chelsea", "RGB", "jpg", "the face of a ginger cat with green eyes"),
    Photograph("china", "RGB", "jpg", "a temple with a curved roof under a blue sky"),
    Photograph("clock", "L", "jpg", "a wall clock, blurred by motion"),
    Photograph("coffee", "RGB", "png", "a cup of coffee with a spoon on a wooden table"),
    Photograph("coins", "L", "png", "rows of old coins on a dark ground"),
    Photograph("colorwheel", "P", "png", "a wheel of all colours"),
    Photograph("flower", "RGB", "jpg", "an orange dahlia flower on a dark ground"),
    Photograph("grass", "L", "png", "blades of grass seen from above"),
    Photograph("gravel", "L", "jpg", "a ground of gravel"),
    Photograph("horse", "LA", "png", "the black silhouette of a horse"),
    Photograph("hubble_deep_field", "RGB", "jpg", "many distant galaxies in a black sky"),
    Photograph("immunohistochemistry", "P", "png", "stained tissue in brown and blue under a microscope"),
    Photograph("logo", "RGBA", "png", "a round logo with a snake"),
    Photograph("microaneurysms", "L", "png", "small dark spots on a grey retina"),
    Photograph("moon", "L", "png", "craters on the surface of the moon"),
    Photograph("page", "L", "png", "a page of a printed book"),
    Photograph("retina", "RGB", "jpg", "the retina of an eye with its blood vessels"),
    Photograph("rocket", "P", "png", "a rocket on a launch pad between two towers"),
    Photograph("stereo_motorcycle", "RGB", "jpg", "a motorcycle in a garage"),
    Photograph("text", "L", "png", "a few lines of printed text"),
)

# Name of a view -> the share of the height and of the width that its centre crop keeps, and its words in the caption.
VIEWS = {
    "whole": (1.0, 1.0, "{}"),
    "wide": (0.5, 1.0, "a wide view of {}"),
    "tall": (1.0, 0.55, "a tall view of {}"),
}


def load_photograph(name: str) -> Image.Image:
    """The picture ``name`` of scikit-image or scikit-learn, as it ships."""
    import skimage.data
    import sklearn.datasets

    if name in ("china", "flower"):
        return Image.fromarray(sklearn.datasets.load_sample_image(f"{name}.jpg"))
    pixels = getattr(skimage.data, name)()
    if isinstance(pixels, tuple):  # the left view of a stereo pair
        pixels = pixels[0]
    if pixels.dtype == bool:
        pixels = pixels.astype(np.uint8) * np.uint8(255)
    return Image.fromarray(pixels)


def write_photographs(folder: str | Path) -> Path:
    """Writes every view of every photograph and one JSONL file of ``{"path", "prompt"}``; returns the latter's path.

    Paths are relative to the JSONL file.
    """
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for photograph in PHOTOGRAPHS:
        picture = _to_mode(load_photograph(photograph.name), photograph.mode)
        for view, (height_kept, width_kept, words) in VIEWS.items():
            name = f"images/{photograph.name}_{view}.{photograph.extension}"
            _centre_crop(picture, height_kept, width_kept).save(folder / name)
            record: dict[str, Any] = {"path": name, "prompt": words.format(photograph.caption)}
            lines.append(json.dumps(record))
    records = folder / "records.jsonl"
    records.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return records


def _to_mode(picture: Image.Image, mode: str) -> Image.Image:
    if mode == "P":
        return picture.convert("RGB").quantize(64)
    if mode == "LA":  # the dark parts opaque, the light ones transparent
        grey = picture.convert("L")
        return Image.merge("LA", (grey, grey.point(lambda value: 255 - value)))
    return picture.convert(mode)


def _centre_crop(picture: Image.Image, height_kept: float, width_kept: float) -> Image.Image:
    height, width = round(picture.height * height_kept), round(picture.width * width_kept)
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))
