"""Reads and writes small files that are whole or not there, and tells which boot this is."""

from __future__ import annotations

import json
import os
import time
from typing import Any, Dict, Optional


def write(folder: str, name: str, value: Any, synced: bool = True) -> None:
    """Writes a file. `synced`: it must survive a power cut, and not only this process."""
    path = os.path.join(folder, name)
    with open(path + ".part", "w") as file:
        json.dump(value, file)
        if synced:
            file.flush()
            os.fsync(file.fileno())
    os.rename(path + ".part", path)


def read(folder: str, name: str) -> Optional[Dict[str, Any]]:
    try:
        with open(os.path.join(folder, name)) as file:
            value = json.load(file)
    except (OSError, ValueError):
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
