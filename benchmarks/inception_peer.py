"""The other side of `benchmarks.inception`: FID's Inception in plain PyTorch modules, with the checkpoint's names."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.inception_shape import Shape

VERSIONS = {"torch": torch.__version__}
Side = int | tuple[int, int]


class Unit(nn.Module):
    """Convolution, batch norm, rectifier."""

    def __init__(self, inputs: int, outputs: int, size: Side = 1, stride: int = 1, padding: Side = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, size, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


def row(inputs: int, outputs: int, size: int) -> Unit:
    """A window of `size` columns."""
    return Unit(inputs, outputs, (1, size), padding=(0, size // 2))


def column(inputs: int, outputs: int, size: int) -> Unit:
    """A window of `size` rows."""
    return Unit(inputs, outputs, (size, 1), padding=(size // 2, 0))


def average(x: Tensor) -> Tensor:
    """Of the 3 x 3 pixels that lie inside."""
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


class BlockA(nn.Module):
    """35 x 35."""

    def __init__(self, inputs: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = Unit(inputs, 64)
        self.branch5x5_1, self.branch5x5_2 = Unit(inputs, 48), Unit(48, 64, 5, padding=2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Unit(inputs, 64), Unit(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Unit(96, 96, 3, padding=1)
        self.branch_pool = Unit(inputs, pooled)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat(
            [self.branch1x1(x), self.branch5x5_2(self.branch5x5_1(x)), double, self.branch_pool(average(x))], 1
        )


class BlockB(nn.Module):
    """35 x 35 to 17 x 17."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3 = Unit(inputs, 384, 3, stride=2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Unit(inputs, 64), Unit(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Unit(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, 2)], 1)


class BlockC(nn.Module):
    """17 x 17."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.branch1x1, self.branch_pool = Unit(inputs, 192), Unit(inputs, 192)
        self.branch7x7_1, self.branch7x7_2 = Unit(inputs, width), row(width, width, 7)
        self.branch7x7_3 = column(width, 192, 7)
        self.branch7x7dbl_1, self.branch7x7dbl_2 = Unit(inputs, width), column(width, width, 7)
        self.branch7x7dbl_3, self.branch7x7dbl_4 = row(width, width, 7), column(width, width, 7)
        self.branch7x7dbl_5 = row(width, 192, 7)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), single, double, self.branch_pool(average(x))], 1)


class BlockD(nn.Module):
    """17 x 17 to 8 x 8."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = Unit(inputs, 192), Unit(192, 320, 3, stride=2)
        self.branch7x7x3_1, self.branch7x7x3_2 = Unit(inputs, 192), row(192, 192, 7)
        self.branch7x7x3_3, self.branch7x7x3_4 = column(192, 192, 7), Unit(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), seven, F.max_pool2d(x, 3, 2)], 1)


class BlockE(nn.Module):
    """8 x 8; the last of the two has a max pool."""

    def __init__(self, inputs: int, pool: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.pool = pool
        self.branch1x1, self.branch_pool = Unit(inputs, 320), Unit(inputs, 192)
        self.branch3x3_1, self.branch3x3_2a = Unit(inputs, 384), row(384, 384, 3)
        self.branch3x3_2b = column(384, 384, 3)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Unit(inputs, 448), Unit(448, 384, 3, padding=1)
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = row(384, 384, 3), column(384, 384, 3)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        wide = [self.branch3x3_2a(single), self.branch3x3_2b(single)]
        wide += [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)]
        return torch.cat([self.branch1x1(x), *wide, self.branch_pool(self.pool(x))], 1)


class Inception(nn.Module):
    """8-bit images [B, 3, H, W] -> features [B, 2048]."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3, self.Conv2d_2a_3x3 = Unit(3, 32, 3, stride=2), Unit(32, 32, 3)
        self.Conv2d_2b_3x3, self.Conv2d_3b_1x1 = Unit(32, 64, 3, padding=1), Unit(64, 80)
        self.Conv2d_4a_3x3 = Unit(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = BlockA(192, 32), BlockA(256, 64), BlockA(288, 64)
        self.Mixed_6a, self.Mixed_6b = BlockB(288), BlockC(768, 128)
        self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = BlockC(768, 160), BlockC(768, 160), BlockC(768, 192)
        self.Mixed_7a, self.Mixed_7b = BlockD(768), BlockE(1280, average)
        self.Mixed_7c = BlockE(2048, lambda x: F.max_pool2d(x, 3, 1, 1))
        self.fc = nn.Linear(2048, 1008)

    def forward(self, images: Tensor) -> Tensor:
        x = F.interpolate(images.float() / 255, size=(299, 299), mode="bilinear", align_corners=False) * 2 - 1
        x = F.max_pool2d(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))), 3, 2)
        x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, 2)
        x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x))))
        return self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))).mean((2, 3))


def load(weights: Mapping[str, np.ndarray]) -> Inception:
    """With these weights, under the checkpoint's names."""
    model = Inception().eval()
    found = model.load_state_dict({k: torch.tensor(np.array(v)) for k, v in weights.items()}, strict=False)
    assert all("num_batches" in name for name in (*found.missing_keys, *found.unexpected_keys)), found
    return model


def features(shape: Shape, weights: Mapping[str, np.ndarray] | None = None) -> tuple[Callable[[], np.ndarray], int]:
    """A function that makes the features of one batch, and the number of parameters.

    Args:
        shape: Of the batch.
        weights: Under the checkpoint's names; random ones by default.
    """
    torch.manual_seed(0)
    torch.set_num_threads(os.cpu_count() or 1)
    model = Inception().eval() if weights is None else load(weights)
    # Channels last are the faster layout on a CPU.
    for parameter in model.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    images = torch.tensor(shape.images).permute(0, 3, 1, 2)

    @torch.inference_mode()
    def run() -> np.ndarray:
        return model(images).numpy()

    return run, sum(p.numel() for p in model.parameters())
