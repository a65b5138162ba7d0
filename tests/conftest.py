"""What the tests of several packages share: a PostgreSQL server."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.postgresql import OLDEST, Server, binaries


@pytest.fixture(scope="session")
def postgresql() -> Iterator[Server]:
    """One server for all tests; who stops it starts it again."""
    pytest.importorskip("psycopg", reason="psycopg is not installed: pip install 'psycopg[binary]'")
    programs = binaries()
    if programs is None:
        pytest.skip(f"no PostgreSQL server of version {OLDEST} or later is installed: apt install postgresql")
    server = Server(programs)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # a server must not outlive tests that are ended
    try:
        server.start()
        yield server
    finally:
        server.close()
        signal.signal(signal.SIGTERM, before)


@pytest.fixture(params=["sqlite", "postgresql"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where a results database may be made: a path or a URL."""
    if request.param == "sqlite":
        return str(tmp_path / "results.sqlite")
    server: Server = request.getfixturevalue("postgresql")
    return server.emptied()
