from __future__ import annotations

import io
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from benchmarks.inception import NETWORK, random_weights
from data_pipelines.records import BadRecord, Record
from svg_jax.checkpoint import save_params
from svg_jax.evaluate import networks
from svg_jax.evaluate.fid.features import extract, extractor_of, load_extractor, prepared, to_inception
from svg_jax.evaluate.fid.picture_sources import GeneratedPictures, ImageArray, stamp
from svg_jax.loading import Loaded
from svg_jax.models.inception import resized
from svg_jax.parallel import make_mesh, replicated
from tests.evaluate.fid.small_inception import SmallInception, write_inception
from tests.vectors import assert_close


@pytest.mark.parametrize("size", [(299, 299), (1, 1), (2, 700), (256, 256), (64, 41), (1000, 333)])
def test_the_host_resizes_as_the_network_does(size: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8)
    found = to_inception(image)
    assert found.dtype == np.float32
    assert_close(found, resized(jnp.asarray(image)[None])[0], 1e-5, str(size))


def record(image: Image.Image) -> Record:
    data = io.BytesIO()
    image.save(data, format="PNG")
    return Record(0, "a.png", "a.png", image=data.getvalue())


def test_images_are_taken_whole_or_as_centre_squares() -> None:
    left, right = Image.new("RGB", (60, 40), "red"), Image.new("RGB", (30, 40), "blue")
    left.paste(right, (30, 0))
    whole = prepared(record(left))
    assert whole.shape == (299, 299, 3)
    np.testing.assert_allclose(whole[0, 0], [1, -1, -1])
    np.testing.assert_allclose(whole[298, 298], [-1, -1, 1])
    grey = Image.new("L", (60, 40), 255)
    grey.paste(0, (0, 0, 10, 40))  # which a centre square of 40 pixels leaves out
    assert prepared(record(grey)).min() == -1
    np.testing.assert_allclose(prepared(record(grey), 40), 1.0)
    with pytest.raises(BadRecord, match=r"image a\.png is none"):
        prepared(Record(0, "a.png", "a.png", image=b"no picture"))


def test_arrays_of_images_are_mapped(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 7, 9, 3)).astype(np.uint8)
    file = tmp_path / "samples.npz"
    np.savez(file, labels=np.arange(5), arr_0=images)
    source = ImageArray(str(file))
    assert len(source) == 5
    for i in (4, 0, 2):
        np.testing.assert_array_equal(prepared(source[i]), to_inception(images[i]))
    before = source.signature
    np.savez(tmp_path / "copy.npz", arr_0=images)
    assert ImageArray(str(tmp_path / "copy.npz")).signature == before
    np.savez(file, arr_0=images ^ np.eye(7, 9, dtype=np.uint8)[None, :, :, None])
    assert ImageArray(str(file)).signature != before

    np.savez_compressed(file, arr_0=images)
    with pytest.raises(ValueError, match=r"samples\.npz holds no images as arr_0 \(it is compressed: write it with"):
        ImageArray(str(file))
    wrongs = (images.astype(np.float32), images[0], np.zeros((5, 3, 4, 4), np.uint8), np.asfortranarray(images))
    for wrong in (*wrongs, images[:0], images[:, :0]):
        np.savez(file, arr_0=wrong)
        with pytest.raises(ValueError, match=r"arr_0 in .*samples\.npz is .*: expected uint8 \[images, height, width"):
            ImageArray(str(file))
    np.savez(file, arr_0=images)
    whole, refusals = file.read_bytes(), []
    for place in range(0, 200, 3):  # where the headers stand
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0x5A]) + whole[place + 1 :])
        try:
            np.testing.assert_array_equal(prepared(ImageArray(str(file))[4]), to_inception(images[4]))
        except ValueError as error:
            refusals.append(str(error))
    assert len(refusals) > 20
    assert all("samples.npz" in text for text in refusals)
    np.savez(file, images=images)
    with pytest.raises(ValueError, match=r"samples\.npz holds no images as arr_0"):
        ImageArray(str(file))
    with pytest.raises(FileNotFoundError, match=r"there is no file of images .*none\.npz"):
        ImageArray(str(tmp_path / "none.npz"))


def test_features_that_are_not_finite_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "Inception", SmallInception)
    params = write_inception(tmp_path / "good")
    save_params(
        str(tmp_path / "bad"),
        {"frozen": {name: np.full_like(value, np.nan) for name, value in params.items()}},
        {"kind": "inception"},
    )
    mesh = make_mesh({"fsdp": -1})
    image = to_inception(np.zeros((8, 8, 3), np.uint8))
    good, bad = (load_extractor(str(tmp_path / n), mesh, logits=False) for n in ("good", "bad"))
    assert np.isfinite(extract(good, [image])["features"]).all()
    assert extract(bad, [])["features"].shape[0] == 0
    with pytest.raises(ValueError, match=r"the Inception of .*/bad gives numbers that are not finite: convert"):
        extract(bad, [image])


def test_inception_gives_the_same_on_one_device_and_on_two() -> None:
    """Bit for bit: the small network of other tests would round alike anyway."""
    images = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3)).astype(np.uint8)
    weights, found = random_weights(), []
    for count in (1, 2):
        mesh = make_mesh({"fsdp": count}, jax.devices()[:count])
        params = jax.device_put(weights, replicated(mesh))
        extractor = extractor_of(Loaded(NETWORK, params, {}), mesh, logits=True)
        found.append(extract(extractor, [to_inception(image) for image in images]))
    for name in ("features", "logits"):
        np.testing.assert_array_equal(found[0][name], found[1][name], err_msg=name)


def test_pictures_of_a_grid_are_taken_one_by_one(tmp_path: Path) -> None:
    from svg_jax.evaluate.generated import begin
    from svg_jax.evaluate.prompt_sets import PromptEntry, PromptSet

    entries = tuple(PromptEntry(i, name, f"a {name}", {}) for i, name in enumerate(("fox", "hen")))
    sources = {}
    for name in ("dpg", "prompts"):
        generated = begin(str(tmp_path / name), PromptSet(name, "ab", entries), 4, {"width": 16, "height": 16})
        images = np.random.default_rng(0).integers(0, 256, (2, 4, 16, 16, 3)).astype(np.uint8)
        generated.save(entries[0], [Image.fromarray(image) for image in images[0]])
        with pytest.raises(ValueError, match=f"{name} is not complete: images/"):
            GeneratedPictures(str(tmp_path / name))
        generated.save(entries[1], [Image.fromarray(image) for image in images[1]])
        source = sources[name] = GeneratedPictures(str(tmp_path / name))
        assert len(source) == 8
        assert source.signature == generated.manifest
        for i in (7, 0, 2):
            np.testing.assert_array_equal(prepared(source[i]), to_inception(images[i // 4, i % 4]), err_msg=name)
    assert sources["prompts"][5].path.endswith("hen_1.png")
    assert sources["dpg"][5].path.endswith("hen.png[1]")
    before = stamp(sources["dpg"], range(4, 8))
    assert before == stamp(sources["dpg"], range(4, 8)) != stamp(sources["dpg"], range(4))
    (tmp_path / "dpg" / "images" / "hen.png").write_bytes(b"no picture")
    assert stamp(sources["dpg"], range(4, 8)) != before
    with pytest.raises(BadRecord, match=r"hen\.png"):
        sources["dpg"][5]
