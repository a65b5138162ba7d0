"""What page.js does, on small pages that keep to what it expects of the templates."""

from __future__ import annotations

from urllib.parse import quote

import pytest
from playwright.sync_api import Page, expect

from reports.pages import layout
from tests.reports.browser.conftest import Opened

ROWS = {
    "first": (("pi4b", "edgemoe", "12.5"), ("pi4b", "naive-swap", "1 024"), ("pi4b", "full-load", None)),
    "second": (("pi5", "edgemoe", "9"), ("pi5", "naive-swap", "100"), ("pi5", "full load, \ufb01ne", "30")),
}


def written(content: str, nav: str = "") -> str:
    """A page with the layout, style sheet, script and policy of all pages."""
    source = (
        '{% extends "layout.html.j2" %}{% block title %}Test{% endblock %}{% block lede %}' + nav + "{% endblock %}"
        '{% block content %}<form id="filters" role="search" hidden></form>' + content + "{% endblock %}"
    )
    return layout._environment().from_string(source).render(**layout._inline())


def table(name: str) -> str:
    lines = ""
    for _, strategy, value in ROWS[name]:
        number = f' data-value="{value.replace(" ", "")}"' if value else ""
        lines += f"""
            <tr data-strategy="{strategy}"><th scope="row">{strategy}</th>
            <td{number}><a href="#raw-{name}">{value or "–"}</a></td></tr>"""
    return f"""
        <table class="comparison sortable" id="{name}-table"><caption>Times</caption><thead><tr>
        <th scope="col" data-sort="text">Strategy</th><th scope="col" data-sort="number">Time<small>ms</small></th>
        </tr></thead><tbody>{lines}</tbody></table>"""


def section(name: str) -> str:
    device = ROWS[name][0][0]
    return f"""
        <section id="{name}" data-device="{device}" aria-labelledby="{name}-h"><h2 id="{name}-h">On {device}</h2>
        {table(name)}<figure data-device="{device}"><figcaption>Both strategies</figcaption></figure></section>"""


def raw(name: str) -> str:
    device = ROWS[name][0][0]
    return f"""
        <details class="raw" id="raw-{name}" data-device="{device}"><summary>Samples of {device}</summary>
        <pre tabindex="0">hidden words {"of a long text " * 400}</pre></details>"""


TABLES = written(
    "".join(map(section, ROWS)) + "<section><h2>Raw</h2>" + "".join(map(raw, ROWS)) + "</section>",
    '<nav aria-label="Parts"><a href="#first">first</a><a href="#second">second</a></nav>',
)

SPANS = (  # kind, microseconds, track
    ("attention", 0, 1000, 0), ("stall", 1000, 2000, 0), ("experts", 3000, 1500, 0), ("head", 4500, 500, 0),
    ("attention", 5000, 1000, 0), ("experts", 6000, 4000, 0),
    ("demanded", 1000, 2000, 1), ("preloaded", 4000, 1500, 1), ("preloaded", 6500, 1000, 1),
)  # fmt: skip


def timeline() -> str:
    paths: dict[str, str] = {}
    lines = []
    for i, (kind, start, time, track) in enumerate(SPANS):
        paths[kind] = paths.get(kind, "") + f"M{start} {14 + 30 * track}h{time}v22H{start}z"
        where = f"layer {i}, at {start / 1e3:.3f} ms, {time / 1e3:.3f} ms"
        lines.append(f"{('compute', 'load')[track]} {kind}: {where}")
    drawn = "".join(f'<path class="span {kind}" d="{d}"/>' for kind, d in paths.items())
    ticks = "".join(
        f'<text class="tick time" data-at="{at}" x="{at / 100}%" y="75">{at / 1000:g} ms</text>'
        for at in (0, 5000, 10000)
    )
    listed = "\n".join(lines)
    return written(f"""
        <figure class="timeline" data-zoom data-time="10000"><figcaption>edgemoe</figcaption>
        <svg class="pipeline" width="100%" height="86" role="img" aria-labelledby="t d">
        <title id="t">Computing</title><desc id="d">Four steps</desc>
        <svg class="spans" viewBox="0 0 10000 66" preserveAspectRatio="none" width="100%" height="66">{drawn}</svg>
        <line class="step" data-at="5000" x1="50%" x2="50%" y1="0" y2="66"/>{ticks}</svg>
        <details><summary>The spans</summary><pre class="span-list" tabindex="0">{listed}</pre></details></figure>""")


