"""The results database: every sweep and every run, raw, on SQLAlchemy Core.

SQLite by default, any SQLAlchemy URL otherwise; only portable types are used. A run is one row: the columns that are
searched, and the complete record as JSON, from which the Run is rebuilt. Nothing derived is stored.

History of SCHEMA: 1 first; since then the table health_marks was added, which is made where it is missing.
"""

from __future__ import annotations

import itertools
import json
import sqlite3
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine.interfaces import DBAPIConnection, DBAPICursor

from reports.errors import DatabaseError, RecordError, UnknownSweepError
from reports.health import RECENT, DeviceHealth, HealthMark, Mark, health_of, is_evidence
from reports.records import Run, RunStatus, Sweep, run_from_json, run_to_json, sweep_from_json, sweep_to_json

SCHEMA = 1
BUSY_TIMEOUT_S = 60.0  # how long a writer waits for another process
LATEST = "latest"

_metadata = sa.MetaData()

_schema = sa.Table("farm_schema", _metadata, sa.Column("version", sa.Integer, primary_key=True, autoincrement=False))

_sweeps = sa.Table(
    "sweeps",
    _metadata,
    sa.Column("id", sa.String(100), primary_key=True),
    sa.Column("name", sa.String(200), nullable=False, index=True),
    sa.Column("started_at", sa.String(40), nullable=False, index=True),
    sa.Column("record", sa.Text, nullable=False),
)

_runs = sa.Table(
    "runs",
    _metadata,
    sa.Column("id", sa.String(100), primary_key=True),
    sa.Column("sweep_id", sa.ForeignKey("sweeps.id"), nullable=False),
    sa.Column("cell", sa.Text, nullable=False),
    sa.Column("block", sa.Integer, nullable=False),
    sa.Column("device", sa.String(200), nullable=False),
    sa.Column("container", sa.String(200), nullable=False),
    sa.Column("strategy", sa.String(200), nullable=False),
    sa.Column("workload", sa.String(200), nullable=False),
    sa.Column("status", sa.String(20), nullable=False),
    sa.Column("verdict", sa.String(20), nullable=False),
    sa.Column("started_at", sa.String(40), nullable=False),
    sa.Column("engine_sha256", sa.String(64), nullable=False, index=True),
    sa.Column("record", sa.Text, nullable=False),
    sa.Index("ix_runs_sweep", "sweep_id", "started_at"),
    sa.Index("ix_runs_history", "device", "container", "strategy", "workload", "started_at"),
)


_marks = sa.Table(
    "health_marks",
    _metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("device", sa.String(200), nullable=False, index=True),
    sa.Column("mark", sa.String(20), nullable=False),
    sa.Column("at", sa.String(40), nullable=False),
    sa.Column("note", sa.Text, nullable=False),
)


