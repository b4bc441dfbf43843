from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from svg_jax.evaluate.generated import Generated, begin, open_generated
from svg_jax.evaluate.prompt_sets import PromptEntry, PromptSet
from tests.evaluate.test_prompt_sets import ONE, THREE, TWO

WIDTH, HEIGHT = 32, 16
SETTINGS = {"width": WIDTH, "height": HEIGHT, "seed": 0, "weights": {"dit": "ab"}, "guidance_interval": (0.0, 1.0)}
GENEVAL = PromptSet(
    "geneval", "12", tuple(PromptEntry(i, f"{i:05d}", row["prompt"], row) for i, row in enumerate((ONE, TWO, THREE)))
)
DPG = PromptSet(
    "dpg", "34", tuple(PromptEntry(i, name, f"text of {name}") for i, name in enumerate(("b7", "007", "é")))
)
PROMPTS = PromptSet("prompts", "56", (PromptEntry(0, "00000", "a fox"), PromptEntry(1, "00001", "")))


def picture(number: int, size: tuple[int, int] = (WIDTH, HEIGHT)) -> Image.Image:
    """Of other pixels for every number."""
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(pixels)


def same(a: Image.Image, b: Image.Image) -> bool:
    return a.mode == b.mode and a.size == b.size and a.tobytes() == b.tobytes()


def drawn(folder: Path, prompt_set: PromptSet, num_images: int = 2, **settings: object) -> Generated:
    """A folder with all pictures: number 10 * prompt + sample."""
    generated = begin(str(folder), prompt_set, num_images, SETTINGS | settings)
    for entry in prompt_set.entries:
        generated.save(entry, [picture(10 * entry.index + sample) for sample in range(num_images)])
    return generated


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("prompt_set", [GENEVAL, DPG, PROMPTS], ids=lambda prompt_set: prompt_set.name)
def test_pictures_come_back(tmp_path: Path, prompt_set: PromptSet) -> None:
    drawn(tmp_path, prompt_set, 2)
    found = open_generated(str(tmp_path))
    assert (found.prompt_set_name, found.entries, found.num_images) == (prompt_set.name, prompt_set.entries, 2)
    assert found.settings["weights"] == {"dit": "ab"}
    assert found.settings["prompts"] == prompt_set.digest
    assert open_generated(str(tmp_path), prompt_set).entries == prompt_set.entries
    assert found.missing() == []
    for entry in found.entries:
        assert found.holds(entry)
        for sample in range(2):
            image = found.picture(entry, sample)
            assert same(image, picture(10 * entry.index + sample))
            with Image.open(found.path(entry, sample)) as whole:
                assert same(whole.crop(found.box(entry, sample)), image)
                assert whole.text["prompt"] == entry.prompt
                assert len(whole.text["manifest"]) == 64


def test_the_layouts_are_those_of_the_official_programs(tmp_path: Path) -> None:
    for prompt_set in (GENEVAL, DPG, PROMPTS):
        drawn(tmp_path / prompt_set.name, prompt_set, 4)
    inside = ["metadata.jsonl", *(f"samples/{sample:04d}.png" for sample in range(4))]
    expected = [f"{number:05d}/{name}" for number in range(3) for name in inside]
    assert files(tmp_path / "geneval") == sorted([*expected, "prompts.jsonl", "settings.json"])
    with (tmp_path / "geneval" / "00001" / "metadata.jsonl").open() as file:
        assert json.load(file) == TWO
    assert files(tmp_path / "dpg" / "images") == ["007.png", "b7.png", "é.png"]
    with Image.open(tmp_path / "dpg" / "images" / "007.png") as grid:
        assert grid.size == (2 * WIDTH, 2 * HEIGHT)
        for number, corner in enumerate([(0, 0), (WIDTH, 0), (0, HEIGHT), (WIDTH, HEIGHT)]):
            assert same(grid.crop((*corner, corner[0] + WIDTH, corner[1] + HEIGHT)), picture(10 + number))
    assert files(tmp_path / "prompts" / "images")[:2] == ["00000_0.png", "00000_1.png"]