@pytest.fixture
def tables(opened: Opened) -> Page:
    return opened(TABLES)


def seen(page: Page, rows: str = "tbody tr") -> list[str]:
    """The first words of the rows that are shown."""
    script = "all => all.filter((row) => row.checkVisibility()).map((row) => row.cells[0].innerText)"
    return page.locator(rows).evaluate_all(script)


def shown(page: Page) -> list[str]:
    """Returns the ids of the sections and samples."""
    script = "all => all.filter((e) => e.checkVisibility()).map((e) => e.id)"
    return page.locator("main [id]:is(section, details)").evaluate_all(script)


# --- filters ---------------------------------------------------------------------------------------------------------


def test_there_is_a_choice_for_each_facet_of_more_than_one_value(tables) -> None:
    assert tables.locator("#filters label span").all_inner_texts() == ["Find", "Device", "Strategy"]
    assert tables.get_by_label("Device").locator("option").all_inner_texts() == ["all", "pi4b", "pi5"]
    expect(tables.get_by_role("search").get_by_role("status")).to_have_text("6 rows")


def test_a_device_leaves_its_rows_its_section_and_its_raw_samples(tables) -> None:
    tables.get_by_label("Device").select_option("pi5")
    assert seen(tables) == ["edgemoe", "naive-swap", "full load, ﬁne"]
    assert shown(tables) == ["second", "raw-second"]
    expect(tables.get_by_role("status")).to_have_text("3 of 6 rows")
    assert tables.get_by_role("navigation").locator("a:visible").all_inner_texts() == ["second"]
    tables.get_by_role("button", name="Show all").click()
    expect(tables.get_by_role("status")).to_have_text("6 rows")
    assert shown(tables) == ["first", "second", "raw-first", "raw-second"] and len(seen(tables)) == 6
    assert tables.evaluate("location.hash") == ""


def test_filters_narrow_together_and_say_where_nothing_fits(tables) -> None:
    tables.get_by_label("Strategy").select_option("full-load")
    assert seen(tables) == ["full-load"]
    assert shown(tables) == ["first", "raw-first", "raw-second"]
    tables.get_by_label("Device").select_option("pi5")
    assert seen(tables) == []
    expect(tables.get_by_role("status")).to_have_text("0 of 6 rows: nothing fits")


@pytest.mark.parametrize(
    ("typed", "rows"),
    [
        ("SWAP", ["naive-swap", "naive-swap"]),
        ("pi4b edge", ["edgemoe"]),  # of what a row is in, too
        ("fine", ["full load, ﬁne"]),  # which is written with a ligature
        ("1 024", ["naive-swap"]),
        ("(.*[", []),
    ],
)
def test_words_are_looked_for_in_the_rows(tables, typed, rows) -> None:
    tables.get_by_label("Find").fill(typed)
    assert seen(tables) == rows


def test_samples_are_found_by_their_summary_and_not_by_what_is_folded_away(tables) -> None:
    tables.get_by_label("Find").fill("samples of pi5")
    assert shown(tables) == ["raw-second"]
    tables.get_by_label("Find").fill("hidden words")
    assert shown(tables) == []


