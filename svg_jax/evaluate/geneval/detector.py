"""GenEval's detector: Mask2Former with Swin-S, COCO instances, through `transformers`, before and after it as mmdet.

The library's own image processor and post-processing give other numbers: it resizes with an antialiasing filter, does
not pad, and judges masks at 384 x 384.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from PIL import Image

from svg_jax.convert import detectors
from svg_jax.convert.formats import open_file
from svg_jax.convert.pretrained import load_pretrained
from svg_jax.evaluate.geneval.rules import CLASSES
from svg_jax.evaluate.torch_networks import check_finite, computing, import_torch, one_thread, read_config, torch_device

SOURCE = (
    "download the official file, https://download.openmmlab.com/mmdetection/v3.0/mask2former/"
    "mask2former_swin-s-p4-w7-224_8xb2-lsj-50e_coco/"
    "mask2former_swin-s-p4-w7-224_8xb2-lsj-50e_coco_20220504_001756-c9d0c4f2.pth, and name it with --detector; or `hf "
    "download facebook/mask2former-swin-small-coco-instance --local-dir detector`, which has the same architecture and "
    "other weights, and name that folder"
)
"""How to get it."""

# mmdet's configuration: the longer side at most LONG and the shorter at most SHORT; then sides are filled with FILL to
# multiples of DIVISOR, and all is normalised.
LONG, SHORT, DIVISOR, FILL = 1333, 800, 32, 128.0
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
MOST = 100  # detections of an image


class Sizes(NamedTuple):
    """Of an image on its way, as (height, width)."""

    padded: tuple[int, int]  # the network's input
    resized: tuple[int, int]  # the image inside it
    original: tuple[int, int]


class Instances(NamedTuple):
    """Detections of an image, by falling score."""

    labels: Int[np.ndarray, " n"]
    scores: Float[np.ndarray, " n"]
    boxes: Float[np.ndarray, "n 4"]
    masks: Bool[np.ndarray, "n height width"]


class Found(NamedTuple):
    """One detection."""

    box: Float[np.ndarray, " 4"]  # [x1, y1, x2, y2] in pixels of the image, float32; x2 and y2 are one past the mask
    score: np.float32
    mask: Bool[np.ndarray, "height width"]  # of the image


class Detector:
    """The network with what stands before and after it; its classes are `rules.CLASSES`, by their number."""

    def __init__(self, network: Any, device: Any, name: str) -> None:
        self._network, self._device, self._name = network.to(device), device, name

    @classmethod
    def load(cls, path: str, *, device: str | None = None) -> Detector:
        """From a folder of transformers, or from mmdet's own file.

        Args:
            path: Either; local.
            device: Of PyTorch; by default the first GPU where there is one.

        Raises:
            FileNotFoundError: Nothing is there; the message says how to get it.
            ValueError: It is another network, or damaged.
            ImportError: PyTorch is not installed.
        """
        import_torch()
        where = torch_device(device)
        if Path(path).is_file():
            weights = open_file(Path(path)).weights
            if not detectors.told_by(weights):
                raise ValueError(f"{path} holds no Mask2Former of mmdet: {SOURCE}")
            network = detectors.load_mmdet(weights, path)
        else:
            read_config(path, "mask2former", SOURCE)
            network = load_pretrained("Mask2FormerForUniversalSegmentation", path, pretrained_model_name_or_path=path)
        if (found := network.config.num_labels) != len(CLASSES):
            raise ValueError(
                f"the detector {path} tells {found} classes apart, and GenEval asks for the {len(CLASSES)} of COCO's "
                f"instances: {SOURCE}"
            )
        return cls(network, where, path)

    def __call__(self, images: Sequence[Image.Image], min_score: float = 0.0) -> list[dict[str, list[Found]]]:
        """Detections of each image by class, best first; classes without any are left out.

        On a CPU images go through one by one, as officially, in one thread, so that nothing depends on what they are
        given with; several processes use several cores. On others those of one size go together, and agree with that
        to rounding.

        Args:
            images: Of any sizes.
            min_score: Only scores strictly above it, compared in float32; the others cost no masks. Of the 100 of an
                image, 0 leaves out those with an empty mask.

        Raises:
            ValueError: What the network says is not finite.
        """
        with computing(self._device), one_thread(self._device):
            inputs = [preprocess(image) for image in images]
            groups: dict[Any, list[int]] = {}
            for i, (_, sizes) in enumerate(inputs):
                groups.setdefault(i if self._device.type == "cpu" else sizes.padded, []).append(i)
            found: list[dict[str, list[Found]]] = [{} for _ in images]
            for indices in groups.values():
                pixels = import_torch().stack([inputs[i][0] for i in indices])
                output = self._network(pixel_values=pixels.to(self._device))
                outputs = (output.class_queries_logits.float(), output.masks_queries_logits.float())
                for values in outputs:
                    check_finite(values, self._name)
                for i, classes, masks in zip(indices, *outputs, strict=True):
                    found[i] = by_class(postprocess(classes, masks, inputs[i][1], min_score))
        return found


def by_class(instances: Instances) -> dict[str, list[Found]]:
    """Detections under the names of their classes, in their order."""
    found: dict[str, list[Found]] = {}
    for label, score, box, mask in zip(*instances, strict=True):
        found.setdefault(CLASSES[label], []).append(Found(box, score, mask))
    return found


def resized_size(height: int, width: int) -> tuple[int, int]:
    """As large as LONG and SHORT allow, in its own proportions; rounded half up."""
    scale = min(LONG / max(height, width), SHORT / min(height, width))
    return int(height * scale + 0.5), int(width * scale + 0.5)


def preprocess(image: Image.Image) -> tuple[Float[Any, "3 height width"], Sizes]:
    """The network's input, a tensor of PyTorch, and its sizes.

    Resized between the centres of pixels without a filter, to whole numbers, as OpenCV resizes 8-bit images.
    """
    torch = import_torch()
    pixels = torch.from_numpy(np.array(image.convert("RGB"), np.float32)).permute(2, 0, 1)
    original = (image.height, image.width)
    height, width = resized_size(*original)
    values = torch.nn.functional.interpolate(pixels[None], (height, width), mode="bilinear")[0]
    padded = tuple(-(-side // DIVISOR) * DIVISOR for side in (height, width))
    filled = torch.full((3, *padded), FILL)
    filled[:, :height, :width] = (values + 0.5).floor()
    mean, std = (torch.tensor(value)[:, None, None] for value in (MEAN, STD))
    return (filled - mean) / std, Sizes((padded[0], padded[1]), (height, width), original)


def postprocess(
    class_logits: Float[Any, "queries classes_and_none"],
    mask_logits: Float[Any, "queries rows cols"],
    sizes: Sizes,
    min_score: float,
) -> Instances:
    """From the network's output for one image to detections, as mmdet does it for instances.

    The 100 best of all queries and classes; score = class probability x mean sigmoid where the mask's logit is above 0.
    That mean is at most 1, so a mask whose class probability does not pass `min_score` need not be made.

    Args:
        class_logits: The last class is none; a float32 tensor of PyTorch, as the next.
        mask_logits: At a quarter of the padded size.
        sizes: Of the image.
        min_score: Scores strictly above it are kept; all with -1.
    """
    torch = import_torch()
    probabilities = class_logits.softmax(-1)[:, :-1]
    num_classes = probabilities.shape[1]
    best, places = probabilities.flatten().topk(min(MOST, probabilities.numel()))
    best, places = best[best > min_score], places[best > min_score]
    queries = torch.div(places, num_classes, rounding_mode="floor").tolist()
    masks = {query: _mask(mask_logits[query], sizes) for query in dict.fromkeys(queries)}
    scores = best.cpu() * torch.tensor([masks[query][1] for query in queries])
    order = [i for i in torch.argsort(scores, descending=True, stable=True).tolist() if scores[i] > min_score]
    kept = [masks[queries[i]][0] for i in order]
    return Instances(
        (places % num_classes).cpu().numpy()[order],
        scores.numpy()[order],
        np.array([_box(mask) for mask in kept], np.float32).reshape(-1, 4),
        np.array(kept, np.bool_).reshape(-1, *sizes.original),
    )


def _mask(logits: Float[Any, "rows cols"], sizes: Sizes) -> tuple[Bool[np.ndarray, "height width"], float]:
    """A query's mask at the image's size, and its mean sigmoid; one query at a time, so that memory is flat."""
    torch = import_torch()
    resize = torch.nn.functional.interpolate
    height, width = sizes.resized
    padded = resize(logits[None, None], sizes.padded, mode="bilinear")
    values = resize(padded[:, :, :height, :width], sizes.original, mode="bilinear")[0, 0]
    mask = values > 0
    # Summed in float64, so that the result is the same in whatever order threads add.
    total = torch.where(mask, values.sigmoid(), 0.0).sum(dtype=torch.float64)
    return mask.cpu().numpy(), float(total / (mask.sum() + 1e-6))


def _box(mask: Bool[np.ndarray, "height width"]) -> tuple[int, int, int, int]:
    """The tight box of a mask, its ends one past it; zeros of an empty one."""
    rows, cols = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return (cols[0], rows[0], cols[-1] + 1, rows[-1] + 1) if len(rows) else (0, 0, 0, 0)
