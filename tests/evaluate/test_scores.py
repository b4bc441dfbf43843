"""The form of results: files from made-up scores, and the page as someone sees it, in a headless Chromium."""

from __future__ import annotations

import io
import json
import math
import re
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from etils import epath
from PIL import Image

from svg_jax.evaluate import published
from svg_jax.evaluate.scores import Box, Card, Question, Report, Score, thumbnail, write_report

if TYPE_CHECKING:
    from playwright.sync_api import Page

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
NUM_CARDS = 2212
SIZE = (640, 480)
BOXES = (
    Box(64.0, 48.0, 320.0, 240.0, "bench", "red", 0.93),
    Box(-20.0, 240.0, 200.0, 500.0, "dog", None, 0.87),
    Box(400.0, 100.0, 600.0, 300.0, "dog", None, 0.31, judged=False),
)
TREE = (
    Question("3", ("2", "1"), "Is the hat red?", "attribute - color", "Yes.", accepted=True, counted=False),
    Question("1", (), "Is there a cat?", "entity - whole", "yes", accepted=True, counted=True),
    Question("2", ("1",), "Is there a hat?", "entity - whole", "No.", accepted=False, counted=False),
    Question("4", ("3",), "Is the hat large?", "attribute - size", None, accepted=False, counted=False),
    Question("5", ("6",), "Does it turn?", "other - x", "perhaps", accepted=False, counted=False),
    Question("6", ("5",), "In a circle?", "other - x", "yes", accepted=True, counted=True),
)


def picture(seed: int) -> bytes:
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return thumbnail(Image.fromarray(coarse).resize(SIZE))


def cards(count: int) -> Iterator[Card]:
    """With markup where there should be none, boxes and a tree on some."""
    pictures = [picture(seed) for seed in range(3)]
    prompts = [
        "a <b>bench</b> </script><script>alert(1)</script>",
        "a photo of a dog <!-- {{ 7 * 7 }}",
        "صورة",
        "word " * 200,
    ]
    for i in range(count):
        passed = i % 3 > 0
        yield Card(
            name=f"{i // 4:05d}/samples/{i % 4:04d}.png",
            prompt=prompts[i % 4],
            task=TASKS[i % 6],
            passed=passed,
            reason="" if passed else f"expected dog>=2, found {i}\nexpected bench red",
            picture=pictures[i % 3],
            size=SIZE,
            boxes=BOXES if i % 2 == 0 else BOXES[1:2],
        )


def report(**more: Any) -> Report:
    found = [Score(task, i / 8, i / 8 - 0.05, i / 8 + 0.05, 4 * i) for i, task in enumerate(TASKS)]
    settings = {"checkpoint": {"step": 7, "ema": True}, "note": "<i>x</i> | y"}
    return Report("GenEval (geneval)", settings, [*found, Score("overall", 0.3125)], **more)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many")
    write_report(
        epath.Path(folder), report(cards=cards(NUM_CARDS), published=published.GENEVAL, warnings=["only <b>few</b>"])
    )
    return folder / "index.html"


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trees")
    card = Card("item_1 0", "a cat with a hat", "", None, "2 of 6", picture(0), SIZE, tree=TREE)
    scores = [Score("overall", value, group=group) for group, value in (("official", 0.8578), ("corrected", 0.8491))]
    more = {"published": published.DPG, "percent": True, "cards": [card], "shown": "corrected"}
    write_report(epath.Path(folder), Report("DPG", {}, scores, **more))
    return folder / "index.html"


def status(page: Page) -> str:
    return page.get_by_role("status").inner_text()