def test_a_filtered_and_sorted_view_has_an_address(tables, opened) -> None:
    tables.get_by_label("Find").fill("e & d=ö")
    tables.get_by_label("Find").fill("e")
    tables.get_by_label("Device").select_option("pi4b")
    tables.locator("#first-table").get_by_role("button", name="Time").click()
    tables.locator("#first-table").get_by_role("button", name="Time").click()
    fragment = tables.evaluate("location.hash")
    again = opened(TABLES, fragment)
    assert seen(again) == seen(tables) == ["naive-swap", "edgemoe"]
    assert again.get_by_label("Find").input_value() == "e"
    assert again.get_by_label("Device").locator("option:checked").inner_text() == "pi4b"
    expect(again.locator("#first-table th").nth(1)).to_have_attribute("aria-sort", "descending")


@pytest.mark.parametrize(
    "fragment",
    [
        "filter:device=__proto__&strategy=constructor&sort=first-table:__proto__:ascending&sort=first-table:1:sideways",
        "filter:device=%E0%A4%A&q=",
        "filter:sort=first-table:99:ascending&sort=:::&sort",
        "no-such-thing",
        "%E0%A4%A",
        quote('"><img src=x onerror=alert(1)>'),
        "filter:q=" + quote("<img src=x onerror=alert(1)>") + "&device=javascript:alert(1)",
    ],
)
def test_any_address_is_borne(opened, fragment) -> None:
    page = opened(TABLES, f"#{fragment}")
    expect(page.get_by_role("status")).to_have_text(
        "0 of 6 rows: nothing fits" if "img" in fragment and "q=" in fragment else "6 rows"
    )
    page.get_by_role("button", name="Show all").click()
    assert seen(page) == [strategy for rows in ROWS.values() for _, strategy, _ in rows]
    assert page.locator("img").count() == 0


def test_enter_sends_nothing(tables) -> None:
    tables.get_by_label("Find").fill("swap")
    tables.get_by_label("Find").press("Enter")
    assert seen(tables) == ["naive-swap", "naive-swap"]


def test_without_facets_there_are_no_filters(opened) -> None:
    page = opened(written("<p>Nothing was measured.</p>"))
    assert not page.locator("#filters").is_visible()


def test_where_there_are_no_rows_entries_are_counted(opened) -> None:
    page = opened(written("".join(f'<article data-device="pi{i}"><p>board {i}</p></article>' for i in range(3))))
    page.get_by_label("Find").fill("board 2")
    expect(page.get_by_role("status")).to_have_text("1 of 3 entries")


# --- links -----------------------------------------------------------------------------------------------------------


def test_a_link_opens_what_it_leads_to(tables) -> None:
    target = tables.locator("#raw-second")
    tables.locator("#second tbody a").first.click()
    expect(target).to_have_attribute("open", "")
    expect(target.locator("summary")).to_be_focused()
    target.locator("summary").click()
    expect(target).not_to_have_attribute("open", "")
    tables.locator("#second tbody a").first.click()  # the same address once more
    expect(target).to_have_attribute("open", "")


def test_an_address_opens_what_it_leads_to_though_a_filter_hides_it(tables, opened) -> None:
    page = opened(TABLES, "#raw-first")
    expect(page.locator("#raw-first")).to_have_attribute("open", "")
    page.get_by_label("Device").select_option("pi5")
    assert not page.locator("#raw-first").is_visible()
    page.evaluate("location.hash = '#raw-first'")
    expect(page.locator("#raw-first")).to_be_visible()


def test_the_way_back_leads_to_the_filtered_view(tables) -> None:
    tables.get_by_label("Device").select_option("pi5")
    tables.locator("#second tbody a").first.click()
    expect(tables.locator("#raw-second")).to_have_attribute("open", "")
    tables.go_back()
    assert tables.get_by_label("Device").locator("option:checked").inner_text() == "pi5"
    assert len(seen(tables)) == 3


# --- tables ----------------------------------------------------------------------------------------------------------


