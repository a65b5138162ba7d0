"""What the operating system says of this device and of this process. None where it does not say."""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import re
from typing import Optional

import numpy as np

from engine import __version__
from engine.protocol import DeviceFacts


def device_facts() -> DeviceFacts:
    names = platform.uname()
    return DeviceFacts(
        hostname=names.node,
        machine=names.machine,
        kernel=f"{names.system} {names.release}",
        os=_os_name(),
        model=_first_text("/proc/device-tree/model", "/sys/class/dmi/id/product_name"),
        cpu=_cpu_name(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_bytes=_kilobytes("/proc/meminfo", "MemTotal"),
        page_bytes=mmap.PAGESIZE,
        boot_id=_first_text("/proc/sys/kernel/random/boot_id"),
        python=platform.python_version(),
        numpy=np.__version__,
        blas=_blas_name(),
        engine=__version__,
    )


def major_faults() -> Optional[int]:
    """Page faults of this process that had to wait for storage."""
    text = _text("/proc/self/stat")
    try:
        return None if text is None else int(text.rsplit(")", 1)[1].split()[9])
    except (IndexError, ValueError):
        return None


def peak_resident_bytes() -> Optional[int]:
    return _kilobytes("/proc/self/status", "VmHWM")


def storage_read_bytes() -> Optional[int]:
    """What the kernel really fetched from storage for this process."""
    match = re.search(r"^read_bytes: (\d+)$", _text("/proc/self/io") or "", re.MULTILINE)
    return int(match.group(1)) if match else None


# --- page cache -----------------------------------------------------------------------------------------------------


def evict_from_page_cache(path: str) -> None:
    """Asks the kernel to forget a file's pages; works on clean pages that no process maps. Needs no root."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(file)


def read_into_page_cache(path: str) -> None:
    block = bytearray(1 << 20)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(block):
            pass


def page_cache_resident_fraction(path: str) -> Optional[float]:
    """The share of a file's pages that is in memory, by mincore(2): what was asked for is no proof of it."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            # A private writable mapping, which touches nothing, because ctypes takes an address from nothing less.
            mapping = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
        try:
            pages = -(-size // mmap.PAGESIZE)
            states = (ctypes.c_ubyte * pages)()
            start = ctypes.c_char.from_buffer(mapping)
            address = ctypes.addressof(start)
            failed = libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), states)
            del start
            return None if failed else sum(state & 1 for state in bytes(states)) / pages
        finally:
            mapping.close()
    except (OSError, ValueError, AttributeError):
        return None


# --- sources --------------------------------------------------------------------------------------------------------


def _text(path: str) -> Optional[str]:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(1 << 20)
    except OSError:
        return None


def _first_text(*paths: str) -> Optional[str]:
    for path in paths:
        text = (_text(path) or "").strip("\0\n ")
        if text:
            return text
    return None


def _kilobytes(path: str, key: str) -> Optional[int]:
    match = re.search(rf"^{key}:\s+(\d+) kB$", _text(path) or "", re.MULTILINE)
    return int(match.group(1)) << 10 if match else None


def _os_name() -> Optional[str]:
    match = re.search(r'^PRETTY_NAME="?([^"\n]+)', _text("/etc/os-release") or "", re.MULTILINE)
    if match:
        return match.group(1)
    return f"Termux {os.environ['TERMUX_VERSION']}" if "TERMUX_VERSION" in os.environ else None


def _cpu_name() -> Optional[str]:
    text = _text("/proc/cpuinfo") or ""
    for key in ("model name", "Model", "Hardware"):
        match = re.search(rf"^{key}\s*: (.+)$", text, re.MULTILINE)
        if match:
            return match.group(1).strip()
    return None


def _blas_name() -> Optional[str]:
    """The library that numpy has really loaded: its build configuration names another on some systems."""
    for line in (_text("/proc/self/maps") or "").splitlines():
        name = os.path.basename(line.rsplit(" ", 1)[-1])
        if re.match(r"lib(scipy_)?(openblas|mkl_rt|blis|atlas|blas)", name):
            return name
    return None
