from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipelines.records import BadRecord, Cause, Record
from svg_jax.evaluate.images import centre_square, read, read_ahead


def record(path: Path | str, image: bytes | None = None) -> Record:
    return Record(0, str(path), str(path), image=image)


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 256, (height, width, channels), np.uint8)


@pytest.mark.parametrize(("height", "width", "side"), [(75, 101, 32), (64, 33, 48), (20, 31, 32), (32, 32, 32)])
def test_centre_square_is_what_pytorch_makes_of_a_tensor(height: int, width: int, side: int) -> None:
    """torchvision's Resize(side), CenterCrop(side) and Normalize(0.5, 0.5) of a tensor are these calls of PyTorch."""
    pixels = noise(height, width)
    x = torch.from_numpy(pixels).permute(2, 0, 1).float().div(255)[None]
    short, long = sorted((height, width))
    size = (side, int(side * long / short)) if height <= width else (int(side * long / short), side)
    x = torch.nn.functional.interpolate(x, size, mode="bilinear", antialias=True)[0]
    top, left = (round((s - side) / 2) for s in size)
    expected = (x[:, top : top + side, left : left + side].permute(1, 2, 0) - 0.5) / 0.5
    found = centre_square(Image.fromarray(pixels), side)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected.numpy(), atol=5e-5)


def test_modes_and_orientation_are_read_as_by_image_folder(tmp_path: Path) -> None:
    """Transparency is dropped, grey becomes three equal channels, the orientation in EXIF is not followed."""
    pixels = noise(16, 24, 4)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    np.testing.assert_array_equal(
        read(record(tmp_path / "a.png"), 16), centre_square(Image.fromarray(pixels[..., :3].copy()), 16)
    )
    exif = Image.Exif()
    exif[274] = 6
    grey = Image.fromarray(noise(16, 24)[..., 0].copy())
    data = io.BytesIO()
    grey.save(data, format="PNG", exif=exif)
    found = read(record("inside", data.getvalue()), 16)
    np.testing.assert_array_equal(found, centre_square(grey.convert("RGB"), 16))
    assert (found == found[..., :1]).all()


def test_unreadable_images(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG")
    with pytest.raises(BadRecord, match=r"image .*a\.png is none: it begins"):
        read(record(tmp_path / "a.png"), 16)
    with pytest.raises(BadRecord, match=r"b\.png does not exist"):
        read(record(tmp_path / "b.png"), 16)


def test_groups_are_read_in_order_and_no_more_than_one_ahead() -> None:
    begun = []

    def load(index: int) -> int:
        begun.append(index)
        if index == 2:
            raise BadRecord(Cause.DAMAGED, "two")
        return 10 * index

    groups = read_ahead(load, [[0, 1], [2], [], [3, 4], [5]], num_threads=2)
    assert next(groups) == [0, 10]
    assert not {3, 4, 5} & set(begun)
    (bad,) = next(groups)
    assert isinstance(bad, BadRecord)
    assert list(groups) == [[], [30, 40], [50]]
    assert list(read_ahead(load, [], num_threads=1)) == []
