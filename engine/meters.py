"""What the operating system says of this process, and of the page cache. None where it does not say."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
from typing import Optional

from engine.sensors import kilobytes


def major_faults() -> Optional[int]:
    """Page faults of this process that had to wait for storage."""
    try:
        return int(_text("/proc/self/stat").rsplit(")", 1)[1].split()[9])
    except (IndexError, ValueError):
        return None


def peak_resident_bytes() -> Optional[int]:
    return kilobytes(_text("/proc/self/status"), "VmHWM")


def storage_read_bytes() -> Optional[int]:
    """What the kernel really fetched from storage for this process."""
    match = re.search(r"^read_bytes: (\d+)$", _text("/proc/self/io"), re.MULTILINE)
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


def _text(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(1 << 20)
    except OSError:
        return ""