class ResultsDatabase:
    """Safe to share between threads: one controller drives many devices. Several processes may use one database."""

    def __init__(self, engine: sa.Engine) -> None:
        """Use `open`."""
        self._engine = engine
        self._writer = engine.execution_options(writes=True)
        # SQLite lets one writer in and makes the others poll. Queueing the threads of a process here is fair and wakes
        # them at once.
        self._turn: AbstractContextManager[Any] = threading.Lock() if _is_sqlite(engine) else nullcontext()

    @classmethod
    def open(cls, place: str | Path, *, create: bool = True) -> ResultsDatabase:
        """Opens the database at a path or an SQLAlchemy URL; `create` makes an empty one where there is none.

        Raises DatabaseError where there is none, where it is not ours, or of another schema version.
        """
        url = _url(place)
        name = url.render_as_string(hide_password=True)
        if _is_file(url):
            path = Path(str(url.database))
            name = str(path)
            if not create and not path.is_file():
                raise DatabaseError(f"no results at {name}: run a matrix first, or name another database")
            if not path.parent.is_dir():
                raise DatabaseError(f"no folder {path.parent} for the results database: create it, or name another")
        try:
            database = cls(_connect(url))
            database._prepare(name, create)
        except (sa.exc.SQLAlchemyError, ImportError) as error:
            raise DatabaseError(f"cannot open the results database {name}: {_cause(error)}") from None
        return database

    def close(self) -> None:
        self._engine.dispose()

    def __enter__(self) -> ResultsDatabase:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- sweeps -----------------------------------------------------------------------------------------------------

    def add_sweep(self, sweep: Sweep) -> None:
        """Idempotent; another sweep of the same id is a DatabaseError."""
        row = {"id": sweep.id, "name": sweep.name, "started_at": sweep.started_at}
        self._add(_sweeps, {**row, "record": json.dumps(sweep_to_json(sweep))}, f"sweep {sweep.id}")

    def sweeps(self) -> list[Sweep]:
        """All, the oldest first."""
        query = sa.select(_sweeps.c.record).order_by(_sweeps.c.started_at, _sweeps.c.id)
        return [sweep_from_json(_parsed(record)) for record in self._read(query)]

    def sweep(self, name: str) -> Sweep:
        """By id, by the unique beginning of one, or `latest`. Raises UnknownSweepError."""
        query = sa.select(_sweeps.c.record)
        if name == LATEST:
            found = self._read(query.order_by(_sweeps.c.started_at.desc(), _sweeps.c.id.desc()).limit(1))
        else:
            found = self._read(query.where(_sweeps.c.id == name)) or self._read(
                query.where(_sweeps.c.id.startswith(name, autoescape=True)).order_by(_sweeps.c.id).limit(2)
            )
        if not found:
            what = (
                "no sweep yet: run a matrix first" if name == LATEST else f"no sweep {name!r}: see the list of sweeps"
            )
            raise UnknownSweepError(what)
        if len(found) > 1:
            ids = " and ".join(sweep_from_json(_parsed(record)).id for record in found)
            raise UnknownSweepError(f"{name!r} begins more than one sweep, {ids} among them: give more of the id")
        return sweep_from_json(_parsed(found[0]))

    # --- runs -------------------------------------------------------------------------------------------------------

    def add_run(self, run: Run) -> None:
        """Durable on return. Idempotent; another run of the same id is a DatabaseError."""
        row = {
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
            "record": json.dumps(run_to_json(run), allow_nan=False),  # ASCII: what no database can store is escaped
        }
        self._add(_runs, row, f"run {run.id}")

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
        """Those that match, in the order in which they were started."""
        wanted = {"device": device, "container": container, "strategy": strategy, "workload": workload}
        return list(self.stream(sweep_id=sweep_id, status=status, **wanted))

    def stream(
        self, *, sweep_id: str | None = None, status: RunStatus | None = None, **wanted: str | None
    ) -> Iterator[Run]:
        """As `runs`, one after another: for more than fits the memory."""
        query = sa.select(_runs.c.record).order_by(_runs.c.started_at, _runs.c.id)
        conditions = {**wanted, "sweep_id": sweep_id, "status": None if status is None else status.value}
        for column, value in conditions.items():
            if value is not None:
                query = query.where(_runs.c[column] == value)
        with self._engine.connect() as connection:
            for record in connection.execution_options(yield_per=50).execute(query).scalars():
                yield run_from_json(_parsed(record))

    def done(self, sweep_id: str, *, again: Collection[RunStatus] = (RunStatus.UNREACHABLE,)) -> set[tuple[str, int]]:
        """The (cell key, block) pairs that a resumed sweep need not measure.

        All that ended, but in one of `again` or of a fault of the infrastructure.
        """
        record = sa.case((_runs.c.status == RunStatus.OK.value, None), else_=_runs.c.record)
        query = sa.select(_runs.c.cell, _runs.c.block, record).where(
            _runs.c.sweep_id == sweep_id, _runs.c.status.not_in([status.value for status in again])
        )
        with self._engine.connect() as connection:
            rows = connection.execution_options(yield_per=50).execute(query)
            return {(cell, block) for cell, block, record in rows if record is None or _is_result(record)}

    # --- the health of devices --------------------------------------------------------------------------------------

    def add_mark(self, mark: HealthMark) -> None:
        """Durable on return."""
        row = {"device": mark.device, "mark": mark.mark.value, "at": mark.at, "note": mark.note}
        try:
            with self._turn, self._writer.begin() as connection:
                connection.execute(sa.insert(_marks).values(row))
        except sa.exc.SQLAlchemyError as error:
            raise DatabaseError(
                f"the mark of {mark.device} cannot be stored: {_cause(error)}: check the disk and who else writes"
            ) from None

    def health(self, device: str) -> DeviceHealth:
        """From its last attempts, in whatever sweep, and its marks."""
        query = sa.select(_runs.c.record).where(_runs.c.device == device)
        query = query.order_by(_runs.c.started_at.desc(), _runs.c.id)
        columns = (_marks.c.device, _marks.c.mark, _marks.c.at, _marks.c.note)
        with self._engine.connect() as connection:
            rows = connection.execute(sa.select(*columns).where(_marks.c.device == device).order_by(_marks.c.id))
            marks = [HealthMark(name, Mark(mark), at, note) for name, mark, at, note in rows]
            records = connection.execution_options(yield_per=RECENT).execute(query).scalars()
            evidence = (run for run in map(run_from_json, map(_parsed, records)) if is_evidence(run))
            return health_of(itertools.islice(evidence, RECENT), marks)

    # --- how --------------------------------------------------------------------------------------------------------

    def _prepare(self, name: str, create: bool) -> None:
        with self._writer.begin() as connection:
            tables = set(sa.inspect(connection).get_table_names())
            if not tables and create:
                _metadata.create_all(connection)
                connection.execute(sa.insert(_schema).values(version=SCHEMA))
                return
            if _schema.name not in tables:
                raise DatabaseError(f"{name} is not a results database of the farm: name another one")
            version = connection.execute(sa.select(sa.func.max(_schema.c.version))).scalar()
            if version != SCHEMA:
                raise DatabaseError(
                    f"{name} has schema version {version} where {SCHEMA} is known: use the farm that wrote it"
                )
            if _marks.name not in tables:
                _marks.create(connection)

    def _add(self, table: sa.Table, row: dict[str, Any], what: str) -> None:
        try:
            with self._turn, self._writer.begin() as connection:
                same_id = connection.execute(sa.select(table.c.record).where(table.c.id == row["id"])).scalar()
                if same_id is None:
                    connection.execute(sa.insert(table).values(row))
                elif same_id != row["record"]:
                    raise DatabaseError(f"{what} is in the results database already, with other content: give a new id")
        except sa.exc.IntegrityError as error:
            if table is _runs and not self._read(sa.select(_sweeps.c.id).where(_sweeps.c.id == row["sweep_id"])):
                raise DatabaseError(f"{what}: sweep {row['sweep_id']} is not in the results database: add it") from None
            raise DatabaseError(f"{what} cannot be stored: {_cause(error)}") from None
        except sa.exc.SQLAlchemyError as error:
            raise DatabaseError(
                f"{what} cannot be stored: {_cause(error)}: check the disk and who else writes"
            ) from None

    def _read(self, query: sa.Select[Any]) -> list[str]:
        with self._engine.connect() as connection:
            return list(connection.execute(query).scalars())


