"""What the controller itself costs, over a real OpenSSH server on 127.0.0.1. ci/bench-controller has the command line.

overhead       of a cell: from the end of one to the end of the next, without the engine's own process, which is timed
               apart by running the same request directly
second deploy  of a large container that the device has already
cut upload     how much of the container is sent again after the link was cut in the middle
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from engine.codec import to_json
from engine.protocol import RunRequest
from harness.demo.faults import write_model
from harness.device.remote import RemoteSession
from harness.transport.ssh import SshTransport
from reports.results.database import ResultsDatabase
from tests.integration.conftest import Relay, Sshd
from tests.programs.scale.openssh import MATRIX, servers, write_inventory
from tests.programs.scale.soak import Controllers, controller_command

BLOCKS = 15  # of two cells each
MOST_OVERHEAD_S, MOST_DEPLOY_S = 0.150, 1.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="ci/bench-controller", description=__doc__)
    parser.add_argument(
        "--gigabytes", type=float, default=2.0, help="size of the container that is deployed (default 2)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, and nothing else")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="controller-") as folder, servers(Path(folder), 1) as (server,):
        result = {
            "overhead": overhead(Path(folder), server),
            "deploy": deploy(Path(folder), server, int(options.gigabytes * 1e9)),
        }
    print(json.dumps(result, indent=None if options.json else 2))
    deployed = result["deploy"]
    held = (
        result["overhead"]["median_s"] < MOST_OVERHEAD_S,
        deployed["second_s"] < MOST_DEPLOY_S,
        deployed["second_bytes"] == 0,
        deployed["sent_again_bytes"] < 0.05 * deployed["bytes"],
    )
    return 0 if all(held) else 1


def overhead(folder: Path, server: Sshd) -> dict[str, Any]:
    write_model(folder)
    (folder / "matrix.toml").write_text(MATRIX.replace("blocks = 1", f"blocks = {BLOCKS}"))
    write_inventory(folder / "devices.toml", [server])
    Controllers(controller_command(folder), folder).live(str(folder / "matrix.toml"))
    with ResultsDatabase.open(folder / "farm.db", create=False) as database:
        runs = database.runs()
    request = runs[-1].request
    assert request is not None
    assert len(runs) == 2 * BLOCKS
    ends = [datetime.fromisoformat(run.ended_at) for run in runs]
    cells_s = [(later - earlier).total_seconds() for earlier, later in pairwise(ends)]
    engine_s = median(_run_directly(folder, run.request) for run in runs[-10:] if run.request)
    low, _, high = quantiles(cells_s, n=4)
    return {
        "median_s": round(median(cells_s) - engine_s, 4),
        "quartiles_s": [round(low - engine_s, 4), round(high - engine_s, 4)],
        "cells": len(cells_s),
        "cell_s": round(median(cells_s), 4),
        "engine_s": round(engine_s, 4),
    }


def _run_directly(folder: Path, request: RunRequest) -> float:
    """The engine's own process for a request, from its start to its end."""
    (folder / "request.json").write_text(json.dumps(to_json(request)))
    command = [sys.executable, "-m", "engine", "run", "--request", str(folder / "request.json")]
    (engine,) = (folder / "r00" / "root" / "engines").iterdir()
    began = time.monotonic()
    subprocess.run(command, cwd=engine, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
    return time.monotonic() - began


def deploy(folder: Path, server: Sshd, size: int) -> dict[str, Any]:
    model = folder / "large.emoe"
    with model.open("wb") as file:
        block = os.urandom(1 << 20)
        for at in range(0, size, len(block)):
            file.write(block[: size - at])
    past = time.time() - 60.0
    os.utime(model, (past, past))  # as any model that was not imported a moment ago: its hash is remembered
    relay = Relay(server.port)
    server.trust(relay.port)
    relay.limit = size // 2
    began = time.monotonic()
    with _Opened(folder, server, relay.port) as session:
        session.put(model)
        first_s, first_bytes = time.monotonic() - began, session.bytes_sent
    sent = relay.forwarded
    relay.close()
    began = time.monotonic()
    with _Opened(folder, server, server.port) as session:
        session.put(model)
        return {
            "bytes": size,
            "first_s": round(first_s, 2),
            "cut_after_bytes": size // 2,
            "forwarded_bytes": sent,
            "sent_again_bytes": max(0, first_bytes - size),
            "second_s": round(time.monotonic() - began, 3),
            "second_bytes": session.bytes_sent,
        }


class _Opened:
    """A session, connecting included."""

    def __init__(self, folder: Path, server: Sshd, port: int) -> None:
        self._session = RemoteSession(
            lambda: SshTransport(server.device_at(port), server.known_hosts),
            root=server.device.root,
            python=sys.executable,
            cache_dir=folder / "cache",
        )

    def __enter__(self) -> RemoteSession:
        return self._session

    def __exit__(self, *error: object) -> None:
        self._session.close()


if __name__ == "__main__":
    sys.exit(main())
