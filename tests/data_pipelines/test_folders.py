"""Folders of images as sources: which records, in which order, and what cannot be opened."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data_pipelines import images
from data_pipelines.batches import TextToImageBatches
from data_pipelines.records import BadRecord, Cause
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
    assert source[1].captions == ()
    assert not source.has_captions
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
    assert not batch["cause"].any()


def test_a_file_that_cannot_be_used_has_its_cause(imagenet: Path) -> None:
    source = open_source(imagenet)
    (imagenet / "n01/deep/er/c.JPG").unlink()
    (imagenet / "n02/a.png").write_bytes(b"")
    (imagenet / "n02/b.jpeg").unlink()
    (imagenet / "n02/b.jpeg").mkdir()
    causes = []
    for i in range(3):
        with pytest.raises(BadRecord) as error:
            images.read(source[i])
        assert str(imagenet) in str(error.value)
        causes.append(error.value.cause)
    assert causes == [Cause.MISSING, Cause.EMPTY, Cause.NOT_A_FILE]
    assert images.read(source[3]).size == (9, 7)