def test_json_holds_scores_by_name_with_intervals_counts_and_what_else_is_said(tmp_path: Path) -> None:
    scores = [Score("fid", 3.5, count=50_000), Score("is", math.inf), Score("recall", math.nan, 0.5, math.nan)]
    rows = ({"index": i, "score": [math.nan, 1.0], "prompt": "ein Fuß"} for i in range(2))
    more = {"per_image": {"x": (1.0, math.inf)}}
    write_report(epath.Path(tmp_path), Report("T", {"seed": 0}, scores, warnings=["few"], images=rows, more=more))
    found = json.loads((tmp_path / "results.json").read_text())
    assert found.pop("versions").keys() >= {"svg_jax", "pillow"}
    assert found == {
        "title": "T",
        "scores": {"fid": 3.5, "is": None, "recall": None},
        "intervals": {"recall": [0.5, None]},
        "counts": {"fid": 50_000},
        "per_image": {"x": [1.0, None]},
        "warnings": ["few"],
        "settings": {"seed": 0},
    }
    lines = (tmp_path / "images.jsonl").read_text(encoding="utf-8").splitlines()
    assert lines[1] == '{"index": 1, "score": [null, 1.0], "prompt": "ein Fuß"}'
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "images.jsonl",
        "index.html",
        "results.json",
        "results.md",
    ]


def test_the_table_shows_ours_above_the_published_rows(tmp_path: Path) -> None:
    printed = write_report(epath.Path(tmp_path), report(published=published.GENEVAL, warnings=["few"]))
    table = (tmp_path / "results.md").read_text()
    assert printed.endswith(f"\n{tmp_path / 'index.html'}")
    assert printed.removesuffix(f"\n{tmp_path / 'index.html'}") in table
    assert "| two object | 0.1250 | 0.0750 to 0.1750 | 4 |" in table
    assert "| overall | 0.3125 |  |  |" in table
    ours = "| this run | 0.0000 | 0.1250 | 0.2500 | 0.3750 | 0.5000 | 0.6250 | 0.3125 |  |"
    release = "| SVG-T2I |  |  |  |  |  |  | 0.75 | README of the SVG-T2I release |"
    assert table.index(ours) < table.index(release)
    assert "\nWarning: few.\n" in table
    assert "\n- checkpoint.ema: True\n" in table


def test_groups_get_a_row_each_and_fractions_are_shown_as_percent(tmp_path: Path) -> None:
    scores = [Score("overall", value, group=group) for group, value in (("official", 0.8578), ("corrected", 0.84914))]
    tables = {"Details": [["", "n"], ["a | b", "1"]]}
    found = Report("DPG", {}, scores, published=published.DPG, percent=True, tables=tables)
    table = write_report(epath.Path(tmp_path), found)
    assert "| official | overall | 85.78 |" in table
    assert "| this run, corrected |  |  |  |  |  | 84.91 |  |" in table
    assert "## Details\n\n|  | n |\n|---|---|\n| a \\| b | 1 |\n" in table
    assert json.loads((tmp_path / "results.json").read_text())["scores"] == {
        "official": {"overall": 0.8578},
        "corrected": {"overall": 0.84914},
    }


@pytest.mark.parametrize("table", [published.GENEVAL, published.DPG])
def test_published_rows_are_whole_and_name_their_sources(table: published.PublishedTable) -> None:
    for row in table.rows:
        assert len(row.values) == len(table.columns)
        assert row.values[-1] is not None
        assert row.source
    values = [row.values for row in table.rows if None not in row.values]
    assert len(values) == len(table.rows) - 1
    if table is published.GENEVAL:  # the overall score is the mean of the others, up to rounding
        assert all(abs(np.mean(row[:-1]) - row[-1]) < 0.011 for row in values)


def test_no_more_than_a_few_cards_are_held(tmp_path: Path) -> None:
    alive: weakref.WeakSet[Card] = weakref.WeakSet()
    most = 0

    def watched() -> Iterator[Card]:
        nonlocal most
        for card in cards(50):
            alive.add(card)
            most = max(most, len(alive))
            yield card

    write_report(epath.Path(tmp_path), report(cards=watched()))
    assert most <= 3
    assert (tmp_path / "index.html").read_text().count('class="card"') == 50


def test_a_report_that_breaks_off_leaves_no_page(tmp_path: Path) -> None:
    def broken() -> Iterator[Card]:
        yield from cards(2)
        raise ValueError("part 3 is damaged")

    with pytest.raises(ValueError, match="part 3 is damaged"):
        write_report(epath.Path(tmp_path), report(cards=broken()))
    assert [file.name for file in tmp_path.iterdir()] == ["images.jsonl"]


