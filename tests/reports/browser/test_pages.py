"""The pages of each kind in a browser: nobody is kept out, links lead somewhere, what strangers wrote is text."""

from __future__ import annotations

import dataclasses
import enum
import re
from typing import Any

import pytest
from playwright.sync_api import Locator, Page, expect

from engine.errors import ProtocolError
from reports.errors import RecordError
from reports.nights.gate import Measured
from reports.nights.night import Night
from reports.pages.devices import devices_page
from reports.pages.night_page import night_page
from reports.pages.strategies import strategies_page
from reports.records import Cell
from tests.programs.scale import sides
from tests.reports.browser.conftest import PHONE, Opened, findings

KINDS = ("strategies", "devices", "nightly")
MOST_BYTES = 2_000_000
IN_CELL = "<img src=x onerror=alert(1)>\"'&amp;{{7*7}}<script>alert(2)"  # printable, and without a slash
HOSTILE = f"{IN_CELL}</script></style></pre></title><svg onload=alert(3)>javascript:alert(4)\x1b[31m\u202e\ud800"


# What reaches beyond the edge of the screen, and nothing around it can be scrolled
CUT_OFF = """() => [...document.querySelectorAll("main *")].filter((each) => {
    if (each.getBoundingClientRect().right <= innerWidth + 1 || !each.checkVisibility()) return false;
    for (let around = each.parentElement; around; around = around.parentElement) {
        if (["auto", "scroll"].includes(getComputedStyle(around).overflowX)) return false;
    }
    return !each.closest("svg svg");
}).map((each) => each.outerHTML.slice(0, 100))"""


def pages_of(before: Measured, after: Measured, night: Night) -> dict[str, str]:
    return {
        "strategies": strategies_page([after]),
        "devices": devices_page([after]),
        "nightly": night_page(night, after, [before], before.sweep.id),
    }


@pytest.fixture(scope="module")
def measured() -> tuple[Measured, Measured, Night]:
    before, after = sides.side(2, 2, 1, blocks=2), sides.side(2, 2, 1, blocks=2, seed=2, day=1, slower=1.6)
    return before, after, sides.night(before, after, nights=20)


@pytest.fixture(scope="module")
def pages(measured: tuple[Measured, Measured, Night]) -> dict[str, str]:
    return pages_of(*measured)


def choice(page: Page, label: str) -> Locator:
    return page.locator("#filters label", has_text=re.compile(f"^{label}")).locator("select")


@pytest.mark.parametrize("kind", KINDS)
def test_nobody_is_kept_out(pages, opened: Opened, kind):
    page = opened(pages[kind])
    assert not findings(page)
    page.set_viewport_size(PHONE)
    page.emulate_media(color_scheme="dark")
    assert not findings(page, only=("color-contrast",))
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page scrolls sideways on a phone"
    assert page.evaluate(CUT_OFF) == []


@pytest.mark.parametrize("kind", KINDS)
def test_every_link_leads_somewhere_and_opens_it(pages, opened, kind):
    page = opened(pages[kind])
    links = page.locator("a").evaluate_all("all => all.map((link) => link.getAttribute('href'))")
    ids = page.locator("[id]").evaluate_all("all => all.map((each) => each.id)")
    assert links and set(links) <= {f"#{each}" for each in ids}
    assert len(ids) == len(set(ids))
    link = page.locator("tbody a[href^='#raw-']:visible").first
    anchor = link.get_attribute("href")
    link.click()
    expect(page.locator(f"details{anchor}")).to_have_attribute("open", "")
    expect(page.locator(f"details{anchor} summary")).to_be_in_viewport()
    assert "Conditions: " in page.locator(anchor).inner_text()


@pytest.mark.parametrize("kind", KINDS)
def test_filters_leave_what_was_asked_for(pages, opened, kind):
    page = opened(pages[kind])
    rows = page.locator("tr[data-device], tr[data-strategy]")
    everything = rows.count()
    choice(page, "Device").select_option("board-01")
    script = "all => all.filter((each) => each.checkVisibility()).length"
    assert page.locator("main [data-device='board-00'], main [data-device='board-00'] *").evaluate_all(script) == 0
    left = rows.filter(visible=True).count()
    assert 0 < left < everything
    choice(page, "Strategy").select_option("edgemoe")
    assert 0 < rows.filter(visible=True).count() < left
    assert page.locator("tbody tr[data-strategy='naive-swap']:visible").count() == 0
    page.get_by_role("button", name="Show all").click()
    expect(rows.filter(visible=True)).to_have_count(everything)


@pytest.mark.parametrize("kind", KINDS)
def test_every_table_is_sorted_by_every_heading_with_a_button(pages, opened, kind):
    page = opened(pages[kind])
    found = page.locator("th[data-sort]:has(button)").evaluate_all("""(headings) => headings.map((heading) => {
        heading.querySelector("button").click();
        const table = heading.closest("table");
        const cells = [...table.tBodies[0].rows].map((row) => row.cells[heading.cellIndex]);
        const others = table.querySelectorAll("[aria-sort]").length - 1;
        return [heading.ariaSort, others, cells.map((cell) => cell.dataset.value ?? null)];
    })""")
    assert [each[:2] for each in found] == [["ascending", 0]] * page.locator("thead th[data-sort]").count()
    columns = [[float(value) for value in values] for _, _, values in found if values and None not in values]
    assert any(len(set(column)) > 1 for column in columns)
    assert columns == [sorted(column) for column in columns]


def test_a_night_is_filtered_by_its_result(pages, measured, opened):
    page = opened(pages["nightly"])
    choice(page, "Result").select_option("worse")
    worse = {(each.cell.device, each.cell.strategy) for each in measured[2].comparison.judged if each.mark == "worse"}
    assert worse == {("board-00", "edgemoe")}
    left = "all => all.filter((e) => e.checkVisibility()).map((e) => [e.dataset.device, e.dataset.strategy].join())"
    assert set(page.locator("tr[data-mark]").evaluate_all(left)) == {"board-00,edgemoe"}


