"""The page about a source, as someone sees it: in a headless Chromium."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from data_pipelines.inspect import main

if TYPE_CHECKING:
    from playwright.sync_api import Page


def scene(seed: int, size: tuple[int, int]) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A list with wide, tall, equal, alike and broken images, and with captions that try to be markup."""
    folder = tmp_path_factory.mktemp("inspect")
    for i in range(9):
        scene(i, [(300, 120), (120, 300), (256, 256)][i % 3]).save(folder / f"{i}.png")
    scene(0, (300, 120)).resize((150, 60)).save(folder / "alike.jpg")
    (folder / "copy.png").write_bytes((folder / "1.png").read_bytes())
    (folder / "words.jpg").write_text("no image")
    captions = ["<script>alert(1)</script> a <b>hen</b>", "{{ 7 * 7 }}", "صورة", "long " * 3000, "x" * 900]
    records = [{"path": f"{i}.png", "prompt": (captions[i : i + 1] or ["a scene"])[0]} for i in range(9)]
    records += [{"path": name, "prompt": "b"} for name in ("alike.jpg", "copy.png", "words.jpg", "<i>none</i>.jpg")]
    (folder / "records.jsonl").write_text("\n".join(map(json.dumps, records)) + "\nno json")
    return folder


@pytest.fixture(scope="module")
def out(folder: Path) -> Path:
    main([str(folder / "records.jsonl"), f"--out={folder / 'page.html'}", "--resolution=128", "--samples=10"])
    return folder / "page.html"


def widths(page: Page) -> tuple[int, int]:
    element = "document.documentElement"
    return page.evaluate(f"{element}.scrollWidth"), page.evaluate(f"{element}.clientWidth")


def test_the_contact_sheet_comes_first_with_crops_and_captions(page: Page, out: Path) -> None:
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text))
    page.on("dialog", lambda dialog: problems.append(dialog.message))
    page.goto(out.as_uri())
    images = page.get_by_label("Contact sheet").locator("img")
    sizes = images.evaluate_all(
        "async i => { for (const x of i) await x.decode(); return i.map(x => [x.naturalWidth, x.naturalHeight]); }"
    )
    assert len(sizes) == 10
    assert {tuple(size) for size in sizes} == {(192, 80), (80, 192), (128, 128)}
    sheet = page.get_by_label("Contact sheet").inner_text()
    assert "<script>alert(1)</script> a <b>hen</b>" in sheet
    assert "{{ 7 * 7 }}" in sheet
    assert "300 × 120 px" in sheet
    first, figures = images.first.bounding_box(), page.get_by_text("In figures").bounding_box()
    assert first
    assert figures
    assert first["y"] < 300 < figures["y"]
    assert not problems


def test_figures_and_tables_say_what_is_in_the_source(page: Page, out: Path) -> None:
    page.goto(out.as_uri())
    text = page.locator("body").inner_text()
    assert "All 14 records: 11 can be used, 3 cannot." in text
    for title in ("Width", "Height", "Aspect ratio", "Cut away by the crop", "Padding of the image", "Caption length"):
        figure = page.locator(".figures section").filter(has_text=title)
        assert figure.locator("rect").count() >= 1
        counts = figure.locator("rect title").evaluate_all("t => t.map(x => Number(x.textContent.split(': ').pop()))")
        assert sum(counts) == 11
    rows = page.locator(".broken tr").all_inner_texts()
    assert [row.split("\t")[:2] for row in rows] == [["not an image", "1"], ["missing", "1"], ["not json", "1"]]
    assert "<i>none</i>.jpg does not exist" in text
    assert "byte for byte: 1. Groups of different files that look alike: 1." in re.sub(r"\s+", " ", text)
    assert page.locator(".group").count() == 2
    assert "images/s" in text


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_it_reads_well_on_a_phone_and_in_the_dark(page: Page, out: Path, scheme: str, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
    page.goto(out.as_uri())
    whole, seen = widths(page)
    assert whole <= seen == width
    code = """e => {
        const style = getComputedStyle(e);
        return [style.color, style.backgroundColor].map(colour => colour.match(/\\d+/g)[0] / 255);
    }"""
    ink, paper = page.locator("html").evaluate(code)
    assert paper > 0.95 > 0.2 > ink if scheme == "light" else paper < 0.15 < 0.8 < ink
    quiet = page.locator(".quiet").first.evaluate(code)[0]
    assert abs(quiet - paper) > 0.45


def test_a_long_caption_unfolds_when_it_is_chosen(page: Page, out: Path) -> None:
    page.goto(out.as_uri())
    figure = page.locator("figure").filter(has_text="long long").first
    before = figure.bounding_box()
    figure.click()
    after = figure.bounding_box()
    assert before
    assert after
    assert after["height"] > before["height"] + 20


def test_the_page_is_one_file_without_script(out: Path) -> None:
    html = out.read_text(encoding="utf-8")
    assert "<script" not in html
    assert re.findall(r'(?:src|href)="(?!data:|#)', html) == []


def test_a_sample_of_a_large_source_is_said_to_be_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    html = folder / "sample.html"
    main([str(folder), f"--out={html}", "--resolution=128", "--limit=4"])
    assert "4 of 12 records, drawn evenly" in " ".join(html.read_text().split())
    assert "Caption length" not in html.read_text()  # a folder has none
    assert capsys.readouterr().out.endswith(f"{html}\n")


def test_where_nothing_can_be_used_the_page_says_why(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "bad.jsonl").write_text('{"path": "words.jpg", "prompt": ""}\n\n')
    main([str(folder / "bad.jsonl"), f"--out={folder / 'bad.html'}"])
    html = (folder / "bad.html").read_text()
    assert "no record that was looked at can be used" in html
    assert "bad.jsonl:2 is an empty line" in html
    said = capsys.readouterr().out
    assert "2 of 2 records: 0 usable, 1 not_an_image, 1 not_json" in said
    assert f"none of them can be used: {folder / 'bad.jsonl'}:1: image" in said


def test_what_is_wrong_is_said_in_one_sentence(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(folder / "records.jsonl")
    with pytest.raises(SystemExit, match="error: data nothing does not exist"):
        main(["nothing"])
    with pytest.raises(SystemExit, match="resolution=100 is not a multiple of the patch size 16"):
        main([source, "--resolution=100"])
    with pytest.raises(SystemExit, match="lies in a folder that does not exist"):
        main([source, "--out=no/such/page.html"])
    with pytest.raises(SystemExit, match=rf"--out {folder} is a folder: name a file, such as {folder}/inspect\.html"):
        main(["nothing", f"--out={folder}"])
    with pytest.raises(SystemExit, match="resolution=16000 is above 8192"):
        main([source, "--resolution=16000"])
    with pytest.raises(SystemExit):
        main([source, "--patch-size=0"])
    assert "'0' is no whole number from 1" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="tokeniser folder none does not exist"):
        main([source, "--tokenizer=none"])
