"""The place of the results database, and connections to it: an SQLite file, or a PostgreSQL server for several.

A server may be restarted while a sweep runs: `Patience` is how long its controllers wait for it.
"""

from __future__ import annotations

import os
import re
import sqlite3
import time
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.engine.interfaces import DBAPIConnection, DBAPICursor

from reports.errors import DatabaseError

BUSY_TIMEOUT_S = 60.0  # how long a writer waits for another process
STATEMENT_TIMEOUT_S = 300.0  # of a server
OUTAGE_S = 900.0  # how long a sweep waits for a server that is away
FIRST_BACKOFF_S, LAST_BACKOFF_S = 0.2, 10.0
_DRIVERS = {
    "sqlite": "sqlite",
    "sqlite+pysqlite": "sqlite",
    "postgres": "postgresql+psycopg",
    "postgresql": "postgresql+psycopg",
    "postgresql+psycopg": "postgresql+psycopg",
}
_POOL = 8  # connections of one controller, whose threads wait for their turn
# A server that vanishes without a word is noticed within half a minute. What the URL says of these has precedence.
_SERVER = {
    "application_name": "edgemoe-farm",
    "connect_timeout": "10",
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "3",
    "tcp_user_timeout": "25000",
}
_SETTINGS = f"""
    SELECT set_config('lock_timeout', '{BUSY_TIMEOUT_S:.0f}s', false),
           set_config('statement_timeout', '{STATEMENT_TIMEOUT_S:.0f}s', false),
           CASE WHEN current_setting('synchronous_commit') IN ('off', 'local')
                THEN set_config('synchronous_commit', 'on', false) END
"""  # a run costs minutes of a device and a sync milliseconds

T = TypeVar("T")
Pause = Callable[[str, float], bool]


# --- where ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """A results database by its path or URL. `name` is what messages call it, without a secret."""

    url: sa.URL = field(repr=False)

    @classmethod
    def parse(cls, place: str | Path) -> Place:
        """Reads a path or URL. Raises DatabaseError, which repeats nothing of it: it may contain a password."""
        if isinstance(place, Path) or "://" not in place:
            if isinstance(place, str) and _LIKE_A_URL.search(place):
                raise DatabaseError(_MALFORMED)
            return cls(sa.URL.create("sqlite", database=str(place)))
        try:
            url = sa.make_url(place)
        except (sa.exc.ArgumentError, ValueError):
            raise DatabaseError(_MALFORMED) from None
        if url.drivername not in _DRIVERS or "@" in f"{url.host}{url.database if url.host else ''}":
            raise DatabaseError(_MALFORMED)
        return cls(url.set(drivername=_DRIVERS[url.drivername]))

    @property
    def is_server(self) -> bool:
        return self.url.drivername != "sqlite"

    @property
    def file(self) -> Path | None:
        """Returns the path of the file, None for a server or a database in memory."""
        named = not self.is_server and self.url.database not in (None, "", ":memory:")
        return Path(str(self.url.database)) if named else None

    @property
    def name(self) -> str:
        if not self.is_server:
            return str(self.file or self.url)
        url = self.url
        where = {key: value for key, value in url.query.items() if key in ("host", "port", "dbname", "service")}
        return sa.URL.create(
            "postgresql", url.username, None, url.host, url.port, url.database, where
        ).render_as_string()

    @property
    def may_be_written(self) -> bool:
        """Tells whether this process may write the file and beside it, as its journal needs; True for a server."""
        file = self.file
        return file is None or all(os.access(path, os.W_OK, effective_ids=True) for path in (file, file.parent))

    def connect(self) -> sa.Engine:
        """Returns an engine that connects at the first use. Raises DatabaseError where the driver is missing."""
        return self._server() if self.is_server else _sqlite(self.url)

    def connect_to_read(self) -> sa.Engine:
        """Returns an engine for a file that writes nothing, neither there nor beside it. Raises sqlite3.Error."""
        file = self.file
        assert file is not None
        query = {"mode": "ro", "uri": "true"}
        if not _can_be_shared(file):
            query["immutable"] = "1"
        return _sqlite(self.url.set(database=_uri(file), query=query), reading=True)

    def _server(self) -> sa.Engine:
        arguments: dict[str, Any] = {key: value for key, value in _SERVER.items() if key not in self.url.query}
        try:
            engine = sa.create_engine(
                self.url,
                connect_args={**arguments, "client_encoding": "utf8"},
                pool_pre_ping=True,
                pool_size=_POOL,
                max_overflow=0,
                pool_timeout=BUSY_TIMEOUT_S,
                hide_parameters=True,
            )
        except ImportError:
            raise DatabaseError(
                f"{self.name} needs the driver of PostgreSQL: pip install 'psycopg[binary]>=3.2'"
            ) from None

        driver: Any = engine.dialect.loaded_dbapi

        class Cursor(driver.ServerCursor):  # type: ignore[misc]
            """Closes a connection whose server went away: SQLAlchemy forgets it then, and the driver complains."""

            def execute(self, *arguments: Any, **options: Any) -> Any:
                try:
                    return super().execute(*arguments, **options)
                except driver.Error:
                    if self.connection.closed:
                        self.close()
                    raise

            def close(self) -> None:
                try:
                    super().close()
                except driver.Error:
                    super().close()  # of a lost connection: nothing is asked of the server any more
                    raise

        @sa.event.listens_for(engine, "connect")
        def configure(connection: DBAPIConnection, _: object) -> None:
            connection.server_cursor_factory = Cursor
            connection.autocommit = True
            connection.cursor().execute(_SETTINGS)
            connection.autocommit = False

        return engine


