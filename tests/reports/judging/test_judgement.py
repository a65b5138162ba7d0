import re
from dataclasses import replace

import pytest

from engine.protocol import Passage
from reports.judging.judgement import ANSWER, GATED, RESULT, Mark, Side, compare_sides, exit_code
from reports.metrics import METRICS
from reports.records import Fault, RunStatus, Verdict
from tests.reports.judging.test_statistics import slowed

TPOT = {"tpot_s": 0.03}
BEFORE, AFTER = "20261123-221500-3f2a", "20261124-221500-77aa"


def steady(make, factors=(1.0, 1.004, 0.997), *, sweep=BEFORE, factor=1.0, **changes):
    """Blocks that differ by little."""
    one = make.run(tokens=8, **changes)
    return tuple(
        replace(slowed(one, f * factor), block=b, sweep_id=sweep, id=f"{sweep}-{one.id}-{b}")
        for b, f in enumerate(factors)
    )


def compared(before, after, metrics=TPOT, **options):
    return compare_sides(Side("a", tuple(before)), Side("b", tuple(after)), metrics, **options)


def only(comparison, metric="tpot_s"):
    (judged,) = (j for j in comparison.judged if j.metric == metric)
    return judged


@pytest.mark.parametrize(
    ("factor", "mark", "code"), [(1.10, "worse", 1), (1.05, "worse", 1), (0.90, "better", 0), (1.01, "unchanged", 0)]
)
def test_a_change_counts_where_it_is_larger_than_the_threshold(make, factor, mark, code) -> None:
    found = compared(steady(make), steady(make, sweep=AFTER, factor=factor))
    judged = only(found)
    assert judged.mark == mark
    assert exit_code(found) == code
    assert judged.ratio == pytest.approx(factor)
    assert judged.candidate.median / judged.baseline.median == pytest.approx(judged.ratio)
    assert judged.ci_low < factor < judged.ci_high
    assert 0.03 < judged.minimum_detectable < 0.06


def test_more_is_better_of_some(make) -> None:
    found = compared(steady(make), steady(make, sweep=AFTER, factor=1.1), {"decode_tokens_per_s": 0.03})
    judged = only(found, "decode_tokens_per_s")
    assert (judged.mark, judged.ratio) == (Mark.WORSE, pytest.approx(1 / 1.1))


@pytest.mark.parametrize("factor", [3.0, 1.0, 0.5])
@pytest.mark.parametrize(
    ("fact", "old", "new", "said"),
    [("cores", 8, 2, r"other cores .*8 → 2"), ("power_mode", "MAXN", "15W", r"other power mode .*MAXN → 15W")],
)
def test_with_other_cores_than_the_baseline_nothing_can_be_said(make, factor, fact, old, new, said) -> None:
    def of(runs, value):
        return tuple(replace(run, facts=replace(run.facts, **{fact: value})) for run in runs)

    before, after = of(steady(make), old), of(steady(make, sweep=AFTER, factor=factor), new)
    found = compared(before, after)
    judged = only(found)
    assert (judged.mark, exit_code(found)) == (Mark.INCONCLUSIVE, 5)
    assert re.search(said, judged.reason)
    assert only(compared(before, of(after, old))).reason != judged.reason
    assert only(compared(before, after, across=("device",))).mark is not Mark.INCONCLUSIVE


def test_the_threshold_is_a_parameter(make) -> None:
    slower = steady(make, sweep=AFTER, factor=1.10)
    assert only(compared(steady(make), slower, {"tpot_s": 0.15})).mark is Mark.UNCHANGED


def test_no_difference_larger_than_the_noise_of_the_device_is_a_regression(make) -> None:
    before, after = steady(make), steady(make, sweep=AFTER, factor=1.08)
    assert "not known" in only(compared(before, after)).reason
    noisy = compared(before, after, noise={("pi4b-emulated", "tpot_s"): 0.12})
    assert (only(noisy).mark, only(noisy).noise, exit_code(noisy)) == (Mark.INCONCLUSIVE, 0.12, 5)
    assert "sweeps of one engine differ" in only(noisy).reason
    assert only(noisy).minimum_detectable > 0.12
    quiet = compared(before, after, noise={("pi4b-emulated", "tpot_s"): 0.02, ("other", "tpot_s"): 0.5})
    assert (only(quiet).mark, only(quiet).reason) == (Mark.WORSE, "")


