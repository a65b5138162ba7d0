"""Finds what a device is: board, cores, memory, storage, system, Python and numpy. None means that it does not say."""

from __future__ import annotations

import mmap
import os
import platform
import re
from typing import List, Optional, Tuple

import numpy as np

from engine import __version__
from engine.device.cores import core_kinds
from engine.device.limits import best_method
from engine.device.sensors import Sensors, board, kilobytes
from engine.device.sources import SilentError, Sources
from engine.device.watch import watch
from engine.protocol import DeviceFacts, Settle

_NETWORK = ("nfs", "nfs4", "cifs", "smb3", "9p", "fuse.sshfs", "ceph", "virtiofs")
_MEMORY = ("tmpfs", "ramfs")


def device_facts(
    sources: Optional[Sources] = None, *, folder: str = os.path.dirname(__file__), now: bool = False
) -> DeviceFacts:
    """Returns the device's facts.

    `folder`: whose storage is meant, the engine's own by default. `now`: also read sensors and test memory limits.
    """
    s = sources or Sources()
    names = platform.uname()
    memory = s.text("/proc/meminfo")
    kind = board(s)
    disk = _disk(s, folder)
    read_ahead = s.text(f"{disk}/queue/read_ahead_kb") if disk else None
    return DeviceFacts(
        hostname=names.node,
        machine=names.machine,
        kernel=_kernel(names),
        os=_os_name(s),
        model=_model(s, kind),
        cpu=_cpu_name(s),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_bytes=kilobytes(memory, "MemTotal"),
        page_bytes=mmap.PAGESIZE,
        boot_id=s.text("/proc/sys/kernel/random/boot_id"),
        python=platform.python_version(),
        numpy=np.__version__,
        blas=_blas_name(s),
        engine=__version__,
        core_kinds=core_kinds(s),
        board=kind,
        power_mode=_power_mode(s) if kind == "jetson" else None,
        storage=_storage_kind(s, folder, disk, kind),
        storage_model=(s.text(f"{disk}/device/model") or s.text(f"{disk}/device/name")) if disk else None,
        read_ahead_bytes=int(read_ahead) << 10 if read_ahead and read_ahead.isdigit() else None,
        swap_bytes=kilobytes(memory, "SwapTotal"),
        memory_limit_method=best_method(s.root) if now else None,
        now=watch(Settle(), Sensors(s), pause=lambda seconds: True) if now else None,
    )


def _os_name(s: Sources) -> Optional[str]:
    match = re.search(r'^PRETTY_NAME="?([^"\n]+)', s.text("/etc/os-release") or "", re.MULTILINE)
    if match:
        return match.group(1)
    android = _ask(s, "getprop", "ro.build.version.release")
    termux = s.environment.get("TERMUX_VERSION")
    known = [f"Android {android}" if android else "", f"Termux {termux}" if termux else ""]
    return ", ".join(name for name in known if name) or None


def _model(s: Sources, kind: Optional[str]) -> Optional[str]:
    if kind == "android":
        words = [_ask(s, "getprop", f"ro.product.{part}") or "" for part in ("manufacturer", "model")]
        return " ".join(word for word in words if word) or None
    return s.text("/proc/device-tree/model") or s.text("/sys/class/dmi/id/product_name")


def _cpu_name(s: Sources) -> Optional[str]:
    text = s.text("/proc/cpuinfo") or ""
    for key in ("model name", "Model", "Hardware"):
        match = re.search(rf"^{key}\s*: (.+)$", text, re.MULTILINE)
        if match:
            return match.group(1).strip()
    return _ask(s, "getprop", "ro.soc.model")


def _kernel(names: platform.uname_result) -> str:
    """Returns the kernel's name and release; platform.uname() tells Android's own instead, from Python 3.13 on."""
    kernel = os.uname() if hasattr(os, "uname") else None
    return f"{kernel.sysname} {kernel.release}" if kernel else f"{names.system} {names.release}"


def _power_mode(s: Sources) -> Optional[str]:
    match = re.search(r"NV Power Mode: *(\S+)", _ask(s, "nvpmodel", "-q") or "")
    return match.group(1) if match else s.text("/var/lib/nvpmodel/status")


def _blas_name(s: Sources) -> Optional[str]:
    """Returns the library that numpy has loaded; its build configuration names another one on some systems."""
    for line in (s.text("/proc/self/maps") or "").splitlines():
        name = os.path.basename(line.rsplit(" ", 1)[-1])
        if re.match(r"lib(scipy_)?(openblas|mkl_rt|blis|atlas|blas)", name):
            return name
    return None


def _ask(s: Sources, *arguments: str) -> Optional[str]:
    try:
        return (s.command(*arguments) or "").strip() or None
    except SilentError:
        return None


# --- storage --------------------------------------------------------------------------------------------------------


def _storage_kind(s: Sources, folder: str, disk: Optional[str], kind: Optional[str]) -> Optional[str]:
    system = _mount(s, folder)[0]
    if system in _MEMORY:
        return "memory"
    if system in _NETWORK:
        return "network"
    if disk is not None:
        return _disk_kind(s, disk)
    if kind == "android":  # which hides its block devices; what it started from, it names
        boot = _ask(s, "getprop", "ro.boot.bootdevice") or ""
        return "ufs" if "ufs" in boot else "emmc" if re.search("sdhci|mmc|msdc", boot) else None
    return system if system == "overlay" else None  # what lies below it does not show


def _disk_kind(s: Sources, disk: str) -> str:
    name = os.path.basename(disk)
    if name.startswith("mmcblk"):
        return "sd-card" if s.text(f"{disk}/device/type") == "SD" else "emmc"
    for start, what in (("nvme", "nvme"), ("loop", "loop"), ("zram", "memory"), ("ram", "memory"), ("nbd", "network")):
        if name.startswith(start):
            return what
    for part, what in (("/virtio", "virtual"), ("/vbd", "virtual"), ("ufs", "ufs"), ("/usb", "usb"), ("/ata", "sata")):
        if part in disk:
            return what
    return "virtual" if re.match(r"x?vd", name) else name


def _disk(s: Sources, folder: str) -> Optional[str]:
    """Returns the folder below /sys of the disk on which a folder lies, beneath partitions and device mappers."""
    _, number, source = _mount(s, folder)
    found = s.real(f"/sys/dev/block/{number}") if number else None
    if found is None and source.startswith("/dev/"):  # file systems over several disks have a number of no disk
        found = s.real(f"/sys/class/block/{os.path.basename(source)}")
    for _ in range(8):  # however often they are stacked
        if found is None:
            return None
        below = s.names(f"{found}/slaves")
        if below:
            found = s.real(f"{found}/slaves/{below[0]}")
        elif not s.names(f"{found}/queue") and s.names(f"{os.path.dirname(found)}/queue"):
            found = os.path.dirname(found)  # a partition's disk
        else:
            return found
    return found


def _mount(s: Sources, folder: str) -> Tuple[str, str, str]:
    """Returns the type, the device number and the source of the file system on which a folder lies."""
    best, found = "", ("", "", "")
    path = s.real(folder) or folder
    for line in (s.text("/proc/self/mountinfo") or "").splitlines():
        left, _, right = line.partition(" - ")
        fields, what = left.split(" "), right.split(" ")
        if len(fields) < 5 or len(what) < 2:
            continue
        point = fields[4].replace("\\040", " ")
        if _is_below(path, point) and len(point) >= len(best):
            best, found = point, (what[0], fields[2], what[1])
    return found


def _is_below(path: str, point: str) -> bool:
    parts: List[str] = [] if point == "/" else point.split("/")
    return path.split("/")[: len(parts)] == parts
