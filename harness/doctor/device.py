"""Checks a device. A check is a function from what the device told to findings, and a line in CHECKS."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from device_inventory import Device
from engine.protocol import DeviceFacts
from harness.doctor.survey import Survey
from harness.errors import UnfitError
from harness.findings import Finding, Severity, Told
from reports.text import harmless

LEAST_FREE_BYTES = 32 << 20  # the engine, a run's events and its log
LITTLE_FREE_BYTES = 1 << 30
CLOCK_TOLERANCE_S = 5.0
LEAST_FREE_INODES = 1000
LOSSY_FILE_SYSTEMS = ("vfat", "exfat", "fuse", "fuseblk", "sdcardfs", "nfs", "nfs4", "cifs", "9p")
_THROTTLED = {0: "under-voltage", 1: "a capped frequency", 2: "throttling", 3: "a soft temperature limit"}


@dataclass(frozen=True)
class Examined:
    """Holds what is known of a device; `facts` are there once the engine was deployed and asked."""

    device: Device
    root: str  # absolute
    survey: Survey
    facts: DeviceFacts | None = None


def examine(found: Examined) -> list[Finding]:
    """Runs all checks in their order; returns what they find."""
    return [
        Finding(found.device.name, name, severity, harmless(finding, limit=400), harmless(remedy, limit=400))
        for name, check in CHECKS.items()
        for severity, finding, remedy in check(found)
    ]


def refuse_unfit(found: Examined) -> None:
    """Raises UnfitError with the first finding that is an error, and its remedy: the gate of a run."""
    for finding in examine(found):
        if finding.severity is Severity.ERROR:
            raise UnfitError(str(finding))


def _writable(found: Examined) -> Iterator[Told]:
    is_full = found.survey.free_bytes < LEAST_FREE_BYTES and not found.survey.read_only  # which another check says
    if found.survey.write_error is not None and not is_full:
        what = "is on a file system that is mounted read-only" if found.survey.read_only else "cannot be written"
        remedy = "`sudo mount -o remount,rw` it (a worn SD card?), or set `root` in the inventory"
        yield Severity.ERROR, f"{found.root} {what} ({found.survey.write_error})", remedy


def _free_space(found: Examined) -> Iterator[Told]:
    free, name = found.survey.free_bytes, found.device.name
    remedy = f"`edgemoe-farm devices prune {name}`, or set `root` in the inventory to a larger disk"
    if free < LEAST_FREE_BYTES:
        yield (
            Severity.ERROR,
            f"the disk of {found.root} has {free / 1e6:.1f} MB free, a run needs {LEAST_FREE_BYTES / 1e6:.0f} MB",
            remedy,
        )
    elif free < LITTLE_FREE_BYTES:
        yield Severity.WARNING, f"the disk of {found.root} has {free / 1e6:.0f} MB free, too little for a model", remedy
    if found.survey.free_inodes is not None and found.survey.free_inodes < LEAST_FREE_INODES:
        yield Severity.WARNING, f"the disk of {found.root} has {found.survey.free_inodes} inodes left", remedy


def _file_system(found: Examined) -> Iterator[Told]:
    kind, where = found.survey.file_system or "", found.survey.storage
    if kind in ("tmpfs", "ramfs"):
        finding = f"{found.root} is in memory ({kind}): reads of experts are none of storage, and a restart empties it"
        yield Severity.WARNING, finding, "set `root` in the inventory to a folder on storage"
    elif kind.split(".")[0] in LOSSY_FILE_SYSTEMS:
        finding = f"{found.root} is on {kind} ({where}), which has no local speed, no locks, or no permissions"
        yield Severity.WARNING, finding, "set `root` in the inventory to a folder on ext4, f2fs, btrfs or xfs"
    if found.survey.no_exec:
        finding = f"the file system of {found.root} is mounted noexec: native kernels cannot be loaded from it"
        yield Severity.WARNING, finding, "`sudo mount -o remount,exec` it, or set `root` in the inventory"


def _direct_reads(found: Examined) -> Iterator[Told]:
    if found.survey.direct_reads is False and found.survey.write_error is None:
        finding = f'{found.survey.file_system} at {found.root} knows no O_DIRECT: `reader = "direct"` cannot engage'
        yield Severity.NOTE, finding, "leave `reader` at pread, or set `root` to a folder on ext4, f2fs or xfs"


def _clock(found: Examined) -> Iterator[Told]:
    error_s = found.survey.clock_error_s or 0.0
    if abs(error_s) > CLOCK_TOLERANCE_S:
        size = f"{abs(error_s):.0f} s" if abs(error_s) < 86400 else f"{abs(error_s) / 86400:.0f} days"
        finding = f"its clock is {size} {'fast' if error_s > 0 else 'slow'}; measurements do not use it, its logs do"
        yield Severity.WARNING, finding, "`sudo timedatectl set-ntp true` there, or set this machine's own clock"


def _governor(found: Examined) -> Iterator[Told]:
    slow = [governor for governor in found.survey.governors if governor and governor != "performance"]
    if slow:
        finding = f"the frequency governor is {', '.join(slow)}: short runs are measured while the clock still rises"
        remedy = "`echo performance | sudo tee /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor` there"
        yield Severity.WARNING, finding, remedy


def _throttled(found: Examined) -> Iterator[Told]:
    bits = found.survey.throttled_bits or 0
    now = [words for bit, words in _THROTTLED.items() if bits >> bit & 1]
    earlier = [words for bit, words in _THROTTLED.items() if bits >> bit + 16 & 1 and words not in now]
    remedy = "use the board's own power supply and a cooler; a restart clears what is remembered"
    if now:
        yield Severity.WARNING, f"the firmware reports {', '.join(now)} now", remedy
    if earlier:
        yield Severity.NOTE, f"the firmware reports {', '.join(earlier)} at some time since the start", remedy


def _swap(found: Examined) -> Iterator[Told]:
    on_storage = [swap for swap in found.survey.swaps if "zram" not in swap]
    if on_storage:
        finding = f"it swaps to {', '.join(on_storage)}: memory that runs short is measured as slowness"
        yield (
            Severity.WARNING,
            finding,
            (
                "`sudo swapoff -a` there (to keep it off, Raspberry Pi OS 13: `Mechanism=none` under [Main] in "
                "/etc/rpi/swap.conf; before: `sudo systemctl disable --now dphys-swapfile`)"
            ),
        )


def _memory_control_groups(found: Examined) -> Iterator[Told]:
    if found.survey.memory_control_groups is False:
        finding = "its kernel has no memory control groups: memory limits cannot be enforced by them"
        remedy = "add `cgroup_enable=memory` to the line in /boot/firmware/cmdline.txt (Raspberry Pi OS) and restart"
        yield Severity.NOTE, finding, remedy


def _tools(found: Examined) -> Iterator[Told]:
    missing = [tool for tool in found.survey.missing_tools if tool != "timeout"]
    if missing:
        yield Severity.ERROR, f"it lacks {', '.join(missing)}", "install coreutils or busybox there"
    if "timeout" in found.survey.missing_tools:
        finding = "it lacks `timeout`: deadlines are held by a watchdog that ends a command but not what it started"
        yield Severity.NOTE, finding, "install coreutils or busybox there"


def _android(found: Examined) -> Iterator[Told]:
    version = found.survey.android
    if version is None:
        return
    yield Severity.NOTE, "Android puts processes to sleep when its screen is off", "`termux-wake-lock` there, once"
    if version.split(".")[0].isdigit() and int(version.split(".")[0]) >= 12:
        finding = f"Android {version} kills processes that it calls phantoms, with signal 9"
        remedy = "`adb shell settings put global settings_enable_monitor_phantom_procs false`, from a computer"
        yield Severity.NOTE, finding, remedy


def _blas(found: Examined) -> Iterator[Told]:
    if found.facts is not None and found.facts.blas is None:
        finding = "numpy uses no optimised BLAS that can be told: its arithmetic may be many times slower"
        yield Severity.WARNING, finding, "install libopenblas there (Debian: `sudo apt install libopenblas0`)"


CHECKS: dict[str, Callable[[Examined], Iterator[Told]]] = {
    "root-writable": _writable,
    "free-space": _free_space,
    "tools": _tools,
    "file-system": _file_system,
    "direct-reads": _direct_reads,
    "clock": _clock,
    "governor": _governor,
    "throttled": _throttled,
    "swap": _swap,
    "memory-control-groups": _memory_control_groups,
    "android": _android,
    "blas": _blas,
}