def test_in_one_sweep_the_noise_between_sweeps_is_no_matter(make) -> None:
    after = steady(make, factor=1.08)
    judged = only(compared(steady(make), after, noise={("pi4b-emulated", "tpot_s"): 0.12}))
    assert (judged.mark, judged.noise) == (Mark.WORSE, None)


def test_too_much_spread_is_inconclusive_either_way(make) -> None:
    wild = (1.0, 1.3, 0.8)
    doubtful = compared(steady(make, wild), steady(make, wild, sweep=AFTER, factor=1.1))
    assert only(doubtful).mark is Mark.INCONCLUSIVE
    assert "may be no change at all" in only(doubtful).reason
    blind = compared(steady(make, wild), steady(make, wild, sweep=AFTER))
    assert only(blind).mark is Mark.INCONCLUSIVE
    assert "would have been found" in only(blind).reason
    assert exit_code(blind) == 5
    known = compared(steady(make, wild), steady(make, wild, sweep=AFTER), noise={("pi4b-emulated", "tpot_s"): 0.01})
    assert only(known).mark is Mark.UNCHANGED


def test_one_run_on_a_side_is_inconclusive(make) -> None:
    judged = only(compared(steady(make, (1.0,)), steady(make, (1.5,), sweep=AFTER)))
    assert (judged.mark, judged.ratio, judged.ci_low) == (Mark.INCONCLUSIVE, pytest.approx(1.5), None)


@pytest.mark.parametrize("verdicts", [("valid", "suspect"), ("suspect", "valid")])
def test_suspect_runs_are_suspect_and_never_a_regression(make, verdicts) -> None:
    sides = [
        [replace(run, verdict=Verdict(verdict), reasons=("throttled during the run",)) for run in runs]
        for verdict, runs in zip(verdicts, (steady(make), steady(make, sweep=AFTER, factor=2.0)), strict=True)
    ]
    found = compared(*sides)
    judged = only(found)
    assert (judged.mark, judged.ratio, exit_code(found)) == (Mark.SUSPECT, None, 5)
    assert judged.reason.startswith("throttled during the run (run ")


def test_valid_runs_count_and_suspect_ones_beside_them_do_not(make) -> None:
    after = steady(make, (1.0, 1.004, 0.997, 5.0), sweep=AFTER)
    after = [replace(r, verdict=Verdict.SUSPECT, reasons=("throttled",)) if r.block == 3 else r for r in after]
    judged = only(compared(steady(make), after))
    assert (judged.mark, judged.candidate.runs) == (Mark.UNCHANGED, 3)


def other_tokens(run):
    samples = tuple(replace(s, tokens=(*s.tokens[:5], s.tokens[5] + 1, *s.tokens[6:])) for s in run.samples)
    return replace(run, samples=samples)


def test_another_answer_is_worse_whatever_the_speed(make) -> None:
    after = [other_tokens(run) for run in steady(make, sweep=AFTER, factor=0.5)]
    found = compared(steady(make), after)
    assert (only(found).mark, only(found, ANSWER).mark, exit_code(found)) == (Mark.BETTER, Mark.WORSE, 1)
    assert only(found, ANSWER).reason == "the answer to prompt 0 differs from token 5 on, of a lossless strategy"
    suspect = [replace(run, verdict=Verdict.SUSPECT, reasons=("throttled",)) for run in after]
    assert exit_code(compared(steady(make), suspect)) == 1


def test_a_lossy_strategy_and_another_device_may_answer_otherwise(make) -> None:
    def lossy(runs):
        return [replace(r, load=replace(r.load, strategy={**r.load.strategy, "precision": "int4"})) for r in runs]

    after = [other_tokens(run) for run in steady(make, sweep=AFTER)]
    found = compared(lossy(steady(make)), lossy(after))
    assert [j.metric for j in found.judged] == ["tpot_s"]
    elsewhere = [other_tokens(run) for run in steady(make, device="jetson-tx2-emulated")]
    judged = only(compared(steady(make), elsewhere, across=("device",)), ANSWER)
    assert judged.mark is Mark.INCONCLUSIVE


