"""Which cells of two sides may be set side by side, why others may not, and what else was different."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

from engine.protocol import DeviceFacts
from reports import units
from reports.records import Cell, Run, by_cell, emulation

DEVICE, STRATEGY = "device", "strategy"  # that may differ between two sides on purpose

_FACTS = tuple(f.name for f in fields(DeviceFacts) if f.name not in ("boot_id", "core_kinds", "now"))

Key = tuple[str, ...]
Runs = TypeVar("Runs", bound=Sequence[Run])


@dataclass(frozen=True)
class Pair:
    """The runs of one cell on both sides; of none on a side where the cell is new or gone."""

    baseline: tuple[Run, ...]
    candidate: tuple[Run, ...]

    @property
    def cell(self) -> Cell:
        """Returns the candidate's cell, or the baseline's where it is gone."""
        return (self.candidate or self.baseline)[0].cell


def match(
    baseline: Iterable[Run], candidate: Iterable[Run], across: Collection[str] = ()
) -> tuple[list[Pair], list[tuple[str, str]]]:
    """Returns the pairs, in the order of the runs, and (cell key, why) of what may not be compared.

    `across` has DEVICE or STRATEGY where those are what is compared. For budgets see `same_budget`.
    """
    before, after = by_cell(baseline), by_cell(candidate)
    groups: dict[Key, dict[str, list[Run]]] = defaultdict(dict)
    for runs in before.values():
        groups[_key(runs[0].cell, across)][runs[0].cell.expert_budget] = runs
    pairs: list[Pair] = []
    incomparable: list[tuple[str, str]] = []
    used: set[int] = set()
    for runs in after.values():
        cell = runs[0].cell
        group = groups.get(_key(cell, across), {})
        partner = same_budget(group, cell.expert_budget)
        used.update(id(runs) for runs in group.values())
        if partner is None and group:
            incomparable.append((cell.key, f"the baseline has other expert budgets: {', '.join(group)}"))
        elif partner is None:
            pairs.append(Pair((), tuple(runs)))
        elif reasons := _differences(_terms(partner, across), _terms(runs, across)):
            incomparable.append((cell.key, "; ".join(f"{name}: {a}, now {b}" for name, a, b in reasons)))
        else:
            pairs.append(Pair(tuple(partner), tuple(runs)))
    pairs += [Pair(tuple(runs), ()) for runs in before.values() if id(runs) not in used]
    return pairs, incomparable


def same_budget(by_budget: Mapping[str, Runs], expert_budget: str) -> Runs | None:
    """Returns a baseline's runs with that expert budget, or with its only one: most baselines have no use for one."""
    found = by_budget.get(expert_budget)
    return next(iter(by_budget.values())) if not found and len(by_budget) == 1 else found


def environment(
    baseline: Sequence[Run], candidate: Sequence[Run], across: Collection[str] = ()
) -> list[tuple[str, str, str]]:
    """Returns (device and fact, before, after) of what differs and is no condition of a measurement."""
    if DEVICE in across:
        return _differences(_facts(baseline, across), _facts(candidate, across))
    found = []
    for device in dict.fromkeys(run.cell.device for run in candidate):
        sides = [[run for run in side if run.cell.device == device] for side in (baseline, candidate)]
        if all(sides):
            before, after = (_facts(side, across) for side in sides)
            found += [(f"{device}: {name}", a, b) for name, a, b in _differences(before, after)]
    return found


def _key(cell: Cell, across: Collection[str]) -> Key:
    free = {DEVICE} & set(across) | ({STRATEGY, "expert_budget"} if STRATEGY in across else set())
    names = ("device", "container", "strategy", "expert_budget", "workload", "page_cache")
    return tuple(getattr(cell, name) for name in names if name not in free)


def _terms(runs: Iterable[Run], across: Collection[str]) -> dict[str, str]:
    """Returns what must be alike, as it was asked for; between two devices, only what they were to do."""
    found = []
    for run in runs:
        request = run.request
        terms = {"container": run.cell.container_sha256[:16], "workload": run.cell.workload_sha256[:16]}
        if request is not None:
            terms |= {"new tokens": str(request.max_new_tokens), "stops at the end": str(request.stop_at_eos)}
            if DEVICE not in across:
                terms |= _conditions(run)
        found.append(terms)
    return _merged(found)


def _conditions(run: Run) -> dict[str, str]:
    request = run.request
    if request is None:
        return {}
    limit = request.memory_limit_bytes
    return {
        "emulation": emulation(run.emulated) or "none",
        "memory limit": "none" if limit is None else units.text(limit, "bytes"),
        "threads": str(request.threads or "auto"),
        "backend": request.backend,
        "reader": request.reader,
        "lanes": str(request.lanes or "auto"),
        "warm-ups": str(request.warmups),
    }


def _facts(runs: Iterable[Run], across: Collection[str]) -> dict[str, str]:
    """Returns what was observed, and which software did it."""
    found = []
    for run in runs:
        known: dict[str, object] = {"engine": run.engine_sha256[:16] or None, "farm": run.farm_version or None}
        known |= {name.replace("_", " "): getattr(run.facts, name, None) for name in _FACTS if name != "engine"}
        known |= {name: getattr(run.conditions, name, None) for name in ("governor", "power")}
        if run.load is not None:
            known |= {"kernels": run.load.variant or run.load.backend, "threads": run.load.threads}
            known |= {"reader": run.load.reader, "lanes": run.load.lanes}
        if run.request is not None and run.request.profile is not None:
            known["profile"] = "/".join(run.request.profile.split("/")[-2:])
        if DEVICE in across:
            known |= _conditions(run)
        found.append({name: str(value) for name, value in known.items() if value is not None})
    return _merged(found)


def _merged(rows: Iterable[dict[str, str]]) -> dict[str, str]:
    values: dict[str, dict[str, None]] = defaultdict(dict)
    for row in rows:
        for name, value in row.items():
            values[name][value] = None
    return {name: ", ".join(sorted(found)) for name, found in values.items()}


def _differences(before: dict[str, str], after: dict[str, str]) -> list[tuple[str, str, str]]:
    """Returns the differences in what both sides know."""
    return [(name, value, after[name]) for name, value in before.items() if after.get(name, value) != value]
