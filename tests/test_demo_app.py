"""The web page, and the gallery of `svg_jax.sample`, as someone sees them: in a headless Chromium."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Page

from svg_jax.demo_app import build, main
from svg_jax.samples import SampleFolder
from tests.tiny import SIDE, write_tiny_weights

ROOT = Path(__file__).parents[1]
WAIT = 120_000  # milliseconds for the first picture: its programs are compiled, on a machine that may be busy


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The door itself, in a process of its own."""
    folder = tmp_path_factory.mktemp("demo_app")
    write_tiny_weights(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "svg_jax.demo_app", f"--checkpoint={folder}", f"--port={port}"]
    environment = {**os.environ, "XLA_FLAGS": "", "GRADIO_TEMP_DIR": str(folder / "served")}
    log = folder / "log"
    with log.open("w") as stream:
        server = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=stream, stderr=stream)
    try:
        for _ in range(600):
            assert server.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=10).close()
                break
            except OSError:
                time.sleep(0.2)
        else:
            pytest.fail(f"the server does not answer: {log.read_text()}")
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(30)


def drawn(page: Page) -> list[tuple[str, int, int]]:
    """Address and size of the pictures that are shown."""
    code = "images => images.map(image => [image.src, image.naturalWidth, image.naturalHeight])"
    return [tuple(image) for image in page.locator(".grid-wrap img").evaluate_all(code)]


def wait_for_pictures(page: Page, count: int, other_than: Sequence[tuple[str, int, int]] = ()) -> None:
    code = """([count, before]) => {
        const images = [...document.querySelectorAll('.grid-wrap img')];
        const done = image => image.complete && image.naturalWidth > 0 && !before.includes(image.src);
        return images.length === count && images.every(done);
    }"""
    page.wait_for_function(code, arg=[count, [source for source, *_ in other_than]], timeout=WAIT)


def number(page: Page, label: str, value: int) -> None:
    page.get_by_role("spinbutton", name=label).fill(str(value))
    page.keyboard.press("Tab")


def test_the_page_draws_what_was_asked(page: Page, address: str) -> None:
    page.goto(address)
    page.get_by_label("Prompt", exact=True).fill("a red fox")
    number(page, "Width", 2 * SIDE)
    number(page, "Steps", 3)
    number(page, "Pictures", 2)
    page.get_by_role("button", name="Draw").click()
    wait_for_pictures(page, 2)
    first = drawn(page)
    assert [size for _, *size in first] == [[2 * SIDE, SIDE]] * 2
    assert first[0][0] != first[1][0]

    page.get_by_role("button", name="Settings of these pictures").click()
    page.wait_for_function("document.body.innerText.includes('num_steps')", timeout=WAIT)
    shown = re.sub(r"\s", "", page.locator(".json-holder").inner_text())
    for setting in ('"prompt":"aredfox"', f'"width":{2 * SIDE}', '"num_steps":3', '"seed":0'):
        assert setting in shown

    page.get_by_role("button", name="New seed").click()
    page.wait_for_function("document.querySelector('input[aria-label=\"Seed\"]').value !== '0'")
    page.get_by_role("button", name="Draw").click()
    wait_for_pictures(page, 2, other_than=first)
    before, now = (page.request.get(images[0][0]).body() for images in (first, drawn(page)))
    assert before != now


def test_a_bad_size_is_said_in_one_sentence(page: Page, address: str) -> None:
    page.goto(address)
    number(page, "Height", SIDE + 1)
    page.get_by_role("button", name="Draw").click()
    sentence = page.get_by_text(f"height {SIDE + 1} is not a multiple of the patch size 8: choose {SIDE}")
    sentence.wait_for(timeout=WAIT)
    assert not drawn(page)


def test_the_gallery_of_samples_shows_its_pictures(page: Page, tmp_path: Path) -> None:
    settings = {"solver": "euler", "num_steps": 4, "seed": 0}
    folder = SampleFolder(str(tmp_path), settings)
    for i, prompt in enumerate(["a red fox", "a <b>hen</b>"]):
        picture = Image.fromarray(np.full((16, 32, 3), 90 * i, np.uint8))
        folder.save(folder.name(i, 0, 32, 16), picture, prompt, index=i, sample=0, width=32, height=16)
    folder.finish()
    page.goto((tmp_path / "index.html").as_uri())
    images = page.locator("img")
    sizes = images.evaluate_all(
        "async images => { for (const i of images) await i.decode(); return images.map(i => i.naturalWidth); }"
    )
    assert sizes == [32, 32]
    assert page.get_by_role("heading", name="a <b>hen</b>").is_visible()
    images.first.click()
    page.wait_for_url("**/images/00000_0_32x16.png")


def test_without_gradio_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ImportError, match=r'pip install "svg_jax\[demo\]"'):
        build(None)  # type: ignore[arg-type]
    with pytest.raises(SystemExit, match=r'error: the web page needs gradio: run `pip install "svg_jax\[demo\]"`'):
        main(["--checkpoint=nowhere"])


def test_without_a_checkpoint_the_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=f"error: no checkpoint in {tmp_path}"):
        main([f"--checkpoint={tmp_path}"])
