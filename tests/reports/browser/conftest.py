"""Pages in Debian's chromium, headless, with an eye on all that a page does unasked: errors, requests, dialogs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
LONGEST_MS = 10_000  # of anything a test waits for
SERIOUS = ("serious", "critical")  # of axe's impacts

Opened = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = shutil.which("chromium")
    if found is None:
        pytest.skip("no chromium: as root, apt-get install chromium")
    # A module's own: its event loop would be in the way of tests that have theirs. Chromium's sandbox is not for root.
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=found, args=arguments)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def usual(browser: Browser) -> Iterator[BrowserContext]:
    context = browser.new_context(viewport=DESKTOP)
    yield context
    context.close()


@pytest.fixture
def opened(browser: Browser, usual: BrowserContext, tmp_path: Path) -> Iterator[Opened]:
    """opened(html, fragment="", **of the browser's context) -> Page. In the end none of them did anything unasked."""
    pages: list[Page] = []
    unasked: list[str] = []

    def open_page(html: str, fragment: str = "", **options) -> Page:
        file = tmp_path / f"page-{len(pages)}.html"
        file.write_bytes(html.encode())
        page = browser.new_page(viewport=DESKTOP, **options) if options else usual.new_page()
        pages.append(page)
        page.set_default_timeout(LONGEST_MS)
        page.on("console", lambda message: unasked.append(f"console {message.type}: {message.text}"))
        page.on("pageerror", lambda error: unasked.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (unasked.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: unasked.append(f"request: {request.url}"))
        page.on("popup", lambda _: unasked.append("popup"))
        page.goto(file.as_uri() + fragment)
        assert unasked.pop(0) == f"request: {page.url.partition('#')[0]}"  # the page itself
        return page

    yield open_page
    for page in pages:
        page.close()
    assert not unasked


def findings(page: Page) -> list[str]:
    """What axe-core finds that keeps people out, one line each."""
    found = Axe().run(page).response["violations"]
    return [
        f"{each['impact']}: {each['id']}: {node['target']}: {node['failureSummary']}"
        for each in found
        if each["impact"] in SERIOUS
        for node in each["nodes"]
    ]