def test_numbers_are_sorted_by_their_value_and_what_has_none_stays_last(tables) -> None:
    heading = tables.locator("#first-table th").nth(1)
    as_written = seen(tables, "#first-table tbody tr")
    heading.get_by_role("button").click()
    assert heading.get_attribute("aria-sort") == "ascending"
    assert seen(tables, "#first-table tbody tr") == ["edgemoe", "naive-swap", "full-load"]
    heading.get_by_role("button").click()
    assert heading.get_attribute("aria-sort") == "descending"
    assert seen(tables, "#first-table tbody tr") == ["naive-swap", "edgemoe", "full-load"]
    heading.get_by_role("button").click()
    assert heading.get_attribute("aria-sort") is None
    assert seen(tables, "#first-table tbody tr") == as_written
    assert seen(tables, "#second-table tbody tr") == [strategy for _, strategy, _ in ROWS["second"]]


def test_a_number_that_stands_in_the_text_alone_is_one(opened) -> None:
    rows = "".join(f"<tr><th scope=row>{name}</th></tr>" for name in ("100 ms", "9 ms", "–", "30 ms"))
    heading = '<th scope="col" data-sort="number">Time</th>'
    page = opened(
        written(f'<table class="sortable" id="t"><thead><tr>{heading}</tr></thead><tbody>{rows}</tbody></table>')
    )
    page.get_by_role("button", name="Time").click()
    assert seen(page) == ["9 ms", "30 ms", "100 ms", "–"]


def test_text_is_sorted_as_people_do_by_keyboard(opened) -> None:
    rows = "".join(f"<tr><th scope=row>{name}</th></tr>" for name in ("b10", "B9", "a", "ä"))
    page = opened(
        written(
            '<table class="sortable" id="t"><thead><tr><th scope="col" data-sort="text">Name</th></tr></thead>'
            f"<tbody>{rows}</tbody></table>"
        )
    )
    page.get_by_role("button", name="Name").focus()
    page.keyboard.press("Enter")
    assert seen(page) == ["a", "ä", "B9", "b10"]
    page.keyboard.press("Space")
    assert seen(page) == ["b10", "B9", "ä", "a"]


# --- the timeline ----------------------------------------------------------------------------------------------------


def view(page: Page) -> tuple[float, float]:
    """(begin, end) in microseconds."""
    begin, _, width, _ = map(float, page.locator("svg.spans").get_attribute("viewBox").split())
    return begin, begin + width


def at(page: Page, microseconds: float, y: float = 25) -> tuple[float, float]:
    """Where that time stands on the screen."""
    box = page.locator("svg.pipeline").bounding_box()
    begin, end = view(page)
    return box["x"] + (microseconds - begin) / (end - begin) * box["width"], box["y"] + y


@pytest.fixture
def zoomed(opened: Opened) -> Page:
    return opened(timeline())


def told(page: Page) -> str:
    """The same for whoever sees it and whoever hears it."""
    text = page.locator(".told").inner_text()
    assert page.get_by_role("slider").get_attribute("aria-valuetext") == text
    return text


def test_buttons_zoom_and_move_and_end_at_the_ends(zoomed) -> None:
    def button(name):
        return zoomed.get_by_role("button", name=name)

    assert view(zoomed) == (0, 10_000)
    assert [b.is_disabled() for b in zoomed.locator(".controls button").all()] == [False, True, True, True, True]
    button("Zoom in").click()
    assert view(zoomed) == (2500, 7500)
    button("Earlier").click()
    assert view(zoomed) == (0, 5000)
    assert button("Earlier").is_disabled()
    button("Later").click()
    button("Later").click()
    assert view(zoomed) == (5000, 10_000)
    assert button("Later").is_disabled()
    while button("Zoom in").is_enabled():
        button("Zoom in").click()
    begin, end = view(zoomed)
    assert end - begin == 50 and begin >= 5000
    assert zoomed.locator(".controls .quiet").inner_text().endswith("of 10.00 ms")
    button("The whole").click()
    assert view(zoomed) == (0, 10_000)


