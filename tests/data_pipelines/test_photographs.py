"""The photographs of scikit-image and scikit-learn: what is written, and in how many forms."""

import json

import pytest
from PIL import Image

pytest.importorskip("skimage")
pytest.importorskip("sklearn")

from data_pipelines.photographs import PHOTOGRAPHS, VIEWS, write_photographs


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    path = write_photographs(tmp_path_factory.mktemp("photographs"))
    return path.parent, [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_view_of_every_photograph_has_a_file_and_a_caption_of_its_own(records):
    folder, lines = records
    assert len(lines) == len(PHOTOGRAPHS) * len(VIEWS) >= 40
    assert all(set(line) == {"path", "prompt"} and (folder / line["path"]).is_file() for line in lines)
    assert len({line["prompt"] for line in lines}) == len(lines)


def test_modes_sizes_and_aspect_ratios_are_mixed(records):
    folder, lines = records
    pictures = [Image.open(folder / line["path"]) for line in lines]
    assert {picture.mode for picture in pictures} == {"RGB", "L", "P", "RGBA", "LA"}
    assert {picture.format for picture in pictures} == {"PNG", "JPEG"}
    assert len({picture.size for picture in pictures}) >= 20
    ratios = [picture.width / picture.height for picture in pictures]
    assert min(ratios) < 0.6
    assert max(ratios) > 2
