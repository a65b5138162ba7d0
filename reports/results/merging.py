"""Merging another database, a file of JSON lines or a bundle into this one.

Doing it twice changes nothing. Where both have something of one name and it differs, what is here stays, and the
conflict is named. Left out is what is said of the devices of another farm (health, controllers).

JSON lines may lack the sweep of a run: a stand-in takes its place, until the sweep itself is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from engine.codec import MAX_LINE_BYTES, loads
from engine.errors import ProtocolError
from reports.errors import RecordError, ReportError
from reports.records import Run, Sweep, run_from_json, run_to_json, sweep_from_json
from reports.results import schema
from reports.results.baselines import Acknowledgement, Baseline, NightRecord
from reports.results.database import ResultsDatabase, run_row, sweep_row
from reports.results.transactions import explained, parsed

Entry = Sweep | Run | NightRecord | Baseline | Acknowledgement

_MOST_CHARACTERS = 200
_BATCH = 200  # entries a transaction
_STAND_IN = "imported"  # the name of a sweep of which only runs are known


@dataclass
class Merged:
    """The outcome of a merge."""

    sweeps: int = 0  # new ones, as are:
    runs: int = 0
    nights: int = 0
    known: int = 0  # entries that were here already
    conflicts: list[str] = field(default_factory=list)  # a line each


def merge(
    target: ResultsDatabase, entries: Iterable[Entry], progress: Callable[[int], object] = lambda n: None
) -> Merged:
    """Adds entries, sweeps before their runs, and tells `progress` how many were looked at. Raises ReportError."""
    merged = Merged()
    refused: set[str] = set()  # sweeps that are another one here: nothing of theirs is mixed with it
    n = 0
    iterator = iter(entries)
    while batch := list(islice(iterator, _BATCH)):
        for entry in batch:
            _require_storable(entry)
        _sweeps(target, [e for e in batch if isinstance(e, Sweep)], merged, refused)
        _runs(target, [e for e in batch if isinstance(e, Run) and e.sweep_id not in refused], merged)
        for entry in batch:
            if isinstance(entry, NightRecord):
                _night(target, entry, merged)
            elif isinstance(entry, Baseline):
                _baseline(target, entry, merged)
            elif isinstance(entry, Acknowledgement):
                target.acknowledge(entry)
        n += len(batch)
        progress(n)
    return merged


def entries_of(source: ResultsDatabase) -> Iterator[Entry]:
    """Yields all that `merge` takes over."""
    yield from source.sweeps()
    yield from source.stream()
    yield from source.nights()
    yield from source.baselines()
    yield from source.acknowledgements()


def _require_storable(entry: Entry) -> None:
    """Refuses searched text that not every database takes and prints; records are ASCII whatever they hold."""
    for name in ("id", "sweep_id", "name", "engine_sha256"):
        value = getattr(entry, name, "")
        if not value.isprintable() or len(value) > _MOST_CHARACTERS:
            kind = type(entry).__name__.lower()
            raise RecordError(
                f"{kind} {value[:40]!r}: {name} is not printable text of up to {_MOST_CHARACTERS} characters"
            )


def _sweeps(target: ResultsDatabase, sweeps: list[Sweep], merged: Merged, refused: set[str]) -> None:
    for sweep in sweeps:
        row = sweep_row(sweep)

        def act(connection: sa.Connection, sweep: Sweep = sweep, row: dict[str, Any] = row) -> bool | None:
            """Returns whether the sweep is new; None if it is another one."""
            table = schema.sweeps
            text = connection.execute(sa.select(table.c.record).where(table.c.id == sweep.id)).scalar()
            if text is None:
                connection.execute(sa.insert(table).values(row))
                connection.execute(sa.delete(schema.imports).where(schema.imports.c.sweep_id == sweep.id))
                connection.execute(sa.insert(schema.imports).values(sweep_id=sweep.id))
                return True
            stored = sweep_from_json(parsed(text))
            if stored == sweep or (is_stand_in(sweep) and not is_stand_in(stored)):
                return False
            if not is_stand_in(stored):
                return None
            if is_stand_in(sweep):
                planned = tuple(dict.fromkeys((*stored.planned, *sweep.planned)))
                row = sweep_row(replace(stored, planned=planned))
            connection.execute(sa.update(table).where(table.c.id == sweep.id).values(row))
            return False

        with explained(f"sweep {sweep.id} cannot be stored"):
            is_new = target._write(act)
        if is_new is None:
            refused.add(sweep.id)
            merged.conflicts.append(f"sweep {sweep.id} is another one here: it and its runs are left out")
        elif is_new:
            merged.sweeps += 1
        else:
            merged.known += 1


def _runs(target: ResultsDatabase, runs: list[Run], merged: Merged) -> None:
    table = schema.runs

    def act(connection: sa.Connection) -> tuple[list[Run], list[Run]]:
        """Returns (new runs, those that are others here)."""
        query = sa.select(table.c.id, table.c.record).where(table.c.id.in_([run.id for run in runs]))
        stored = {identity: run_from_json(parsed(text)) for identity, text in connection.execute(query)}
        new: dict[str, Run] = {}
        others = []
        for run in runs:
            known = stored.get(run.id) or new.setdefault(run.id, run)
            if known != run:
                others.append(run)
        if new:
            connection.execute(sa.insert(table), [run_row(run, run_to_json(run)) for run in new.values()])
        return list(new.values()), others

    if not runs:
        return
    with explained("runs cannot be stored"):
        new, others = target._write(act)
    merged.runs += len(new)
    merged.known += len(runs) - len(new) - len(others)
    merged.conflicts += [f"run {run.id} of sweep {run.sweep_id} is another one here" for run in others]


def _night(target: ResultsDatabase, night: NightRecord, merged: Merged) -> None:
    if target.night(night.sweep_id) is None and target.add_night(night, anew=False) == night:
        merged.nights += 1
    elif target.night(night.sweep_id) == night:
        merged.known += 1
    else:
        merged.conflicts.append(f"the night of sweep {night.sweep_id} was judged otherwise here")


def _baseline(target: ResultsDatabase, baseline: Baseline, merged: Merged) -> None:
    stored = target.baseline(baseline.name)
    if stored is None:
        target.pin(baseline, seen=None)
    elif stored.sweep_id == baseline.sweep_id:
        merged.known += 1
    else:
        merged.conflicts.append(f"baseline {baseline.name} is sweep {stored.sweep_id} here, {baseline.sweep_id} there")


# --- JSON lines -----------------------------------------------------------------------------------------------------


def json_lines(path: Path) -> Iterator[Entry]:
    """Yields the sweeps and then the runs of an export. Raises ReportError that names the line."""
    given: set[str] = set()
    stand_ins: dict[str, Sweep] = {}
    for entry in _read_lines(path):
        if isinstance(entry, Sweep):
            given.add(entry.id)
            yield entry
        elif entry.sweep_id not in given:
            stand_ins[entry.sweep_id] = _stand_in(entry, stand_ins.get(entry.sweep_id))
    yield from (sweep for sweep in stand_ins.values() if sweep.id not in given)
    yield from (entry for entry in _read_lines(path) if isinstance(entry, Run))


def is_stand_in(sweep: Sweep) -> bool:
    return sweep.name == _STAND_IN and not sweep.matrix_toml


def _stand_in(run: Run, so_far: Sweep | None) -> Sweep:
    """Returns the sweep of a run, as far as its runs tell: what was measured counts as planned."""
    planned = (run.cell.key, run.block)
    if so_far is None:
        started_at = run.started_at or "1970-01-01T00:00:00+00:00"
        return Sweep(run.sweep_id, _STAND_IN, "", run.cell.strategy, (planned,), started_at, run.farm_version)
    first = min(so_far.started_at, run.started_at or so_far.started_at)
    return replace(so_far, planned=tuple(dict.fromkeys((*so_far.planned, planned))), started_at=first)


def _read_lines(path: Path) -> Iterator[Sweep | Run]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), start=1):
                if line.strip():
                    yield _decoded(line, f"{path}, line {number}")
    except OSError as error:
        raise ReportError(f"cannot read {path}: {error.strerror or error}: name another file") from None


def _decoded(line: bytes, where: str) -> Sweep | Run:
    try:
        record = loads(line)
        return sweep_from_json(record) if "planned" in record else run_from_json(record)
    except (ProtocolError, RecordError) as error:
        raise RecordError(f"{where}: {error}: nothing but what `results export --format jsonl` writes") from None
