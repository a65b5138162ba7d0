"""The results database: every sweep and every run, raw, on SQLAlchemy Core.

An SQLite file by default, a PostgreSQL server where several controllers share one (see connection.py). A run is one
row: the columns that are searched, and the complete record as JSON, from which the Run is rebuilt. Nothing derived is
stored.

History of SCHEMA: 1 first; since then the tables health_marks and controllers were added, which are made where missing.
"""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import sqlalchemy as sa

from reports.connection import Patience, Pause, Place, cause, is_outage
from reports.controllers import Controller
from reports.errors import DatabaseError, OutageError, RecordError, UnknownSweepError
from reports.health import RECENT, DeviceHealth, HealthMark, Mark, health_of, is_evidence
from reports.records import Run, RunStatus, Sweep, run_from_json, run_to_json, sweep_from_json, sweep_to_json

SCHEMA = 1
LATEST = "latest"
_CREATING = 0x656467656D6F65  # of PostgreSQL's advisory locks: two controllers may make one database at once
_CLOCK = {  # the database's own, in seconds since 1970
    "sqlite": "((julianday('now') - 2440587.5) * 86400.0)",
    "postgresql": "CAST(extract(epoch FROM clock_timestamp()) AS double precision)",
}

T = TypeVar("T")


def _text(length: int) -> sa.String:
    """Ordered by code point everywhere: a language's order would shuffle times and ids."""
    return sa.String(length).with_variant(sa.String(length, collation="C"), "postgresql")


_metadata = sa.MetaData()

_schema = sa.Table("farm_schema", _metadata, sa.Column("version", sa.Integer, primary_key=True, autoincrement=False))

_sweeps = sa.Table(
    "sweeps",
    _metadata,
    sa.Column("id", _text(100), primary_key=True),
    sa.Column("name", _text(200), nullable=False, index=True),
    sa.Column("started_at", _text(40), nullable=False, index=True),
    sa.Column("record", sa.Text, nullable=False),
)

_runs = sa.Table(
    "runs",
    _metadata,
    sa.Column("id", _text(100), primary_key=True),
    sa.Column("sweep_id", sa.ForeignKey("sweeps.id"), nullable=False),
    sa.Column("cell", sa.Text, nullable=False),
    sa.Column("block", sa.Integer, nullable=False),
    sa.Column("device", _text(200), nullable=False),
    sa.Column("container", _text(200), nullable=False),
    sa.Column("strategy", _text(200), nullable=False),
    sa.Column("workload", _text(200), nullable=False),
    sa.Column("status", _text(20), nullable=False),
    sa.Column("verdict", _text(20), nullable=False),
    sa.Column("started_at", _text(40), nullable=False),
    sa.Column("engine_sha256", _text(64), nullable=False, index=True),
    sa.Column("record", sa.Text, nullable=False),
    sa.Index("ix_runs_sweep", "sweep_id", "started_at"),
    sa.Index("ix_runs_history", "device", "container", "strategy", "workload", "started_at"),
)


_marks = sa.Table(
    "health_marks",
    _metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("device", _text(200), nullable=False, index=True),
    sa.Column("mark", _text(20), nullable=False),
    sa.Column("at", _text(40), nullable=False),
    sa.Column("note", sa.Text, nullable=False),
)

_controllers = sa.Table(
    "controllers",
    _metadata,
    sa.Column("id", _text(100), primary_key=True),
    sa.Column("owner", _text(300), nullable=False),
    sa.Column("pid", sa.Integer, nullable=False),
    sa.Column("process", _text(200), nullable=False),
    sa.Column("sweep_id", sa.ForeignKey("sweeps.id"), nullable=False, unique=True),  # one controller a sweep
    sa.Column("started_at_s", sa.Double, nullable=False),
    sa.Column("heard_at_s", sa.Double, nullable=False),
)


class Recorded(NamedTuple):
    """How far a sweep is."""

    runs: int  # attempts, all of them
    cells: int  # and blocks, with one attempt or more
    last_started_at: str


