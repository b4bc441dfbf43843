"""Decoding, cropping and patches: against the golden vectors, and on files of every mode."""

from __future__ import annotations

import io
import math
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipelines import images
from data_pipelines.photographs import load_photograph
from data_pipelines.records import BadRecord, Cause, Record
from tests.vectors import Case, assert_close


def gradient(width: int, height: int) -> np.ndarray:
    """uint8 [height, width, 3]: red grows to the right, green downwards."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([columns * 255 // max(width - 1, 1), rows * 255 // max(height - 1, 1), 0 * rows], -1).astype(
        np.uint8
    )


@pytest.mark.golden
def test_crop_list_and_choice_are_the_releases() -> None:
    case = Case.load("crops")
    sizes = [tuple(size) for size in case.inputs["image_sizes_wh"].tolist()]
    keys = [key.removeprefix("crop_sizes_wh.") for key in case.outputs if key.startswith("crop_sizes_wh.")]
    assert len(keys) == len(case.config["resolutions"]) * len(case.config["max_ratios"])
    for key in keys:
        resolution, ratio = key.removeprefix("res").split(".ratio")
        crops = images.crop_sizes(int(resolution), case.config["patch_size"], float(ratio.replace("p", ".")))
        assert crops == [tuple(size) for size in case.outputs[f"crop_sizes_wh.{key}"].tolist()]
        chosen = [images.nearest_size(size, crops) for size in sizes]
        assert chosen == [tuple(size) for size in case.outputs[f"chosen_wh.{key}"].tolist()]


@pytest.mark.golden
def test_crops_are_the_releases_to_the_byte() -> None:
    case = Case.load("crops")
    jobs = [(f"crop{i}", tuple(size)) for i, (_, size) in enumerate(case.config["crop_jobs"])]
    jobs += [(f"adm{i}", (side, side)) for i, (_, side) in enumerate(case.config["adm_jobs"])]
    for name, size in jobs:
        cropped = images.crop(Image.fromarray(case.inputs[name]), size)
        np.testing.assert_array_equal(np.asarray(cropped), case.outputs[name], err_msg=name)


@pytest.mark.golden
def test_transparency_is_composited_on_white_as_in_the_release() -> None:
    case = Case.load("crops")
    np.testing.assert_array_equal(images.to_rgb(Image.fromarray(case.inputs["rgba"])), case.outputs["rgba_to_rgb"])


@pytest.mark.golden
def test_normalised_crop_follows_from_the_patches() -> None:
    """The device normalises what `patchify` hands over; through `unpatchify` that is the release's input tensor."""
    case = Case.load("crops")
    expected = case.outputs["crop0_normalised_CHW"]
    patch_size = math.gcd(*expected.shape[1:])
    budget = expected[0].size // patch_size**2 + 5
    patches, grid = images.patchify(case.outputs["crop0"], patch_size, budget)
    pixels = images.unpatchify(patches, grid) / 255.0
    imagenet_mean, imagenet_std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    assert_close(((pixels - imagenet_mean) / imagenet_std).transpose(2, 0, 1), expected, 1e-5)


@pytest.mark.parametrize(
    ("resolution", "patch_size"), [(64, 8), (128, 8), (48, 8), (32, 16), (256, 16), (1024, 16), (224, 14)]
)
@pytest.mark.parametrize("max_ratio", [1.0, 2.0, 4.0])
def test_every_crop_fits_the_token_budget(resolution: int, patch_size: int, max_ratio: float) -> None:
    budget = images.token_budget(resolution, patch_size)
    sizes = images.crop_sizes(resolution, patch_size, max_ratio)
    assert sizes
    assert len(set(sizes)) == len(sizes)
    for width, height in sizes:
        assert width % patch_size == 0
        assert height % patch_size == 0
        assert width * height <= budget * patch_size**2
        assert max(width, height) <= max_ratio * min(width, height)
    if max_ratio == 1.0:
        assert sizes == [(resolution, resolution)]


@pytest.mark.parametrize(("resolution", "most"), [(256, 0.06), (512, 0.04), (1024, 0.02)])
def test_little_of_the_token_budget_is_padding(resolution: int, most: float) -> None:
    sizes = images.crop_sizes(resolution, 16)
    shapes = [(round(1e5 * ratio), 100_000) for ratio in np.exp(np.linspace(-np.log(4), np.log(4), 501))]
    filled = [math.prod(images.nearest_size(shape, sizes)) / resolution**2 for shape in shapes]
    assert 1 - np.mean(filled) < most


