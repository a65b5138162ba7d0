"""Which devices answered, and what ran there."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from engine.protocol import CoreKind, DeviceFacts
from reports import units
from reports.records import Run, emulated_in

_LABELS = {
    "machine": "architecture", "os": "system", "cpu": "processor", "memory_bytes": "memory",
    "page_bytes": "memory page", "boot_id": "boot", "blas": "BLAS", "python": "Python", "core_kinds": "kinds of cores",
    "read_ahead_bytes": "read-ahead", "swap_bytes": "swap",
}  # fmt: skip
_PROBED_ONLY = ("memory_limit_method", "now")  # facts that a run's Conditions tell better


@dataclass(frozen=True)
class DeviceCard:
    name: str
    anchor: str
    emulated: tuple[str, ...]
    facts: tuple[tuple[str, str], ...]


def device_cards(runs: Iterable[Run]) -> list[DeviceCard]:
    by_name: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        by_name[run.cell.device].append(run)
    return [_card(name, f"device-{i}", found) for i, (name, found) in enumerate(by_name.items())]


def _card(name: str, anchor: str, runs: Sequence[Run]) -> DeviceCard:
    facts: list[tuple[str, str]] = []
    answered = [run.facts for run in runs if run.facts]
    for fact in fields(DeviceFacts) if answered else ():
        if fact.name not in _PROBED_ONLY:
            label = _LABELS.get(fact.name, fact.name.replace("_", " "))
            facts.append((label, _distinct(_fact(fact.name, getattr(f, fact.name)) for f in answered)))
    threads = [str(run.load.threads) for run in runs if run.load and run.load.threads]
    facts += [
        ("threads", _distinct(threads)),
        ("engine sha256", _distinct(run.engine_sha256 for run in runs)),
        ("farm", _distinct(run.farm_version for run in runs)),
        ("containers", _distinct(f"{run.cell.container} sha256 {run.cell.container_sha256}" for run in runs)),
        ("measured", _span(runs)),
    ]
    return DeviceCard(name, anchor, emulated_in(runs), tuple(facts))


def _fact(name: str, value: Any) -> str:
    if value is None:
        return "unknown"
    if name == "core_kinds":
        return ", ".join(_cores(kind) for kind in value) or "unknown"
    return units.text(value, "bytes") if name.endswith("_bytes") else str(value)


def _cores(kind: CoreKind) -> str:
    rate = "" if kind.highest_hz is None else f" at {kind.highest_hz / 1e9:.2f} GHz"
    return f"{kind.cores} {kind.name or 'of unknown kind'}{rate}"


def _span(runs: Sequence[Run]) -> str:
    return f"{units.moment(min(run.started_at for run in runs))} to {units.moment(max(run.ended_at for run in runs))}"


def _distinct(values: Iterable[str]) -> str:
    """Each value once: a fact that changed within a sweep must be seen."""
    return ", then ".join(dict.fromkeys(value for value in values if value)) or "unknown"
