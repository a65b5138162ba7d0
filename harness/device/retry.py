"""Decides which failed attempts at a cell are repeated, how often, and after how long a pause.

A result is never tried again: what ran out of memory, or gave a wrong answer, would do so once more, and a harness that
repeats until it likes the answer measures nothing. A fault of the infrastructure is, a few times.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from harness.device.collect import fault_of_words
from harness.errors import (
    DeviceBusyError,
    DiskFullError,
    HostKeyError,
    LeaseLostError,
    PythonMissingError,
    RemoteTimeoutError,
    UnfitError,
    UnreachableError,
)
from reports.records import Fault, RunStatus


@dataclass(frozen=True)
class Backoff:
    """Sets how often a cell is tried, and the pauses between: doubling, with jitter."""

    attempts: int
    first_pause_s: float
    last_pause_s: float = 120.0

    def pause_s(self, failures: int, random: Callable[[], float]) -> float:
        """Returns the pause after the `failures`-th failure. `random` returns a number between 0 and 1.

        Half of the pause is left to chance, so that devices that one power cut took away do not come back in step.
        """
        whole_s = min(self.first_pause_s * 2.0 ** (failures - 1), self.last_pause_s)
        return whole_s * (0.5 + 0.5 * random())


# What clears by itself is tried three times; where waiting alone is unlikely to help, once more.
RETRIES = {
    Fault.UNREACHABLE: Backoff(3, 5.0),
    Fault.LINK_LOST: Backoff(3, 5.0),
    Fault.LEASE_LOST: Backoff(3, 1.0),  # the device is waited for, in its queue
    Fault.REBOOTED: Backoff(3, 15.0),
    Fault.STALLED: Backoff(2, 15.0),
    Fault.KILLED: Backoff(2, 5.0),
    Fault.DAMAGED_OUTPUT: Backoff(2, 1.0),
    Fault.COMMAND_FAILED: Backoff(2, 5.0),
    Fault.STORAGE: Backoff(2, 5.0),
    Fault.DISK_FULL: Backoff(2, 30.0),
}
assert all((fault in RETRIES) is fault.is_infrastructure for fault in Fault)


def fault_of_error(error: Exception) -> Fault:
    """Returns the fault that a DeviceError stands for."""
    if isinstance(error, (HostKeyError, PythonMissingError, UnfitError)):
        return Fault.UNFIT
    if isinstance(error, DeviceBusyError):
        return Fault.BUSY
    if isinstance(error, LeaseLostError):
        return Fault.LEASE_LOST
    if isinstance(error, UnreachableError):
        return Fault.UNREACHABLE
    if isinstance(error, RemoteTimeoutError):
        return Fault.STALLED
    if isinstance(error, DiskFullError):
        return Fault.DISK_FULL
    return fault_of_words(str(error)) or Fault.COMMAND_FAILED


FAULT_OF_STATUS = {
    RunStatus.OK: None,
    RunStatus.FAILED: Fault.ENGINE,
    RunStatus.OUT_OF_MEMORY: Fault.OUT_OF_MEMORY,
    RunStatus.TIMED_OUT: Fault.TIMED_OUT,
    RunStatus.UNREACHABLE: Fault.LINK_LOST,
    RunStatus.SKIPPED: Fault.UNFIT,
}  # where nothing more is known
