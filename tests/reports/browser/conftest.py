"""Pages in Debian's chromium, headless, with an eye on all that a page does unasked: errors, requests, dialogs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, sync_playwright

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


class Watched:
    """A page, and what it did unasked."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.unasked: list[str] = []
        page.set_default_timeout(LONGEST_MS)
        page.on("console", lambda message: self.unasked.append(f"console {message.type}: {message.text}"))
        page.on("pageerror", lambda error: self.unasked.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (self.unasked.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: self.unasked.append(f"request: {request.url}"))
        page.on("popup", lambda _: self.unasked.append("popup"))

    def show(self, uri: str) -> None:
        self.page.goto(uri)
        assert self.unasked.pop(0) == f"request: {uri.partition('#')[0]}"  # the page itself


@pytest.fixture(scope="module")
def usual(browser: Browser) -> Iterator[Watched]:
    """The first page of each test: to make one takes as long as many a test."""
    with browser.new_context(viewport=DESKTOP) as context:
        yield Watched(context.new_page())


@pytest.fixture
def opened(browser: Browser, usual: Watched, tmp_path: Path) -> Iterator[Opened]:
    """opened(html, fragment="", **of the browser's context) -> Page. In the end none of them did anything unasked."""
    shown: list[Watched] = []

    def open_page(html: str, fragment: str = "", **options) -> Page:
        file = tmp_path / f"page-{len(shown)}.html"
        file.write_bytes(html.encode())
        is_another = bool(shown or options)
        shown.append(Watched(browser.new_page(viewport=DESKTOP, **options)) if is_another else usual)
        shown[-1].show(file.as_uri() + fragment)
        return shown[-1].page

    yield open_page
    unasked = [what for each in shown for what in each.unasked]
    for each in shown:
        if each is not usual:
            each.page.close()
    usual.unasked.clear()
    usual.page.set_viewport_size(DESKTOP)
    usual.page.emulate_media(color_scheme="light", media="screen")
    usual.page.mouse.move(0, 0)
    assert not unasked


def findings(page: Page, only: Sequence[str] = ()) -> list[str]:
    """What axe-core finds that keeps people out, one line each; by all its rules or `only` some."""
    options = {"resultTypes": ["violations"], **({"runOnly": list(only)} if only else {})}
    found = Axe().run(page, options=options).response["violations"]
    return [
        f"{each['impact']}: {each['id']}: {node['target']}: {node['failureSummary']}"
        for each in found
        if each["impact"] in SERIOUS
        for node in each["nodes"]
    ]
