"""The results database from one schema to the next, by Alembic; and a new one at the newest.

A database has two numbers. `farm_schema.version` changes when farms of before could no longer use the database, which
they refuse then; the revision (Alembic's) with everything else: new tables, indexes, columns that may be empty. Such a
step is taken when a farm that knows it opens the database, in one transaction; farms that do not know it go on beside
it. Another version is only reached by `results migrate`.
"""

from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from reports.errors import DatabaseError
from reports.files import replacing
from reports.results import schema
from reports.results.connection import Place, cause

_DENIED = "42501"  # PostgreSQL's word for a role that may not do so: it can still read
_TURN = 0x656467656D6F65  # of PostgreSQL's advisory locks: two controllers may make or migrate one database at once


@dataclass(frozen=True)
class Migration:
    """The outcome of `migrate`."""

    name: str  # of the database, without a secret
    before: int  # revisions
    after: int
    backup: Path | None  # of an SQLite file that was changed


def prepare(engine: sa.Engine, name: str, create: bool) -> None:
    """Makes the tables where there are none and `create` says so; takes an older database to the newest revision.

    Raises DatabaseError where it is no database of ours, or of another version.
    """
    with engine.connect() as connection:
        if _is_newest(connection, name, create):
            return
        may_stay = (_revision(connection, name) or 0) >= schema.READABLE
    try:
        _make(engine, name, create)
    except sa.exc.ProgrammingError as error:
        if create or not may_stay or getattr(error.orig, "sqlstate", None) != _DENIED:
            raise


def _make(engine: sa.Engine, name: str, create: bool) -> None:
    with engine.execution_options(writes=True).begin() as connection:
        _take_turn(connection)
        if sa.inspect(connection).has_table(schema.version.name):
            _upgrade(connection, name)
        elif not _is_newest(connection, name, create):
            schema.metadata.create_all(connection)
            connection.execute(sa.insert(schema.version).values(version=schema.VERSION))
            connection.execute(sa.insert(schema.revision).values(version_num=str(schema.REVISION)))


def to_read(where: Place) -> tuple[sa.Engine, Callable[[], None]]:
    """Returns an engine that reads a file and writes nothing there, and what is to be called at the end.

    A database of an older revision is copied and the copy taken to the newest. Raises as `prepare`.
    """
    engine = where.connect_to_read()
    try:
        with engine.connect() as connection:
            if _is_newest(connection, where.name, False, needed=schema.READABLE):
                return engine, lambda: None
    except BaseException:
        engine.dispose()
        raise
    folder = tempfile.TemporaryDirectory(prefix="edgemoe-farm-")
    copy = Path(folder.name) / "results.db"
    upgraded = Place.parse(copy).connect()
    try:
        with engine.connect() as connection, closing(sqlite3.connect(copy)) as target:
            driver: Any = connection.connection.driver_connection
            driver.backup(target)
        prepare(upgraded, where.name, False)
    except BaseException:
        upgraded.dispose()
        folder.cleanup()
        raise
    finally:
        engine.dispose()
    return upgraded, folder.cleanup


def migrate(place: str | Path) -> Migration:
    """Takes a database to the newest schema, in a transaction, after an SQLite file was copied to one beside it."""
    where = Place.parse(place)
    if where.file is not None and not where.file.is_file():
        raise DatabaseError(f"no results at {where.name}: name another database")
    engine = where.connect()
    try:
        with engine.execution_options(writes=True).begin() as connection:
            _take_turn(connection)
            before = _revision(connection, where.name)
            if before is None:
                raise DatabaseError(f"no results in {where.name}: name another database")
            if before >= schema.REVISION and _version(connection) == schema.VERSION:
                return Migration(where.name, before, before, None)
            backup = _backup(where.file, before) if where.file is not None else None
            _upgrade(connection, where.name, any_version=True)
        return Migration(where.name, before, schema.REVISION, backup)
    except sa.exc.SQLAlchemyError as error:
        raise DatabaseError(f"{where.name} cannot be migrated, and is what it was: {cause(error)}") from None
    finally:
        engine.dispose()


def _is_newest(connection: sa.Connection, name: str, create: bool, needed: int = schema.REVISION) -> bool:
    revision = _revision(connection, name)
    if revision is None and not create:
        raise DatabaseError(f"no results in {name}: run a matrix first, or name another database")
    if revision is None:
        return False
    _require_version(connection, name)
    return revision >= needed


def _revision(connection: sa.Connection, name: str) -> int | None:
    """Returns the revision, None for an empty database; the first releases stored none, and are revision 1."""
    tables = set(sa.inspect(connection).get_table_names())
    if tables and schema.version.name not in tables:
        raise DatabaseError(f"{name} is not a results database of the farm: name another one")
    if schema.revision.name not in tables:
        return 1 if tables else None
    text = connection.execute(sa.select(schema.revision.c.version_num)).scalar()
    if text is None or not text.isdecimal():
        raise DatabaseError(f"{name} has the unknown revision {text!r}: use the farm that wrote it")
    return int(text)


def _version(connection: sa.Connection) -> int | None:
    version: int | None = connection.execute(sa.select(sa.func.max(schema.version.c.version))).scalar()
    return version


def _require_version(connection: sa.Connection, name: str, *, older: bool = False) -> None:
    version = _version(connection)
    if version is None or version > schema.VERSION:
        raise DatabaseError(
            f"{name} has schema version {version} where {schema.VERSION} is known: use the farm that wrote it"
        )
    if version < schema.VERSION and not older:
        raise DatabaseError(
            f"{name} has schema version {version}, of an older farm, where {schema.VERSION} is needed: stop whoever "
            "writes to it, then `edgemoe-farm results migrate`"
        )


def _upgrade(connection: sa.Connection, name: str, *, any_version: bool = False) -> None:
    from alembic import command  # half a second to import, for what is rarely done
    from alembic.config import Config

    revision = _revision(connection, name)
    _require_version(connection, name, older=any_version)
    if revision is None or revision >= schema.REVISION:
        return  # another process was first
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.attributes["connection"] = connection
    if not sa.inspect(connection).has_table(schema.revision.name):
        command.stamp(config, str(revision))
    command.upgrade(config, str(schema.REVISION))


def _take_turn(connection: sa.Connection) -> None:
    if connection.dialect.name == "postgresql":
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_TURN)))


def _backup(file: Path, revision: int) -> Path:
    """Makes a consistent copy, whoever reads or waits to write."""
    backup = file.with_name(f"{file.name}.revision-{revision}.bak")
    if backup.exists():
        raise DatabaseError(f"the backup {backup} is there already: move it away, then migrate again")
    with replacing(backup) as copy:
        source, target = sqlite3.connect(file), sqlite3.connect(copy.name)
        try:
            source.backup(target)
        except sqlite3.Error as error:
            raise DatabaseError(f"cannot write {backup}: {error}: free some disk, then migrate again") from None
        finally:
            source.close()
            target.close()
    return backup
