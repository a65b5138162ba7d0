"""A night at the farm in minutes: many scripted devices with faults, a controller that is killed again and again.

What is killed and resumed is the real command, in a process of its own; the devices go on without it. At the end every
promise is checked against three witnesses: the database, what the controllers said they had stored, and what was
started on the devices. ci/soak has the command line.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.demo.faults import write_model
from harness.scripted import FaultKind, FaultScript, ScriptedDevice, declare
from reports.records import RunStatus
from reports.results.database import ResultsDatabase
from tests.command_line import COMMAND

SPEED = 20.0  # of the devices' time
MATRIX = """
name = "soak"
baseline = "naive-swap"
strategies = ["full-load", "naive-swap", "edgemoe", "edgemoe-buffer"]
expert_budgets = ["4-experts"]
warmups = 0
repetitions = 1
blocks = {blocks}
deadline_s = 30.0
[[containers]]
name = "tiny"
path = "tiny.emoe"
profile = "tiny.profile.json"
[[workloads]]
name = "ids"
tokens = [[1, 17, 5, 80, 33], [2, 3]]
max_new_tokens = 8
"""
ARMS = 4  # of the matrix
RATES = {
    FaultKind.DROP: 0.04,
    FaultKind.OFFLINE: 0.005,
    FaultKind.STALL: 0.01,
    FaultKind.THROTTLE: 0.03,
    FaultKind.REBOOT: 0.01,
    FaultKind.SLOW_DISK: 0.03,
    FaultKind.DAMAGE: 0.03,
    FaultKind.DISK_FULL: 0.01,
    FaultKind.OUT_OF_MEMORY: 0.02,
}
RETRIED = (RunStatus.UNREACHABLE, RunStatus.SKIPPED)  # by `run --resume`: no final state
MOST_RESUMES = 12  # after the last kill, until every cell has ended: a night of bad luck has an end, too
CONTROLLER_DEADLINE_S = 900.0
LEASE_DEADLINE_S = 20.0  # a lease's 180 s, on the devices' clock, twice


@dataclass
class Controllers:
    """The lives of the controller: what it said it had stored, and how much memory it took on the way."""

    arguments: list[str]
    folder: Path
    stored: list[str] = field(default_factory=list)  # run ids, in order
    memory: list[tuple[int, int]] = field(default_factory=list)  # (runs stored so far, resident bytes)
    peak_rss_bytes: int = 0

    def live(self, *arguments: str, until: Callable[[int], bool] = lambda stored: False) -> int:
        """Runs the command until it ends, or until it is killed, when `until` says so; its exit status."""
        log = (self.folder / "controller.log").open("ab")
        command = [*self.arguments, *arguments]
        environment = {**os.environ, "XDG_CACHE_HOME": str(self.folder / "cache")}
        with log, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=environment, text=True) as process:
            sampler = threading.Thread(target=self._sample, args=(process,), daemon=True)
            sampler.start()
            watchdog = threading.Timer(CONTROLLER_DEADLINE_S, process.kill)
            watchdog.start()
            assert process.stdout is not None
            for line in process.stdout:  # to the end: what was said before it died counts
                event = json.loads(line) if line.endswith("\n") else {"event": "cut off"}
                if event["event"] == "cell_ended":
                    self.stored.append(event["run"])
                    if until(len(self.stored)):
                        process.send_signal(signal.SIGKILL)
            status = process.wait()
            watchdog.cancel()
            sampler.join()
        return status

    def _sample(self, process: subprocess.Popen[str]) -> None:
        while process.poll() is None:
            try:
                lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            except OSError:
                return
            memory = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith("Vm")}
            if "VmRSS" in memory:
                self.memory.append((len(self.stored), memory["VmRSS"]))
                self.peak_rss_bytes = max(self.peak_rss_bytes, memory["VmHWM"])
            time.sleep(0.1)

    def resident_at(self, share: float) -> int | None:
        """The largest resident size around the time when `share` of all that was stored had been stored.

        None where that went by between two looks, as it may in a small soak.
        """
        total = len(self.stored)
        near = [size for stored, size in self.memory if abs(stored / max(total, 1) - share) <= 0.05]
        return max(near, default=None)


def soak(
    folder: Path, *, devices: int, cells: int, kills: int, seed: int, say: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """`cells`: on each device, rounded up to whole blocks of the matrix. Returns what ci/soak prints."""
    began = time.monotonic()
    blocks = -(-cells // ARMS)
    total = devices * blocks * ARMS
    chance = random.Random(seed)
    scripted = _make_farm(folder, devices, seed, blocks)
    controllers = Controllers(controller_command(folder), folder)
    kill_at = sorted(chance.sample(range(1, total), kills))
    for n, point in enumerate(kill_at):
        what = ["--resume"] if n else [str(folder / "matrix.toml")]
        controllers.live(*what, until=lambda stored, point=point: stored >= point)
        say(f"killed {n + 1} of {kills} times, {len(controllers.stored)} runs stored")
    status, resumes = -1, 0
    while status != 0 and resumes < MOST_RESUMES:
        status = controllers.live("--resume" if kills or resumes else str(folder / "matrix.toml"))
        resumes += 1
        with ResultsDatabase.open(folder / "farm.db", create=False) as database:
            sweep = database.sweep("latest")
            left = len(sweep.planned) - len(database.done(sweep.id, again=RETRIED))
        say(f"resumed: {total - left} of {total} cells have ended")
        if not left:
            break
    return {
        "devices": devices,
        **_verdict(folder, controllers, scripted),
        "kills": kills,
        "seed": seed,
        "seconds": round(time.monotonic() - began, 1),
        "peak_rss_bytes": controllers.peak_rss_bytes,
        "rss_bytes": {
            name: controllers.resident_at(share) for name, share in (("start", 0.1), ("middle", 0.5), ("end", 0.95))
        },
    }


def broken_promises(result: dict[str, Any]) -> list[str]:
    """What a result shows that must not be."""
    start, end = result["rss_bytes"]["start"], result["rss_bytes"]["end"]
    promises = {
        "a cell did not end": result["final"] != result["cells"],
        "a record was lost": result["lost"] > 0,
        "a record or a run was doubled": result["doubled"] > 0,
        "a lock was left": result["locks_left"] > 0,
        "the controller's memory grew": None not in (start, end) and end > 1.3 * start + (32 << 20),
    }
    return [promise for promise, broken in promises.items() if broken]


def _make_farm(folder: Path, devices: int, seed: int, blocks: int) -> list[ScriptedDevice]:
    write_model(folder)
    (folder / "matrix.toml").write_text(MATRIX.format(blocks=blocks))
    faults = FaultScript(seed, {kind.value: rate for kind, rate in RATES.items()})
    lines = ["version = 1"]
    for n in range(devices):
        device = declare(folder / "devices" / f"s{n:03}", f"s{n:03}", faults=faults, speed=SPEED)
        lines += [f"[devices.{device.name}]", 'host = "scripted"', f"scripted = {json.dumps(device.scripted)}"]
    (folder / "devices.toml").write_text("\n".join(lines) + "\n")
    return [ScriptedDevice(folder / "devices" / f"s{n:03}") for n in range(devices)]


def controller_command(folder: Path) -> list[str]:
    files = ("--inventory", "devices.toml"), ("--results", "farm.db"), ("--known-hosts", "known_hosts")
    options = [word for option, name in files for word in (option, str(folder / name))]
    return [*COMMAND, "run", "--json", *options]


def _verdict(folder: Path, controllers: Controllers, devices: list[ScriptedDevice]) -> dict[str, Any]:
    with ResultsDatabase.open(folder / "farm.db", create=False) as database:
        sweeps = database.sweeps()
        planned = set(sweeps[0].planned)
        runs = [((run.cell.key, run.block), run.id, run.status, run.fault) for run in database.stream()]
        ended = database.done(sweeps[0].id, again=RETRIED)
    # What was not measured, or failed of the infrastructure, is tried again; everything else ends its cell, once.
    endings = Counter(
        key
        for key, _, status, fault in runs
        if status not in RETRIED and (fault is None or not fault.is_infrastructure)
    )
    known = {run_id for _, run_id, _, _ in runs}
    started = Counter(name for device in devices for name in device.starts())
    doubled = sum(n - 1 for n in (*endings.values(), *started.values()))
    lost = len(set(controllers.stored) - known) + len(planned - {key for key, *_ in runs})
    return {
        "cells": len(planned),
        "final": len(planned & ended),
        "lost": lost,
        "doubled": doubled + len(sweeps) - 1,
        "locks_left": _locks_left(devices),
        "folders_left": sum(len(list(device.home.glob("*/runs/*"))) for device in devices),  # removed after a week
        "records": len(runs),
        "started": sum(started.values()),
        "statuses": dict(Counter(status.value for _, _, status, _ in runs)),
    }


def _locks_left(devices: list[ScriptedDevice]) -> int:
    """Leases that would keep another controller from a device. Those of controllers that were killed run out."""
    end = time.monotonic() + LEASE_DEADLINE_S
    while (held := sum(_is_held(device) for device in devices)) and time.monotonic() < end:
        time.sleep(0.2)
    return held


def _is_held(device: ScriptedDevice) -> bool:
    try:
        (folder,) = device.home.glob("*/lease")
        holder = json.loads((folder / "lease.json").read_bytes())["holder"]
        return holder is not None and json.loads((folder / "alive.json").read_bytes())["expires"] > device.clock()
    except (ValueError, FileNotFoundError):  # no lease was ever taken there
        return False
