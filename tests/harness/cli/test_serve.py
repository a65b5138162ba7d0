"""`serve` as a user types it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from reports.results.database import ResultsDatabase
from tests.command_line import COMMAND, refused
from tests.reports.conftest import run, sweep


def _heeds_ctrl_c() -> None:
    """Undoes what a shell does to its background jobs, which ignore SIGINT, and their children with them."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_pages_while_records_come_in_until_ctrl_c(tmp_path: Path, number: int) -> None:
    first, second = run(block=0), run(block=1)
    with ResultsDatabase.open(tmp_path / "farm.db") as database:
        database.add_sweep(sweep([first, second]))
        database.add_run(first)
        environment = {**os.environ, "EDGEMOE_FARM_TOKEN": "letters-and-digits-16"}
        process = subprocess.Popen(
            [*COMMAND, "serve", "--port", "0", "--json", "--results", str(tmp_path / "farm.db")], env=environment,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=_heeds_ctrl_c,
        )  # fmt: skip
        try:
            assert process.stdout is not None
            lines = iter(process.stdout.readline, "}\n")
            said = json.loads("".join(lines) + "}")
            assert said["url"] == f"http://127.0.0.1:{said['port']}/?token=letters-and-digits-16"
            with pytest.raises(urllib.error.HTTPError, match="401"):
                urllib.request.urlopen(f"http://127.0.0.1:{said['port']}/", timeout=20)
            asked = urllib.request.Request(
                f"http://127.0.0.1:{said['port']}/sweep/latest", headers={"Authorization": f"Bearer {said['token']}"}
            )
            before = urllib.request.urlopen(asked, timeout=20).read()
            database.add_run(second)
            assert urllib.request.urlopen(asked, timeout=20).read() != before
        finally:
            process.send_signal(number)
            _, errors = process.communicate(timeout=20)
        assert (process.returncode, errors) == (0, "")


def test_what_cannot_be_served_is_one_line(tmp_path: Path) -> None:
    for arguments, message in (
        (("--results", str(tmp_path / "none.db")), "no results at"),
        (("--host", "no.such.host.invalid", "--results", _empty(tmp_path)), "cannot listen at no.such.host.invalid"),
    ):
        assert message in refused("serve", *arguments)


def _empty(folder: Path) -> str:
    ResultsDatabase.open(folder / "empty.db").close()
    return str(folder / "empty.db")
