"""What is missing, failed, or is not to be trusted: how many, and each with its fault and its reason."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from reports.nights.gate import Measured
from reports.pages.layout import words
from reports.records import Run, RunStatus, Verdict, emulated_in


@dataclass(frozen=True)
class Problem:
    """Runs of one cell that gave no number, or none that may be trusted, for the same reason."""

    cell: str
    emulated: tuple[str, ...]
    mark: str  # the status, or the verdict of a run that ended well
    fault: str  # empty where the status says as much, or none is recorded
    blocks: str
    reasons: tuple[str, ...]
    commands: tuple[str, ...] = ()
    log_tail: str = ""


def run_counts(sides: Sequence[Measured]) -> list[tuple[int, str]]:
    """(how many, of what); zeros are left out."""
    runs = [run for side in sides for run in side.runs]
    by_status = Counter(run.status for run in runs)
    by_verdict = Counter(run.verdict for run in runs if run.status is RunStatus.OK)
    counts = [(sum(len(side.sweep.planned) for side in sides), "planned"), (by_status[RunStatus.OK], "measured")]
    counts += [(by_status[status], words(status.value)) for status in RunStatus if status is not RunStatus.OK]
    counts += [(by_verdict[verdict], verdict.value) for verdict in (Verdict.SUSPECT, Verdict.INVALID)]
    counts += [(sum(len(_missing(side)) for side in sides), "missing")]
    return [(n, what) for n, what in counts if n or what in ("planned", "measured")]


def problems(sides: Iterable[Measured]) -> list[Problem]:
    return [problem for side in sides for problem in (*_recorded(side.runs), *_unrecorded(side))]


def _recorded(runs: Iterable[Run]) -> list[Problem]:
    alike: dict[tuple[str, str, str, tuple[str, ...]], list[Run]] = defaultdict(list)
    for run in runs:
        if run.status is not RunStatus.OK or run.verdict is not Verdict.VALID:
            mark = run.verdict.value if run.status is RunStatus.OK else words(run.status.value)
            fault = words(run.fault.value) if run.fault else ""
            alike[run.cell.key, mark, fault if fault != mark else "", run.reasons].append(run)
    return [
        Problem(
            cell,
            emulated_in(found),
            mark,
            fault,
            _blocks(run.block for run in found),
            reasons,
            tuple(dict.fromkeys(run.command for run in found if run.command and not run.samples)),
            found[-1].log_tail,
        )
        for (cell, mark, fault, reasons), found in alike.items()
    ]


def _unrecorded(side: Measured) -> list[Problem]:
    missing: dict[str, list[int]] = defaultdict(list)
    for cell, block in _missing(side):
        missing[cell].append(block)
    reason = ("no record: the sweep was interrupted, or is still under way; resume it to measure what is missing",)
    return [Problem(cell, (), "missing", "", _blocks(blocks), reason) for cell, blocks in missing.items()]


def _missing(side: Measured) -> list[tuple[str, int]]:
    found = {(run.cell.key, run.block) for run in side.runs}
    return [pair for pair in side.sweep.planned if pair not in found]


def _blocks(numbers: Iterable[int]) -> str:
    listed = [str(n + 1) for n in sorted(numbers)]
    return ("block " if len(listed) == 1 else "blocks ") + ", ".join(listed)
