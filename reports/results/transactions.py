"""Reading and writing the results database: in transactions that are durable on return, and with patience."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import sqlalchemy as sa

from reports.errors import DatabaseError, OutageError, RecordError
from reports.results.connection import Patience, Pause, cause, is_outage

_CLOCK = {  # the database's own, in seconds since 1970
    "sqlite": "((julianday('now') - 2440587.5) * 86400.0)",
    "postgresql": "CAST(extract(epoch FROM clock_timestamp()) AS double precision)",
}

T = TypeVar("T")


class Transactions:
    """The base of the parts of ResultsDatabase, safe to share between threads."""

    def __init__(self, engine: sa.Engine, patience: Patience) -> None:
        self._engine = engine
        self._patience = patience
        self._writer = engine.execution_options(writes=True)
        # SQLite lets one writer in and makes the others poll. Queueing the threads of a process here is fair and wakes
        # them at once.
        is_file = engine.dialect.name == "sqlite"
        self._turn: AbstractContextManager[Any] = threading.Lock() if is_file else nullcontext()
        self._now: sa.ColumnElement[float] = sa.literal_column(_CLOCK[engine.dialect.name], sa.Double)

    def _write(self, act: Callable[[sa.Connection], T], pause: Pause | None = None) -> T:
        return self._patience.persist(lambda: self._begun(act), pause)

    def _begun(self, act: Callable[[sa.Connection], T]) -> T:
        """Calls `act` in a transaction of its own, which is stored on return."""
        with self._turn, self._writer.begin() as connection:
            return act(connection)

    def _read(self, what: str, act: Callable[[], T]) -> T:
        with explained(f"{what} cannot be read"):
            return self._patience.persist(act)

    def _rows(self, what: str, query: sa.Select[Any]) -> list[Any]:
        def act() -> list[Any]:
            with self._engine.connect() as connection:
                return list(connection.execute(query))

        return self._read(what, act)


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turns what the database raises into one line with the remedy."""
    try:
        yield
    except sa.exc.SQLAlchemyError as error:
        if is_outage(error):
            raise OutageError(
                f"{what}: the database server is away ({cause(error)}): start it; `edgemoe-farm run --resume` goes on"
            ) from None
        raise DatabaseError(f"{what}: {cause(error)}: check the disk and who else writes") from None


def parsed(record: str) -> dict[str, Any]:
    try:
        value = json.loads(record)
    except ValueError as error:
        raise RecordError(f"a record in the results database is damaged: {error}: restore the database") from None
    if not isinstance(value, dict):
        raise RecordError("a record in the results database is damaged: not an object: restore the database")
    return value
