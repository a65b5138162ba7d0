"""Health follows from the last attempts, in whatever order they come, and from the marks as they were made."""

from __future__ import annotations

import random

import pytest

from reports.records import Cell, Fault, Run, RunStatus, Verdict
from reports.results.health import QUARANTINE, RECENT, Health, HealthMark, Mark, health_of

CELL = Cell("pi", "c", "0" * 64, "s", "default", "w", "0" * 64, "cold")


def at(second: int) -> str:
    return f"2026-01-01T00:00:{second:02}+00:00"


def attempts(*faults: Fault | None) -> list[Run]:
    return [
        Run(f"r{i}", "s", CELL, 0, RunStatus.FAILED, Verdict.INVALID, (f"reason {i}",), fault=fault, ended_at=at(i))
        for i, fault in enumerate(faults)
    ]


def mark(second: int, kind: Mark, note: str = "") -> HealthMark:
    return HealthMark("pi", kind, at(second), note)


BAD, FINE = Fault.LINK_LOST, Fault.OUT_OF_MEMORY


@pytest.mark.parametrize(
    ("faults", "marks", "health"),
    [
        ([], [], Health.GOOD),
        ([FINE, None, FINE], [], Health.GOOD),
        ([BAD], [], Health.SUSPECT),
        ([BAD, BAD, FINE], [], Health.SUSPECT),
        ([BAD] * QUARANTINE, [], Health.QUARANTINED),
        ([BAD] * QUARANTINE + [Fault.UNTRIED, Fault.UNFIT], [], Health.QUARANTINED),
        ([BAD] * QUARANTINE + [None], [], Health.SUSPECT),
        ([BAD] * QUARANTINE + [None] * RECENT, [], Health.GOOD),
        ([BAD] * QUARANTINE, [mark(30, Mark.CANARY_OK)], Health.GOOD),
        ([BAD] * QUARANTINE, [mark(30, Mark.GOOD)], Health.GOOD),
        ([None], [mark(30, Mark.CANARY_FAILED, "no answer")], Health.QUARANTINED),
        ([None], [mark(30, Mark.MAINTENANCE)], Health.MAINTENANCE),
        ([None], [mark(30, Mark.MAINTENANCE), mark(40, Mark.CANARY_OK)], Health.MAINTENANCE),
        ([BAD] * QUARANTINE, [mark(30, Mark.MAINTENANCE), mark(40, Mark.GOOD)], Health.GOOD),
    ],
)
def test_health(faults, marks, health) -> None:
    runs = attempts(*faults)
    for seed in range(3):
        random.Random(seed).shuffle(runs)
        assert health_of(runs, marks).health is health


def test_health_says_what_it_rests_on() -> None:
    found = health_of(attempts(BAD, None, BAD, BAD), [])
    assert (found.reason, found.since, found.faults, found.faults_in_a_row) == ("reason 3", at(3), 3, 2)
    found = health_of([], [mark(30, Mark.MAINTENANCE, "new SD card")])
    assert (found.reason, found.since) == ("in maintenance: new SD card", at(30))
    assert health_of([], [mark(5, Mark.CANARY_FAILED, "no answer")]).reason == "canary run: no answer"