def with_perplexity(runs, nats, text=6):
    return [
        replace(
            run,
            request=replace(run.request, passages=(Passage((5,), (text,) * 100),)),
            totals=replace(run.totals, passage_nats=(nats,)),
        )
        for run in runs
    ]


@pytest.mark.parametrize(
    ("nats", "mark"), [(230.0, "unchanged"), (231.0, "unchanged"), (232.1, "worse"), (1e9, "worse"), (227.0, "better")]
)
def test_a_loss_of_accuracy_of_two_per_cent_is_worse_whatever_the_speed(make, nats, mark) -> None:
    before, after = steady(make), steady(make, sweep=AFTER, factor=0.5)
    found = compared(with_perplexity(before, 230.0), with_perplexity(after, nats), GATED)
    assert only(found, "perplexity").mark == mark
    assert exit_code(found) == (1 if mark == "worse" else 0)


def test_perplexities_of_two_texts_are_not_compared(make) -> None:
    before, after = with_perplexity(steady(make), 230.0), with_perplexity(steady(make, sweep=AFTER), 400.0, text=9)
    found = compared(before, after, GATED)
    assert "perplexity" not in {j.metric for j in found.judged}
    assert found.incomparable == ((before[0].cell.key, "Perplexity: of another text, not compared"),)
    assert exit_code(found) == 5


def test_memory_is_judged_like_time(make) -> None:
    def larger(run):
        return replace(run, totals=replace(run.totals, peak_resident_bytes=run.totals.peak_resident_bytes * 2))

    found = compared(steady(make), [larger(run) for run in steady(make, sweep=AFTER)], GATED)
    assert only(found, "peak_resident_bytes").mark is Mark.WORSE


def test_what_has_no_logarithm_has_no_ratio(make) -> None:
    swap = steady(make, strategy="naive-swap")
    rate = {"expert_hit_rate": 0.05}
    assert only(compared(swap, steady(make, strategy="naive-swap", sweep=AFTER), rate), "expert_hit_rate").mark is (
        Mark.UNCHANGED
    )
    assert METRICS["expert_hit_rate"].of(swap[0]) == 0


def failed(make, fault, status=RunStatus.FAILED, **changes):
    return [make.failed(status, "it failed", fault=fault, block=b, tokens=8, **changes) for b in range(3)]


@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [
        (Fault.ENGINE, RunStatus.FAILED, 1),
        (Fault.WRONG_ANSWER, RunStatus.FAILED, 1),
        (Fault.OUT_OF_MEMORY, RunStatus.OUT_OF_MEMORY, 1),
        (None, RunStatus.TIMED_OUT, 1),  # recorded before faults were kept
        (Fault.LINK_LOST, RunStatus.UNREACHABLE, 4),
        (None, RunStatus.SKIPPED, 4),
    ],
)
def test_failing_is_a_regression_where_the_engine_is_to_blame(make, fault, status, code) -> None:
    found = compared(steady(make), failed(make, fault, status))
    judged = only(found, RESULT)
    assert (judged.mark, exit_code(found)) == (Mark.FAILING, code)
    assert "it failed (run " in judged.reason


def test_one_failing_block_is_told_and_the_others_are_compared(make) -> None:
    after = [*steady(make, (1.0, 1.003), sweep=AFTER), make.failed(fault=Fault.REBOOTED, block=2, tokens=8)]
    found = compared(steady(make), after)
    assert only(found, RESULT).reason.startswith("1 of 3 runs: failed: ")
    assert (only(found).mark, exit_code(found)) == (Mark.UNCHANGED, 3)


