import re
from dataclasses import replace

import pytest

from reports.judging.judgement import Side, compare_sides
from reports.nights.gate import Measured
from reports.nights.night import ChangePoint, Confirmation, Finding, Kind, Night, Trend, TrendPoint
from reports.nights.trends import trends
from reports.pages.night_page import night_page
from reports.records import Fault, RunStatus, Verdict
from tests.reports.seen import Page

AT = "2026-11-25T06:00:00+00:00"
OLD, NEW = "a" * 64, "b" * 64


@pytest.fixture
def before(make):
    runs = [replace(run, engine_sha256=OLD) for run in make.runs()]
    return Measured.of(make.sweep(runs, started_at="2026-11-20T02:00:00+00:00"), runs)


@pytest.fixture
def tonight(make, before):
    """Slower on one device by one strategy, out of memory by another, suspect on the other device."""

    def slower(sample):
        return replace(sample, steps=replace(sample.steps, time_s=tuple(1.2 * t for t in sample.steps.time_s)))

    runs = []
    for run in before.runs:
        run = replace(run, id=f"tonight-{run.id}", sweep_id="tonight", engine_sha256=NEW)
        where = run.cell.device, run.cell.strategy
        if where == ("pi4b-emulated", "edgemoe"):
            run = replace(run, samples=tuple(map(slower, run.samples)))
        if where == ("pi4b-emulated", "full-load"):
            run = replace(
                run, status=RunStatus.OUT_OF_MEMORY, verdict=Verdict.INVALID, fault=Fault.OUT_OF_MEMORY,
                reasons=("needs 171 MiB",), samples=(), totals=None,
            )  # fmt: skip
        if where == ("jetson-tx2-emulated", "edgemoe"):
            run = replace(run, verdict=Verdict.SUSPECT, reasons=("throttled: cool the board",))
        runs.append(run)
    return Measured.of(make.sweep(runs, id="tonight", started_at="2026-11-25T02:00:00+00:00"), runs)


@pytest.fixture
def night(make, before, tonight):
    cell = make.cell()
    points = tuple(
        TrendPoint(
            f"s{day}",
            f"2026-11-{day}T02:00:00+00:00",
            level,
            level * 0.98,
            level * 1.03,
            engine,
            (),
            f"0.1.0+g{engine[:12]}",
        )
        for day, level, engine in ((21, 0.10, OLD), (22, 0.10, OLD), (23, 0.10, OLD), (24, 0.12, NEW), (25, 0.12, NEW))
    )
    found = trends(tonight, ("tpot_s",), [])
    trend = Trend(cell, "tpot_s", points, (ChangePoint(3, 0.10, 0.12, 0.005),), ((3, "kernel 6.1 → 6.6"),))
    return Night(
        "tonight", "farm", AT, 1, "main",
        compare_sides(Side("main", before.runs), Side("tonight", tonight.runs)),
        (
            Finding(Kind.REGRESSION, "confirmed: 20 % slower", cell, "tpot_s"),
            Finding(Kind.MISSING, "1 of 3 results are missing", make.cell("jetson-tx2-emulated"), "result"),
            Finding(Kind.INFRASTRUCTURE, "the webhook was away"),
        ),
        (Confirmation(cell, "tpot_s", 1.2, 1.15, 1.25, True, "again", "confirmed", 0.001, 12),),
        (Finding(Kind.REGRESSION, "known since May", make.cell("jetson-tx2-emulated", "full-load"), "ttft_s"),),
        (), (trend, *(t for t in found if t.cell != cell)),
    )  # fmt: skip


@pytest.fixture
def html(night, tonight, before):
    return night_page(night, tonight, [before], before.sweep.id)


def test_the_first_sentence_says_how_it_ended_and_where(html) -> None:
    words = Page(html).words
    assert "1 regression against main: edgemoe (10 experts) on pi4b-emulated." in words
    assert "Exit code 1. Judged 2026-11-25 06:00:00 UTC against main, sweep 20261123-221500-3f2a" in words
    assert 'class="lede outcome bad"' in html


@pytest.mark.parametrize(
    ("findings", "code", "sentence", "colour"),
    [
        ((), 0, "No regression against main; too noisy to say in 1 of 21 comparisons.", "good"),
        ((Finding(Kind.MISSING, "it was unplugged"),), 3, "1 result missing against main, and no regression.", "bad"),
        ((Finding(Kind.INFRASTRUCTURE, "no device"),), 4, "The devices could not be used", "bad"),
        ((Finding(Kind.INCONCLUSIVE, "too much noise"),), 5, "1 result inconclusive against main", "warn"),
    ],
)
def test_other_endings_have_their_sentence(night, tonight, findings, code, sentence, colour) -> None:
    html = night_page(replace(night, findings=findings, exit_code=code), tonight)
    assert sentence in Page(html).words and f'class="lede outcome {colour}"' in html
    assert all(finding.reason in html for finding in findings)


