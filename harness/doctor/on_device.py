"""Tells what the checks need to know of this device: standard library only, Python >= 3.8; see harness/agent.

survey ROOT                what the checks look at, as one JSON object; changes nothing
prune ROOT DAYS KINDS DRY  removes engines, sites, blobs and runs (KINDS, with commas) that nobody used for DAYS days,
                           and says what; with DRY=1 it only says it. Runs that are alive stay, and so does all that the
                           farm did not make: by its marker, names and owner, behind no link. Ages are by the device's
                           own clock: where that jumps, the worst is that something is sent or measured once more;
                           but what began since it started is no older than that
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import json
import mmap
import os
import re
import shutil
import stat
import subprocess
import sys
import time
from typing import Any, Dict, List, Optional

TOOLS = ("timeout", "dd", "df", "wc", "tail", "mv", "rm", "mkdir")
# Of what the farm makes in its folders, as in harness/agent/place.py.
_HASH, _ASIDE = "[0-9a-f]{16}", r"(\.[0-9]+\.part)?"
FORMS = {
    "engines": _HASH + _ASIDE,
    "sites": _HASH + _ASIDE,
    "blobs": "[0-9a-f]{64}" + _ASIDE,
    "runs": r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}?" + _ASIDE,
}
NO_CLOCK_S = 1e9  # 2001: clocks that nobody set begin in 1970, 1980 or 2000
COMMAND_DEADLINE_S = 3.0  # vcgencmd and getprop may hang


def survey(root: str) -> Dict[str, Any]:
    found: Dict[str, Any] = {"utc_s": time.time()}
    found.update(file_system(root))
    disk = os.statvfs(root)
    found["free_bytes"] = disk.f_bavail * disk.f_frsize
    found["disk_bytes"] = disk.f_blocks * disk.f_frsize
    found["free_inodes"] = disk.f_favail if disk.f_files else None  # some file systems make them as needed
    found.update(try_writing(root))
    found["memory_control_groups"] = memory_control_groups()
    found["governors"] = sorted(
        {text(path) for path in glob.glob("/sys/devices/system/cpu/cpu*/cpufreq/scaling_governor")}
    )
    found["throttled_bits"] = throttled_bits()
    found["swaps"] = [line.split()[0] for line in text("/proc/swaps").splitlines()[1:] if line.strip()]
    found["android"] = (
        command("getprop", "ro.build.version.release") if "com.termux" in os.environ.get("PREFIX", "") else None
    )
    found["missing_tools"] = [tool for tool in TOOLS if shutil.which(tool) is None]
    found["stale_runs"] = len(unused(root, "runs", 7.0))
    return found


def file_system(root: str) -> Dict[str, Any]:
    """Returns type, source and options of the mount on which `root` lies."""
    best = ""
    told: Dict[str, Any] = {"file_system": None, "storage": None, "read_only": None, "no_exec": None}
    path = os.path.realpath(root)
    for line in text("/proc/self/mounts").splitlines():
        words = line.split()
        if len(words) < 4:
            continue
        point = words[1].replace("\\040", " ")
        if (path == point or path.startswith(point.rstrip("/") + "/")) and len(point) >= len(best):
            best, options = point, words[3].split(",")
            told = {
                "file_system": words[2],
                "storage": words[0],
                "read_only": "ro" in options,
                "no_exec": "noexec" in options,
            }
    return told


def try_writing(root: str) -> Dict[str, Any]:
    """Tells whether a file can be written there, and read past the page cache."""
    path = os.path.join(root, f".survey.{os.getpid()}")
    remove(path)
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(b"x" * 4096)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        remove(path)
        return {"write_error": error.strerror or str(error), "direct_reads": None}
    direct = False
    try:
        opened = os.open(path, os.O_RDONLY | os.O_DIRECT)  # type: ignore[attr-defined,unused-ignore]
        try:
            direct = os.readv(opened, [mmap.mmap(-1, 4096)]) == 4096
        finally:
            os.close(opened)
    except (OSError, AttributeError):
        pass
    remove(path)
    return {"write_error": None, "direct_reads": direct}


def memory_control_groups() -> Optional[bool]:
    if os.path.exists("/sys/fs/cgroup/cgroup.controllers"):
        return "memory" in text("/sys/fs/cgroup/cgroup.controllers").split()
    for line in text("/proc/cgroups").splitlines():
        words = line.split()
        if words and words[0] == "memory":
            return words[-1] == "1"
    return None


def throttled_bits() -> Optional[int]:
    """Returns a Raspberry Pi's bits: 0-3 now, 16-19 since its start (low voltage, frequency cap, throttled, hot)."""
    answer = command("vcgencmd", "get_throttled") or text("/sys/devices/platform/soc/soc:firmware/get_throttled")
    try:
        return int(answer.rpartition("=")[2].strip(), 16)
    except ValueError:
        return None


