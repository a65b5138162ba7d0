"""Reads and writes small files that are whole or not there, and tells which boot this is."""

from __future__ import annotations

import contextlib
import json
import os
import time
from typing import Any, Dict, Optional

from harness.agent.place import sync

MOST_BYTES = 16 << 20  # a run's request has all of its prompts


def write(folder: str, name: str, value: Any, synced: bool = True) -> None:
    """Writes a file. `synced`: it must survive a power cut, and not only this process."""
    path = os.path.join(folder, name)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path + ".part")  # of a process that was killed, or a link that somebody put there
    with create(path + ".part") as file:
        file.write(json.dumps(value).encode())
        if synced:
            file.flush()
            os.fsync(file.fileno())
    try:
        os.rename(path + ".part", path)
    except IsADirectoryError:
        os.rename(path, f"{path}.damaged-{time.time_ns()}")
        os.rename(path + ".part", path)
    if synced:
        sync(folder)


def create(path: str) -> Any:
    """Returns a new binary file, this user's alone. Raises FileExistsError, also where a link has the name."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "wb")


def read(folder: str, name: str) -> Optional[Dict[str, Any]]:
    try:
        handle = os.open(os.path.join(folder, name), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(handle, "rb") as file:
            value = json.loads(file.read(MOST_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def boot_id() -> Optional[str]:
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError:
        return None


def since_boot_s() -> float:
    """Returns the seconds since the device started, sleep included. The date may be wrong, this is not."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