def test_the_timeline_of_a_record_tells_all_its_spans(pages, opened):
    page = opened(pages["strategies"])
    figure = page.locator("figure.timeline").filter(has_text="edgemoe").first
    told = figure.get_by_role("slider").evaluate("""(slider) => {
        const told = [];
        for (let i = 0; i < slider.ariaValueMax; i++) {
            slider.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight" }));
            told.push(slider.ariaValueText);
        }
        return told;
    }""")
    begins = [float(re.search(r"at (-?[0-9.]+) ms", text)[1]) for text in told]
    assert sorted(told) == sorted(figure.locator(".span-list").text_content().splitlines())
    assert [max(0.0, begin) for begin in begins] == sorted(max(0.0, begin) for begin in begins)
    assert {text.split(":")[0] for text in told} >= {"compute stall", "load demanded", "load preloaded"}


def test_all_of_a_page_is_drawn_and_of_a_long_one_soon(pages, opened):
    style = "(each) => getComputedStyle(each).contentVisibility === 'visible'"
    drawn = f"() => [...document.querySelectorAll('main > section')].every({style})"
    assert opened(pages["nightly"]).evaluate(drawn)
    long = pages["nightly"].replace("<main>", '<main class="long">')
    opened(long).wait_for_function(drawn)
    page = opened(long, java_script_enabled=False)
    assert not page.evaluate(drawn)
    page.emulate_media(media="print")
    assert page.evaluate(drawn)


@pytest.mark.parametrize("kind", KINDS)
def test_on_paper_there_is_the_page_and_nothing_to_press(pages, opened, kind):
    page = opened(pages[kind])
    page.emulate_media(media="print", color_scheme="dark")
    assert page.locator("#filters, .controls, nav, .told").filter(visible=True).count() == 0
    assert page.locator("tbody tr").filter(visible=True).count() == page.locator("tbody tr").count() > 0
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
    page.emulate_media(media="screen")
    choice(page, "Device").select_option("board-01")
    page.emulate_media(media="print")
    expect(page.get_by_role("status")).to_be_visible()  # what was left out is said


# --- strangers -------------------------------------------------------------------------------------------------------


def hostile(value: Any) -> Any:
    """With every text in it hostile that may be so; what is checked more strictly stays as it is."""
    if isinstance(value, enum.Enum):
        return value
    if isinstance(value, str):
        return HOSTILE + value
    if isinstance(value, tuple):
        return tuple(map(hostile, value))
    if isinstance(value, dict):
        return {key: hostile(each) for key, each in value.items()}
    if not dataclasses.is_dataclass(value):
        return value
    if isinstance(value, Cell):
        parts = ("device", "container", "strategy", "workload")
        return dataclasses.replace(value, **{part: IN_CELL + getattr(value, part) for part in parts})
    for each in dataclasses.fields(value):
        if each.name != "metric":  # the farm's own names
            try:
                value = dataclasses.replace(value, **{each.name: hostile(getattr(value, each.name))})
            except (ProtocolError, RecordError):
                continue
    return value


def hostile_side(side: Measured) -> Measured:
    runs = tuple(map(hostile, side.runs))
    assert HOSTILE in runs[0].command and HOSTILE in runs[0].facts.model and HOSTILE in runs[0].load.reader
    sweep = dataclasses.replace(hostile(side.sweep), planned=tuple((run.cell.key, run.block) for run in runs))
    return Measured(dataclasses.replace(sweep, baseline=IN_CELL + side.sweep.baseline), runs)


@pytest.fixture(scope="module")
def hostile_pages(measured: tuple[Measured, Measured, Night]) -> dict[str, str]:
    before, after, night = measured
    return pages_of(hostile_side(before), hostile_side(after), hostile(night))


@pytest.mark.parametrize("kind", KINDS)
def test_what_strangers_wrote_is_text(hostile_pages, opened, kind):
    page = opened(hostile_pages[kind])
    assert page.locator("script").count() == 1
    assert page.locator("img, iframe, object, embed, base, [onload], [onerror], body style, body link").count() == 0
    assert page.evaluate("[...document.links].every((link) => link.getAttribute('href').startsWith('#'))")
    assert IN_CELL in page.locator("h1, main").all_inner_texts()[-1]
    text = page.locator("html").text_content()
    assert "{{7*7}}" in text and "\x1b" not in text and "\u202e" not in text


@pytest.mark.parametrize("kind", KINDS)
def test_strangers_names_are_filtered_by_and_linked_to(hostile_pages, opened, kind):
    name = f"{IN_CELL}board-01"
    page = opened(hostile_pages[kind])
    choice(page, "Device").select_option(name)
    left = page.get_by_role("status").inner_text()
    assert " of " in left
    again = opened(hostile_pages[kind], page.evaluate("location.hash"))
    assert again.get_by_role("status").inner_text() == left
    assert choice(again, "Device").locator("option:checked").inner_text() == name


# --- size ------------------------------------------------------------------------------------------------------------


def test_five_hundred_cells_stay_small():
    before, after = sides.side(10, 10, 5, blocks=1), sides.side(10, 10, 5, blocks=1, seed=2, day=1, slower=1.2)
    night = sides.night(before, after)
    assert len(night.findings) > 1000  # of one block each, all is inconclusive
    pages = pages_of(before, after, night)
    sizes = {kind: len(html.encode()) for kind, html in pages.items()}
    assert all(size < MOST_BYTES for size in sizes.values()), sizes
    assert all('<main class="long">' in html for html in pages.values())