def test_half_a_surrogate_pair_does_no_harm(tmp_path: Path) -> None:
    card = Card("a", "x\ud800y", "", None, "", picture(0), SIZE)
    write_report(
        epath.Path(tmp_path), Report("T", {"prompt": "\ud800"}, [], images=[{"prompt": "\ud800"}], cards=[card])
    )
    assert (tmp_path / "images.jsonl").read_text() == '{"prompt": "?"}\n'


def test_thumbnails_are_small_jpegs_of_the_same_shape() -> None:
    image = Image.open(io.BytesIO(thumbnail(Image.new("RGBA", (1024, 512), "red"), 100)))
    assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (100, 50))
    assert Image.open(io.BytesIO(thumbnail(Image.new("RGB", (64, 32)), 100))).size == (64, 32)


def test_the_page_is_one_file(many: Path) -> None:
    html = many.read_text(encoding="utf-8")
    assert re.findall(r'(?:src|href)="', html) == []
    assert "http" not in html
    assert html.count("alert(1)") == NUM_CARDS // 4
    assert "<script>alert" not in html


def test_cards_are_drawn_as_they_are_scrolled_to(page: Page, many: Path) -> None:
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text))
    page.on("dialog", lambda dialog: problems.append(dialog.message))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(many.as_uri())
    shown = page.locator("article")
    assert status(page) == "2,212 of 2,212"
    first = shown.count()
    assert 0 < first < 300
    page.evaluate("scrollTo(0, document.body.scrollHeight)")
    page.wait_for_function(f"document.querySelectorAll('article').length > {first}")
    sizes = shown.first.locator("img").evaluate(
        "async i => { await i.decode(); return [i.naturalWidth, i.naturalHeight]; }"
    )
    assert sizes == [256, 192]
    assert "a <b>bench</b> </script><script>alert(1)</script>" in shown.nth(0).inner_text()
    assert "{{ 7 * 7 }}" in shown.nth(1).inner_text()
    assert "only <b>few</b>." in page.locator(".warning").inner_text()
    assert not problems


def test_filters_work_together(page: Page, many: Path) -> None:
    page.goto(many.as_uri())
    page.get_by_label("Verdict").select_option("fail")
    assert status(page) == "738 of 2,212"
    page.get_by_label("Task").select_option("counting")
    assert status(page) == "0 of 2,212"
    assert page.get_by_text("No picture is left").count() == 0  # it is drawn by the style sheet
    page.get_by_label("Task").select_option("single_object")
    assert status(page) == "369 of 2,212"
    page.get_by_label("Class").select_option("bench")
    assert status(page) == "369 of 2,212"
    page.get_by_label("Search").fill("FOUND 12 bench")
    assert {name[:10] for name in page.locator(".name").all_inner_texts()} >= {"00003/samp"}
    page.get_by_label("Search").fill("00003/samples/0000")
    assert status(page) == "1 of 2,212"
    card = page.locator("article")
    assert card.locator(".verdict").inner_text() == "✗ fail · single object"
    assert card.locator(".reason").inner_text() == "expected dog>=2, found 12\nexpected bench red"
    options = page.get_by_label("Class").locator("option").all_inner_texts()
    assert options == ["all", "bench (1106)", "dog (2212)"]


def test_boxes_lie_where_the_objects_are(page: Page, many: Path) -> None:
    page.goto(many.as_uri())
    card = page.locator("article").first
    outer = card.locator(".picture").bounding_box()
    assert outer
    assert abs(outer["width"] / outer["height"] - 4 / 3) < 0.01
    groups = card.locator("svg g")
    titles = groups.locator("title").evaluate_all("all => all.map(t => t.textContent)")
    assert titles == ["dog 0.31 (found, not judged)", "red bench 0.93", "dog 0.87"]
    drawn = groups.nth(1).locator("rect").last
    code = "r => { const b = r.getBoundingClientRect(); return [b.x, b.y, b.width, b.height]; }"
    x, y, width, height = drawn.evaluate(code)
    scale = outer["width"] / 640
    expected = (outer["x"] + 64 * scale, outer["y"] + 48 * scale, 256 * scale, 192 * scale)
    assert np.allclose((x, y, width, height), expected, atol=2.5)
    assert drawn.evaluate("r => getComputedStyle(r).stroke") == "rgb(255, 0, 0)"
    assert groups.nth(0).locator("rect").last.evaluate("r => getComputedStyle(r).strokeDasharray") == "4px, 3px"
    assert card.locator(".chips li").all_inner_texts() == ["red bench 0.93", "dog 0.87"]
    assert groups.locator("text").evaluate_all("all => all.map(t => t.textContent)") == ["red bench", "dog"]