def _url(place: str | Path) -> sa.URL:
    if isinstance(place, Path) or "://" not in place:
        return sa.URL.create("sqlite", database=str(place))
    try:
        return sa.make_url(place)
    except sa.exc.ArgumentError:
        raise DatabaseError("the database URL is malformed: write a path or dialect://user@host/name") from None


def _is_file(url: sa.URL) -> bool:
    return url.get_backend_name() == "sqlite" and url.database not in (None, "", ":memory:")


def _is_sqlite(engine: sa.Engine) -> bool:
    return engine.dialect.name == "sqlite"


def _connect(url: sa.URL) -> sa.Engine:
    if url.get_backend_name() != "sqlite":
        return sa.create_engine(url, pool_pre_ping=True)
    engine = sa.create_engine(url, connect_args={"timeout": BUSY_TIMEOUT_S})

    @sa.event.listens_for(engine, "connect")
    def configure(connection: DBAPIConnection, _: object) -> None:
        connection.isolation_level = None  # the driver's own transactions begin too late: see `begin`
        cursor = connection.cursor()
        cursor.execute("PRAGMA foreign_keys = ON")
        _switch_to_wal(cursor)
        # A run costs minutes of a device and a sync milliseconds: it must survive a power cut, which NORMAL does not
        # promise under WAL.
        cursor.execute("PRAGMA synchronous = FULL")
        cursor.close()

    @sa.event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        # A reader that turns writer cannot wait for its turn (SQLITE_BUSY at once): writers say so from the start.
        writes = connection.get_execution_options().get("writes", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _switch_to_wal(cursor: DBAPICursor) -> None:
    """So that readers and the writer do not wait for one another. The file remembers it.

    The switch is the one statement that the busy timeout does not cover: two processes may make the database at once.
    """
    deadline = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            cursor.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def _cause(error: Exception) -> str:
    """One line, without the statement and its parameters."""
    return str(getattr(error, "orig", None) or error).strip().split("\n", 1)[0]


def _is_result(record: str) -> bool:
    fault = run_from_json(_parsed(record)).fault
    return fault is None or not fault.is_infrastructure


def _parsed(record: str) -> dict[str, Any]:
    try:
        value = json.loads(record)
    except ValueError as error:
        raise RecordError(f"a record in the results database is damaged: {error}: restore the database") from None
    if not isinstance(value, dict):
        raise RecordError("a record in the results database is damaged: not an object: restore the database")
    return value
