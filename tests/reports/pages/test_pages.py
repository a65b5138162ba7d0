"""What all pages have in common, and which is chosen."""

import base64
import hashlib
import re
from dataclasses import replace
from pathlib import Path

import pytest

from reports.errors import ReportError, SelectionError, UnknownSweepError
from reports.nights.night import Night
from reports.pages import page, render
from reports.results.baselines import NightRecord
from reports.results.database import ResultsDatabase
from tests.programs.scale.sides import complete
from tests.reports.conftest import runs, sweep
from tests.reports.seen import HOSTILE, Page, pages_of

KINDS = ("strategies", "devices", "nightly")


@pytest.fixture(scope="module")
def pages():
    measured = [complete(run) for run in runs(blocks=2, tokens=12)]
    return pages_of(sweep(measured), measured)


@pytest.fixture
def database(tmp_path, make):
    runs = make.runs(blocks=2)
    with ResultsDatabase.open(tmp_path / "results.sqlite") as database:
        database.add_sweep(make.sweep(runs))
        for run in runs:
            database.add_run(run)
        yield database


def judged(database, sweep_id, **changes):
    night = Night(sweep_id, "demo", "2026-11-24T06:00:00+00:00", 0, **changes)
    database.add_night(NightRecord(sweep_id, "demo", None, night.at, 0, night.to_json()))


def title_of(html):
    (kind,) = re.findall('<p class="overline">EdgeMoE Farm: (.*?)</p>', html)
    return kind


def test_a_page_is_written_whole_from_the_database(database, tmp_path):
    written = render(database, ["latest"], tmp_path / "page.html")
    assert written.read_text() == page(database, ["latest"])
    with pytest.raises(UnknownSweepError):
        render(database, ["1999"], tmp_path / "page.html")
    with pytest.raises(ReportError, match="cannot write"):
        render(database, ["latest"], tmp_path / "nowhere" / "page.html")


def test_auto_goes_by_what_there_is(database, make):
    assert title_of(page(database, ["latest"])) == "strategies"
    many = [
        replace(run, id=f"{run.id}-{i}", sweep_id="many", cell=replace(run.cell, device=f"pi{i}"))
        for i in range(4)
        for run in make.runs(devices=("pi4b-emulated",), blocks=1)
    ]
    database.add_sweep(make.sweep(many, id="many", started_at="2026-11-22T22:15:00+00:00"))
    for run in many:
        database.add_run(run)
    assert title_of(page(database, ["many"])) == "devices"
    assert title_of(page(database, ["many"], "strategies")) == "strategies"
    assert title_of(page(database, ["many", "latest"], "devices")) == "devices"
    judged(database, "many")
    assert title_of(page(database, ["many"])) == "nightly"
    assert title_of(page(database, ["many", "latest"])) == "devices"


def test_a_night_is_shown_only_where_there_is_one(database):
    with pytest.raises(SelectionError, match="was not judged as a night"):
        page(database, ["latest"], "nightly")
    database.add_sweep(replace(database.sweep("latest"), id="other"))
    with pytest.raises(SelectionError, match="several sweeps were not"):
        page(database, ["2026", "other"], "nightly")


def test_the_same_sweep_named_twice_is_one(database):
    assert page(database, ["latest", "2026"]) == page(database, ["latest"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_needs_nothing_but_itself_and_its_policy_allows_nothing_else(pages, kind):
    seen = Page(pages[kind])

    def digest(text):
        return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

    (style,), (script,) = seen.styles, seen.scripts
    (policy,) = [m["content"] for m in seen.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert policy == (
        f"default-src 'none'; style-src 'sha256-{digest(style)}'; script-src 'sha256-{digest(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    assert not {tag for tag, _ in seen.elements} & {"link", "img", "iframe", "object", "base"}
    for _, attributes in seen.elements:
        assert not {"style", "src", "srcset", "action"} & attributes.keys()
        assert not any(name.startswith("on") for name in attributes)
        assert attributes.get("href", "#").startswith("#")
    assert "url(" not in style and "@import" not in style
    assert not re.search(r"\b(fetch|XMLHttpRequest|import|eval|innerHTML|WebSocket)\b *[(=]", script)


@pytest.mark.parametrize("kind", KINDS)
def test_links_lead_somewhere_and_no_id_stands_twice(pages, kind):
    seen = Page(pages[kind])
    assert len(seen.ids) == len(set(seen.ids))
    links = {a["href"].removeprefix("#") for a in seen.all("a")}
    assert links and links <= set(seen.ids)
    named = {name for _, each in seen.elements for name in each.get("aria-labelledby", "").split()}
    assert named and named <= set(seen.ids)
    raw = {identity for identity in seen.ids if re.fullmatch(r"raw-\d+", identity)}
    assert len(raw) == 6 and raw <= links  # each cell's samples are reached


@pytest.mark.parametrize("kind", KINDS)
def test_every_chart_has_its_name_and_its_numbers_in_words(pages, kind):
    seen = Page(pages[kind])
    for svg in seen.all("svg"):
        is_within = svg.get("class") == "spans"
        assert is_within or svg.get("aria-hidden") == "true" or (svg["role"] == "img" and svg["aria-labelledby"])
    assert len(seen.all("desc")) == len([svg for svg in seen.all("svg") if svg.get("role") == "img"])
    assert "nan" not in " ".join(path["d"] for path in seen.all("path"))


def test_hostile_text_stays_text_everywhere(make, pages):
    name = "<script>alert(1)<\\script>\"'&"  # a key has no "/"
    cell = make.cell(device=name, container=name, strategy=name, expert_budget=name, workload=name, page_cache=name)
    facts = replace(
        make.facts(), **dict.fromkeys(("hostname", "machine", "kernel", "os", "model", "cpu", "boot_id"), HOSTILE)
    )
    bad = {"cell": cell, "emulated": (HOSTILE,), "command": HOSTILE, "engine_sha256": HOSTILE, "farm_version": HOSTILE}
    good = replace(complete(make.run(facts=facts)), **bad)
    good = replace(good, load=replace(good.load, strategy={HOSTILE: HOSTILE}, reader=HOSTILE, warnings=(HOSTILE,)))
    failed = replace(make.failed(reason=HOSTILE, log_tail=HOSTILE, block=1), **bad)
    sweep = make.sweep([good, failed], name=HOSTILE, matrix_toml=HOSTILE, baseline=HOSTILE, farm_version=HOSTILE)
    sweep = replace(sweep, planned=(*sweep.planned, (HOSTILE, 3)))
    for kind, html in pages_of(sweep, [good, failed], HOSTILE).items():
        seen, usual = Page(html), Page(pages[kind])
        assert {tag for tag, _ in seen.elements} <= {tag for tag, _ in usual.elements} | {
            "details",
            "summary",
            "pre",
            "nav",
        }
        assert {a for _, each in seen.elements for a in each} <= {a for _, each in usual.elements for a in each}
        assert "alert(1)" in seen.words and "{{ 7 * 7 }}" in seen.words
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e\ud800-\udfff]", html)


def test_whatever_a_chart_draws_or_a_table_marks_has_a_style():
    style = (Path(__file__).parents[3] / "reports" / "templates" / "page.css").read_text()
    from engine.spans import COMPUTED, LOADED
    from reports.charts.samples import PARTS
    from reports.judging.judgement import Mark
    from reports.nights.night import Kind

    for name in (*COMPUTED, *LOADED, *PARTS, *(mark.value for mark in Mark), *(kind.value for kind in Kind)):
        assert re.search(rf"\.{name}\b", style), name