def test_what_does_not_count_as_there(tmp_path: Path) -> None:
    generated, other = drawn(tmp_path / "this", GENEVAL), drawn(tmp_path / "other", GENEVAL, seed=1)
    first, second, third = GENEVAL.entries
    cut = generated.path(first, 1)
    cut.write_bytes(cut.read_bytes()[:-20])
    generated.path(second, 1).write_bytes(other.path(second, 1).read_bytes())
    generated.save(third, [picture(0, (16, 16))] * 2)
    (tmp_path / "this" / "00002" / "metadata.jsonl").unlink()
    (tmp_path / "this" / "00001" / "metadata.jsonl").write_text("")
    of_other_settings = ["00001/samples/0001.png", "00001/metadata.jsonl"]
    of_third = [f"00002/{name}" for name in ("samples/0000.png", "samples/0001.png", "metadata.jsonl")]
    assert generated.missing() == ["00000/samples/0001.png", *of_other_settings, *of_third]
    assert generated.missing(quick=True) == [*of_other_settings, *of_third]
    assert not any(map(generated.holds, GENEVAL.entries))
    cut.write_bytes(b"")
    assert generated.missing(quick=True)[0] == "00000/samples/0001.png"


def test_a_folder_that_is_not_complete_says_what_is_missing(tmp_path: Path) -> None:
    generated = drawn(tmp_path, GENEVAL)
    gone = [generated.path(entry, sample) for entry in GENEVAL.entries for sample in range(2)]
    gone[0].unlink()
    with pytest.raises(ValueError, match=r"is not complete: 00000/samples/0000\.png is missing or damaged: draw what"):
        open_generated(str(tmp_path))
    for path in gone[1:]:
        path.unlink()
    with pytest.raises(
        ValueError, match=r"0000\.png, 00000/samples/0001\.png, .*0000\.png and 3 more are missing"
    ) as error:
        open_generated(str(tmp_path))
    assert "\n" not in str(error.value)
    found = open_generated(str(tmp_path), complete=False)
    with pytest.raises(FileNotFoundError, match=r"00000/samples/0000\.png is missing: draw it with"):
        found.picture(found.entries[0], 0)


def test_a_picture_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    generated = drawn(tmp_path, GENEVAL)
    path = tmp_path / "00001" / "samples" / "0001.png"
    for damaged in (path.read_bytes()[:200], b"no picture"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"00001/samples/0001\.png cannot be read as an image .*: draw it again"):
            generated.picture(GENEVAL.entries[1], 1)


def test_other_settings_do_not_mix(tmp_path: Path) -> None:
    drawn(tmp_path, GENEVAL)
    begin(str(tmp_path), GENEVAL, 2, SETTINGS)
    for prompt_set, num_images, settings, message in (
        (GENEVAL, 2, SETTINGS | {"seed": 1}, "pictures of seed = 0, and now it is 1: choose another --out"),
        (GENEVAL, 3, SETTINGS, "pictures of num_images = 2, and now it is 3"),
        (GENEVAL, 2, SETTINGS | {"weights": {"dit": "cd"}}, r"weights\.dit = ab, and now it is cd"),
        (dataclasses.replace(GENEVAL, digest="99"), 2, SETTINGS, "pictures of prompts = 12, and now it is 99"),
        (PROMPTS, 2, SETTINGS, "pictures of prompt_set = geneval, and now it is prompts|of prompts = 12"),
    ):
        with pytest.raises(ValueError, match=message):
            begin(str(tmp_path), prompt_set, num_images, settings)


def test_pictures_of_another_program_are_not_drawn_over(tmp_path: Path) -> None:
    (tmp_path / "00000" / "samples").mkdir(parents=True)
    picture(0).save(tmp_path / "00000" / "samples" / "00000.png")
    with pytest.raises(ValueError, match=r"holds pictures that another program drew, .*: choose another --out"):
        begin(str(tmp_path), GENEVAL, 2, SETTINGS)
    assert files(tmp_path) == ["00000/samples/00000.png"]