def test_small_patches_keep_the_same_grids_as_large_ones() -> None:
    small = [(w // 8, h // 8) for w, h in images.crop_sizes(128, 8)]
    large = [(w // 16, h // 16) for w, h in images.crop_sizes(256, 16)]
    assert small == large


@pytest.mark.parametrize(("resolution", "nearest"), [(100, ["96", "112"]), (8, ["16"]), (0, ["16"])])
def test_resolution_must_be_a_multiple_of_the_patch(resolution: int, nearest: list[str]) -> None:
    with pytest.raises(ValueError, match=f"resolution={resolution} is not a multiple of the patch size 16") as error:
        images.crop_sizes(resolution, 16)
    assert all(value in str(error.value) for value in nearest)


def test_absurd_numbers_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match="patch_size=0 is not above zero"):
        images.crop_sizes(256, 0)
    with pytest.raises(ValueError, match="resolution=16000000000 is above 8192"):
        images.crop_sizes(16_000_000_000, 16)


@pytest.mark.parametrize("ratio", [0.5, float("nan")])
def test_ratio_below_one_is_an_error(ratio: float) -> None:
    with pytest.raises(ValueError, match=f"max_ratio={ratio} is not at least 1"):
        images.crop_sizes(256, 16, ratio)


def test_patches_are_row_major_and_channel_fastest() -> None:
    pixels = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    patches, grid = images.patchify(pixels, 2, 8)
    assert patches.shape == (8, 12)
    assert grid.tolist() == [2, 3]
    np.testing.assert_array_equal(patches[4], pixels[2:4, 2:4].reshape(-1))
    assert not patches[6:].any()
    np.testing.assert_array_equal(images.unpatchify(patches, grid), pixels)


def test_patchify_names_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="6 x 5 pixels does not divide into patches of 2"):
        images.patchify(np.zeros((5, 6, 3), np.uint8), 2, 8)
    with pytest.raises(ValueError, match="4 x 4 patches exceed the token budget 15"):
        images.patchify(np.zeros((8, 8, 3), np.uint8), 2, 15)


def with_transparency_on_the_left(mode: str) -> Image.Image:
    """Black, with the left half fully transparent."""
    alpha = Image.fromarray(np.repeat(np.array([[0, 0, 255, 255]], np.uint8), 3, 0))
    image = Image.new("RGBA", (4, 3), (0, 0, 0, 255))
    image.putalpha(alpha)
    return image.convert(mode)


@pytest.mark.parametrize(
    ("mode", "suffix", "mode_in_file"),
    [
        ("RGBA", "png", "RGBA"),
        ("LA", "png", "LA"),
        ("P", "png", "P"),
        ("RGBA", "gif", "P"),
        ("RGBA", "webp", "RGBA"),
    ],
)
def test_transparent_becomes_white(tmp_path: Path, mode: str, suffix: str, mode_in_file: str) -> None:
    path = tmp_path / f"a.{suffix}"
    options = {"lossless": True} if suffix == "webp" else {}
    with_transparency_on_the_left(mode).save(path, **options)
    with Image.open(path) as saved:
        assert saved.mode == mode_in_file
    pixels = np.asarray(images.decode(path))
    assert (pixels[:, :2] == 255).all()
    assert (pixels[:, 2:] == 0).all()


@pytest.mark.parametrize(
    ("mode", "suffix", "tolerance"),
    [
        ("L", "png", 0),
        ("1", "png", 0),
        ("P", "png", 0),
        ("CMYK", "jpg", 6),
        ("CMYK", "tiff", 0),
        ("RGB", "bmp", 0),
        ("YCbCr", "jpg", 6),
    ],
)
def test_modes_become_rgb(tmp_path: Path, mode: str, suffix: str, tolerance: int) -> None:
    expected = np.zeros((16, 32, 3), np.uint8)
    expected[:, 16:] = 255
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(expected).convert(mode).save(path)
    decoded = images.decode(path)
    assert decoded.mode == "RGB"
    assert np.abs(np.asarray(decoded).astype(int) - expected).max() <= tolerance


@pytest.mark.parametrize("suffix", ["png", "tiff", "pgm"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path, suffix: str) -> None:
    values = np.array([[0, 128, 129, 257, 32896, 65535]], np.uint16)
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(values).save(path)
    pixels = np.asarray(images.decode(path))
    assert pixels.shape == (1, 6, 3)
    assert pixels[0, :, 0].tolist() == [0, 0, 1, 1, 128, 255]


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    upright = gradient(24, 16)
    path = tmp_path / "a.png"
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned 90 degrees clockwise
    Image.fromarray(np.rot90(upright)).save(path, exif=exif)
    np.testing.assert_array_equal(np.asarray(images.decode(path)), upright)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_the_first_frame_of_an_animation_is_taken(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(path, save_all=True, append_images=frames[1:], **({"lossless": True} if suffix == "webp" else {}))
    assert (np.asarray(images.decode(path)) == [255, 0, 0]).all()


def truncated(path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(path, "PNG")
    path.write_bytes(path.read_bytes()[:1000])


def float_mode(path: Path) -> None:
    Image.fromarray(np.ones((4, 4), np.float32)).save(path, "TIFF")


def wide_integers(path: Path) -> None:
    Image.fromarray(np.full((4, 4), 70000, np.int32)).save(path, "TIFF")


@pytest.mark.parametrize(
    ("make", "cause", "reason"),
    [
        (lambda path: None, Cause.MISSING, "does not exist"),
        (lambda path: path.mkdir(), Cause.NOT_A_FILE, "is a folder; expected a file"),
        (lambda path: path.write_bytes(b""), Cause.EMPTY, "is empty"),
        (
            lambda path: path.write_text("<html>not found</html>"),
            Cause.NOT_AN_IMAGE,
            "is none: it begins b'<html>.*; expected JPEG, PNG",
        ),
        (truncated, Cause.TRUNCATED, "cannot be read"),
        (float_mode, Cause.MODE, r"mode F \(floats\) has no defined white"),
        (wide_integers, Cause.MODE, "mode I .* holds 70000 to 70000; expected 0 to 65535"),
    ],
    ids=["missing", "folder", "no bytes", "not an image", "truncated", "float mode", "32-bit mode"],
)
def test_a_file_that_cannot_be_used_is_a_bad_record(
    tmp_path: Path, make: Callable[[Path], None], cause: Cause, reason: str
) -> None:
    path = tmp_path / "a.image"
    make(path)
    with pytest.raises(BadRecord, match=f"^image {path} .*{reason}") as error:
        images.decode(path)
    assert error.value.cause is cause
    if cause not in (Cause.TRUNCATED, Cause.MODE):  # those stand behind the header
        with pytest.raises(BadRecord, match=f"^image {path} .*{reason}") as error:
            images.upright_size(path)
        assert error.value.cause is cause


def test_messages_of_a_record_begin_with_where_it_stands() -> None:
    record = Record(3, "a.jpg", "list.jsonl:4", image=b"no image")
    for read in (images.read, images.read_size, lambda record: images.read_for(record, [(64, 64)])):
        with pytest.raises(BadRecord, match=r"^list.jsonl:4: image a.jpg is none") as error:
            read(record)
        assert error.value.cause is Cause.NOT_AN_IMAGE


def test_an_image_beyond_the_limit_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    record = Record(0, "a.png", "list.jsonl:1", image=as_file(Image.new("RGB", (20, 10))))
    monkeypatch.setattr(images, "MAX_PIXELS", 200)
    assert images.read(record).size == (20, 10)
    monkeypatch.setattr(images, "MAX_PIXELS", 199)
    for read in (images.read, images.read_size):
        with pytest.raises(BadRecord, match="cannot be used: it has 20 x 10 pixels, above 199") as error:
            read(record)
        assert error.value.cause is Cause.TOO_LARGE


def as_file(image: Image.Image, image_format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def crops(
    image: bytes, sizes: list[images.Size], words: tuple[int, int] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """With and without short cuts."""
    record = Record(0, "image", "here", image=image)
    whole = images.read(record)
    exact = images.crop(whole, images.nearest_size(whole.size, sizes), words)
    return np.asarray(images.read_for(record, sizes, words)).astype(int), np.asarray(exact).astype(int)


def assert_close_enough(fast: np.ndarray, exact: np.ndarray) -> None:
    """The tolerance that `read_for` states."""
    assert fast.shape == exact.shape
    difference = np.abs(fast - exact)
    assert difference.mean() < 2
    assert 10 * np.log10(255**2 / max((difference**2).mean(), 1e-9)) > 40


@pytest.mark.parametrize(
    "name",
    ["astronaut", "brick", "chelsea", "china", "coffee", "flower", "grass", "hubble_deep_field", "page", "rocket"],
)
def test_short_cuts_stay_within_the_tolerance_on_photographs(name: str) -> None:
    photograph = load_photograph(name).convert("RGB")
    width, height = photograph.size
    views = [photograph, photograph.crop((0, 0, width // 8 * 8, height // 8 * 8)), photograph.crop((0, 0, 255, 150))]
    files = []
    for view in views:
        files += [as_file(view), *(as_file(view, "JPEG", quality=q, subsampling=s) for q, s in [(95, 0), (75, 2)])]
    num_changed = 0
    for image in files:
        for side in (32, 64, 128):
            fast, exact = crops(image, images.crop_sizes(side, 8))
            assert_close_enough(fast, exact)
            num_changed += bool((fast != exact).any())
    assert num_changed > len(files)  # short cuts were taken


@pytest.mark.parametrize(
    ("size", "target", "drafted"),
    [
        ((512, 512), (256, 256), (256, 256)),
        ((2048, 1536), (256, 192), (256, 192)),
        ((2048, 1536), (64, 48), (256, 192)),  # an eighth is the least; the rest is halved
        ((1536, 512), (256, 192), (768, 256)),  # the short side decides, as for the release
        ((2044, 1536), (64, 48), (511, 384)),
        ((2047, 1536), (64, 48), (2047, 1536)),  # an odd side cannot be halved without moving pixels
        ((511, 510), (256, 256), (511, 510)),
    ],
)
def test_a_jpeg_is_decoded_smaller_where_the_crop_halves_it(
    monkeypatch: pytest.MonkeyPatch, size: images.Size, target: images.Size, drafted: images.Size
) -> None:
    decoded = []
    to_rgb = images.to_rgb
    monkeypatch.setattr(images, "to_rgb", lambda image: decoded.append(image.size) or to_rgb(image))
    record = Record(0, "a.jpg", "here", image=as_file(Image.fromarray(gradient(*size)), "JPEG"))
    assert images.read_for(record, [target]).size == target
    images.read(record)
    assert decoded == [drafted, size]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_jpeg_is_cropped_upright_and_from_the_same_place(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    view = load_photograph("astronaut").crop((0, 0, 512, 256))
    for words in (None, (1, 40)):
        assert_close_enough(*crops(as_file(view, "JPEG", quality=95, exif=exif), [(128, 64), (64, 96)], words))


@pytest.mark.parametrize(("image_format", "mode"), [("JPEG", "L"), ("JPEG", "CMYK"), ("MPO", "RGB"), ("WEBP", "RGB")])
def test_short_cuts_in_other_modes(image_format: str, mode: str) -> None:
    view = load_photograph("astronaut").convert(mode)
    assert_close_enough(*crops(as_file(view, image_format, quality=95), [(128, 128)]))


def test_without_halving_the_short_cuts_change_nothing() -> None:
    view = as_file(load_photograph("coffee"), "JPEG")  # 600 x 400
    for size in ((384, 256), (600, 400), (800, 512), (320, 208)):
        np.testing.assert_array_equal(*crops(view, [size]))


@pytest.mark.parametrize("size", [(1, 60000), (60000, 1), (60000, 2)])
def test_a_line_is_cropped_without_making_it_huge(size: images.Size) -> None:
    """Covering 256 x 256 pixels with it takes 4 to 12 GB."""
    line = Image.new("RGB", size, (10, 20, 30))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert images.crop(line, (256, 256)).getcolors() == [(256 * 256, (10, 20, 30))]
    assert images.crop(line, (256, 256), (2**31, 2**31 - 1)).size == (256, 256)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20 / 4  # KiB


@pytest.mark.parametrize("words", [None, (0, 0), (12345, 678910)])
def test_the_window_of_a_long_image_is_what_resizing_the_whole_gives(
    monkeypatch: pytest.MonkeyPatch, words: tuple[int, int] | None
) -> None:
    image = load_photograph("astronaut").resize((700, 20))
    window = np.asarray(images.crop(image, (32, 32), words)).astype(int)
    monkeypatch.setattr(images, "_MOST_TO_RESIZE", 1000)
    whole = np.asarray(images.crop(image, (32, 32), words))
    assert np.abs(window - whole).max() <= 1


def test_a_truncated_jpeg_is_a_bad_record(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    Image.fromarray(gradient(200, 200)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    for sizes in ([(200, 200)], [(64, 64)]):
        with pytest.raises(BadRecord, match="truncated") as error:
            images.read_for(Record(0, str(path), "here"), sizes)
        assert error.value.cause is Cause.TRUNCATED
