"""Which cores this process may use, and how many of them the arithmetic should."""

from __future__ import annotations

import os
from typing import List, Optional

MOST_THREADS = 4  # beyond which cores wait for memory, on the devices that this is for


def arithmetic_threads() -> int:
    """One for each fast core but one, which is left for reading; at most MOST_THREADS.

    Where cores differ (big.LITTLE), those of less than half the speed of the fastest are not counted: a product is as
    fast as its slowest share.
    """
    try:
        cores = sorted(os.sched_getaffinity(0))
    except (AttributeError, OSError):
        cores = list(range(os.cpu_count() or 1))
    speeds = [_speed(core) for core in cores]
    known: List[float] = [speed for speed in speeds if speed is not None]
    fast = [s for s in speeds if s is None or s >= 0.5 * max(known)]
    return max(1, min(MOST_THREADS, len(fast) - 1))


def _speed(core: int) -> Optional[float]:
    """Relative to other cores: the kernel's capacity on ARM, else the highest frequency."""
    folder = f"/sys/devices/system/cpu/cpu{core}"
    for name in ("cpu_capacity", "cpufreq/cpuinfo_max_freq"):
        try:
            with open(f"{folder}/{name}", encoding="ascii") as file:
                return float(file.read())
        except (OSError, ValueError):
            continue
    return None
