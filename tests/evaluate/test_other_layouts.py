"""Folders of pictures that other programs drew."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from PIL import Image

from svg_jax.evaluate.generated import open_generated
from svg_jax.evaluate.grids import grid_of
from tests.evaluate.test_generated import DPG, GENEVAL, HEIGHT, WIDTH, drawn, picture, same
from tests.evaluate.test_grids import padded
from tests.evaluate.test_prompt_sets import ONE, TWO


def write_other_geneval(folder: Path) -> None:
    """As the official script does it, with what else people leave there."""
    for number, row in enumerate((ONE, TWO)):
        (folder / f"{number:05d}" / "samples").mkdir(parents=True)
        (folder / f"{number:05d}" / "metadata.jsonl").write_text(json.dumps(row))
        for sample in range(3):
            picture(10 * number + sample).save(folder / f"{number:05d}" / "samples" / f"{sample:05d}.png")
        picture(0).save(folder / f"{number:05d}" / "grid.png")
        (folder / f"{number:05d}" / "samples" / "notes.png").write_text("")
    (folder / "results.jsonl").write_text("")


def test_geneval_folders_of_another_program(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_other_geneval(tmp_path)
    found = open_generated(str(tmp_path))
    assert (found.prompt_set_name, found.num_images, found.settings) == ("geneval", 3, {})
    assert found.entries == GENEVAL.entries[:2]
    assert same(found.picture(found.entries[1], 2), picture(12))
    assert "has 2 prompts and geneval has 553" in caplog.text
    with pytest.raises(ValueError, match=r"00002/samples/00000\.png, .* are missing"):
        open_generated(str(tmp_path), GENEVAL)
    (tmp_path / "00001" / "samples" / "00001.png").unlink()
    with pytest.raises(ValueError, match=r"is not complete: 00001/samples/00001\.png is missing"):
        open_generated(str(tmp_path))
    assert same((found := open_generated(str(tmp_path), complete=False)).picture(found.entries[1], 2), picture(12))
    swapped = dataclasses.replace(GENEVAL, entries=tuple(dataclasses.replace(e, metadata=ONE) for e in GENEVAL.entries))
    with pytest.raises(ValueError, match=r"drawn from another file of prompts: 00001 is not the same there"):
        open_generated(str(tmp_path), swapped)


def test_geneval_folders_of_long_prompts_say_so(tmp_path: Path) -> None:
    write_other_geneval(tmp_path)
    row = ONE | {"refined_prompt": "a bench " * 40}
    (tmp_path / "00000" / "metadata.jsonl").write_text(json.dumps(row))
    found = open_generated(str(tmp_path))
    assert (found.prompt_set_name, found.entries[0].prompt) == ("geneval_long", row["refined_prompt"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"00001/metadata\.jsonl: not JSON"),
        ('{"prompt": "a"}', r"00001/metadata\.jsonl: tag is null"),
        (None, r"00001 has no metadata\.jsonl: put GenEval's row of its prompt there"),
    ],
)
def test_bad_metadata_beside_pictures(tmp_path: Path, text: str | None, message: str) -> None:
    write_other_geneval(tmp_path)
    file = tmp_path / "00001" / "metadata.jsonl"
    file.unlink() if text is None else file.write_text(text)
    with pytest.raises(ValueError, match=message):
        open_generated(str(tmp_path))


def test_pictures_are_turned_and_made_rgb(tmp_path: Path) -> None:
    write_other_geneval(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    picture(5).convert("RGBA").save(tmp_path / "00000" / "samples" / "00000.png", exif=exif)
    found = open_generated(str(tmp_path))
    assert same(found.picture(found.entries[0], 0), picture(5).transpose(Image.Transpose.ROTATE_270))


@pytest.mark.parametrize("inside", ["", "images"])
def test_grids_of_another_program(tmp_path: Path, inside: str) -> None:
    folder = tmp_path / inside
    folder.mkdir(exist_ok=True)
    for entry in DPG.entries:
        grid_of([picture(10 * entry.index + sample) for sample in range(4)]).save(folder / f"{entry.id}.png")
    (folder / "results.txt").write_text("")
    found = open_generated(str(tmp_path), DPG)
    assert (found.entries, found.num_images, found.settings) == (DPG.entries, 4, {})
    assert same(found.picture(DPG.entries[1], 3), picture(13))
    assert found.box(DPG.entries[1], 3) == (WIDTH, HEIGHT, 2 * WIDTH, 2 * HEIGHT)
    for count in (1, 2):
        some = open_generated(str(tmp_path), DPG, num_images=count)
        assert some.num_images == count
        assert same(some.picture(DPG.entries[1], count - 1), picture(10 + count - 1))
    assert same(found.picture(DPG.entries[1], 2), picture(12))
    with pytest.raises(ValueError, match=r"--num-images is 5: .* has 4 pictures a prompt"):
        open_generated(str(tmp_path), DPG, num_images=5)

    (folder / "007.png").unlink()
    with pytest.raises(ValueError, match=rf"is not complete: {Path(inside, '007.png')} is missing"):
        open_generated(str(tmp_path), DPG)
    assert not open_generated(str(tmp_path), DPG, complete=False).holds(DPG.entries[1])
    picture(0).save(folder / "stray.png")
    with pytest.raises(
        ValueError, match=r"prompts that the file of prompts does not have \(stray is not there\): give"
    ):
        open_generated(str(tmp_path), DPG, complete=False)


def test_padded_and_uneven_grids_are_refused(tmp_path: Path) -> None:
    for size, message in (
        (
            (2 * 64 + 6, 2 * 64 + 6),
            r"b7\.png has 134 x 134 pixels, 2 of them around each picture: make it without padding",
        ),
        ((1006, 1006), r"b7\.png has 1006 x 1006 pixels, 2 of them around each picture"),
        ((33, 32), r"b7\.png has 33 x 32 pixels: a grid of 2 x 2 equal pictures was expected"),
    ):
        image = padded(picture(0, size)) if size[0] % 2 == 0 else picture(0, size)
        image.save(tmp_path / "b7.png")
        found = open_generated(str(tmp_path))
        for read in (found.picture, found.box):
            with pytest.raises(ValueError, match=message):
                read(found.entries[0], 0)


def test_single_pictures_of_another_program(tmp_path: Path) -> None:
    for entry in DPG.entries:
        picture(entry.index).save(tmp_path / f"{entry.id}.png")
    found = open_generated(str(tmp_path), DPG, grid="1x1")
    assert found.num_images == 1
    assert same(found.picture(DPG.entries[2], 0), picture(2))
    assert found.box(DPG.entries[2], 0) == (0, 0, WIDTH, HEIGHT)
    drawn(tmp_path / "ours", DPG, 4)
    with pytest.raises(ValueError, match=r"--grid is 1x1, and the files in .* hold 2 x 2 pictures: leave it out"):
        open_generated(str(tmp_path / "ours"), grid="1x1")


def test_numbers_of_another_program(tmp_path: Path) -> None:
    write_other_geneval(tmp_path)
    for folder in ("00000", "00001"):  # from 1 on
        for number in (3, 2, 1):
            samples = tmp_path / folder / "samples"
            (samples / f"{number - 1:05d}.png").rename(samples / f"{number:05d}.png")
    found = open_generated(str(tmp_path))
    assert found.num_images == 3
    assert same(found.picture(found.entries[1], 0), picture(10))
    (tmp_path / "00001" / "samples" / "1.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"00001/samples has two pictures 1, of which one is"):
        open_generated(str(tmp_path))
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "metadata.jsonl").write_text(json.dumps(ONE))
    (tmp_path / "00001" / "samples" / "1.png").unlink()
    with pytest.raises(ValueError, match=r"has two folders of prompt 1, of which one is"):
        open_generated(str(tmp_path))


def test_two_files_of_one_item_and_a_cut_jpeg(tmp_path: Path) -> None:
    grid = grid_of([picture(number) for number in range(4)])
    for suffix in ("jpg", "webp"):
        file = tmp_path / f"b7.{suffix}"
        grid.save(file)
        found = open_generated(str(tmp_path))
        assert found.missing() == []
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        assert found.missing() == [file.name]
        file.unlink()
    for suffix in ("jpg", "png"):
        grid.save(tmp_path / f"b7.{suffix}")
    with pytest.raises(ValueError, match=r"has two pictures of item b7"):
        open_generated(str(tmp_path))
