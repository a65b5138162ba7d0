"""Reads what the operating system says of this process and of the page cache. None means that it does not say."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
from typing import Optional

from engine.device.sensors import kilobytes


def major_faults() -> Optional[int]:
    """Returns this process's page faults that had to wait for storage."""
    try:
        return int(_text("/proc/self/stat").rsplit(")", 1)[1].split()[9])
    except (IndexError, ValueError):
        return None


def peak_resident_bytes() -> Optional[int]:
    return kilobytes(_text("/proc/self/status"), "VmHWM")


def storage_read_bytes() -> Optional[int]:
    """Returns the bytes that the kernel fetched from storage for this process."""
    match = re.search(r"^read_bytes: (\d+)$", _text("/proc/self/io"), re.MULTILINE)
    return int(match.group(1)) if match else None


# --- page cache -----------------------------------------------------------------------------------------------------


def evict_from_page_cache(path: str) -> None:
    """Asks the kernel to forget a file's pages. Works on clean pages that no process maps; needs no root."""
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
    """Returns the share of a file's pages that is in memory, measured with mincore(2)."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            pages = [
                _resident_pages(libc, file.fileno(), at, min(_WINDOW, size - at)) for at in range(0, size, _WINDOW)
            ]
        return sum(pages) / -(-size // mmap.PAGESIZE)
    except (OSError, ValueError, AttributeError, ZeroDivisionError):
        return None


_WINDOW = 16 << 20  # mapped at a time: a mapping counts in RLIMIT_DATA


def _resident_pages(libc: ctypes.CDLL, file: int, offset: int, size: int) -> int:
    # A private writable mapping, which touches nothing, because ctypes takes an address from nothing less.
    with mmap.mmap(file, size, access=mmap.ACCESS_COPY, offset=offset) as mapping:
        states = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        start = ctypes.c_char.from_buffer(mapping)
        failed = libc.mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(size), states)
        del start
    if failed:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return sum(state & 1 for state in bytes(states))


# --- sources --------------------------------------------------------------------------------------------------------


def _text(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(1 << 20)
    except OSError:
        return ""