def test_ticks_and_steps_move_along_and_finer_ticks_are_written(zoomed) -> None:
    step, ticks = zoomed.locator("line.step"), zoomed.locator("text.time:visible")
    assert ticks.all_text_contents() == ["0 ms", "5 ms", "10 ms"]
    zoomed.get_by_role("button", name="Zoom in").click()
    assert step.get_attribute("x1") == step.get_attribute("x2") == "50.000%"
    assert ticks.all_text_contents() == ["3 ms", "4 ms", "5 ms", "6 ms", "7 ms"]
    assert ticks.nth(2).get_attribute("x") == "50.000%"
    zoomed.get_by_role("button", name="Later").click()
    assert step.get_attribute("x1") == "0.000%"
    zoomed.get_by_role("button", name="Zoom in").click()
    assert not step.is_visible()
    zoomed.get_by_role("button", name="The whole").click()
    assert ticks.all_text_contents() == ["0 ms", "5 ms", "10 ms"]


def test_the_keyboard_goes_from_span_to_span_and_the_view_follows(zoomed) -> None:
    slider = zoomed.get_by_role("slider")
    zoomed.keyboard.press("Tab")
    while not slider.evaluate("element => element === document.activeElement"):
        zoomed.keyboard.press("Tab")
    assert told(zoomed) == "compute attention: layer 0, at 0.000 ms, 1.000 ms"
    zoomed.keyboard.press("ArrowRight")
    assert told(zoomed).startswith("compute stall: layer 1")
    zoomed.keyboard.press("ArrowDown")
    assert told(zoomed).startswith("load demanded: layer 6")
    zoomed.keyboard.press("ArrowUp")
    assert told(zoomed).startswith("compute stall: layer 1")
    for _ in range(3):
        zoomed.keyboard.press("+")
    begin, end = view(zoomed)
    assert end - begin == 1250 and begin < 2000 < end  # the chosen span stays in view
    zoomed.keyboard.press("End")
    assert told(zoomed).startswith("load preloaded: layer 8")
    begin, end = view(zoomed)
    assert begin < 7000 < end
    assert slider.get_attribute("aria-valuenow") == slider.get_attribute("aria-valuemax") == "9"
    zoomed.keyboard.press("0")
    assert view(zoomed) == (0, 10_000)
    zoomed.keyboard.press("Home")
    zoomed.keyboard.press("ArrowLeft")
    assert told(zoomed).startswith("compute attention: layer 0")


def test_the_pointer_tells_the_span_that_it_is_on(zoomed) -> None:
    zoomed.mouse.move(*at(zoomed, 2000))
    assert told(zoomed).startswith("compute stall: layer 1")
    zoomed.mouse.move(*at(zoomed, 4100, y=50))
    assert told(zoomed).startswith("load preloaded: layer 7")
    outline = zoomed.locator(".chosen")
    assert [outline.get_attribute(name) for name in ("x", "width", "y")] == ["4000", "1500", "44"]


def test_ctrl_and_the_wheel_zoom_where_the_pointer_is_and_the_wheel_alone_scrolls(zoomed) -> None:
    zoomed.mouse.move(*at(zoomed, 2500))
    zoomed.mouse.wheel(0, -100)
    assert view(zoomed) == (0, 10_000)
    zoomed.keyboard.down("Control")
    zoomed.mouse.wheel(0, -100)
    zoomed.wait_for_function("document.querySelector('svg.spans').viewBox.baseVal.width < 10000")
    begin, end = view(zoomed)
    assert end - begin == 5000 and begin == pytest.approx(1250, abs=10)


def test_dragging_moves_the_view(zoomed) -> None:
    zoomed.get_by_role("button", name="Zoom in").click()
    zoomed.mouse.move(*at(zoomed, 5000))
    zoomed.mouse.down()
    zoomed.mouse.move(*at(zoomed, 6000), steps=4)
    zoomed.mouse.up()
    assert view(zoomed) == (pytest.approx(1500, abs=15), pytest.approx(6500, abs=15))


# --- without it ------------------------------------------------------------------------------------------------------


def test_without_the_script_all_is_there_to_be_read(opened) -> None:
    page = opened(TABLES, java_script_enabled=False)
    assert page.locator("tbody tr:visible").count() == 6
    assert not page.locator("#filters").is_visible()
