"""Runs `edgemoe-farm` for tests, in this process or in one of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from click.testing import CliRunner, Result

from harness.cli import main

COMMAND = (sys.executable, "-m", "harness.cli")


def invoke(*arguments: object) -> Result:
    """Runs a command in this process, and returns its exit code and what it printed, whatever that is."""
    return CliRunner().invoke(main, [*map(str, arguments)])


def farm(*arguments: object, code: int = 0, typed: str | None = None, columns: int = 80) -> Result:
    """Runs a command in this process, asserts its exit code, and returns what it printed."""
    options = {"input": typed, "catch_exceptions": False, "terminal_width": columns}
    result = CliRunner().invoke(main, [*map(str, arguments)], **options)
    assert result.exit_code == code, result.output
    return result


def refused(*arguments: object, code: int = 2) -> str:
    """Runs a command that must fail, and returns its error: one line, and the last."""
    lines = farm(*arguments, code=code).stderr.strip().splitlines()
    assert lines[-1].startswith(("edgemoe-farm: error: ", "Error: ")), lines
    assert "Traceback" not in "".join(lines)
    return lines[-1]


def start(folder: Path, *arguments: object, **environment: str) -> subprocess.Popen[str]:
    """Starts a command in a process of its own, as the user whose files lie in `folder`."""
    own = {f"XDG_{name}_HOME": str(folder / name.lower()) for name in ("CACHE", "CONFIG", "DATA")}
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)], cwd=folder, env={**os.environ, **own, **environment}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(process: subprocess.Popen[str], timeout_s: float = 280) -> tuple[int, str, str]:
    """Waits for a command's end; returns its exit code, standard output and standard error."""
    out, err = process.communicate(timeout=timeout_s)
    return process.returncode, out, err