# --- prune ------------------------------------------------------------------------------------------------------------


def prune(root: str, days: str, kinds: str, dry: str) -> Dict[str, Any]:
    removed: List[Dict[str, Any]] = []
    runs = os.path.join(root, "runs")
    if any(is_alive(os.path.join(runs, run)) for run in own(root, "runs")):
        days = str(max(float(days), 1.0))  # what it uses was touched when it began
    for kind in kinds.split(","):
        for name in unused(root, kind, float(days)):
            path = os.path.join(root, kind, name)
            removed.append({"kind": kind, "name": name, "bytes": size_bytes(path)})
            if dry != "1":
                shutil.rmtree(path, ignore_errors=True)  # which follows no link
    left = {kind: size_bytes(os.path.join(root, kind)) for kind in ("engines", "sites", "blobs", "runs")}
    return {"removed": removed, "left_bytes": left}


def unused(root: str, kind: str, days: float) -> List[str]:
    """Returns what lies in a folder of the farm, untouched for `days`; whoever uses something touches it."""
    names = []
    for name in own(root, kind):
        path = os.path.join(root, kind, name)
        try:
            times = [os.lstat(path).st_mtime]
            times += [os.lstat(os.path.join(path, inner)).st_mtime for inner in os.listdir(path)]
        except OSError:
            continue
        if age_s(path, max(times)) > days * 86400 and not is_alive(path):
            names.append(name)
    return names


def age_s(path: str, touched: float) -> float:
    """Returns for how long something was not touched, at most.

    A board without a clock dates what it does by 1970 until it reaches a server of time: not before this start of it.
    The same holds for a run that says it began since then, whatever was done to the date.
    """
    age = time.time() - touched
    with contextlib.suppress(OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError):
        up = time.clock_gettime(time.CLOCK_BOOTTIME)
        if touched < NO_CLOCK_S:
            return min(age, up)
        engine = os.open(os.path.join(path, "engine.json"), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open("/proc/sys/kernel/random/boot_id") as now, os.fdopen(engine) as file:
            if json.loads(file.read(1 << 16))["boot_id"] == now.read().strip():
                return min(age, up)
    return age


def own(root: str, kind: str) -> List[str]:
    """Returns what the farm made in one of its folders, as harness/agent/place.py tells it; nothing behind a link."""
    outer = os.path.join(root, kind)
    try:
        marker, found = os.lstat(os.path.join(root, ".edgemoe-farm")), os.lstat(outer)
    except OSError:
        return []
    if not (stat.S_ISREG(marker.st_mode) and stat.S_ISDIR(found.st_mode) and kind in FORMS):
        return []
    names = []
    for name in sorted(os.listdir(outer)):
        inner = os.lstat(os.path.join(outer, name))
        is_ours = stat.S_ISDIR(inner.st_mode) and inner.st_uid == os.geteuid() and inner.st_dev == found.st_dev
        if kind == "runs" and not name.endswith(".part"):  # any word may be the name of a run
            is_ours = is_ours and os.path.lexists(os.path.join(outer, name, "holder.json"))
        if is_ours and re.fullmatch(FORMS[kind], name):
            names.append(name)
    return names


def is_alive(run: str) -> bool:
    """Tells whether a run's supervisor or engine holds its lock, as harness/agent/runs.py does."""
    try:
        lock = os.open(os.path.join(run, "alive"), os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(lock)
    return False


def size_bytes(path: str) -> int:
    """Returns what it occupies on the disk, as `du` counts."""
    total = 0
    for folder, _, names in os.walk(path):
        for inner in [folder] + [os.path.join(folder, name) for name in names]:
            try:
                total += os.lstat(inner).st_blocks * 512
            except OSError:
                continue
    return total


# --- what they share ----------------------------------------------------------------------------------------------


def text(path: str) -> str:
    try:
        with open(path, errors="replace") as file:
            return file.read(1 << 20).strip()
    except OSError:
        return ""


def command(*arguments: str) -> str:
    """Returns what a command says; nothing where it is missing, fails or hangs."""
    try:
        done = subprocess.run(
            arguments, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            timeout=COMMAND_DEADLINE_S,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.decode("utf-8", "replace").strip() if done.returncode == 0 else ""


def remove(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)


VERBS: Dict[str, Any] = {"survey": survey, "prune": prune}

if __name__ == "__main__":
    sys.stdout.write(json.dumps(VERBS[sys.argv[1]](*sys.argv[2:])) + "\n")
