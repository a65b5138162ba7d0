"""The results database: every sweep and every run, raw, on SQLAlchemy Core.

An SQLite file by default, a PostgreSQL server where several controllers share one (see connection.py). A run is one
row: the columns that are searched, and the complete record as JSON, from which the Run is rebuilt. Nothing derived is
stored. The tables stand in schema.py; methods beside what they are about, in controllers.py, baselines.py, history.py.
"""

from __future__ import annotations

import itertools
import json
import sqlite3
from collections.abc import Callable, Collection, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from reports.errors import DatabaseError, UnknownSweepError
from reports.records import Run, RunStatus, Sweep, run_from_json, run_to_json, sweep_from_json, sweep_to_json
from reports.results import schema
from reports.results.baselines import BaselineRows
from reports.results.connection import Patience, Pause, Place, cause
from reports.results.controllers import ControllerRows
from reports.results.health import RECENT, DeviceHealth, HealthMark, Mark, health_of, is_evidence
from reports.results.history import HistoryRows, credible_until
from reports.results.migrations import prepare, to_read
from reports.results.transactions import explained, parsed

LATEST = "latest"


class ResultsDatabase(HistoryRows, ControllerRows, BaselineRows):
    """The results database, safe to share between threads; several processes may use one database."""

    @classmethod
    def open(
        cls, place: str | Path, *, create: bool = True, reading: bool = False, patience: Patience | None = None
    ) -> ResultsDatabase:
        """Opens the database at a path or a URL; `create` makes an empty one where there is none.

        `reading` changes nothing there, and a file that may only be read is opened so, unless it is to be made.
        `patience` is for a server that goes away later; by default there is none. Raises DatabaseError where there is
        no database, where it is not ours, or of another schema version.
        """
        where = Place.parse(place)
        if where.file is not None:
            if not create and not where.file.is_file():
                raise DatabaseError(f"no results at {where.name}: run a matrix first, or name another database")
            if not where.file.parent.is_dir():
                raise DatabaseError(
                    f"no folder {where.file.parent} for the results database: create it, or name another"
                )
        reading = reading or not (create or where.may_be_written)
        try:
            if reading and where.file is not None:
                engine, done = to_read(where)
                database = cls(engine, patience or Patience())
                database._done = done
                return database
            database = cls(where.connect(), patience or Patience())
            try:
                prepare(database._engine, where.name, create)
            except BaseException:
                database.close()
                raise
            return database
        except (sa.exc.SQLAlchemyError, sqlite3.Error) as error:
            raise DatabaseError(f"cannot open the results database {where.name}: {cause(error)}") from None

    _done: Callable[[], None] = staticmethod(lambda: None)  # what is to be called at the end

    def close(self) -> None:
        self._engine.dispose()
        self._done()

    def __enter__(self) -> ResultsDatabase:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- sweeps -----------------------------------------------------------------------------------------------------

    def add_sweep(self, sweep: Sweep) -> None:
        """Stores a sweep. Idempotent; another sweep of the same id is a DatabaseError."""
        self._add(schema.sweeps, sweep_row(sweep), f"sweep {sweep.id}")

    def sweep(self, name: str, *, own: bool = False) -> Sweep:
        """Returns a sweep by its id, the unique beginning of one, `latest`, or a matrix's name for its latest.

        `~2` after it goes back two sweeps of the same matrix. `own` finds as latest none that was imported. Raises
        UnknownSweepError.
        """
        name, _, back = name.partition("~")
        if back and not (back.isascii() and back.isdigit()):
            raise UnknownSweepError(f"~{back} does not say how far back: write {name or LATEST}~1 for the sweep before")
        query, table = sa.select(schema.sweeps.c.record), schema.sweeps.c
        newest = query.order_by(table.started_at.desc(), table.id.desc()).limit(1)
        # What a clock dated ahead of now is the newest only where there is nothing else: it would be for years.
        credible = table.started_at <= credible_until(datetime.now(UTC))
        if name == LATEST:
            whole = newest.where(table.name.not_like("% (%"))  # not what was measured again of another sweep
            if own:
                whole = whole.where(table.id.not_in(sa.select(schema.imports.c.sweep_id)))
            queries = [whole.where(credible), whole]
        else:
            beginning = query.where(table.id.startswith(name, autoescape=True)).order_by(table.id).limit(2)
            named = newest.where(table.name == name)
            queries = [query.where(table.id == name), beginning, named.where(credible), named]
        found = next(filter(None, (self._rows("sweeps", each) for each in queries)), []) if name else []
        if not found:
            what = (
                "no sweep yet: run a matrix first" if name == LATEST else f"no sweep {name!r}: see the list of sweeps"
            )
            raise UnknownSweepError(what)
        if len(found) > 1:
            ids = " and ".join(sweep_from_json(parsed(record)).id for (record,) in found)
            raise UnknownSweepError(f"{name!r} begins more than one sweep, {ids} among them: give more of the id")
        sweep = sweep_from_json(parsed(found[0][0]))
        steps = int(back[:9] or 0)
        earlier = self.sweeps_before(sweep, steps) if steps else [sweep]
        if len(earlier) < max(1, steps):
            raise UnknownSweepError(
                f"{name}~{back}: matrix {sweep.name} has {len(earlier)} sweeps before {sweep.id}: go less far back"
            )
        return earlier[-1]

    def is_imported(self, sweep_id: str) -> bool:
        """Returns whether a sweep was measured elsewhere."""
        return bool(self._rows("imports", sa.select(schema.imports).where(schema.imports.c.sweep_id == sweep_id)))

    # --- runs -------------------------------------------------------------------------------------------------------

    def run(self, run_id: str) -> Run | None:
        query = sa.select(schema.runs.c.record).where(schema.runs.c.id == run_id)
        return next((run_from_json(parsed(record)) for (record,) in self._rows("runs", query)), None)

    def add_run(self, run: Run, *, pause: Pause | None = None) -> None:
        """Stores a run, durably. Idempotent; another run of the same id is a DatabaseError.

        Waits for a server that is away, by `pause` where it is given (see Patience); then raises OutageError.
        """
        self._add(schema.runs, run_row(run, run_to_json(run)), f"run {run.id}", pause)

    def runs(
        self,
        *,
        sweep_id: str | None = None,
        device: str | None = None,
        container: str | None = None,
        strategy: str | None = None,
        workload: str | None = None,
        status: RunStatus | None = None,
    ) -> list[Run]:
        """Returns the runs that match, in the order in which they were started."""
        wanted = {"device": device, "container": container, "strategy": strategy, "workload": workload}
        stream = self._stream
        return self._read("runs", lambda: list(stream(sweep_id=sweep_id, status=status, **wanted)))

    def stream(
        self,
        *,
        sweep_id: str | None = None,
        status: RunStatus | None = None,
        since: str | None = None,
        **wanted: str | None,
    ) -> Iterator[Run]:
        """Yields runs one after another, for more than fits the memory; `since`: started then or later, UTC."""
        with explained("runs cannot be read"):
            yield from self._stream(sweep_id=sweep_id, status=status, since=since, **wanted)

    def _stream(self, *, status: RunStatus | None, since: str | None = None, **wanted: str | None) -> Iterator[Run]:
        query = sa.select(schema.runs.c.record).order_by(schema.runs.c.started_at, schema.runs.c.id)
        conditions = {**wanted, "status": None if status is None else status.value}
        for column, value in conditions.items():
            if value is not None:
                query = query.where(schema.runs.c[column] == value)
        if since is not None:
            query = query.where(schema.runs.c.started_at >= since)
        with (
            self._engine.connect() as connection,
            connection.execution_options(yield_per=50).execute(query) as result,
        ):
            for record in result.scalars():
                yield run_from_json(parsed(record))

    def records(self, sweep_id: str, status: RunStatus) -> list[str]:
        """Returns records as they are stored, for statistics over more runs than there is time to decode."""
        query = sa.select(schema.runs.c.record).where(schema.runs.c.sweep_id == sweep_id)
        return [record for (record,) in self._rows("runs", query.where(schema.runs.c.status == status.value))]

    def done(self, sweep_id: str, *, again: Collection[RunStatus] = (RunStatus.UNREACHABLE,)) -> set[tuple[str, int]]:
        """Returns the (cell key, block) pairs that a resumed sweep need not measure.

        All that ended, but in one of `again` or of a fault of the infrastructure.
        """
        record = sa.case((schema.runs.c.status == RunStatus.OK.value, None), else_=schema.runs.c.record)
        query = sa.select(schema.runs.c.cell, schema.runs.c.block, record).where(
            schema.runs.c.sweep_id == sweep_id, schema.runs.c.status.not_in([status.value for status in again])
        )

        def act() -> set[tuple[str, int]]:
            with (
                self._engine.connect() as connection,
                connection.execution_options(yield_per=50).execute(query) as rows,
            ):
                return {(cell, block) for cell, block, record in rows if record is None or _is_result(record)}

        return self._read("runs", act)

    # --- the health of devices --------------------------------------------------------------------------------------

    def add_mark(self, mark: HealthMark) -> None:
        """Stores a mark. Durable on return."""
        row = {"device": mark.device, "mark": mark.mark.value, "at": mark.at, "note": mark.note}
        with explained(f"the mark of {mark.device} cannot be stored"):
            self._write(lambda connection: connection.execute(sa.insert(schema.marks).values(row)))

    def health(self, device: str, *, at: str | None = None) -> DeviceHealth:
        """Returns a device's health, from its last attempts in any sweep and its marks; `at` is now by default."""
        query = sa.select(schema.runs.c.record).where(schema.runs.c.device == device)
        now, started_at = at or datetime.now(UTC).isoformat(), schema.runs.c.started_at
        query = query.order_by(started_at.desc(), schema.runs.c.id)
        columns = (schema.marks.c.device, schema.marks.c.mark, schema.marks.c.at, schema.marks.c.note)

        def act() -> DeviceHealth:
            with self._engine.connect() as connection:
                rows = connection.execute(
                    sa.select(*columns).where(schema.marks.c.device == device).order_by(schema.marks.c.id)
                )
                marks = [HealthMark(name, Mark(mark), at, note) for name, mark, at, note in rows]
                recent: list[Run] = []
                for dated in (started_at <= now, started_at > now):  # a clock that was ahead says nothing of late
                    with connection.execution_options(yield_per=RECENT).execute(query.where(dated)) as rows:
                        evidence = filter(is_evidence, map(run_from_json, map(parsed, rows.scalars())))
                        recent += itertools.islice(evidence, RECENT - len(recent))
                return health_of(recent, marks, now)

        return self._read(f"the health of {device}", act)

    # --- how --------------------------------------------------------------------------------------------------------

    def _add(self, table: sa.Table, row: dict[str, Any], what: str, pause: Pause | None = None) -> None:
        same_id = sa.select(table.c.record).where(table.c.id == row["id"])

        def act(connection: sa.Connection) -> str | None:
            stored: str | None = connection.execute(same_id).scalar()
            if stored is None:
                connection.execute(sa.insert(table).values(row))
            return stored

        with explained(f"{what} cannot be stored"):
            try:
                stored = self._write(act, pause)
            except sa.exc.IntegrityError:
                # Another process stored it at this very moment, or it refers to what is not there.
                stored = self._write(lambda connection: connection.execute(same_id).scalar(), pause)
                if stored is None and table is schema.runs:
                    raise DatabaseError(
                        f"{what}: sweep {row['sweep_id']} is not in the results database: add it"
                    ) from None
                if stored is None:
                    raise
        if stored not in (None, row["record"]):
            raise DatabaseError(f"{what} is in the results database already, with other content: give a new id")


def sweep_row(sweep: Sweep) -> dict[str, Any]:
    """Returns the row of a sweep: what is searched, and its whole record."""
    row = {"id": sweep.id, "name": sweep.name, "started_at": sweep.started_at}
    return {**row, "record": json.dumps(sweep_to_json(sweep))}


def run_row(run: Run, record: dict[str, Any]) -> dict[str, Any]:
    """Returns the row of a run: what is searched, and its whole record."""
    return {
        "id": run.id,
        "sweep_id": run.sweep_id,
        "cell": run.cell.key,
        "block": run.block,
        "device": run.cell.device,
        "container": run.cell.container,
        "strategy": run.cell.strategy,
        "workload": run.cell.workload,
        "status": run.status.value,
        "verdict": run.verdict.value,
        "started_at": run.started_at,
        "engine_sha256": run.engine_sha256,
        "record": json.dumps(record, allow_nan=False),  # ASCII: what no database can store is escaped
    }


def _is_result(record: str) -> bool:
    fault = run_from_json(parsed(record)).fault
    return fault is None or not fault.is_infrastructure
