import math
import re
from dataclasses import replace

import pytest

from engine.protocol import Course, Passage
from reports.nights.gate import Measured
from reports.pages.strategies import strategies_page
from reports.records import Conditions, Fault, RunStatus, Verdict
from tests.programs.scale.sides import complete
from tests.reports.seen import HOSTILE, Page


def html_of(sweep, runs):
    return strategies_page([Measured.of(sweep, runs)])


def page_of(make, runs, **changes):
    return Page(html_of(make.sweep(runs, **changes), runs))


def test_the_same_records_give_the_same_bytes_in_any_order(make):
    runs = [*make.runs(), make.failed(device="pi3b")]
    assert html_of(make.sweep(runs), runs) == html_of(make.sweep(runs), runs[::-1])


def test_every_number_from_emulated_conditions_is_marked(make):
    runs = make.runs(devices=("pi4b-emulated",))
    html = html_of(make.sweep(runs), runs)
    for place in ('class="lede"', '<h2 id="comparison', "<caption", "<article"):
        (line,) = re.findall(f"{place}.*?(?:</p>|</h2>|</caption>|</h3>)", html, re.DOTALL)
        assert ">emulated</span>" in line
    captions = re.findall('<figcaption>(?!<span class="dot).*?</figcaption>', html)
    assert len(captions) == 7 and all(">emulated</span>" in caption for caption in captions)
    assert all(">emulated</span>" in heading for heading in re.findall("<h3>Time of.*?</h3>", html))
    summaries = re.findall('<details class="raw".*?</summary>', html, re.DOTALL)
    assert len(summaries) == 3 and all(">emulated</span>" in summary for summary in summaries)
    real = [replace(run, emulated=()) for run in runs]
    assert ">emulated</span>" not in html_of(make.sweep(real), real)


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
    assert len(page.ids) == len(set(page.ids))
    drawings = page.all("svg")
    assert len(drawings) == 2 * (7 + 3)
    assert all(set(svg["aria-labelledby"].split()) <= set(page.ids) and svg["role"] == "img" for svg in drawings)


def test_what_failed_is_missing_or_doubtful_is_told_with_its_reason(make):
    runs = make.runs(devices=("pi4b-emulated",), blocks=2)
    runs[1] = replace(runs[1], verdict=Verdict.SUSPECT, reasons=("throttled: cool the board",))
    runs[5] = replace(runs[5], verdict=Verdict.INVALID, reasons=("the clock jumped",))
    lost = [
        make.failed(RunStatus.OUT_OF_MEMORY, "needs 171 MiB", device="pi3b", block=b, log_tail="Killed") for b in (0, 1)
    ]
    lost += [make.failed(RunStatus.UNREACHABLE, "no answer", device="orin", fault=Fault.LINK_LOST)]
    sweep = make.sweep(runs + lost)
    sweep = replace(sweep, planned=(*sweep.planned, ("orin/m/edgemoe/default/w/cold", 0)))
    words = Page(html_of(sweep, runs + lost)).words
    assert "10 planned 6 measured 2 out of memory 1 unreachable 1 suspect 1 invalid 1 missing" in words
    assert "suspect pi4b-emulated / tiny-mixtral-int4 / full-load / default / dialogue / cold" in words
    assert "throttled: cool the board" in words and "the clock jumped" in words
    assert re.search(
        "out of memory pi3b / .{1,80} blocks 1, 2 needs 171 MiB Command on the device .* End .* log Killed", words
    )
    assert re.search("unreachable orin / .{1,80} block 1; fault: link lost no answer", words)
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
    assert len(page.all("svg")) == (2 if tokens == 1 else 10)
    assert all(path["d"].count("L") <= 322 for path in page.all("path"))
    assert "nan" not in " ".join(path["d"] for path in page.all("path"))


def test_one_outlier_does_not_flatten_the_others(make):
    runs = make.runs(devices=("pi4b-emulated",), blocks=3)
    sample = runs[0].samples[-1]
    steps = replace(sample.steps, time_s=(*sample.steps.time_s[:-1], 60.0))
    runs[0] = replace(runs[0], samples=(*runs[0].samples[:-1], replace(sample, steps=steps)))
    assert "1 step lies above the axis" in page_of(make, runs).words


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
    assert "Perplexity" not in page_of(make, make.runs()).words.split("How to read the numbers")[0]


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
    assert HOSTILE.split("\x1b")[0].split("/")[0] in page.words
    assert "Energy per token" not in page_of(make, [make.run()]).words.split("How to read the numbers")[0]


def test_what_a_token_consists_of_and_what_loading_did_is_shown_where_it_was_seen(make):
    runs = [complete(run) for run in make.runs(devices=("pi4b-emulated",), blocks=1)]
    page = page_of(make, runs)
    for title in ("Where a token's time goes", "Memory over time", "Hit rate by layer", "Distribution over tokens"):
        assert title in page.words
    timelines = [figure for figure in page.all("figure") if figure.get("class") == "timeline"]
    assert len(timelines) == 3 and all("data-zoom" in figure for figure in timelines)
    kinds = {path["class"] for path in page.all("path") if path.get("class", "").startswith("span ")}
    assert {"span attention", "span experts", "span head"} <= kinds
    assert kinds & {"span demanded", "span preloaded"}
    assert re.search(r"compute attention: layer \d+, at [\d.]+ ms, [\d.]+ ms", page.words)
    bare = page_of(make, make.runs(devices=("pi4b-emulated",), blocks=1))
    assert "Hit rate by layer" not in bare.words and not [f for f in bare.all("figure") if "data-zoom" in f]


def test_several_sweeps_share_a_page_and_say_which_they_are(make):
    first = make.runs(devices=("pi4b-emulated",), blocks=1)
    second = [replace(run, sweep_id="later", id=f"later-{run.id}") for run in first]
    sides = [Measured.of(make.sweep(first), first), Measured.of(make.sweep(second, id="later", name="again"), second)]
    page = Page(strategies_page(sides))
    assert "demo, again" in page.words and "again, later" in page.words
    assert len(page.ids) == len(set(page.ids))
    assert {a["href"] for a in page.all("a") if a["href"].startswith("#raw")} == {f"#raw-{i}" for i in range(6)}


def test_sorting_goes_by_values_and_not_by_their_text(make):
    page = page_of(make, make.runs())
    values = [cell["data-value"] for cell in page.all("td") if "data-value" in cell]
    assert len(values) == 6 * 7 and all(math.isfinite(float(value)) for value in values)
    assert {heading["data-sort"] for heading in page.all("th") if "data-sort" in heading} == {"text", "number"}
