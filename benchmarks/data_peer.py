"""The other side of `benchmarks.data`: the steps of the release in Pillow and PyTorch, in a DataLoader."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, RandomSampler

from benchmarks.data import PATCH_SIZE, PREFETCH, Shape
from data_pipelines import images

__all__ = ["VERSIONS", "Shape", "workers"]

VERSIONS = {"torch": torch.__version__, "Pillow": PIL.__version__}
MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]

torch.set_num_threads(1)  # as a DataLoader's workers have it


def to_tensor(path: str, sizes: Sequence[images.Size]) -> torch.Tensor:
    """A file to a normalised tensor [3, H, W]: torchvision's ToTensor and Normalize, in place as the release has it."""
    with Image.open(path) as image:
        rgb = image if image.mode == "RGB" else image.convert("RGB")
        # Exact to the byte with the release's crop, and the same calls of Pillow.
        cropped = images.crop(rgb, images.nearest_size(rgb.size, sizes))
    tensor = torch.from_numpy(np.array(cropped)).permute(2, 0, 1).contiguous()
    return tensor.to(torch.get_default_dtype()).div(255).sub_(MEAN).div_(STD)


def to_pixels(tensor: torch.Tensor) -> np.ndarray:
    """Back to bytes, as floats [H, W, 3]."""
    return ((tensor * STD + MEAN) * 255).round().permute(1, 2, 0).numpy()


class Photographs(Dataset[tuple[torch.Tensor, str]]):
    """Pictures and captions of a list, which is held in memory."""

    def __init__(self, records: str, resolution: int) -> None:
        lines = Path(records).read_text().splitlines()
        self._records = [json.loads(line) for line in lines]
        self._folder = Path(records).parent
        self._sizes = images.crop_sizes(resolution, PATCH_SIZE)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, str]:
        record = self._records[index]
        return to_tensor(str(self._folder / record["path"]), self._sizes), record["prompt"]


def workers(shape: Shape) -> tuple[Callable[[], Any], int]:
    """A function that takes the next batch, read by processes of the DataLoader."""
    dataset = Photographs(shape.records, shape.resolution)
    loader = DataLoader(
        dataset,
        batch_size=shape.batch,
        sampler=RandomSampler(dataset, num_samples=10**7),
        num_workers=shape.workers,
        prefetch_factor=PREFETCH,
        persistent_workers=True,
        collate_fn=list,  # pictures of different sizes stay apart
    )
    batches = iter(loader)
    return lambda: next(batches), 0