def test_a_finding_says_what_where_and_since_when_and_leads_on(html) -> None:
    (item,) = re.findall(r"<li[^>]*>\n<p><span class=\"mark regression\">Time per token.*?</li>", html, re.S)
    words = Page(item).words
    assert (
        "tiny-mixtral-int4 / dialogue / cold confirmed: 20 % slower since the night of 2026-11-24, sweep s24" in words
    )
    after, was = (f"engine {sha256[:12]} of farm 0.1.0+g{sha256[:12]}" for sha256 in (NEW, OLD))
    assert f"{after}, before that {was}; that night changed, too: kernel 6.1 → 6.6" in words
    assert "trend · tonight's samples · the baseline's samples" in words
    targets = [a["href"].removeprefix("#") for a in Page(item).all("a")]
    raw = {title: anchor for anchor, title in re.findall(r'id="(raw-\d+)"[^>]*>\n<summary>(.*?)</summary>', html)}
    tonights = [anchor for title, anchor in raw.items() if "tonight" in title and "pi4b-emulated / tiny" in title]
    assert targets[0] == "trend-0" and targets[1] in tonights and targets[2] not in tonights


def test_what_is_acknowledged_is_shown_apart(html) -> None:
    acknowledged = html.split('id="acknowledged"')[1].split("</section>")[0]
    assert "known since May" in acknowledged
    assert "known since May" not in html.split('id="acknowledged"')[0]


def test_what_was_measured_again_has_its_interval(html) -> None:
    words = Page(html).words
    assert "pi4b-emulated, edgemoe (10 experts): Time per token 1.200 (1.15–1.25)" in words
    assert "confirmed +20.0% +15.0% to +25.0% 12 0.001 confirmed" in words


def test_trends_of_findings_come_first_with_band_and_change(html, night, tonight) -> None:
    first = html.split('id="trend-0"')[1].split("</figure>")[0]
    assert 'class="band"' in first and 'class="rule change"' in first and 'class="rule environment"' in first
    assert "+20.0%" in first and "2026-11-24: from 100\u202fms to 120\u202fms, p = 0.005" in first
    assert "2026-11-21  100\u202fms (98–103)  s21  engine aaaaaaaaaaaa" in first
    alone = replace(
        night, trends=tuple(replace(t, points=t.points[-1:], changes=(), environment=()) for t in night.trends)
    )
    assert 'id="trends"' not in night_page(alone, tonight)  # one night is no trend


def test_every_result_has_its_row_and_its_mark(html) -> None:
    table = html.split('id="comparison-table"')[1].split("</table>")[0]
    rows = re.findall(r'<tr data-device="(.*?)" data-strategy="(.*?)".*?(?: data-mark="(\w+)")?>\n', table)
    marks = {(device, strategy): mark for device, strategy, mark in rows}
    assert marks["pi4b-emulated", "edgemoe"] == "worse"
    assert marks["pi4b-emulated", "full-load"] == "failing"
    assert marks["jetson-tx2-emulated", "edgemoe"] == "suspect"
    assert marks["pi4b-emulated", "naive-swap"] in ("unchanged", "inconclusive")
    words = Page(f"<table{table}</table>").words
    assert re.search(r"\+20\.0% worse [\d.]+ → [\d.]+ ms", words)
    assert "throttled: cool the board" in words and "same answer" in words


def test_the_first_night_has_medians(night, tonight) -> None:
    hint = Finding(Kind.INCONCLUSIVE, "no baseline main is pinned, so nothing was compared")
    first = replace(night, baseline=None, comparison=None, findings=(hint,), confirmations=(), acknowledged=())
    words = Page(night_page(first, tonight)).words
    assert "no baseline is pinned" in words and "there is no baseline to compare with" in words
    assert re.search(r"jetson-tx2-emulated naive-swap tiny-mixtral-int4 / dialogue / cold [\d.]+ ms", words)


def test_a_night_of_many_cells_draws_what_matters_and_says_what_is_left(night, tonight) -> None:
    cells = [replace(trend.cell, workload=f"w{i}") for i in range(40) for trend in night.trends[:2]]
    many = replace(night, trends=(*(replace(night.trends[0], cell=cell) for cell in cells), night.trends[0]))
    html = night_page(many, tonight)
    assert html.count('class="band"') == 40
    assert "41 other trends of this night are only in the table" in html
    assert "edgemoe (10 experts) on pi4b-emulated<small>tiny-mixtral-int4 / dialogue" in html.split('id="trend-0"')[1]


def test_of_many_findings_the_first_are_told_and_the_others_counted(night, tonight) -> None:
    first = next(finding for finding in night.findings if finding.cell)
    many = [replace(first, cell=replace(first.cell, workload=f"w{i}"), kind=Kind.INCONCLUSIVE) for i in range(100)]
    page = night_page(replace(night, findings=(*night.findings, *many)), tonight)
    listed = page.split('id="findings"')[1].split("</section>")[0]
    undecided = sum(finding.kind is Kind.INCONCLUSIVE for finding in night.findings)
    assert f'Inconclusive <span class="quiet">{100 + undecided}</span>' in listed
    assert f"And {40 + undecided} more." in listed
    assert re.findall(r"/ w(\d+) /", listed)[-1] == str(59 - undecided)
    assert "more." not in night_page(night, tonight).split('id="findings"')[1].split("</section>")[0]


def test_the_same_night_gives_the_same_bytes(html, night, tonight, before) -> None:
    other = Measured(tonight.sweep, tonight.runs[::-1])
    assert night_page(night, other, [before], before.sweep.id) == html
