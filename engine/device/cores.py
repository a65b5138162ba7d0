"""Finds the cores that this process may use, their kinds, and how many of them the arithmetic should use."""

from __future__ import annotations

import os
import re
from typing import Dict, List, Optional, Tuple

from engine.device.sources import SilentError, Sources
from engine.protocol import CoreKind

CPUS = "/sys/devices/system/cpu"
MOST_THREADS = 4  # beyond which cores wait for memory, on the devices that this is for


def arithmetic_threads() -> int:
    """Returns one thread for each fast core but one, which is left for reading; at most MOST_THREADS.

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
    """Returns a core's speed relative to the others: the kernel's capacity on ARM, else the highest frequency."""
    folder = f"{CPUS}/cpu{core}"
    for name in ("cpu_capacity", "cpufreq/cpuinfo_max_freq"):
        try:
            with open(f"{folder}/{name}", encoding="ascii") as file:
                return float(file.read())
        except (OSError, ValueError):
            continue
    return None


def core_kinds(sources: Sources) -> Tuple[CoreKind, ...]:
    """Returns all cores of the device, by name and highest frequency, the fastest kind first."""
    names = _core_names(sources.text("/proc/cpuinfo") or "")
    present = [int(n[3:]) for n in sources.names(CPUS) if re.match(r"cpu\d+$", n)] or sorted(names)
    counts: Dict[Tuple[Optional[str], Optional[float]], int] = {}
    for core in present:
        try:
            kilohertz = sources.number(f"{CPUS}/cpu{core}/cpufreq/cpuinfo_max_freq")
        except SilentError:
            kilohertz = None
        kind = (names.get(core), None if kilohertz is None else kilohertz * 1e3)
        counts[kind] = counts.get(kind, 0) + 1
    kinds = [CoreKind(n, name, hertz) for (name, hertz), n in counts.items()]
    return tuple(sorted(kinds, key=lambda kind: (-(kind.highest_hz or 0), kind.name or "")))


def _core_names(cpuinfo: str) -> Dict[int, str]:
    """Returns names by core; ARM tells an implementer and a part, others a model's name."""
    names = {}
    for block in cpuinfo.split("\n\n"):
        told = dict(re.findall(r"^([\w ]+?)\s*: (.*)$", block, re.MULTILINE))
        core = told.get("processor", "")
        if not core.isdigit():
            continue
        if "CPU part" in told:
            part = (told.get("CPU implementer", ""), told["CPU part"])
            names[int(core)] = _PARTS.get(part, f"part {part[1]} of implementer {part[0]}")
        elif "model name" in told:
            names[int(core)] = told["model name"]
    return names


# Implementer and part as in the processor's MIDR register (Arm, "MIDR_EL1", and the kernel's asm/cputype.h).
_PARTS = {
    **{
        ("0x41", part): f"Cortex-{name}"
        for part, name in (
            ("0xc05", "A5"), ("0xc07", "A7"), ("0xc08", "A8"), ("0xc09", "A9"), ("0xc0e", "A17"), ("0xc0f", "A15"),
            ("0xd03", "A53"), ("0xd04", "A35"), ("0xd05", "A55"), ("0xd07", "A57"), ("0xd08", "A72"), ("0xd09", "A73"),
            ("0xd0a", "A75"), ("0xd0b", "A76"), ("0xd0d", "A77"), ("0xd41", "A78"), ("0xd42", "A78AE"),
            ("0xd44", "X1"), ("0xd46", "A510"), ("0xd47", "A710"), ("0xd48", "X2"), ("0xd4b", "A78C"),
            ("0xd4d", "A715"), ("0xd4e", "X3"), ("0xd80", "A520"), ("0xd81", "A720"), ("0xd82", "X4"),
            ("0xd85", "X925"), ("0xd87", "A725"),
        )
    },
    ("0x41", "0xb76"): "ARM1176", ("0x41", "0xd0c"): "Neoverse-N1", ("0x41", "0xd40"): "Neoverse-V1",
    ("0x4e", "0x003"): "Denver 2", ("0x4e", "0x004"): "Carmel",
    ("0x51", "0x800"): "Kryo 2xx Gold", ("0x51", "0x801"): "Kryo 2xx Silver",
    ("0x51", "0x802"): "Kryo 3xx Gold", ("0x51", "0x803"): "Kryo 3xx Silver",
    ("0x51", "0x804"): "Kryo 4xx Gold", ("0x51", "0x805"): "Kryo 4xx Silver",
}  # fmt: skip
