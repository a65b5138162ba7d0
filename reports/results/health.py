"""The health of a device: derived from its last runs and from what people and canary runs noted, never stored itself.

It is apart from a device's state (connecting, measuring, done): a device of good health may be switched off, and a
quarantined one may answer at once.

    good          nothing of late that speaks against it
    suspect       at least one of its last RECENT attempts failed of the infrastructure
    quarantined   its last QUARANTINE attempts failed so, one after the other: a canary run has to succeed first
    maintenance   somebody said so: nothing is measured until they say otherwise
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from reports.records import Fault, Run, require_utc

QUARANTINE = 3
RECENT = 10


class Health(enum.StrEnum):
    GOOD = "good"
    SUSPECT = "suspect"
    QUARANTINED = "quarantined"
    MAINTENANCE = "maintenance"


class Mark(enum.StrEnum):
    """The notes on a device that are no run."""

    MAINTENANCE = "maintenance"  # by a person
    GOOD = "good"  # by a person: ends maintenance, and forgives what was before
    CANARY_OK = "canary_ok"  # forgives what was before; ends no maintenance
    CANARY_FAILED = "canary_failed"


@dataclass(frozen=True)
class HealthMark:
    device: str
    mark: Mark
    at: str  # UTC, ISO 8601, the controller's clock
    note: str = ""  # why

    def __post_init__(self) -> None:
        require_utc(self.at, f"mark of {self.device}: at")


@dataclass(frozen=True)
class DeviceHealth:
    """Health, and what it rests on."""

    health: Health = Health.GOOD
    reason: str = ""  # empty where it is good
    since: str = ""  # when the last thing that speaks against it was noted, UTC
    faults: int = 0  # attempts that failed of the infrastructure, of those of late
    faults_in_a_row: int = 0


def health_of(runs: Iterable[Run], marks: Sequence[HealthMark], now: str = "9999") -> DeviceHealth:
    """Returns the health of a device from its last RECENT attempts, in any order, and all its marks, as they were made.

    Clocks may be set back, or be years ahead. A mark is never later than one that was made after it; what is dated
    after `now` counts as older than all else, or neither a person nor a success could end what it says.
    """
    events: list[tuple[tuple[bool, str], str, Run | HealthMark]] = []
    for run in runs:
        if is_evidence(run):
            at = run.ended_at or run.started_at
            events.append(((at <= now, at), at, run))
    events += [(when, mark.at, mark) for when, mark in zip(_in_order(marks, now), marks, strict=True)]
    maintenance: HealthMark | None = None
    recent: list[tuple[str, str] | None] = []  # of each attempt since it was forgiven: when and why it failed
    for _, at, event in sorted(events, key=lambda event: event[0]):
        if isinstance(event, Run):
            failed = event.fault is not None and event.fault.is_infrastructure
            recent.append((at, event.reasons[0]) if failed else None)
        elif event.mark is Mark.MAINTENANCE:
            maintenance = event
        elif event.mark is Mark.CANARY_FAILED:
            recent += [(at, f"canary run: {event.note}")] * QUARANTINE
        else:
            recent = []
            maintenance = None if event.mark is Mark.GOOD else maintenance
    recent = recent[-RECENT:]
    in_a_row = next((i for i, failure in enumerate(reversed(recent)) if failure is None), len(recent))
    failures = [failure for failure in recent if failure is not None]
    if maintenance is not None:
        why = f": {maintenance.note}" if maintenance.note else ""
        return DeviceHealth(Health.MAINTENANCE, f"in maintenance{why}", maintenance.at, len(failures), in_a_row)
    if not failures:
        return DeviceHealth()
    at, why = failures[-1]
    health = Health.QUARANTINED if in_a_row >= QUARANTINE else Health.SUSPECT
    return DeviceHealth(health, why, at, len(failures), in_a_row)


def _in_order(marks: Sequence[HealthMark], now: str) -> list[tuple[bool, str]]:
    """Returns by what to order marks among runs: they keep the order in which they were made."""
    order: list[tuple[bool, str]] = []
    for mark in marks:
        order.append((True, mark.at) if mark.at <= now else (order[-1] if order else (True, "")))
    for i in range(len(order) - 1, 0, -1):
        order[i - 1] = min(order[i - 1], order[i])
    return order


def is_evidence(run: Run) -> bool:
    """Returns whether a run tells something about the device: not if untried, or cut off by another controller."""
    return run.fault not in (Fault.UNFIT, Fault.UNTRIED, Fault.BUSY, Fault.LEASE_LOST)
