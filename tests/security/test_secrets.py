"""Passwords, passphrases and the environment stay where they are: in no record, page, log or message."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reports.errors import DatabaseError
from reports.results.connection import Place
from reports.results.database import ResultsDatabase
from reports.results.export import FORMATS
from tests.command_line import invoke
from tests.postgresql import PASSWORD, Server
from tests.reports import conftest as synthetic
from tests.security.hostile import texts

SECRET = "correct-horse-battery-staple"


@given(
    st.sampled_from(["postgresql", "postgresql+psycopg", "postgres", "mysql", "sqlite", ""]),
    st.sampled_from(["://", ":/", ":", "//"]),
    texts, texts, st.sampled_from(["@", "@@", ":", "/", ""]), st.sampled_from(["127.0.0.1:1", "[::1]:1", "/tmp", "h"]),
)  # fmt: skip
def test_no_spelling_of_a_url_gives_its_password_away(
    dialect: str, slashes: str, user: str, noise: str, at: str, host: str
) -> None:
    """Whatever is wrong with it: what cannot be understood is not repeated."""
    for place in (
        f"{dialect}{slashes}{user}:{SECRET}{noise}{at}{host}/farm",
        f"{dialect}{slashes}{user}:{noise}{SECRET}{at}{host}/farm",
        f"{dialect}{slashes}{host}/farm?user=me&password={SECRET}{noise}",
        f"host={host} password={SECRET}",
    ):
        is_ours = dialect.startswith("postgres") or "password=" in place
        if not is_ours or (slashes == "//" and "password=" not in place):
            continue  # a path, which no one takes for a URL
        try:
            shown = [Place.parse(place).name, repr(Place.parse(place))]
        except DatabaseError as error:
            shown = [str(error), repr(error)]
        assert not [text for text in shown if SECRET in text]


def test_the_password_of_a_shared_database_is_in_nothing_that_is_shown(
    postgresql: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A whole sweep, its list, exports and page, and each kind of failure, with the loudest logging."""
    caplog.set_level(logging.DEBUG)
    place = postgresql.emptied()
    runs = synthetic.runs(blocks=1, tokens=4)
    with ResultsDatabase.open(place) as database:
        database.add_sweep(synthetic.sweep(runs))
        for run in runs:
            database.add_run(run)
    monkeypatch.setenv("EDGEMOE_FARM_RESULTS", place)
    monkeypatch.setenv("SOME_TOKEN", SECRET)
    commands = [
        ["results", "list"], ["results", "list", "--json"], ["results", "show"], ["results", "show", "--json"],
        ["report", "latest", "-o", str(tmp_path / "page.html")], ["results", "show", "nonsense"], ["results", "--help"],
        ["results", "list", "--help"], ["--debug", "results", "show", "nonsense"],
        *(["results", "export", "--format", name, "-o", str(tmp_path / name)] for name in FORMATS),
    ]  # fmt: skip
    shown = [invoke(*command).output for command in commands]
    assert json.loads(shown[1])[0]["state"] == "complete"
    postgresql.stop()
    try:
        result = invoke("results", "list")
        assert (result.exit_code, "Connection refused" in result.stderr) == (2, True)
        shown += [result.output, invoke("--debug", "results", "list").output]
    finally:
        postgresql.start()
    shown += [
        path.read_bytes().decode("utf-8", "replace")
        for path in (*map(tmp_path.joinpath, FORMATS), tmp_path / "page.html")
    ]
    shown += [caplog.text, str(postgresql.execute("SELECT record FROM runs"))]
    assert len("".join(shown)) > 10_000
    for secret in (
        PASSWORD,
        SECRET,
        *(value for key, value in os.environ.items() if "PASSWORD" in key or "KEY" in key),
    ):
        assert not [text[:200] for text in shown if secret and secret in text]
