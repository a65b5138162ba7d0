"""A real PostgreSQL server on 127.0.0.1, started by the tests: own folder, own port, a password, syncs to disk."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

OLDEST = 15
_LANGUAGE = ("--locale-provider", "icu", "--icu-locale", "en")
USER, PASSWORD = "farm", "hunter2-of-the-tests"


def binaries() -> Path | None:
    """The folder of the newest server that is installed, as Debian and its like do it."""
    found = [path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/initdb")]
    found = [path for path in found if int(path.parent.name) >= OLDEST]
    return max(found, key=lambda path: int(path.parent.name), default=None)


class Server:
    """Restarts keep its port and what it stored. It orders by a language unless told otherwise, as many servers do."""

    def __init__(self, programs: Path) -> None:
        self._programs = programs
        # Not under pytest's folder, which nobody but its owner may enter: PostgreSQL refuses to run as root.
        self._folder = Path(tempfile.mkdtemp(prefix="farm-postgresql-"))
        self._as = {"user": "nobody", "group": "nogroup", "extra_groups": []} if os.geteuid() == 0 else {}
        if self._as:
            shutil.chown(self._folder, "nobody", "nogroup")
        self.port = _free_port()
        self._process: subprocess.Popen[bytes] | None = None
        (self._folder / "password").write_text(PASSWORD)
        (self._folder / "password").chmod(0o644)
        subprocess.run(
            [
                programs / "initdb", "--pgdata", self._folder / "data", "--username", USER, "--auth", "scram-sha-256",
                "--pwfile", self._folder / "password", "--encoding", "UTF8", "--locale", "C",
                *_LANGUAGE, "--no-sync",
            ],
            check=True, capture_output=True, cwd="/", timeout=120, **self._as,
        )  # fmt: skip

    def url(self, database: str = "postgres", password: str | None = PASSWORD) -> str:
        secret = f":{password}" if password else ""
        return f"postgresql://{USER}{secret}@127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        settings = {"listen_addresses": "127.0.0.1", "port": self.port, "unix_socket_directories": "", "fsync": "on"}
        options = [word for key, value in settings.items() for word in ("-c", f"{key}={value}")]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [self._programs / "postgres", "-D", self._folder / "data", *options],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/", **self._as,
            )  # fmt: skip
        end = time.monotonic() + 60
        while not self._answers():
            assert self._process.poll() is None and time.monotonic() < end, (self._folder / "log").read_text()
            time.sleep(0.05)

    def stop(self) -> None:
        """Stops it as an administrator does: connections are cut, what was committed is on disk."""
        assert self._process is not None
        self._process.send_signal(signal.SIGINT)
        self._process.wait(60)

    def crash(self) -> None:
        """Kills it as a lack of memory does: all of its processes at once."""
        assert self._process is not None
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        for pid in (self._process.pid, *map(int, children)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait(60)

    def emptied(self) -> str:
        """The URL of the one database of the tests, which is empty now; far faster than a new one."""
        self.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'farm' AND pid <> pg_backend_pid();"
            "DROP SCHEMA public CASCADE; CREATE SCHEMA public"
        )
        return self.url()

    def execute(self, statement: str, database: str = "postgres") -> list[tuple]:
        import psycopg

        with psycopg.connect(self.url(database), autocommit=True) as connection:
            cursor = connection.execute(statement)
            return cursor.fetchall() if cursor.description else []

    @property
    def log(self) -> str:
        return (self._folder / "log").read_text()

    def close(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self.crash()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _answers(self) -> bool:
        import psycopg

        try:
            psycopg.connect(self.url(), connect_timeout=5).close()
        except psycopg.OperationalError:
            return False
        return True


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]