_MALFORMED = (
    "the place of the results database is malformed: write a path or postgresql://user@host/database, with special "
    "characters as %40 and the like; the password may stand in ~/.pgpass or PGPASSWORD"
)
_LIKE_A_URL = re.compile(r"^postgres(ql)?(\+\w+)?:|^sqlite(\+\w+)?:|\b(ssl)?password\s*=", re.IGNORECASE)


def _uri(file: Path) -> str:
    return f"file:{urllib.parse.quote(str(file.resolve()))}"


def _can_be_shared(file: Path) -> bool:
    """Tells whether SQLite can read a file beside others that write it.

    In a folder that may not be written that needs the files of the one that writes. Without them nobody does, so the
    file does not change; but what a killed writer has left in the journal is then not seen, and is refused.
    """
    connection = sqlite3.connect(f"{_uri(file)}?mode=ro", uri=True, timeout=BUSY_TIMEOUT_S)
    try:
        connection.execute("SELECT 1 FROM sqlite_master").fetchone()
    except sqlite3.OperationalError as error:
        journal = file.with_name(f"{file.name}-wal")
        if journal.exists() and journal.stat().st_size > 0:
            raise DatabaseError(
                f"{file} has records in {journal.name} that cannot be read without writing ({error}): copy both to a "
                "folder of your own, and name that"
            ) from None
        return False
    finally:
        connection.close()
    return True


def _sqlite(url: sa.URL, *, reading: bool = False) -> sa.Engine:
    engine = sa.create_engine(url, connect_args={"timeout": BUSY_TIMEOUT_S})

    @sa.event.listens_for(engine, "connect")
    def configure(connection: DBAPIConnection, _: object) -> None:
        connection.isolation_level = None  # the driver's own transactions begin too late: see `begin`
        cursor = connection.cursor()
        cursor.execute("PRAGMA foreign_keys = ON")
        if not reading:
            _switch_to_wal(cursor)
            # A run costs minutes of a device and a sync milliseconds: it must survive a power cut, which NORMAL does
            # not promise under WAL.
            cursor.execute("PRAGMA synchronous = FULL")
        cursor.close()

    @sa.event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        # A reader that turns writer cannot wait for its turn (SQLITE_BUSY at once): writers say so from the start.
        options = connection.get_execution_options()
        if options.get("isolation_level") == "AUTOCOMMIT":
            return
        writes = options.get("writes", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _switch_to_wal(cursor: DBAPICursor) -> None:
    """Sets WAL, with which readers and the writer do not wait for one another. The file remembers it.

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


# --- when it is away ------------------------------------------------------------------------------------------------


def sleep(why: str, seconds: float) -> bool:
    time.sleep(seconds)
    return True


@dataclass(frozen=True)
class Patience:
    """The patience with a server that is away: restarted, overloaded, out of reach.

    `pause` is told before each further try why, waits so many seconds, and says whether to go on.
    """

    outage_s: float = 0.0
    pause: Pause = sleep
    clock: Callable[[], float] = time.monotonic

    def persist(self, act: Callable[[], T], pause: Pause | None = None) -> T:
        """Calls `act` again while it fails of an outage, up to a limit; raises what it raised last.

        A commit may have been done though its answer was lost: `act` must bear to be done twice.
        """
        end, backoff_s = self.clock() + self.outage_s, FIRST_BACKOFF_S
        while True:
            try:
                return act()
            except sa.exc.SQLAlchemyError as error:
                left_s = end - self.clock()
                if left_s <= 0 or not is_outage(error):
                    raise
                if not (pause or self.pause)(cause(error), min(backoff_s, left_s)):
                    raise
            backoff_s = min(2 * backoff_s, LAST_BACKOFF_S)


def is_outage(error: Exception) -> bool:
    """Returns whether another try may help; SQLite's errors are no outage, as it has waited already."""
    if isinstance(error, sa.exc.TimeoutError):  # no connection of the pool became free
        return True
    if not isinstance(error, sa.exc.DBAPIError) or isinstance(error.orig, sqlite3.Error):
        return False
    return error.connection_invalidated or isinstance(error, sa.exc.OperationalError | sa.exc.InterfaceError)


def cause(error: Exception) -> str:
    """Returns the cause in one line, without the statement and its parameters."""
    return str(getattr(error, "orig", None) or error).strip().split("\n", 1)[0]
