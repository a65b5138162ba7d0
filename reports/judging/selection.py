"""Selectors of what is compared with what: two of them become two sides.

    SWEEP                        latest, a sweep's id or the beginning of it, or a matrix's name for its latest sweep;
                                 ~N after it goes back N sweeps of the same matrix: latest~1, nightly~7
    PART:NAME[,PART:NAME...]     some of the latest sweep: device, strategy, container, workload, budget or cache;
                                 engine:SHA256, or its beginning, is of the newest sweep that it measured, and
                                 commit:HASH of the newest that a checkout of the farm at that commit measured
    PART:NAME...@SWEEP           some of that sweep
    RUN                          one run's id

A part that only one side names holds for both. Where both name another device, or another strategy, that is compared.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from reports.errors import SelectionError, UnknownSweepError
from reports.judging.judgement import Side
from reports.judging.matching import DEVICE, STRATEGY
from reports.records import Cell, Run, Sweep, last_attempts
from reports.results.database import LATEST, ResultsDatabase

PARTS = {
    "device": "device",
    "strategy": "strategy",
    "container": "container",
    "workload": "workload",
    "budget": "expert_budget",
    "cache": "page_cache",
}
ENGINE, COMMIT = "engine", "commit"  # which choose the sweep, too
_FIELDS = PARTS | {ENGINE: "engine_sha256", COMMIT: COMMIT}
_A = {ENGINE: "an engine", COMMIT: "a commit"}
_COLUMNS = ("device", "strategy", "container", "workload", "engine_sha256")  # that the database searches by
_FILTERS = re.compile(rf"({'|'.join(_FIELDS)}):")


@dataclass(frozen=True)
class Selection:
    """One selector, resolved: a sweep, and which of its runs."""

    sweep: Sweep
    wanted: dict[str, str]  # field of a cell, or engine_sha256 -> its value
    run: Run | None = None  # the only one

    @property
    def name(self) -> str:
        if self.run is not None:
            return self.run.id
        by_field = {field: part for part, field in PARTS.items()} | {"engine_sha256": ENGINE}
        parts = [f"{by_field[field]}:{value[:16] if field == 'engine_sha256' else value}" for field, value in
                 self.wanted.items()]  # fmt: skip
        return f"{','.join(parts)}@{self.sweep.id}" if parts else self.sweep.id


@dataclass(frozen=True)
class Selected:
    """Two sides, and what differs between them on purpose."""

    baseline: Side
    candidate: Side
    across: frozenset[str]
    between: tuple[Sweep, Sweep]


def select(database: ResultsDatabase, baseline: str, candidate: str) -> Selected:
    """Resolves two selectors. Raises SelectionError, UnknownSweepError."""
    before, after = _resolve(database, baseline), _resolve(database, candidate)
    across = {part for part in (DEVICE, STRATEGY) if before.wanted.get(part, 0) != after.wanted.get(part, 0)}
    across &= before.wanted.keys() & after.wanted.keys()
    return Selected(
        _side(database, before, after), _side(database, after, before), frozenset(across), (before.sweep, after.sweep)
    )


def _resolve(database: ResultsDatabase, text: str) -> Selection:
    if not _FILTERS.match(text):
        run = database.run(text)
        if run is None:
            try:
                return Selection(database.sweep(text), {})
            except UnknownSweepError as error:
                raise UnknownSweepError(f"{error}{_meant(database, text)}") from None
        return Selection(
            database.sweep(run.sweep_id), {field: getattr(run.cell, field) for field in PARTS.values()}, run
        )
    filters, at, sweep_name = text.rpartition("@") if "@" in text else (text, "", "")
    wanted = {}
    for word in filters.split(","):
        part, _, value = word.partition(":")
        if part not in _FIELDS or not value:
            known = ", ".join(_FIELDS)
            raise SelectionError(f"{text!r}: {word!r} is no part: write PART:NAME, where PART is one of {known}")
        field = _FIELDS[part]
        if field in wanted:
            raise SelectionError(f"{text!r} names two of {part}: compare them as two sides")
        wanted[field] = value
    newest = LATEST
    if "engine_sha256" in wanted:
        wanted["engine_sha256"], newest = _only(ENGINE, wanted["engine_sha256"], database.engines)
    if COMMIT in wanted:
        if at or "engine_sha256" in wanted:
            raise SelectionError(f"{text!r}: a commit has its newest sweep: name no other sweep or engine beside it")
        _, newest = _only(COMMIT, wanted.pop(COMMIT), database.commits)
    return Selection(database.sweep(sweep_name if at else newest), wanted)


def _meant(database: ResultsDatabase, text: str) -> str:
    """Returns which part of the latest sweep has that name, as it is written; empty where none has."""
    with suppress(UnknownSweepError):
        keys = [key.split("/") for key, _ in database.sweep(LATEST).planned]
        for n, part in enumerate((DEVICE, "container", STRATEGY, "", "workload")):
            if part and any(len(key) > n and key[n] == text for key in keys):
                return f"; a {part} has that name: write {part}:{text}"
    return ""


def _only(part: str, beginning: str, find: Callable[[str], list[tuple[str, str]]]) -> tuple[str, str]:
    """Returns (the hash that begins so, the newest sweep that it measured)."""
    found = find(beginning)
    if not found:
        raise SelectionError(f"{part}:{beginning}: nothing was measured by such {_A[part]}: see `results show --json`")
    if len(found) > 1:
        hashes = " and ".join(name[:16] for name, _ in found)
        raise SelectionError(f"{part}:{beginning} begins more than one, {hashes} among them: give more of it")
    return found[0]


def _side(database: ResultsDatabase, selection: Selection, other: Selection) -> Side:
    if selection.run is not None:
        return Side(selection.name, (selection.run,))
    wanted = {field: value for field, value in other.wanted.items() if field in PARTS.values()} | selection.wanted
    columns = {field: wanted.get(field) for field in _COLUMNS}
    runs = database.stream(sweep_id=selection.sweep.id, status=None, **columns)
    chosen = tuple(last_attempts(run for run in runs if _matches(run.cell, wanted)))
    if not chosen:
        raise SelectionError(
            f"{selection.name}: no run there{_as_asked(wanted)}: see `results show {selection.sweep.id}`"
        )
    return Side(selection.name, chosen)


def _matches(cell: Cell, wanted: dict[str, str]) -> bool:
    return all(getattr(cell, field) == wanted[field] for field in PARTS.values() if field in wanted)


def _as_asked(wanted: dict[str, str]) -> str:
    return f" with {', '.join(f'{field} {value}' for field, value in wanted.items())}" if wanted else ""