def test_published_rows_stand_below_ours(page: Page, many: Path) -> None:
    page.goto(many.as_uri())
    table = page.get_by_role("region", name="Beside published scores")
    rows = [re.split(r"\t", row) for row in table.locator("tr").all_inner_texts()]
    assert rows[0][1:] == [
        "single object",
        "two object",
        "counting",
        "colors",
        "position",
        "color attr",
        "overall",
        "source",
    ]
    assert rows[1][:2] == ["this run", "0.0000"]
    assert [row[0] for row in rows[2:]] == [row.model for row in published.GENEVAL.rows]
    overall = [float(row[-2]) for row in rows[2:]]
    assert overall == sorted(overall, reverse=True)
    page.get_by_text("Settings: what these numbers").click()
    assert "<i>x</i> | y" in page.locator(".settings").inner_text()


def test_a_tree_shows_what_was_answered_and_what_counts(page: Page, trees: Path) -> None:
    page.goto(trees.as_uri())
    tree = page.locator(".tree")
    items = [
        re.sub(r"\s+", " ", text) for text in tree.locator("li").evaluate_all("all => all.map(i => i.textContent)")
    ]
    own = {text.split(".")[0].split()[-1]: text for text in items}
    assert own["1"].startswith("✓ 1. Is there a cat? yes entity - whole✗ 2.")
    assert own["2"].startswith("✗ 2. Is there a hat? No. entity - whole")
    assert own["3"].startswith("✗ 3. Is the hat red? Yes., not counted: it depends on 2, 1 attribute - color")
    assert own["4"] == "✗ 4. Is the hat large? no answer attribute - size"
    assert own["5"].startswith("✗ 5. Does it turn? perhaps, taken for no")
    assert page.get_by_role("heading", name="Pictures as corrected judges them").is_visible()
    code = """items => items.map(item => {
        let depth = 0;
        for (let above = item; (above = above.parentElement.closest("li")); ) depth++;
        return [item.textContent.match(/[0-9]+/)[0], depth];
    })"""
    depths = tree.locator("li").evaluate_all(code)
    assert {tuple(pair) for pair in depths} == {("1", 0), ("2", 1), ("3", 2), ("4", 3), ("5", 0), ("6", 1)}
    labels = page.locator("form label").evaluate_all("all => all.filter(l => !l.hidden).map(l => l.textContent)")
    assert [label.split()[0] for label in labels] == ["Category", "Search"]
    rows = page.get_by_role("region", name="Beside").locator("tr.ours td:first-child").all_inner_texts()
    assert rows == ["this run, official", "this run, corrected"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_it_reads_well_on_a_phone_and_in_the_dark(page: Page, many: Path, trees: Path, scheme: str, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
    for path in (many, trees):
        page.goto(path.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        code = "e => ['color', 'backgroundColor'].map(name => getComputedStyle(e)[name].match(/\\d+/g)[0] / 255)"
        ink, paper = page.locator("html").evaluate(code)
        assert paper > 0.95 > 0.2 > ink if scheme == "light" else paper < 0.15 < 0.8 < ink


def test_without_pictures_there_is_no_gallery(page: Page, tmp_path: Path) -> None:
    write_report(epath.Path(tmp_path), Report("FID", {}, [Score("fid", 3.5)]))
    page.goto((tmp_path / "index.html").as_uri())
    assert page.get_by_text("3.5000").is_visible()
    assert not page.get_by_label("Search").is_visible()
