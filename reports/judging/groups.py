"""What may be set side by side: groups of runs that differ in strategy and expert budget only, against the baseline."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

from reports import units
from reports.judging.answers import is_lossy
from reports.judging.matching import same_budget
from reports.judging.statistics import Ratio, Summary, speed_up, summarize
from reports.metrics import METRICS
from reports.records import Run, RunStatus, Sweep, Verdict, emulated_in, last_attempts

Variant = tuple[str, str]  # strategy, expert budget as asked for


@dataclass(frozen=True)
class Row:
    """One strategy with one expert budget. Its runs are the valid ones; where there are none, the suspect ones."""

    strategy: str
    expert_budget: str
    runs: tuple[Run, ...]
    verdict: Verdict
    summaries: dict[str, Summary | None]
    speed_up: Ratio | None
    no_speed_up: str  # why there is none

    @property
    def budget(self) -> str:
        return budget_text(self.expert_budget)

    @property
    def name(self) -> str:
        return f"{self.strategy} ({self.budget})" if self.budget else self.strategy

    @property
    def emulated(self) -> tuple[str, ...]:
        return emulated_in(self.runs)

    @property
    def is_lossy(self) -> bool:
        return any(map(is_lossy, self.runs))

    @property
    def keeps_all_experts(self) -> bool:
        """Returns whether no limit was set and experts were resident before the first token."""
        loads = [run.load for run in self.runs if run.load]
        return bool(loads) and all(load.expert_budget_bytes is None and load.expert_bytes > 0 for load in loads)


@dataclass(frozen=True)
class Group:
    """One device, container, workload and state of the page cache."""

    device: str
    container: str
    workload: str
    page_cache: str
    baseline: str
    rows: tuple[Row, ...]
    other_tokens: tuple[str, ...] | None  # lossless rows whose tokens differ from the first's; None: nothing to compare

    @property
    def emulated(self) -> tuple[str, ...]:
        return emulated_in(chain.from_iterable(row.runs for row in self.rows))


def budget_text(expert_budget: str) -> str:
    """Returns a budget as people write it, empty where the strategy's default was asked for."""
    if expert_budget.isdecimal():
        return units.text(int(expert_budget), "bytes")
    return "" if expert_budget == "default" else expert_budget.replace("-", " ")


def compare(sweep: Sweep, runs: Iterable[Run]) -> list[Group]:
    """Returns groups and rows in the order of the plan, without what was not measured or is invalid."""
    order = {key: i for i, key in enumerate(dict.fromkeys(key for key, _ in sweep.planned))}
    usable = [r for r in last_attempts(runs) if r.status is RunStatus.OK and r.verdict is not Verdict.INVALID]
    usable.sort(key=lambda run: (order.get(run.cell.key, len(order)), run.cell.key, run.block))
    by_group: dict[tuple[str, str, str, str], dict[Variant, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for run in usable:
        cell = run.cell
        group = by_group[cell.device, cell.container, cell.workload, cell.page_cache]
        group[cell.strategy, cell.expert_budget].append(run)
    return [_group(key, sweep.baseline, variants) for key, variants in by_group.items()]


def _group(key: tuple[str, str, str, str], baseline: str, variants: dict[Variant, list[Run]]) -> Group:
    chosen = {variant: _trusted(runs) for variant, runs in variants.items()}
    rows = tuple(_row(variant, baseline, chosen) for variant in chosen)
    return Group(*key, baseline=baseline, rows=rows, other_tokens=_other_tokens(rows))


def _trusted(runs: Sequence[Run]) -> tuple[Run, ...]:
    return tuple(run for run in runs if run.verdict is Verdict.VALID) or tuple(runs)


def _row(variant: Variant, baseline: str, chosen: dict[Variant, tuple[Run, ...]]) -> Row:
    runs = chosen[variant]
    ratio, reason = None, ""
    if variant[0] != baseline:
        reference, reason = _reference(variant[1], baseline, chosen)
        if reference and runs[0].verdict is not Verdict.VALID:
            reason = "its runs are suspect"
        elif reference:
            ratio = speed_up(reference, runs)
            reason = "" if ratio else "no block in which both were measured"
    summaries = {name: summarize(metric, runs) for name, metric in METRICS.items()}
    return Row(*variant, runs, runs[0].verdict, summaries, ratio, reason)


def _reference(
    expert_budget: str, baseline: str, chosen: dict[Variant, tuple[Run, ...]]
) -> tuple[tuple[Run, ...], str]:
    """Returns the baseline's runs to compare with, or none and why."""
    by_budget = {budget: runs for (strategy, budget), runs in chosen.items() if strategy == baseline}
    if not by_budget:
        return (), f"{baseline} was not measured"
    runs = same_budget(by_budget, expert_budget)
    if runs is None:
        return (), f"{baseline} was measured with several other budgets"
    if runs[0].verdict is not Verdict.VALID:
        return (), f"the runs of {baseline} are suspect"
    return runs, ""


def _other_tokens(rows: Sequence[Row]) -> tuple[str, ...] | None:
    """Returns the rows whose tokens differ from the first row's for the same prompts: their speed proves nothing.

    Lossy rows may differ, and have a perplexity instead.
    """
    rows = [row for row in rows if not row.is_lossy]
    if len(rows) < 2:
        return None
    expected: dict[tuple[str, int, int], tuple[int, ...]] = {}
    other = []
    for row in rows:
        samples = [
            ((run.cell.workload_sha256, s.prompt, s.repetition), s)
            for run in row.runs
            for s in run.samples
            if s.timeline is None  # else it is cut short
        ]
        differs = [key for key, s in samples if expected.setdefault(key, s.tokens) != s.tokens]
        if differs:
            other.append(row.name)
    return tuple(other)
