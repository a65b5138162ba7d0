"""Results that may only be read are read at once, and what is read is not changed."""

from __future__ import annotations

import hashlib
import os
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa

from reports.errors import DatabaseError
from reports.results.connection import BUSY_TIMEOUT_S
from reports.results.database import ResultsDatabase
from tests.command_line import invoke
from tests.postgresql import Server
from tests.reports.conftest import run as make_run
from tests.reports.conftest import runs as make_runs
from tests.reports.conftest import sweep as make_sweep
from tests.reports.results.test_migrations import FIRST_RELEASE

RUNS = make_runs()


@pytest.fixture
def stored() -> Iterator[Path]:
    """A database in a folder that others may enter."""
    folder = Path(tempfile.mkdtemp(prefix="results-", dir="/tmp"))
    with ResultsDatabase.open(folder / "farm.db") as database:
        database.add_sweep(make_sweep(RUNS))
        for run in RUNS:
            database.add_run(run)
    yield folder / "farm.db"
    folder.chmod(0o700)
    shutil.rmtree(folder)


@pytest.fixture
def nobody() -> Iterator[None]:
    """This process is another user, for whom modes count."""
    if os.geteuid() == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(os.getuid())


def protect(file: Path) -> None:
    file.chmod(0o444)
    file.parent.chmod(0o555)


def content(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_a_file_that_may_only_be_read_is_read_at_once(stored: Path, request: pytest.FixtureRequest) -> None:
    protect(stored)
    before = content(stored.parent)
    request.getfixturevalue("nobody")
    began = time.monotonic()
    with ResultsDatabase.open(stored, create=False) as database:
        assert len(database.runs()) == len(RUNS)
        with pytest.raises(DatabaseError, match="readonly"):
            database.add_sweep(make_sweep(RUNS, id="20261124-221500-0000"))
    assert time.monotonic() - began < BUSY_TIMEOUT_S / 2
    assert content(stored.parent) == before


@pytest.mark.parametrize(
    "command",
    ["results list", "results show latest", "report latest", "results export --format jsonl", "compare latest latest"],
)
def test_every_way_to_look_at_results(stored: Path, request: pytest.FixtureRequest, command: str) -> None:
    protect(stored)
    out = Path(tempfile.mkdtemp(dir="/tmp"))
    out.chmod(0o777)
    request.getfixturevalue("nobody")
    extra = ("-o", out / "page") if command.startswith("report") or "export" in command else ()
    result = invoke(*command.split(), *extra, "--results", stored)
    assert result.exit_code == 0, result.output


def test_what_a_killed_writer_left_is_not_overlooked(stored: Path, request: pytest.FixtureRequest) -> None:
    """Its journal cannot be read without writing beside it: that is said, and no older state is shown as the newest."""
    writer = sqlite3.connect(stored)
    writer.execute("PRAGMA wal_autocheckpoint = 0")
    writer.execute("CREATE TABLE later (x)")
    writer.commit()
    journal = stored.with_name("farm.db-wal")
    kept = journal.read_bytes()
    writer.close()
    journal.write_bytes(kept)
    protect(stored)
    request.getfixturevalue("nobody")
    with pytest.raises(DatabaseError, match=r"farm\.db-wal that cannot be read without writing"):
        ResultsDatabase.open(stored, create=False)


def test_importing_an_older_database_does_not_change_it(stored: Path) -> None:
    stored.unlink()
    with closing(sqlite3.connect(stored)) as connection:
        connection.executescript(FIRST_RELEASE)
    before = content(stored.parent)
    with ResultsDatabase.open(stored, create=False, reading=True) as database:
        assert len(database.runs()) == 1
    assert content(stored.parent) == before
    target = stored.parent / "target.db"
    assert invoke("results", "import", stored, "--results", target).exit_code == 0
    with ResultsDatabase.open(target) as database:
        assert len(database.runs()) == 1
    assert {name: found for name, found in content(stored.parent).items() if name in before} == before


def test_a_reader_sees_what_a_writer_adds(stored: Path) -> None:
    with ResultsDatabase.open(stored) as writer, ResultsDatabase.open(stored, create=False, reading=True) as reader:
        before = len(reader.runs())
        writer.add_run(make_run(id="later"))
        assert len(reader.runs()) == before + 1


def test_a_role_that_may_only_select_reads_a_server(postgresql: Server) -> None:
    place = postgresql.emptied()
    with ResultsDatabase.open(place) as database:
        database.add_sweep(make_sweep(RUNS))
        for run in RUNS:
            database.add_run(run)
    postgresql.execute(
        "CREATE ROLE reader LOGIN PASSWORD 'reader'; GRANT USAGE ON SCHEMA public TO reader;"
        "GRANT SELECT ON ALL TABLES IN SCHEMA public TO reader"
    )
    reader = sa.make_url(place).set(username="reader", password="reader").render_as_string(hide_password=False)
    began = time.monotonic()
    with ResultsDatabase.open(reader, create=False) as database:
        assert len(database.runs()) == len(RUNS)
        with pytest.raises(DatabaseError, match="permission denied"):
            database.add_run(make_run(id="later"))
    postgresql.execute("DROP TABLE imports; UPDATE alembic_version SET version_num = '3'")
    with ResultsDatabase.open(reader, create=False) as database:
        assert len(database.runs()) == len(RUNS), "of the revision before, which it may not take to the newest"
    assert time.monotonic() - began < BUSY_TIMEOUT_S / 2
