"""Where a command ends, whatever happened: its exit code, and what it shows on streams that fail."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from engine.offline.importing.importer import import_checkpoint
from tests import command_line
from tests.command_line import COMMAND, farm
from tests.golden.checkpoints import RECIPES

MATRIX = """
name = "small"
strategies = ["naive-swap"]
warmups = 0
repetitions = 1
[[containers]]
name = "tiny"
path = "tiny.emoe"
[[workloads]]
name = "ids"
tokens = [[5, 6, 7]]
max_new_tokens = 2
"""
INVENTORY = """
version = 1
[devices.off]
host = "127.0.0.1"
port = 1
user = "nobody"
connect_s = 2
reconnect_s = 0
"""
NIGHTLY = 'name = "farm"\nmatrix = "matrix.toml"\nbaseline = "main"\n'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder whose only device is off, without a baseline: a night there ends with 5."""
    folder = tmp_path_factory.mktemp("user")
    import_checkpoint(RECIPES[0].write(folder / "hf"), folder / "tiny.emoe")
    (folder / "matrix.toml").write_text(MATRIX)
    (folder / "devices.toml").write_text(INVENTORY)
    (folder / "nightly.toml").write_text(NIGHTLY)
    return folder


@pytest.mark.parametrize(("command", "code"), [("nightly", 4), ("gate", 4), ("run", 1), ("devices", 1)])
def test_an_error_that_nobody_foresaw_has_an_exit_code_that_says_nothing_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str, code: int
) -> None:
    """The 1 of nightly and gate means a regression."""

    def fail(*arguments: Any, **options: Any) -> Any:
        raise ZeroDivisionError("nobody foresaw this")

    place = {"nightly": "read_nightly", "gate": "open_results", "run": "load_inventory", "devices": "load_inventory"}
    monkeypatch.setattr(f"harness.cli.{command}.{place[command]}", fail)
    result = farm(command, *([tmp_path / "x.toml"] if command in ("nightly", "run") else []), code=code)
    lines = result.stderr.strip().splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1] == (
        "edgemoe-farm: error: the farm itself failed of ZeroDivisionError (nobody foresaw this): report it"
    )


SURROUNDINGS = {
    "a full log disk": ">/dev/full 2>/dev/full",
    "closed streams": "<&- >&- 2>&-",
    "a reader that has gone": "2>&1 | true",
    "latin-1 output": "2>&1 | cat",
    "a damaged cache": "",
    "a cache that is a file": "",
    "data that cannot be kept": "",
    "a damaged state": "",
}


@pytest.mark.parametrize("surroundings", SURROUNDINGS)
def test_a_night_ends_with_its_own_exit_code_in_odd_surroundings(
    folder: Path, tmp_path: Path, surroundings: str
) -> None:
    environment = {f"XDG_{name}_HOME": str(tmp_path / name.lower()) for name in ("CACHE", "CONFIG", "DATA")}
    if surroundings == "latin-1 output":
        environment |= {"PYTHONIOENCODING": "latin-1"}
    elif surroundings == "a damaged cache":
        (tmp_path / "cache/edgemoe-farm").mkdir(parents=True)
        (tmp_path / "cache/edgemoe-farm/sha256.sqlite").write_bytes(b"no database at all" * 99)
    elif surroundings == "a cache that is a file":
        (tmp_path / "cache").write_text("")
    elif surroundings == "data that cannot be kept":
        (tmp_path / "data").write_text("")
    elif surroundings == "a damaged state":
        (folder / "nightly").mkdir(exist_ok=True)
        (folder / "nightly/.farm.state.json").write_text("{")
    line = f'"$@" {SURROUNDINGS[surroundings]}; exit "${{PIPESTATUS[0]}}"'
    nightly = [*COMMAND, "nightly", "nightly.toml", "--results", str(tmp_path / "farm.db")]
    done = subprocess.run(
        ["bash", "-c", line, "bash", *nightly], cwd=folder, env={**os.environ, **environment}, capture_output=True,
        text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 5, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert (tmp_path / "farm.db").exists()
    if surroundings == "a damaged cache":
        assert (tmp_path / "cache/edgemoe-farm/sha256.sqlite.damaged").exists()
        assert "put aside as sha256.sqlite.damaged" in done.stderr
    if surroundings == "data that cannot be kept":
        assert "warning: engines cannot be kept in" in done.stderr
    assert not (folder / "nightly/.farm.state.json").exists()


def test_a_page_that_cannot_be_written_costs_no_verdict(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise ZeroDivisionError("in a chart")

    monkeypatch.chdir(folder)
    monkeypatch.setattr("harness.night.run.render", fail)
    result = farm("nightly", "nightly.toml", "--results", tmp_path / "farm.db", code=4)
    assert "warning: the page was not published: the farm itself failed of ZeroDivisionError" in result.stderr
    assert "no baseline main is pinned" in result.stdout


def test_a_display_that_cannot_be_written_names_the_cause(tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*COMMAND, "strategies"], stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=60
        )
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["edgemoe-farm: error: No space left on device"]


def test_one_device_that_fails_of_anything_leaves_the_others_their_answers(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)

    def fail(*arguments: Any, **options: Any) -> Any:
        raise ZeroDivisionError("odd")

    for command, place in (("probe", "probe.open_session"), ("doctor", "doctor.open_session")):
        monkeypatch.setattr(f"harness.cli.{place}", fail)
        result = command_line.invoke(command)
        assert result.exit_code == 4, result.output
        assert "the farm itself failed of ZeroDivisionError (odd)" in result.output
    monkeypatch.setattr("harness.cli.devices_locks.open_lease", fail)
    result = command_line.invoke("devices", "locks", "--json")
    assert result.exit_code == 4
    assert "the farm itself failed of ZeroDivisionError (odd)" in result.output
