"""Finds which of the built libraries this processor can run."""

from __future__ import annotations

import platform
import struct
from typing import Dict, FrozenSet, List, Tuple

# All that the compiler may use, whether or not it does: what it uses unlisted ends the process.
_X86_64_V3 = ("avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe")
_ARMV8_2 = ("asimd", "atomics", "crc32", "fphp", "asimdhp", "asimdrdm", "lrcpc")  # of a Cortex-A76
# By machine, the best first: the library, and what /proc/cpuinfo must list for it.
VARIANTS: Dict[str, Tuple[Tuple[str, Tuple[str, ...]], ...]] = {
    "x86_64": (
        ("x86_64-avx512vnni", (*_X86_64_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512_vnni")),
        ("x86_64-avx2", _X86_64_V3),
    ),
    "aarch64": (("aarch64-dotprod", (*_ARMV8_2, "asimddp")), ("aarch64-neon", ("asimd",))),
    "armv7": (("armv7-neon", ("neon", "vfpv4")),),
}


class NativeUnavailableError(Exception):
    """Reports that no library exists for this processor, or that none works here."""


def fitting_variants() -> List[str]:
    """Returns the libraries that this processor can run, the best first.

    Raises NativeUnavailableError if there are none.
    """
    machine, features = machine_name(), cpu_features()
    variants = VARIANTS.get(machine, ())
    if not variants:
        raise NativeUnavailableError(f"there is no library for {machine}")
    fitting = [name for name, needed in variants if features.issuperset(needed)]
    if not fitting:
        missing = [feature for feature in variants[-1][1] if feature not in features]
        raise NativeUnavailableError(f"there is no library for {machine} without {' '.join(missing)}")
    return fitting


def machine_name() -> str:
    """Returns the machine as VARIANTS names it. On ARM a process may have 32 bits under a kernel of 64."""
    machine = platform.machine().lower()
    if machine in ("aarch64", "arm64", "armv8l", "armv7l"):
        return "aarch64" if struct.calcsize("P") == 8 else "armv7"
    return "x86_64" if machine in ("x86_64", "amd64") and struct.calcsize("P") == 8 else machine


def cpu_features() -> FrozenSet[str]:
    """Returns what Linux lists of the first processor; a 64-bit kernel does not list what every ARMv8 has."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                name, _, value = line.partition(":")
                if name.strip().lower() in ("flags", "features"):
                    found = set(value.split())
                    if "asimd" in found:
                        found |= {"neon", "vfpv4"}
                    return frozenset(found)
    except OSError:
        pass
    return frozenset()
