"""Folders of images and prepared data sets as sources: which records, in which order, and what cannot be opened."""

from __future__ import annotations

import builtins
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipelines import images
from data_pipelines.batches import TextToImageBatches
from data_pipelines.sources import open_source
from data_pipelines.text import ByteTokenizer


def write(path: Path, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (9, 7), (value, 0, 0)).save(path)


@pytest.fixture
def imagenet(tmp_path: Path) -> Path:
    folder = tmp_path / "train"
    for i, name in enumerate(["n02/b.jpeg", "n02/a.png", "n01/deep/er/c.JPG", "top.webp"]):
        write(folder / name, i)
    (folder / "n01" / "notes.txt").write_text("no image")
    write(folder / ".hidden" / "d.png")
    write(folder / "n01" / "._c.png")
    return folder


def test_a_folder_is_read_at_any_depth_in_a_stable_order(imagenet: Path) -> None:
    source = open_source(imagenet)
    relative = [str(Path(source[i].path).relative_to(imagenet)) for i in range(len(source))]
    assert relative == ["n01/deep/er/c.JPG", "n02/a.png", "n02/b.jpeg", "top.webp"]
    assert source[1].caption is None
    assert images.read(source[1]).getpixel((0, 0)) == (1, 0, 0)
    assert pickle.loads(pickle.dumps(source))[2] == source[2]
    with pytest.raises(IndexError):
        source[4]


def test_links_are_followed_once(imagenet: Path, tmp_path: Path) -> None:
    write(tmp_path / "elsewhere" / "x.png")
    (imagenet / "linked").symlink_to(tmp_path / "elsewhere")
    (imagenet / "n01" / "around").symlink_to(imagenet)
    assert len(open_source(imagenet)) == 5


def test_the_signature_follows_the_names(imagenet: Path) -> None:
    before = open_source(imagenet).signature
    assert open_source(imagenet).signature == before
    (imagenet / "top.webp").rename(imagenet / "pot.webp")
    assert open_source(imagenet).signature != before


def test_a_folder_without_images_is_fatal(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("no image")
    with pytest.raises(ValueError, match=r"holds no images, at any depth; expected .*\.jpg"):
        open_source(tmp_path)


def test_a_folder_has_no_captions_to_train_on(imagenet: Path) -> None:
    settings: dict[str, Any] = {
        "batch_size": 2, "resolution": 16, "patch_size": 8, "max_text_tokens": 4, "seed": 0
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"train has no captions to train on; expected a \.jsonl"):
        TextToImageBatches(open_source(imagenet), ByteTokenizer(), **settings)
    batch = TextToImageBatches(open_source(imagenet), ByteTokenizer(), caption_dropout=1.0, **settings)[0]
    assert batch["num_bad"] == 0


def test_without_tensorflow_datasets_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "tensorflow_datasets":
            raise ModuleNotFoundError("No module named 'tensorflow_datasets'", name="tensorflow_datasets")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"tfds:imagenet2012/train needs .*svg_jax\[tfds\].*tensorflow_datasets"):
        open_source("tfds:imagenet2012/train")


def test_an_address_without_a_split_is_named() -> None:
    with pytest.raises(ValueError, match="tfds:imagenet2012 names no split"):
        open_source("tfds:imagenet2012")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of prepared data sets with one of five PNG files, image i of 10 + i pixels width."""
    tfds = pytest.importorskip("tensorflow_datasets")

    class TinyPictures(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> Any:
            features = {"label": tfds.features.Scalar(np.int64), "image": tfds.features.Image()}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, downloads: Any) -> Any:
            return {"train": self._generate_examples()}

        def _generate_examples(self) -> Any:
            for i in range(5):
                with io.BytesIO() as file:
                    Image.new("RGB", (10 + i, 8), (50 * i, 0, 0)).save(file, "PNG")
                    yield i, {"image": file.getvalue(), "label": i}

    folder = tmp_path_factory.mktemp("prepared")
    TinyPictures(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def test_a_prepared_data_set_gives_the_bytes_of_its_images(prepared: Path) -> None:
    source = open_source("tfds:tiny_pictures/train", root=prepared)
    assert len(source) == 5
    sizes = {images.read_size(source[i]) for i in range(5)}
    assert sizes == {(10 + i, 8) for i in range(5)}
    for i in range(5):
        picture = images.read(source[i])
        assert picture.getpixel((0, 0)) == (50 * (picture.width - 10), 0, 0)
    assert source[3].where == "tfds:tiny_pictures/train record 3"


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("tfds:tiny_pictures/tests", "there is no split 'tests'"),
        ("tfds:tiny_picture/train", "there is no data set 'tiny_picture'"),
    ],
)
def test_data_sets_that_are_not_there_are_named(prepared: Path, address: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        open_source(address, root=prepared)
    with pytest.raises(FileNotFoundError, match=r"tfds:mnist/train is not prepared in .*tfds build mnist"):
        open_source("tfds:mnist/train", root=prepared)
