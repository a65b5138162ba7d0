"""Asks a device about itself by on_device.py and checks the answer: a device may answer anything."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from engine.codec import from_json, loads
from engine.errors import ProtocolError
from harness.errors import RemoteCommandError
from harness.transport import Transport

SCRIPT = (Path(__file__).parent / "on_device.py").read_bytes()
BOOT = 'import sys; exec(compile(sys.stdin.buffer.read(), "on_device", "exec"))'

KINDS = ("engines", "sites", "blobs", "runs")  # the folders of the farm on a device
PRUNE_DEADLINE_S = 600.0  # large files on a slow card
T = TypeVar("T")


@dataclass(frozen=True)
class Survey:
    """Holds what a device tells of itself; None where it does not say."""

    utc_s: float
    file_system: str | None  # of the farm's folder
    storage: str | None  # what is mounted there, such as /dev/mmcblk0p2
    read_only: bool | None
    no_exec: bool | None
    free_bytes: int
    disk_bytes: int
    free_inodes: int | None
    write_error: str | None  # None: a file could be written
    direct_reads: bool | None
    memory_control_groups: bool | None
    governors: tuple[str, ...]
    throttled_bits: int | None
    swaps: tuple[str, ...]
    android: str | None  # its version, in Termux
    missing_tools: tuple[str, ...]
    stale_runs: int  # that nobody collected for a week
    clock_error_s: float | None = None  # of the device against the controller's, beyond what the network explains


@dataclass(frozen=True)
class Removed:
    kind: str  # engines, sites, blobs or runs
    name: str
    bytes: int


@dataclass(frozen=True)
class Pruned:
    """Lists what was removed from a device, or would be, and what is left there."""

    removed: tuple[Removed, ...]
    left_bytes: dict[str, int]


def survey(
    transport: Transport,
    python: str,
    root: str,
    *,
    deadline_s: float,
    clock: Callable[[], float] = time.time,
) -> Survey:
    """Surveys a device with `python`, which needs no numpy. `root`: the farm's folder, absolute. Raises DeviceError."""
    before_s = clock()
    found = _ask(Survey, transport, python, "survey", root, deadline_s=deadline_s)
    after_s = clock()
    early_s, late_s = found.utc_s - before_s, found.utc_s - after_s
    return replace(found, clock_error_s=min(early_s, 0.0) + max(late_s, 0.0))


def prune(
    transport: Transport,
    python: str,
    root: str,
    *,
    days: float,
    kinds: tuple[str, ...] = KINDS,
    dry: bool = False,
) -> Pruned:
    """Removes what nobody used for `days`; `dry` only says what that would be. Raises DeviceError."""
    arguments = (root, str(days), ",".join(kinds), "1" if dry else "0")
    return _ask(Pruned, transport, python, "prune", *arguments, deadline_s=PRUNE_DEADLINE_S)


def _ask(cls: type[T], transport: Transport, python: str, verb: str, *arguments: str, deadline_s: float) -> T:
    command = [python, "-I", "-c", BOOT, verb, *arguments]
    done = transport.run(command, deadline_s=deadline_s, stdin=SCRIPT)
    try:
        answer: Any = loads(done.stdout.strip().rpartition(b"\n")[2])
        return from_json(cls, answer)
    except ProtocolError as error:
        raise RemoteCommandError(f"{transport.name}: `{verb}` gave no valid answer: {error}") from None
