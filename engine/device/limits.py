"""A limit on the memory of the engine's process, by the strictest means that is delegated to this user.

cgroup-v2    a group of its own below one whose memory is ours to divide, or a scope of the user's systemd
cgroup-v1    a group of its own in the memory hierarchy, which needs root
rlimit-data  RLIMIT_DATA (Linux >= 4.7): what the process itself allocates, and not the page cache that it fills
none         nothing holds

The groups count the page cache that the process fills, and get no swap: what does not fit is read again, or ends by the
kernel's out-of-memory kill. Standard library only: the farm's agent on a device uses this file too.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import subprocess
from typing import List, Optional, Tuple

from engine.device.sources import Sources

_SYSTEMD_DEADLINE_S = 5.0


class MemoryLimit:
    """Holds a limit that is ready for one process. Start `command`; call `enter` before its exec."""

    def __init__(self, limit_bytes: int, name: str, root: str = "/") -> None:
        """Makes the limit. `name` is that of the control group, if one is made."""
        self.limit_bytes = limit_bytes
        self.method = "none"
        self._folder: Optional[str] = None  # of the control group
        self._prefix: List[str] = []
        sources = Sources(root)
        made = _make_v2(sources, limit_bytes, name) or _make_v1(sources, limit_bytes, name)
        if made is not None:
            self.method, self._folder = made
        elif _systemd_holds(sources, limit_bytes):
            self.method, self._prefix = "cgroup-v2", _systemd_scope(limit_bytes)
        elif _data_limit_allowed(limit_bytes):
            self.method = "rlimit-data"

    def command(self, arguments: List[str]) -> List[str]:
        return [*self._prefix, *arguments]

    def enter(self) -> None:
        """Applies the limit to the calling process. Raises OSError if that is impossible."""
        if self._folder is not None:
            with open(os.path.join(self._folder, "cgroup.procs"), "w") as file:
                file.write(str(os.getpid()))
        elif self.method == "rlimit-data":
            resource.setrlimit(resource.RLIMIT_DATA, (self.limit_bytes, self.limit_bytes))

    def peak(self) -> Tuple[Optional[int], Optional[str]]:
        """Returns the most bytes in use and the counter: the group's, which includes page cache, or the process's."""
        for name in ("memory.peak", "memory.max_usage_in_bytes"):
            text = self._read(name)
            if text is not None and text.strip().isdigit():
                return int(text), name
        kilobytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss  # the largest of those that have ended
        return (kilobytes << 10, "ru_maxrss") if kilobytes else (None, None)

    def kills(self) -> Optional[int]:
        """Returns how often the kernel killed in this group for lack of memory; None if no group of ours counts it."""
        for name in ("memory.events", "memory.oom_control"):
            match = re.search(r"^oom_kill (\d+)$", self._read(name) or "", re.MULTILINE)
            if match:
                return int(match.group(1))
        return None

    def close(self) -> None:
        """Removes the limit, once nothing runs in it."""
        if self._folder is not None:
            _remove(self._folder)

    def _read(self, name: str) -> Optional[str]:
        if self._folder is None:
            return None
        try:
            with open(os.path.join(self._folder, name), encoding="ascii") as file:
                return file.read(1 << 16)
        except (OSError, ValueError):
            return None


def best_method(root: str = "/") -> str:
    """Returns the strictest method that works here; probes by creating and removing a large limit."""
    limit = MemoryLimit(1 << 40, f"edgemoe-farm-probe-{os.getpid()}", root)
    limit.close()
    return limit.method


# --- control groups -------------------------------------------------------------------------------------------------


def _make_v2(sources: Sources, limit_bytes: int, name: str) -> Optional[Tuple[str, str]]:
    """Makes a group below the nearest ancestor that divides its memory and allows it; returns its folder."""
    for mount in _mounts(sources, "cgroup2"):
        for above in _ancestors(sources, mount, _own_group(sources, "")):
            if "memory" not in _words(sources, f"{above}/cgroup.controllers"):
                continue
            if above == mount and "memory" not in _words(sources, f"{above}/cgroup.subtree_control"):
                _write(sources.at(f"{above}/cgroup.subtree_control"), "+memory")  # the root alone may have processes
            if "memory" not in _words(sources, f"{above}/cgroup.subtree_control"):
                continue
            limits = (("memory.max", limit_bytes), ("memory.swap.max", 0))
            folder = _make(sources, f"{above}/{name}", limits)
            if folder is not None:
                return "cgroup-v2", folder
    return None


def _make_v1(sources: Sources, limit_bytes: int, name: str) -> Optional[Tuple[str, str]]:
    for mount in _mounts(sources, "cgroup", "memory"):
        for above in _ancestors(sources, mount, _own_group(sources, "memory")):
            limits = (("memory.limit_in_bytes", limit_bytes), ("memory.memsw.limit_in_bytes", limit_bytes))
            folder = _make(sources, f"{above}/{name}", limits)
            if folder is not None:
                _write(os.path.join(folder, "memory.swappiness"), "0")  # where the kernel does not count swap
                return "cgroup-v1", folder
    return None


def _make(sources: Sources, path: str, limits: Tuple[Tuple[str, int], Tuple[str, int]]) -> Optional[str]:
    """Makes a group and checks that its memory limit is set. Not every kernel has the second limit, of swap."""
    folder = sources.at(path)
    _remove(folder)  # left by a run whose supervisor was killed
    try:
        os.mkdir(folder)
    except OSError:
        return None
    (memory, limit_bytes), (swap, swap_bytes) = limits
    _write(os.path.join(folder, memory), str(limit_bytes))
    _write(os.path.join(folder, swap), str(swap_bytes))
    told = sources.text(f"{path}/{memory}") or ""
    if told.isdigit() and int(told) <= limit_bytes and _can_be_entered(folder):
        return folder
    _remove(folder)
    return None


def _can_be_entered(folder: str) -> bool:
    """Tells whether a process can enter the group, by trying. Moving needs rights over the old group, too."""
    child = os.fork()
    if child == 0:
        try:
            with open(os.path.join(folder, "cgroup.procs"), "w") as file:
                file.write(str(os.getpid()))
            os._exit(0)
        except OSError:
            os._exit(1)
    return os.waitpid(child, 0)[1] == 0


def _mounts(sources: Sources, kind: str, option: Optional[str] = None) -> List[str]:
    found = []
    for line in (sources.text("/proc/self/mounts") or "").splitlines():
        fields = line.split(" ")
        if len(fields) > 3 and fields[2] == kind and (option is None or option in fields[3].split(",")):
            found.append(fields[1])
    return found


def _own_group(sources: Sources, controller: str) -> str:
    """Returns the path of our own group. `controller`: of version 1, or nothing for version 2."""
    for line in (sources.text("/proc/self/cgroup") or "").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controller in controllers.split(","):
            return path
    return "/"


def _ancestors(sources: Sources, mount: str, path: str) -> List[str]:
    """Yields the folders of a group and its ancestors, itself first.

    In a container the mount shows only the lower part of the path, or none of it.
    """
    parts = [part for part in path.split("/") if part not in ("", "..")]
    paths = ["/".join([mount, *parts[:n]]) for n in range(len(parts), 0, -1)]
    return [*(p for p in paths if sources.names(p)), mount]


def _words(sources: Sources, path: str) -> List[str]:
    return (sources.text(path) or "").split()


def _write(path: str, value: str) -> None:
    with contextlib.suppress(OSError), open(path, "w") as file:  # what holds is read back
        file.write(value)


def _remove(folder: str) -> None:
    with contextlib.suppress(OSError):  # a process of it lives on, and with it the group
        os.rmdir(folder)


# --- systemd, rlimit ------------------------------------------------------------------------------------------------


def _systemd_scope(limit_bytes: int) -> List[str]:
    limits = ["-p", f"MemoryMax={limit_bytes}", "-p", "MemorySwapMax=0"]
    return ["systemd-run", "--user", "--scope", "--quiet", "--collect", *limits, "--"]


def _systemd_holds(sources: Sources, limit_bytes: int) -> bool:
    """Tells whether the user's own systemd puts a command under the limit; asks one command for its limit."""
    if not _mounts(sources, "cgroup2") or sources.root != "/":
        return False
    tell = 'cat "$1$(sed -n s/^0:://p /proc/self/cgroup)/memory.max"'
    try:
        answer = subprocess.run(
            [*_systemd_scope(limit_bytes), "sh", "-c", tell, "sh", _mounts(sources, "cgroup2")[0]],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=_SYSTEMD_DEADLINE_S,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return False
    return answer.isdigit() and int(answer) <= limit_bytes


def _data_limit_allowed(limit_bytes: int) -> bool:
    """Tells whether RLIMIT_DATA may be set and counts what mmap allocates, as Linux does from 4.7 on."""
    try:
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        version = tuple(int(part) for part in re.findall(r"\d+", os.uname().release)[:2])
    except (OSError, ValueError):
        return False
    return (
        os.uname().sysname == "Linux" and version >= (4, 7) and (hard == resource.RLIM_INFINITY or hard >= limit_bytes)
    )