class ResultsDatabase:
    """Safe to share between threads: one controller drives many devices. Several processes may use one database."""

    def __init__(self, engine: sa.Engine, patience: Patience) -> None:
        """Use `open`."""
        self._engine = engine
        self._patience = patience
        self._writer = engine.execution_options(writes=True)
        # SQLite lets one writer in and makes the others poll. Queueing the threads of a process here is fair and wakes
        # them at once.
        is_file = engine.dialect.name == "sqlite"
        self._turn: AbstractContextManager[Any] = threading.Lock() if is_file else nullcontext()
        self._now: sa.ColumnElement[float] = sa.literal_column(_CLOCK[engine.dialect.name], sa.Double)

    @classmethod
    def open(cls, place: str | Path, *, create: bool = True, patience: Patience | None = None) -> ResultsDatabase:
        """Opens the database at a path or a URL; `create` makes an empty one where there is none.

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
        database = cls(where.connect(), patience or Patience())
        try:
            database._prepare(where.name, create)
        except sa.exc.SQLAlchemyError as error:
            database.close()
            raise DatabaseError(f"cannot open the results database {where.name}: {cause(error)}") from None
        except DatabaseError:
            database.close()
            raise
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
        return [sweep_from_json(_parsed(record)) for (record,) in self._rows("sweeps", query)]

    def sweep(self, name: str) -> Sweep:
        """By id, by the unique beginning of one, or `latest`. Raises UnknownSweepError."""
        query = sa.select(_sweeps.c.record)
        if name == LATEST:
            queries = [query.order_by(_sweeps.c.started_at.desc(), _sweeps.c.id.desc()).limit(1)]
        else:
            beginning = _sweeps.c.id.startswith(name, autoescape=True)
            queries = [query.where(_sweeps.c.id == name), query.where(beginning).order_by(_sweeps.c.id).limit(2)]
        found = next(filter(None, (self._rows("sweeps", each) for each in queries)), [])
        if not found:
            what = (
                "no sweep yet: run a matrix first" if name == LATEST else f"no sweep {name!r}: see the list of sweeps"
            )
            raise UnknownSweepError(what)
        if len(found) > 1:
            ids = " and ".join(sweep_from_json(_parsed(record)).id for (record,) in found)
            raise UnknownSweepError(f"{name!r} begins more than one sweep, {ids} among them: give more of the id")
        return sweep_from_json(_parsed(found[0][0]))

    def recorded(self, sweep_id: str | None = None) -> dict[str, Recorded]:
        """How far each sweep with a record is, or one of them; no record is read for that."""
        cell = _runs.c.cell + sa.literal("/") + sa.cast(_runs.c.block, sa.String)
        numbers = sa.func.count(), sa.func.count(cell.distinct()), sa.func.max(_runs.c.started_at)
        query = sa.select(_runs.c.sweep_id, *numbers).group_by(_runs.c.sweep_id)
        if sweep_id is not None:
            query = query.where(_runs.c.sweep_id == sweep_id)
        return {identity: Recorded(*found) for identity, *found in self._rows("runs", query)}

    # --- runs -------------------------------------------------------------------------------------------------------

    def add_run(self, run: Run, *, pause: Pause | None = None) -> None:
        """Durable on return. Idempotent; another run of the same id is a DatabaseError.

        Waits for a server that is away, by `pause` where it is given (see Patience); then raises OutageError.
        """
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
        self._add(_runs, row, f"run {run.id}", pause)

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
        stream = self._stream
        return self._read("runs", lambda: list(stream(sweep_id=sweep_id, status=status, **wanted)))

    def stream(
        self, *, sweep_id: str | None = None, status: RunStatus | None = None, **wanted: str | None
    ) -> Iterator[Run]:
        """As `runs`, one after another: for more than fits the memory."""
        with _explained("runs cannot be read"):
            yield from self._stream(sweep_id=sweep_id, status=status, **wanted)

    def _stream(self, *, status: RunStatus | None, **wanted: str | None) -> Iterator[Run]:
        query = sa.select(_runs.c.record).order_by(_runs.c.started_at, _runs.c.id)
        conditions = {**wanted, "status": None if status is None else status.value}
        for column, value in conditions.items():
            if value is not None:
                query = query.where(_runs.c[column] == value)
        with (
            self._engine.connect() as connection,
            connection.execution_options(yield_per=50).execute(query) as result,
        ):
            for record in result.scalars():
                yield run_from_json(_parsed(record))

    def done(self, sweep_id: str, *, again: Collection[RunStatus] = (RunStatus.UNREACHABLE,)) -> set[tuple[str, int]]:
        """The (cell key, block) pairs that a resumed sweep need not measure.

        All that ended, but in one of `again` or of a fault of the infrastructure.
        """
        record = sa.case((_runs.c.status == RunStatus.OK.value, None), else_=_runs.c.record)
        query = sa.select(_runs.c.cell, _runs.c.block, record).where(
            _runs.c.sweep_id == sweep_id, _runs.c.status.not_in([status.value for status in again])
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
        """Durable on return."""
        row = {"device": mark.device, "mark": mark.mark.value, "at": mark.at, "note": mark.note}
        with _explained(f"the mark of {mark.device} cannot be stored"):
            self._write(lambda connection: connection.execute(sa.insert(_marks).values(row)))

    def health(self, device: str) -> DeviceHealth:
        """From its last attempts, in whatever sweep, and its marks."""
        query = sa.select(_runs.c.record).where(_runs.c.device == device)
        query = query.order_by(_runs.c.started_at.desc(), _runs.c.id)
        columns = (_marks.c.device, _marks.c.mark, _marks.c.at, _marks.c.note)

        def act() -> DeviceHealth:
            with self._engine.connect() as connection:
                rows = connection.execute(sa.select(*columns).where(_marks.c.device == device).order_by(_marks.c.id))
                marks = [HealthMark(name, Mark(mark), at, note) for name, mark, at, note in rows]
                with connection.execution_options(yield_per=RECENT).execute(query) as rows:
                    evidence = filter(is_evidence, map(run_from_json, map(_parsed, rows.scalars())))
                    return health_of(itertools.islice(evidence, RECENT), marks)

        return self._read(f"the health of {device}", act)

    # --- controllers ------------------------------------------------------------------------------------------------

    def controllers(self) -> list[Controller]:
        """All that are at work, and those that were last seen so, the oldest first."""
        columns = [_controllers.c[name] for name in ("id", "owner", "pid", "process", "sweep_id")]
        columns += [_controllers.c.started_at_s, _controllers.c.heard_at_s]
        query = sa.select(*columns, self._now - _controllers.c.heard_at_s).order_by(_controllers.c.started_at_s)
        return [Controller(*row) for row in self._rows("controllers", query)]

    def enter(self, controller: Controller, *, instead_of: Controller | None = None) -> bool:
        """Gives a controller its sweep's one place, or that of another; False where somebody else has it (now)."""

        def act(connection: sa.Connection) -> None:
            if instead_of is not None:
                gone = _controllers.c.id == instead_of.id, _controllers.c.heard_at_s == instead_of.heard_at_s
                connection.execute(sa.delete(_controllers).where(*gone))
            row = {name: getattr(controller, name) for name in ("id", "owner", "pid", "process", "sweep_id")}
            connection.execute(sa.insert(_controllers).values(**row, started_at_s=self._now, heard_at_s=self._now))

        with _explained(f"the controller of sweep {controller.sweep_id} cannot be stored"):
            try:
                self._write(act)
            except sa.exc.IntegrityError:
                return any(other.id == controller.id for other in self.controllers())  # a lost answer: it was stored
        return True

    def beat(self, controller: Controller) -> bool:
        """Tells that a controller lives; False where it has lost its place. Waits for no server that is away."""
        query = sa.update(_controllers).where(_controllers.c.id == controller.id).values(heard_at_s=self._now)
        with _explained("the controller's heartbeat cannot be stored"):
            return self._begun(lambda connection: connection.execute(query).rowcount) == 1

    def leave(self, controller: Controller) -> None:
        query = sa.delete(_controllers).where(_controllers.c.id == controller.id)
        with _explained("the controller's end cannot be stored"):
            self._begun(lambda connection: connection.execute(query))

    # --- how --------------------------------------------------------------------------------------------------------

    def _prepare(self, name: str, create: bool) -> None:
        with self._writer.begin() as connection:
            if connection.dialect.name == "postgresql":
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_CREATING)))
            tables = set(sa.inspect(connection).get_table_names())
            if not tables and create:
                _metadata.create_all(connection)
                connection.execute(sa.insert(_schema).values(version=SCHEMA))
                return
            if not tables:
                raise DatabaseError(f"no results in {name}: run a matrix first, or name another database")
            if _schema.name not in tables:
                raise DatabaseError(f"{name} is not a results database of the farm: name another one")
            version = connection.execute(sa.select(sa.func.max(_schema.c.version))).scalar()
            if version != SCHEMA:
                raise DatabaseError(
                    f"{name} has schema version {version} where {SCHEMA} is known: use the farm that wrote it"
                )
            _metadata.create_all(connection)  # what was added since

    def _add(self, table: sa.Table, row: dict[str, Any], what: str, pause: Pause | None = None) -> None:
        same_id = sa.select(table.c.record).where(table.c.id == row["id"])

        def act(connection: sa.Connection) -> str | None:
            stored: str | None = connection.execute(same_id).scalar()
            if stored is None:
                connection.execute(sa.insert(table).values(row))
            return stored

        with _explained(f"{what} cannot be stored"):
            try:
                stored = self._write(act, pause)
            except sa.exc.IntegrityError:
                # Another process stored it at this very moment, or it refers to what is not there.
                stored = self._write(lambda connection: connection.execute(same_id).scalar(), pause)
                if stored is None and table is _runs:
                    raise DatabaseError(
                        f"{what}: sweep {row['sweep_id']} is not in the results database: add it"
                    ) from None
                if stored is None:
                    raise
        if stored not in (None, row["record"]):
            raise DatabaseError(f"{what} is in the results database already, with other content: give a new id")

    def _write(self, act: Callable[[sa.Connection], T], pause: Pause | None = None) -> T:
        return self._patience.persist(lambda: self._begun(act), pause)

    def _begun(self, act: Callable[[sa.Connection], T]) -> T:
        """`act` in a transaction of its own, which is stored on return."""
        with self._turn, self._writer.begin() as connection:
            return act(connection)

    def _read(self, what: str, act: Callable[[], T]) -> T:
        with _explained(f"{what} cannot be read"):
            return self._patience.persist(act)

    def _rows(self, what: str, query: sa.Select[Any]) -> list[Any]:
        def act() -> list[Any]:
            with self._engine.connect() as connection:
                return list(connection.execute(query))

        return self._read(what, act)


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turns what the database raises into one line with the remedy."""
    try:
        yield
    except sa.exc.SQLAlchemyError as error:
        if is_outage(error):
            raise OutageError(
                f"{what}: the database server is away ({cause(error)}): start it; `edgemoe-farm run --resume` goes on"
            ) from None
        raise DatabaseError(f"{what}: {cause(error)}: check the disk and who else writes") from None


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