def test_prompts_that_are_worded_otherwise(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Publishers of DPG-Bench differ in white space, and in a word here and there."""
    drawn(tmp_path, DPG)
    spaced = tuple(dataclasses.replace(entry, prompt=f" {entry.prompt}\n") for entry in DPG.entries)
    open_generated(str(tmp_path), dataclasses.replace(DPG, entries=spaced))
    assert not caplog.records
    reordered = tuple(dataclasses.replace(entry, prompt="another", index=9) for entry in DPG.entries[::-1])
    found = open_generated(str(tmp_path), dataclasses.replace(DPG, entries=reordered))
    assert "was drawn from prompts that are worded otherwise: b7, 007, é are" in caplog.text
    assert same(found.picture(found.entries[0], 1), picture(21))
    with pytest.raises(ValueError, match=r"holds pictures of dpg, and not of geneval"):
        open_generated(str(tmp_path), GENEVAL)


def test_folders_without_pictures(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no folder of pictures '.*none'"):
        open_generated(str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match=r"no pictures in .*: expected NUMBER/samples/NUMBER\.png or ITEM\.png"):
        open_generated(str(tmp_path))
    (tmp_path / "00000").mkdir()
    (tmp_path / "00000" / "metadata.jsonl").write_text(json.dumps(ONE))
    with pytest.raises(FileNotFoundError, match=r"no pictures in .*: expected NUMBER/samples/NUMBER\.png"):
        open_generated(str(tmp_path))
    drawn(tmp_path / "ours", PROMPTS)
    (tmp_path / "ours" / "settings.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"settings\.json does not say what `python -m svg_jax\.evaluate generate` drew there"
    ):
        open_generated(str(tmp_path / "ours"))


@pytest.mark.parametrize("num_images", [0, -1, 3])
def test_how_many_pictures_are_scored(tmp_path: Path, num_images: int) -> None:
    drawn(tmp_path, DPG, 2)
    one = open_generated(str(tmp_path), num_images=1)
    assert (one.num_images, one.missing()) == (1, [])
    assert same(one.picture(one.entries[2], 0), picture(20))
    with pytest.raises(
        ValueError, match=rf"--num-images is {num_images}: .* has 2 pictures a prompt, of which at least"
    ):
        open_generated(str(tmp_path), num_images=num_images)


def test_what_was_drawn_must_be_known_in_full(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    drawn(tmp_path, GENEVAL)
    open_generated(str(tmp_path))
    assert "has 3 prompts and geneval has 553" in caplog.text
    listing, about = tmp_path / "prompts.jsonl", tmp_path / "settings.json"
    rows, settings = listing.read_bytes(), about.read_text()
    for damaged in (b"", rows.splitlines(keepends=True)[0], None):
        listing.unlink() if damaged is None else listing.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"prompts\.jsonl is missing, or not as it was written: the command that"):
            open_generated(str(tmp_path))
        begin(str(tmp_path), GENEVAL, 2, SETTINGS)  # as the message says
        assert open_generated(str(tmp_path)).missing() == []
        assert listing.read_bytes() == rows
    for key, value in (("width", None), ("num_images", "x"), ("num_images", 0), ("prompt_set", "genevall")):
        about.write_text(json.dumps(json.loads(settings) | {key: value}))
        with pytest.raises(ValueError, match=r"settings\.json does not say what"):
            open_generated(str(tmp_path))
    about.write_text("{")
    with pytest.raises(ValueError, match=r"settings\.json is damaged .* draw the pictures again into another folder"):
        open_generated(str(tmp_path))
    about.unlink()
    with pytest.raises(ValueError, match=r"settings\.json is missing, which says what was drawn"):
        open_generated(str(tmp_path))


def test_where_the_weights_lay_does_not_matter(tmp_path: Path) -> None:
    here, there = ({"origin": {"checkpoint": place}} for place in ("/here", "/there"))
    drawn(tmp_path, PROMPTS, **here)
    again = begin(str(tmp_path), PROMPTS, 2, SETTINGS | there)
    assert again.missing() == []
    assert open_generated(str(tmp_path)).settings["origin"] == {"checkpoint": "/here"}
