"""Real OpenSSH servers on 127.0.0.1 with the real engine, under one controller."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harness.demo.faults import write_model
from reports.records import RunStatus
from reports.results.database import ResultsDatabase
from tests.integration.conftest import Sshd, _keygen, free_port
from tests.programs.scale.soak import Controllers, controller_command

MATRIX = """
name = "real"
baseline = "naive-swap"
strategies = ["naive-swap", "edgemoe"]
expert_budgets = ["4-experts"]
warmups = 0
repetitions = 1
blocks = 1
deadline_s = 300.0
[[containers]]
name = "tiny"
path = "tiny.emoe"
profile = "tiny.profile.json"
[[workloads]]
name = "ids"
tokens = [[1, 17, 5, 80, 33]]
max_new_tokens = 8
"""


@contextmanager
def servers(folder: Path, n: int) -> Iterator[list[Sshd]]:
    """`n` servers that trust one key, and whose keys stand in folder/known_hosts."""
    if Path("/run").is_dir() and not Path("/run/sshd").exists():
        Path("/run/sshd").mkdir(mode=0o755)
    client_key, known_hosts, started = folder / "client_key", folder / "known_hosts", list[Sshd]()
    _keygen(client_key)
    try:
        for i in range(n):
            home = folder / f"r{i:02}"
            home.mkdir()
            _keygen(home / "host_key")
            started.append(Sshd(home.name, home, free_port(), client_key, known_hosts))
            started[-1].start()
            started[-1].trust()
        yield started
    finally:
        for server in started:
            server.kill_everything()


def write_inventory(path: Path, devices: list[Sshd]) -> None:
    lines = ["version = 1"]
    for device in (server.device for server in devices):
        lines.append(f"[devices.{device.name}]")
        for key in ("host", "port", "user", "identity_file", "root", "python"):
            lines.append(f"{key} = {json.dumps(getattr(device, key))}")
    path.write_text("\n".join(lines) + "\n")


def measure_real(folder: Path, *, devices: int, say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """One real sweep on all of them; returns what ci/soak --real prints."""
    write_model(folder)
    (folder / "matrix.toml").write_text(MATRIX)
    with servers(folder, devices) as started:
        say(f"{devices} OpenSSH servers run")
        write_inventory(folder / "devices.toml", started)
        controllers, began = Controllers(controller_command(folder), folder), time.monotonic()
        controllers.live(str(folder / "matrix.toml"))
        seconds = time.monotonic() - began
    with ResultsDatabase.open(folder / "farm.db", create=False) as database:
        runs = database.runs()
    for run in runs:
        if run.status is not RunStatus.OK:
            say(f"{run.cell.key}: {run.status.value} ({'; '.join(run.reasons)})")
    return {
        "devices": devices,
        "cells": len(runs),
        "ok": sum(run.status is RunStatus.OK for run in runs),
        "seconds": round(seconds, 1),
        "peak_rss_bytes": controllers.peak_rss_bytes,
    }
