from dataclasses import replace

import pytest

from reports.judging.groups import compare
from reports.judging.headline import across_devices, headline, sentence
from reports.records import Verdict


def suspect(run):
    return replace(run, verdict=Verdict.SUSPECT, reasons=("throttled during the run",))


def one_group(make, runs, **changes):
    (group,) = compare(make.sweep(runs, **changes), runs)
    return group


def row(group, strategy):
    return next(r for r in group.rows if r.strategy == strategy)


def test_only_strategy_and_budget_differ_within_a_group(make) -> None:
    runs = make.runs()
    warm = [replace(r, id=r.id + "w", cell=replace(r.cell, page_cache="warm")) for r in runs]
    groups = compare(make.sweep(runs + warm), runs + warm)
    places = [(g.device, g.page_cache) for g in groups]
    assert places == [(d, p) for p in ("cold", "warm") for d in ("pi4b-emulated", "jetson-tx2-emulated")]
    assert all([r.strategy for r in g.rows] == ["naive-swap", "full-load", "edgemoe"] for g in groups)
    assert all(len(r.runs) == 3 for g in groups for r in g.rows)


def test_the_order_is_that_of_the_plan_whatever_the_order_of_the_runs(make) -> None:
    runs = make.runs()
    assert compare(make.sweep(runs), runs[::-1]) == compare(make.sweep(runs), runs)


def test_suspect_runs_stand_aside_for_valid_ones_and_invalid_ones_are_never_used(make) -> None:
    runs = make.runs(devices=("pi4b-emulated",), blocks=2)
    runs[2] = suspect(runs[2])
    edgemoe = row(one_group(make, runs), "edgemoe")
    assert (edgemoe.verdict, [r.block for r in edgemoe.runs]) == (Verdict.VALID, [1])

    runs[5] = suspect(runs[5])
    edgemoe = row(one_group(make, runs), "edgemoe")
    assert (edgemoe.verdict, len(edgemoe.runs)) == (Verdict.SUSPECT, 2)
    assert (edgemoe.speed_up, edgemoe.no_speed_up) == (None, "its runs are suspect")

    runs[2], runs[5] = (replace(r, verdict=Verdict.INVALID) for r in (runs[2], runs[5]))
    assert [r.strategy for r in one_group(make, runs).rows] == ["naive-swap", "full-load"]


def test_a_baseline_without_a_budget_serves_every_budget(make) -> None:
    small = [make.run(block=b) for b in range(2)]
    large = [replace(r, id=r.id + "l", cell=replace(r.cell, expert_budget="16777216")) for r in small]
    naive = [make.run(strategy="naive-swap", block=b) for b in range(2)]
    group = one_group(make, naive + small + large)
    assert [r.name for r in group.rows] == ["naive-swap", "edgemoe (10 experts)", "edgemoe (16\u202fMiB)"]
    assert all(r.speed_up.ratio > 3 for r in group.rows[1:])


def test_a_baseline_with_budgets_serves_its_own(make) -> None:
    edgemoe = [make.run()]
    naive = [
        replace(make.run(strategy="naive-swap"), id=budget, cell=make.cell(strategy="naive-swap", expert_budget=budget))
        for budget in ("4-experts", "8-experts")
    ]
    assert row(one_group(make, naive + edgemoe), "edgemoe").no_speed_up == (
        "naive-swap was measured with several other budgets"
    )
    same = [replace(run, cell=replace(run.cell, expert_budget="8-experts")) for run in edgemoe]
    assert row(one_group(make, naive + same), "edgemoe").speed_up is not None


def test_other_tokens_are_noticed(make) -> None:
    runs = make.runs(devices=("pi4b-emulated",), blocks=2)
    assert one_group(make, runs).other_tokens == ()
    wrong = replace(runs[2].samples[-1], tokens=tuple(t + 1 for t in runs[2].samples[-1].tokens))
    runs[2] = replace(runs[2], samples=(*runs[2].samples[:-1], wrong))
    assert one_group(make, runs).other_tokens == ("edgemoe (10 experts)",)
    assert one_group(make, runs[:1]).other_tokens is None


def test_the_sentence_says_what_the_rows_say(make) -> None:
    runs = make.runs(devices=("pi4b-emulated",))
    group = one_group(make, runs)
    speed = row(group, "edgemoe").speed_up
    assert sentence(group) == (
        f"On pi4b-emulated, edgemoe (10 experts) generates a token {speed.ratio:.1f}× faster than naive-swap "
        f"(95 % interval {speed.low:.1f}–{speed.high:.1f}), with 2.6× less memory than full-load."
    )
    assert headline([group]) == sentence(group)