def test_what_failed_before_likewise_is_no_news(make) -> None:
    memory = failed(make, Fault.OUT_OF_MEMORY, RunStatus.OUT_OF_MEMORY)
    found = compared(memory, memory)
    assert (only(found, RESULT).mark, exit_code(found)) == (Mark.UNCHANGED, 0)
    assert only(compared(memory, failed(make, Fault.ENGINE)), RESULT).mark is Mark.FAILING
    assert only(compared(memory, steady(make)), RESULT).mark is Mark.BETTER


def test_new_and_gone_cells_are_told(make) -> None:
    both, gone, new = (steady(make, strategy=s) for s in ("edgemoe", "full-load", "naive-swap"))
    found = compared([*both, *gone], [*both, *new])
    assert {(j.cell.strategy, j.mark) for j in found.judged if j.metric == RESULT} == {
        ("full-load", Mark.GONE),
        ("naive-swap", Mark.NEW),
    }
    assert exit_code(found) == 3
    assert exit_code(compared(both, [*both, *new])) == 0


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (lambda run: {"cell": replace(run.cell, container_sha256="f" * 64)}, "container: c0c0c0c0c0c0c0c0, now ffff"),
        (lambda run: {"cell": replace(run.cell, workload_sha256="f" * 64)}, "workload: d0d0d0d0d0d0d0d0, now ffff"),
        (lambda run: {"emulated": ()}, "emulation: expert reads limited to 43 MB/s by the engine, now none"),
        (lambda run: {"request": replace(run.request, memory_limit_bytes=1 << 29)}, "memory limit: none, now 512"),
        (lambda run: {"request": replace(run.request, threads=2)}, "threads: auto, now 2"),
        (lambda run: {"request": replace(run.request, reader="mmap")}, "reader: auto, now mmap"),
    ],
)
def test_what_was_measured_otherwise_is_not_compared(make, changes, reason) -> None:
    before = steady(make)
    found = compared(before, [replace(run, **changes(run)) for run in steady(make, sweep=AFTER)])
    ((cell, why),) = found.incomparable
    assert (cell, found.judged, exit_code(found)) == (before[0].cell.key, (), 5)
    assert why.startswith(reason)


def test_devices_are_compared_though_their_emulation_differs(make) -> None:
    found = compared(steady(make), steady(make, device="jetson-tx2-emulated"), across=("device",))
    assert only(found).cell.device == "jetson-tx2-emulated"
    assert ("emulation", *(f"expert reads limited to {n} MB/s by the engine" for n in (43, 200))) in found.environment


def test_strategies_are_compared_at_the_same_budget_or_with_the_only_one(make) -> None:
    naive = steady(make, strategy="naive-swap")
    edgemoe = [
        replace(run, cell=replace(run.cell, expert_budget=budget))
        for budget in ("10-experts", "20-experts")
        for run in steady(make)
    ]
    found = compared(naive, edgemoe, across=("strategy",))
    assert [j.cell.expert_budget for j in found.judged if j.metric == "tpot_s"] == ["10-experts", "20-experts"]
    assert {j.mark for j in found.judged if j.metric == "tpot_s"} == {Mark.BETTER}
    back = compared(edgemoe, naive, across=("strategy",))
    assert back.incomparable[0][1] == "the baseline has other expert budgets: 10-experts, 20-experts"


def test_differences_of_the_environment_are_listed(make) -> None:
    after = [
        replace(
            run,
            engine_sha256="e2" * 32,
            farm_version="0.2.0",
            facts=replace(run.facts, kernel="6.12", boot_id="another"),
        )
        for run in steady(make, sweep=AFTER)
    ]
    found = compared(steady(make), after)
    assert found.environment == (
        ("pi4b-emulated: engine", "e1" * 8, "e2" * 8),
        ("pi4b-emulated: farm", "0.1.0", "0.2.0"),
        ("pi4b-emulated: kernel", "6.6.31+rpt-rpi-v8", "6.12"),
    )


def test_a_sweep_is_like_itself(make) -> None:
    runs = make.runs()
    found = compared(runs, runs, GATED)
    assert {j.mark for j in found.judged} == {Mark.UNCHANGED}
    assert exit_code(found) == 0


def test_nothing_compared_is_no_pass() -> None:
    assert exit_code(compared([], [])) == 5
