"""A headless Chromium for the tests of report.html: the installed one, nothing is downloaded."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
VARIABLE = "RESFUSE_CHROMIUM"
PATIENCE_MS = 120_000  # a busy machine is slow; nothing here asserts a time


def chromium() -> str:
    """The path of a browser; skips the test where there is none."""
    found = os.environ.get(VARIABLE) or next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is on PATH, {VARIABLE} is not set")
    return found


@contextmanager
def started() -> Iterator[Any]:
    """playwright's browser."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=chromium(),
            args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"],  # containers
            timeout=PATIENCE_MS,
        )
        yield browser
        browser.close()


class Complaints(list[str]):
    """What a page said on its console, raised, asked a network for, or popped up."""

    def listen(self, page: Any) -> None:
        page.on("console", lambda message: self.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: self.append(str(error)))
        page.on("dialog", lambda dialog: (self.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: self.note_request(request.url))

    def note_request(self, url: str) -> None:
        if not url.startswith(("file:", "data:")):
            self.append(url)


def opened(
    browser: Any, path: Path, width: int = 1280, theme: str = "light", part: str = ""
) -> tuple[Any, Complaints]:
    """The page in a window of its own with its plots drawn, and what it complains of from then on.

    Args:
        path: of the HTML file.
        width: of the window in pixels.
        theme: what the system prefers, "light" or "dark".
        part: what follows # in the address.
    """
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=theme)
    page = context.new_page()
    page.set_default_timeout(PATIENCE_MS)
    complaints = Complaints()
    complaints.listen(page)
    page.goto(path.resolve().as_uri() + part)
    settle(page)
    return page, complaints


def settle(page: Any) -> None:
    """Waits until every plot has been drawn or says why it is not."""
    page.wait_for_function(
        """() => document.getElementById("content").hidden
        || [...document.querySelectorAll(".figure")].every((f) => f.children.length)"""
    )
    # plots out of sight are drawn again one by one, whenever the page has nothing else to do
    page.wait_for_function(
        """() => document.getElementById("content").hidden
        || document.body.dataset.plots === 'drawn'"""
    )
    page.wait_for_function(
        """() => new Promise((done) =>
        requestAnimationFrame(() => requestIdleCallback(() => done(true))))"""
    )