def test_the_sentence_admits_a_loss(make) -> None:
    """Against full-load edgemoe is slower, and saves memory."""
    text = sentence(one_group(make, make.runs(devices=("pi4b-emulated",)), baseline="full-load"))
    assert "slower than full-load" in text
    assert text.endswith("with 2.6× less memory than full-load.")


def test_the_sentence_admits_more_memory(make) -> None:
    group = one_group(make, make.runs(devices=("pi4b-emulated",)))
    peak = row(group, "full-load").summaries["peak_resident_bytes"].median
    ours = row(group, "edgemoe")
    larger = replace(ours.summaries["peak_resident_bytes"], median=2.5 * peak)
    ours = replace(ours, summaries=ours.summaries | {"peak_resident_bytes": larger})
    rows = tuple(ours if each.strategy == "edgemoe" else each for each in group.rows)
    assert sentence(replace(group, rows=rows)).endswith("), with 2.5× the memory of full-load.")


def test_the_sentence_admits_no_difference(make) -> None:
    runs = [make.run(block=b, seed=1) for b in range(4)]
    twin = [replace(make.run(block=b, seed=2), id=f"twin-{b}", cell=make.cell(strategy="lru")) for b in range(4)]
    text = sentence(one_group(make, runs + twin, baseline="edgemoe"))
    assert "neither measurably faster nor slower than edgemoe" in text


@pytest.mark.parametrize(
    ("strategies", "text"),
    [
        (["naive-swap"], "nothing was measured beside it"),
        (["edgemoe"], "cannot be compared with naive-swap: naive-swap was not measured"),
        (["naive-swap", "full-load"], "full-load generates a token 16.0× faster than naive-swap"),
    ],
)
def test_the_sentence_stands_with_whatever_was_measured(make, strategies, text) -> None:
    runs = [make.run(strategy=s, block=b) for b in range(2) for s in strategies]
    assert text in sentence(one_group(make, runs)).replace("16.1", "16.0")


def test_a_headline_over_devices_spans_them(make) -> None:
    runs = make.runs()
    groups = compare(make.sweep(runs), runs)
    low, high = sorted(row(g, "edgemoe").speed_up.ratio for g in groups)
    assert headline(groups) == (
        f"On 2 devices, edgemoe generates a token {low:.1f}–{high:.1f}× faster than naive-swap, "
        "with 2.6× less memory than full-load."
    )


def with_median(group, strategy, metric, median):
    """The group with another median of a metric for one strategy; None: no value."""
    summaries = {
        r.strategy: r.summaries | {metric: median and replace(r.summaries[metric], median=median)}
        if r.strategy == strategy
        else r.summaries
        for r in group.rows
    }
    return replace(group, rows=tuple(replace(r, summaries=summaries[r.strategy]) for r in group.rows))


@pytest.mark.parametrize(
    ("times", "told"),
    [(1.5, "1.50× less memory than full-load."), (1.0, "faster than naive-swap."), (0.5, "faster than naive-swap.")],
)
def test_a_headline_tells_of_any_saving_of_memory_and_of_nothing_else(make, times: float, told: str) -> None:
    runs = make.runs()
    groups = compare(make.sweep(runs), runs)
    peaks = [row(g, "full-load").summaries["peak_resident_bytes"].median for g in groups]
    changed = [
        with_median(g, "edgemoe", "peak_resident_bytes", peak / times) for g, peak in zip(groups, peaks, strict=True)
    ]
    assert headline(changed).endswith(told)


def test_across_devices_the_fastest_that_has_a_time_is_named(make) -> None:
    runs = make.runs()
    groups = compare(make.sweep(runs), runs)
    pi, jetson = (with_median(g, "naive-swap", "tpot_s", None) for g in groups)
    text = across_devices([pi, jetson])
    assert text.startswith("Of what does not keep all experts in memory, jetson-tx2-emulated is fastest: ")
    assert " a token with edgemoe (10 experts). pi4b-emulated takes " in text
    nothing = with_median(jetson, "edgemoe", "tpot_s", None)
    assert "pi4b-emulated alone gave numbers" in across_devices([pi, nothing])
    assert across_devices([with_median(nothing, "full-load", "tpot_s", None)]) == (
        "No device generated a token after the first."
    )


def test_a_headline_counts_where_it_cannot_boast(make) -> None:
    runs = [r for r in make.runs() if r.cell.strategy != "naive-swap" or r.cell.device == "pi4b-emulated"]
    assert "in 1 of 2 comparisons on 2 devices" in headline(compare(make.sweep(runs), runs))
    assert headline([]).startswith("Nothing was measured")
