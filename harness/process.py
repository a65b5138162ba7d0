"""Identifies processes that hold a sweep or a lease, so that others can tell whether they still live."""

from __future__ import annotations

import getpass
import os
import socket
from pathlib import Path


def owner() -> str:
    """Returns user@host of this process."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


def identity(pid: int) -> str:
    """Returns machine and boot, process namespace and start of a process; empty where it is gone or hidden."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        namespace = Path("/proc/self/ns/pid").readlink()
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    state, *numbers = status.rpartition(")")[2].split()
    return f"{boot} {namespace} {'ended' if state in 'ZX' else numbers[18]}"


def lives(pid: int, known: str) -> bool | None:
    """Returns whether the process with this number and `identity` lives; None where that cannot be told from here."""
    there, here = known.rpartition(" ")[0], identity(os.getpid()).rpartition(" ")[0]
    if not here or there != here:
        return None
    seen = identity(pid)
    if seen:
        return seen == known
    return None if _exists(pid) else False


def _exists(pid: int) -> bool:
    """Returns whether a process of that number exists, even if /proc hides it."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass
    return True
