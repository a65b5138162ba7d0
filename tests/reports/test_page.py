import base64
import hashlib
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from reports.page import render, render_html

from engine.protocol import Course, Passage
from reports import charts
from reports.database import ResultsDatabase
from reports.errors import ReportError, UnknownSweepError
from reports.records import Conditions, RunStatus, Verdict

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&{{ 7 * 7 }}\x1b[31m\u202e\ud800"


class Page(HTMLParser):
    """What a browser would see: elements with their attributes, and text."""

    VOID = frozenset(("meta", "line", "rect", "path", "br", "img", "link", "circle"))

    def __init__(self, html):
        super().__init__()
        self.elements, self.text, self.open, self.styles = [], [], [], []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        (self.styles if self.open[-1:] == ["style"] else self.text).append(data)

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def page_of(make, runs, **changes):
    return Page(render_html(make.sweep(runs, **changes), runs))


def test_the_page_is_written_whole_from_the_database(tmp_path, make):
    runs = make.runs()
    with ResultsDatabase.open(tmp_path / "results.sqlite") as database:
        database.add_sweep(make.sweep(runs))
        for run in runs:
            database.add_run(run)
        page = render(database, "latest", tmp_path / "page.html")
        assert page.read_text() == render_html(make.sweep(runs), runs)
        with pytest.raises(UnknownSweepError):
            render(database, "1999", tmp_path / "page.html")
        with pytest.raises(ReportError, match="cannot write"):
            render(database, "latest", tmp_path / "nowhere" / "page.html")


def test_the_same_records_give_the_same_bytes_in_any_order(make):
    runs = [*make.runs(), make.failed(device="pi3b")]
    assert render_html(make.sweep(runs), runs) == render_html(make.sweep(runs), runs[::-1])


def test_the_page_needs_nothing_but_itself_and_its_policy_allows_nothing_else(make):
    html = render_html(make.sweep(make.runs()), make.runs())
    page = Page(html)
    (style,) = page.styles
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    (policy,) = [m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert policy == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    assert not {tag for tag, _ in page.elements} & {"script", "link", "img", "iframe", "object", "form", "base"}
    for _, attributes in page.elements:
        assert not {"style", "src", "srcset"} & attributes.keys()
        assert not any(name.startswith("on") for name in attributes)
        assert attributes.get("href", "#").startswith("#")
    assert "url(" not in style and "@import" not in style


def test_hostile_text_stays_text_everywhere(make):
    name = "<script>alert(1)<\\script>\"'&"  # a key has no "/"
    cell = make.cell(device=name, container=name, strategy=name, expert_budget=name, workload=name, page_cache=name)
    facts = replace(
        make.facts(), **dict.fromkeys(("hostname", "machine", "kernel", "os", "model", "cpu", "boot_id"), HOSTILE)
    )
    bad = {"cell": cell, "emulated": (HOSTILE,), "command": HOSTILE, "engine_sha256": HOSTILE, "farm_version": HOSTILE}
    good = make.run(facts=facts, **bad)
    good = replace(good, load=replace(good.load, strategy={HOSTILE: HOSTILE}, reader=HOSTILE, warnings=(HOSTILE,)))
    failed = replace(make.failed(reason=HOSTILE, log_tail=HOSTILE, block=1), **bad)
    sweep = make.sweep([good, failed], name=HOSTILE, matrix_toml=HOSTILE, baseline=HOSTILE, farm_version=HOSTILE)
    sweep = replace(sweep, planned=(*sweep.planned, (HOSTILE, 3)))
    html = render_html(sweep, [good, failed])
    page = Page(html)
    benign = Page(render_html(make.sweep(make.runs()), make.runs()))
    assert {tag for tag, _ in page.elements} <= {tag for tag, _ in benign.elements} | {"details", "summary", "pre"}
    assert "alert(1)" in page.words and "{{ 7 * 7 }}" in page.words
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e\ud800-\udfff]", html)


def test_every_number_from_emulated_conditions_is_marked(make):
    runs = make.runs(devices=("pi4b-emulated",))
    html = render_html(make.sweep(runs), runs)
    for place in ('class="lede"', '<h2 id="comparison', "<caption>", "<article"):
        (line,) = re.findall(f"{place}.*?(?:</p>|</h2>|</caption>|</h3>)", html, re.DOTALL)
        assert ">emulated</span>" in line
    captions = re.findall('<figcaption>(?!<span class="dot).*?</figcaption>', html)
    assert len(captions) == 3 and all(">emulated</span>" in caption for caption in captions)
    summaries = re.findall('<details class="raw".*?</summary>', html, re.DOTALL)
    assert len(summaries) == 3 and all(">emulated</span>" in summary for summary in summaries)
    real = [replace(run, emulated=()) for run in runs]
    assert ">emulated</span>" not in render_html(make.sweep(real), real)


def test_every_number_leads_to_its_raw_samples(make):
    runs = make.runs()
    page = page_of(make, runs)
    targets = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    links = [a["href"].removeprefix("#") for a in page.all("a")]
    assert links and set(links) <= targets
    assert {link for link in links if link.startswith("raw-")} == {f"raw-{i}" for i in range(6)}
    steps = runs[0].samples[0].steps
    assert f"{steps.time_s[0] * 1e3:.3f}" in page.words and f"{steps.time_s[-1] * 1e3:.3f}" in page.words


def test_ids_are_unique_and_charts_are_named(make):
    page = page_of(make, make.runs())
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    drawings = page.all("svg")
    assert len(drawings) == 2 * (3 + 3)
    assert all(set(svg["aria-labelledby"].split()) <= set(ids) and svg["role"] == "img" for svg in drawings)


def test_what_failed_is_missing_or_doubtful_is_told_with_its_reason(make):
    runs = make.runs(devices=("pi4b-emulated",), blocks=2)
    runs[1] = replace(runs[1], verdict=Verdict.SUSPECT, reasons=("throttled: cool the board",))
    runs[5] = replace(runs[5], verdict=Verdict.INVALID, reasons=("the clock jumped",))
    lost = [
        make.failed(RunStatus.OUT_OF_MEMORY, "needs 171 MiB", device="pi3b", block=b, log_tail="Killed") for b in (0, 1)
    ]
    sweep = make.sweep(runs + lost)
    sweep = replace(sweep, planned=(*sweep.planned, ("orin/m/edgemoe/default/w/cold", 0)))
    words = Page(render_html(sweep, runs + lost)).words
    assert "9 planned 6 measured 2 out of memory 1 suspect 1 invalid 1 missing" in words
    assert "suspect pi4b-emulated / tiny-mixtral-int4 / full-load / default / dialogue / cold" in words
    assert "throttled: cool the board" in words and "the clock jumped" in words
    assert re.search("out of memory pi3b / .{1,80} blocks 1, 2 needs 171 MiB End of the engine's log Killed", words)
    assert re.search("missing orin / m / .{1,80} block 1 no record: the sweep was interrupted", words)


def test_different_answers_are_shouted(make):
    runs = make.runs(devices=("pi4b-emulated",), blocks=1)
    assert "All strategies generated the same tokens." in page_of(make, runs).words
    wrong = tuple(replace(s, tokens=tuple(t + 1 for t in s.tokens)) for s in runs[2].samples)
    runs[2] = replace(runs[2], samples=wrong)
    words = page_of(make, runs).words
    assert "Different answers. edgemoe (10 experts) did not generate the same tokens as naive-swap" in words
    assert "All strategies generated the same tokens." not in words


def test_a_sweep_without_a_single_number_still_has_a_page(make):
    runs = [make.failed(strategy=s) for s in ("naive-swap", "edgemoe")]
    words = page_of(make, runs).words
    assert "Nothing was measured" in words and "exit status 3" in words


def test_a_fact_that_changed_within_the_sweep_is_seen(make):
    runs = make.runs(devices=("pi4b-emulated",), blocks=2)
    runs[3] = replace(runs[3], facts=replace(runs[3].facts, kernel="6.12.0"))
    assert "6.6.31+rpt-rpi-v8, then 6.12.0" in page_of(make, runs).words


@pytest.mark.parametrize(("tokens", "prompts", "repetitions"), [(1, 1, 1), (2, 1, 1), (700, 1, 1)])
def test_a_page_stands_with_few_and_with_many_tokens(make, tokens, prompts, repetitions):
    runs = make.runs(devices=("pi4b-emulated",), blocks=1, tokens=tokens, prompts=prompts, repetitions=repetitions)
    page = page_of(make, runs)
    assert len(page.all("svg")) == (1 if tokens == 1 else 6)
    assert all(path["d"].count("L") <= 322 for path in page.all("path"))
    assert "nan" not in " ".join(path["d"] for path in page.all("path"))


def test_one_outlier_does_not_flatten_the_others(make):
    runs = make.runs(devices=("pi4b-emulated",), blocks=3)
    sample = runs[0].samples[-1]
    steps = replace(sample.steps, time_s=(*sample.steps.time_s[:-1], 60.0))
    runs[0] = replace(runs[0], samples=(*runs[0].samples[:-1], replace(sample, steps=steps)))
    assert "1 step lies above the axis" in page_of(make, runs).words


@pytest.mark.parametrize(
    ("top", "ticks"),
    [
        (100, [0, 20, 40, 60, 80, 100]),
        (7.3, [0, 2, 4, 6, 8]),
        (0.031, [0, 0.01, 0.02, 0.03, 0.04]),
        (1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
    ],
)
def test_ticks_are_round_and_hold_the_top(top, ticks):
    assert charts.nice_ticks(top) == pytest.approx(ticks)


@pytest.mark.parametrize("nothing", [0.0, float("nan"), float("inf")])
def test_an_axis_without_values_still_exists(nothing):
    assert charts.nice_ticks(nothing) == [0.0, 1.0]


def test_what_a_lossy_strategy_loses_stands_beside_its_speed(make):
    """And a lossy one without a measured loss says that it has none."""
    passages = (Passage((1,), (2, 3)),)

    def with_loss(run, nats):
        totals = replace(run.totals, passage_nats=(nats,))
        return replace(run, request=replace(run.request, passages=passages), totals=totals)

    def lossy(run):
        return replace(run, load=replace(run.load, strategy={**run.load.strategy, "relief": "cache-aware"}))

    def other_tokens(run):
        return replace(run, samples=tuple(replace(s, tokens=tuple(t + 1 for t in s.tokens)) for s in run.samples))

    exact = with_loss(make.run(strategy="naive-swap"), 2 * math.log(100))
    rough = other_tokens(lossy(make.run(strategy="edgemoe")))
    page = page_of(make, [exact, with_loss(rough, 2 * math.log(102))])
    assert "Perplexity" in page.words
    assert "+2.00%" in page.words
    assert "Different answers" not in page.words
    page = page_of(make, [exact, rough])
    assert "loss not measured" in page.words
    labels = {cell.get("data-label") for cell in page_of(make, make.runs()).all("td")}
    assert "First token, ms" in labels or "First token, s" in labels
    assert "Perplexity, " not in labels


def test_each_run_shows_its_conditions(make):
    seen = Conditions(
        readings=40, cpu_s=0.02, temperature_c=Course(41.0, 55.5, 41.0, 56.0), governor=HOSTILE, throttled=True,
        throttle_causes=("under-voltage",), energy_j=30.0, watched_s=10.0, energy_sensor="ina VDD_IN", waited_s=12.0,
        memory_limit_bytes=1 << 29, memory_limit_method="cgroup-v2", memory_peak_bytes=1 << 28, absent=("battery",),
    )  # fmt: skip
    run = replace(make.run(), conditions=seen)
    page = page_of(make, [run, make.run(strategy="naive-swap")])
    for words in (
        "processor 41.0 °C, then 55.5 °C", "throttled: under-voltage", "by ina VDD_IN", "no sensor for battery",
        "by cgroup-v2", "40 readings", "Conditions: not recorded", "Energy per token",
    ):  # fmt: skip
        assert words in page.words
    assert not [tag for tag, _ in page.elements if tag == "script"]
    assert "Energy per token" not in page_of(make, [make.run()]).words.split("How to read the numbers")[0]
