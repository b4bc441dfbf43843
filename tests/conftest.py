"""Strict settings for every test: eight fake CPU devices, no implicit promotion of dtype or rank."""

from __future__ import annotations

import os
import shutil
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    # One thread a device: with more, devices begin their collectives in different orders, and now and then wait for one
    # another for ever.
    flags = " --xla_force_host_platform_device_count=8 --xla_cpu_multi_thread_eigen=false"
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + flags

from collections.abc import Iterator
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import jax
import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", os.path.join(tempfile.gettempdir(), "svg_jax_test_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@pytest.fixture(autouse=True, scope="module")
def _forgotten() -> Iterator[None]:
    """What one file compiled, no other one needs: kept, it takes several GiB in each test process."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="module")
def uncached() -> Iterator[None]:
    """Programs for absent chips cannot be read back from JAX's cache: none are put there."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, float("inf"))
    yield
    jax.config.update(name, before)


CHROMIUM_FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A headless Chromium; without one the test is skipped, or fails where SVG_REQUIRE_BROWSER=1."""
    names = ("chromium", "chromium-browser", "google-chrome")
    executable = next((path for name in names if (path := shutil.which(name))), None)
    if executable is None:
        missing = pytest.fail if os.environ.get("SVG_REQUIRE_BROWSER") == "1" else pytest.skip
        missing("needs Chromium, as in `apt-get install chromium`")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=CHROMIUM_FLAGS.split())
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page that fails the test when it asks anything of another machine."""
    page, elsewhere = browser.new_page(), []

    def is_here(address: str) -> bool:
        return urlsplit(address).scheme in ("file", "data", "blob") or urlsplit(address).hostname == "127.0.0.1"

    page.on("request", lambda request: is_here(request.url) or elsewhere.append(request.url))
    page.route(lambda address: not is_here(address), lambda route: route.abort())
    yield page
    page.close()
    assert not elsewhere
