import re
from dataclasses import replace

from reports.nights.gate import Measured
from reports.pages.devices import devices_page
from reports.records import Fault, RunStatus, Verdict
from tests.programs.scale.sides import complete
from tests.reports.seen import Page


def html_of(make, runs, **changes):
    return devices_page([Measured.of(make.sweep(runs, **changes), runs)])


def shades(html):
    return re.findall(r'<td class="level-(\d)" data-value="([^"]+)"', html)


def test_the_map_has_every_strategy_on_every_device_and_the_fastest_is_darkest(make):
    html = html_of(make, make.runs())
    found = [(int(level), float(value)) for level, value in shades(html)]
    assert len(found) == 6
    assert [level for level, _ in sorted(found, key=lambda each: -each[1])] == sorted(level for level, _ in found)
    assert max(found)[0] == 7 and min(found)[0] == 0
    words = Page(html).words
    # full-load is faster still, and says nothing of how experts are held
    first = "Of what does not keep all experts in memory, jetson-tx2-emulated is fastest:"
    assert re.search(first + r" .{1,12} a token with edgemoe \(10 experts\)\.", words)
    assert re.search(r"pi4b-emulated takes [\d.]+× as long", words)


def test_what_gave_no_number_says_why_in_its_place(make):
    runs = make.runs(blocks=1)
    runs[0] = make.failed(RunStatus.OUT_OF_MEMORY, "needs 171 MiB", fault=Fault.OUT_OF_MEMORY, strategy="naive-swap")
    runs[1] = replace(runs[1], verdict=Verdict.SUSPECT, reasons=("throttled",))
    runs[2] = replace(runs[2], verdict=Verdict.INVALID, reasons=("the clock jumped",))
    runs += [make.failed(RunStatus.UNREACHABLE, "no answer", fault=Fault.LINK_LOST, device="pi3b")]
    html = html_of(make, runs)
    words = Page(html).words
    rows = dict(re.findall(r'<tr data-device="([^"]+)">\n<th scope="row">[^\n]*</th>\n(.*?)</tr>', html, re.S))
    assert "out of memory" in rows["pi4b-emulated"] and ">suspect</span>" in rows["pi4b-emulated"]
    assert "invalid" in rows["pi4b-emulated"]
    assert "unreachable<small>link lost</small>" in rows["pi3b"] and rows["pi3b"].count("not tried") == 2
    assert "1 unreachable" in words


def test_memory_speed_and_roof_are_drawn_for_each_device(make):
    page = Page(html_of(make, [complete(run) for run in make.runs()]))
    assert page.words.count("Memory and time, ") == page.words.count("Roofline, ") == 4  # caption and title
    classes = {path.get("class", "") for path in page.all("path")}
    assert {"front", "roof", "roof level"} <= classes
    assert "None is both smaller and faster than" in page.words
    assert "Roofs: storage 41.0 MiB/s, arithmetic" in page.words
    figures = [figure["data-device"] for figure in page.all("figure")]
    assert figures == ["pi4b-emulated"] * 2 + ["jetson-tx2-emulated"] * 2


def test_a_device_that_two_sweeps_measured_is_one_in_each(make):
    first = make.runs(devices=("pi4b-emulated",), blocks=1)
    second = [replace(run, sweep_id="later", id=f"later-{run.id}") for run in first]
    sides = [Measured.of(make.sweep(first), first), Measured.of(make.sweep(second, id="later"), second)]
    page = Page(devices_page(sides))
    assert [row["data-device"] for row in page.all("tr") if "data-device" in row][:2] == [
        "pi4b-emulated, 20261123-221500-3f2a",
        "pi4b-emulated, later",
    ]
    assert len(page.ids) == len(set(page.ids))


def test_where_all_keep_every_expert_in_memory_they_are_what_is_compared(make):
    words = Page(html_of(make, [run for run in make.runs() if run.cell.strategy == "full-load"])).words
    assert re.search(r"(?<!memory, )jetson-tx2-emulated is fastest: .{1,12} a token with full-load\.", words)


def test_nothing_measured_still_has_a_page(make):
    runs = [make.failed(device=device) for device in ("pi3b", "pi4b")]
    words = Page(html_of(make, runs)).words
    assert "Nothing was measured" in words and "failed" in words


def test_the_same_records_give_the_same_bytes_in_any_order(make):
    runs = [*make.runs(), make.failed(device="pi3b")]
    assert html_of(make, runs) == devices_page([Measured.of(make.sweep(runs), runs[::-1])])
