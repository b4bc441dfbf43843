"""Prepared data sets, written by TensorFlow Datasets without TensorFlow: images, captions, what cannot be opened."""

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
from data_pipelines.records import BadRecord, Caption, Cause
from data_pipelines.sources import open_source

CAPTIONS: dict[str, Any] = {
    "plain": None,  # as imagenet2012: a label, and a file name that is no caption
    "one": lambda i: f"number {i}, größer",
    "many": lambda i: [f"number {i}"] * i,
    "coco": lambda i: [{"id": 7, "text": f"number {i}"}, {"id": 8, "text": "größer"}],
    "broken": lambda i: b"caf\xe9" if i == 2 else "coffee",
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of prepared data sets, one for each kind of captions, of five PNG files: image i has 10 + i columns."""
    tfds = pytest.importorskip("tensorflow_datasets")

    class TinyPictures(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in CAPTIONS]  # noqa: RUF012

        def _info(self) -> Any:
            features = {
                "label": tfds.features.Scalar(np.int64),
                "file_name": tfds.features.Text(),
                "image": tfds.features.Image(),
            }
            text = tfds.features.Text()
            match self.builder_config.name:
                case "one" | "broken":
                    features["caption"] = text
                case "many":
                    features["prompt"] = tfds.features.Sequence(text)
                case "coco":
                    features["captions"] = tfds.features.Sequence({"id": tfds.features.Scalar(np.int64), "text": text})
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, downloads: Any) -> Any:
            return {"train": self._generate_examples()}

        def _generate_examples(self) -> Any:
            for i in range(5):
                with io.BytesIO() as file:
                    Image.new("RGB", (10 + i, 8), (50 * i, 0, 0)).save(file, "PNG")
                    example: dict[str, Any] = {"image": file.getvalue(), "label": i, "file_name": f"{i}.png"}
                key = {"plain": None, "many": "prompt", "coco": "captions"}.get(self.builder_config.name, "caption")
                if key:
                    example[key] = CAPTIONS[self.builder_config.name](i)
                yield i, example

    folder = tmp_path_factory.mktemp("prepared")
    for name in CAPTIONS:
        TinyPictures(config=name, data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def test_a_prepared_data_set_gives_the_bytes_of_its_images(prepared: Path) -> None:
    source = open_source("tfds:tiny_pictures/plain/train", root=prepared)
    assert len(source) == 5
    assert not source.has_captions
    sizes = {images.read_size(source[i]) for i in range(5)}
    assert sizes == {(10 + i, 8) for i in range(5)}
    for i in range(5):
        picture = images.read(source[i])
        assert picture.getpixel((0, 0)) == (50 * (picture.width - 10), 0, 0)
        assert source[i].captions == ()
    assert source[3].where == "tfds:tiny_pictures/plain/train record 3"
    assert pickle.loads(pickle.dumps(source))[4] == source[4]
    assert len(open_source("tfds:tiny_pictures/plain/train[:2]", root=prepared)) == 2


@pytest.mark.parametrize("kind", ["one", "many", "coco"])
def test_captions(prepared: Path, kind: str) -> None:
    source = open_source(f"tfds:tiny_pictures/{kind}/train", root=prepared)
    assert source.has_captions
    for index in range(5):
        record = source[index]
        i = images.read(record).width - 10  # data sets are shuffled when they are prepared
        expected = {
            "one": (Caption(f"number {i}, größer"),),
            "many": (Caption(f"number {i}"),) * i,
            "coco": (Caption(f"number {i}"), Caption("größer")),
        }
        assert record.captions == expected[kind]


def test_a_caption_that_is_not_utf8_is_one_bad_record(prepared: Path) -> None:
    source = open_source("tfds:tiny_pictures/broken/train", root=prepared)
    causes = []
    for i in range(5):
        try:
            assert source[i].captions == (Caption("coffee"),)
        except BadRecord as error:
            causes.append(error.cause)
    assert causes == [Cause.ENCODING]


def test_a_damaged_record_is_one_bad_record(prepared: Path, tmp_path: Path) -> None:
    copy = tmp_path / "tiny_pictures" / "one" / "1.0.0"
    copy.mkdir(parents=True)
    for file in (prepared / "tiny_pictures" / "one" / "1.0.0").iterdir():
        content = bytearray(file.read_bytes())
        if ".array_record" in file.name:
            place = content.index(b"number 2")
            content[place : place + 8] = b"damage 2"
        (copy / file.name).write_bytes(content)
    source = open_source("tfds:tiny_pictures/one/train", root=tmp_path)
    errors = []
    for i in range(5):
        try:
            assert images.read(source[i]).height == 8
        except BadRecord as error:
            errors.append((i, error))
    [(i, error)] = errors
    assert error.cause is Cause.STORE
    assert f"train record {i} cannot be read" in str(error)


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("tfds:tiny_pictures/plain/tests", "there is no split 'tests'"),
        ("tfds:tiny_picture/train", "there is no data set 'tiny_picture'"),
    ],
)
def test_data_sets_that_are_not_there_are_named(prepared: Path, address: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        open_source(address, root=prepared)
    with pytest.raises(FileNotFoundError, match=r"tfds:mnist/train is not prepared in .*tfds build mnist"):
        open_source("tfds:mnist/train", root=prepared)


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
