"""Defines every error that the controller raises on purpose; harness/cli catches them and prints one line.

FarmError                 names the device, file or key and the remedy            exit code
├── UsageError            a matrix, inventory, checkpoint or argument is wrong    2
├── TakenOverError        another controller measures the sweep now               1
├── InfrastructureError   the farm failed where an exit code of 1 says something else  4
├── LockedError           another nightly run of the configuration is at work     4
└── DeviceError           infrastructure: a device cannot be used                 4
    ├── UnreachableError  no connection, or lost and not regained in time
    │   └── LeaseLostError  so long that another controller has taken the device
    ├── DeviceBusyError   another controller holds the device's lease
    ├── HostKeyError      the host key is unknown or has changed
    ├── RemoteCommandError  a command on the device failed
    ├── RemoteTimeoutError  a command on the device did not end within its deadline
    ├── DiskFullError     not enough space on the device
    ├── PythonMissingError  no python3 >= 3.8 with numpy on the device
    └── UnfitError        a check of the device failed: see `edgemoe-farm doctor`

Whatever nobody foresaw becomes one of these where one device ends and the others begin: see `of_one_device`.
A device's failure during a run is a record (reports.records.Run), not an exception that ends the run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class FarmError(Exception):
    exit_code = 1


class UsageError(FarmError):
    exit_code = 2


class TakenOverError(FarmError):
    pass


class InfrastructureError(FarmError):
    exit_code = 4


class LockedError(FarmError):
    exit_code = 4


class DeviceError(FarmError):
    exit_code = 4


class UnreachableError(DeviceError):
    pass


class LeaseLostError(UnreachableError):
    pass


class DeviceBusyError(DeviceError):
    pass


class HostKeyError(DeviceError):
    pass


class RemoteCommandError(DeviceError):
    pass


class RemoteTimeoutError(DeviceError):
    pass


class DiskFullError(DeviceError):
    pass


class PythonMissingError(DeviceError):
    """Names in `bare` a Python that would do if it had numpy."""

    def __init__(self, message: str, bare: str | None = None) -> None:
        super().__init__(message)
        self.bare = bare


class UnfitError(DeviceError):
    pass


@contextmanager
def of_one_device(name: str, kind: type[DeviceError] = DeviceError) -> Iterator[None]:
    """Turns what nobody foresaw into an error of `kind` of the device `name`, so that the other devices go on.

    What was raised on purpose passes. The traceback is kept as the cause, for --debug.
    """
    try:
        yield
    except FarmError:
        raise
    except Exception as error:
        raise kind(f"{name}: {unforeseen(error)}") from error


def unforeseen(error: BaseException) -> str:
    """Returns what to say of an error that nobody foresaw: its type, its message and the remedy, in one line."""
    told = " ".join(str(error).split())[:300]
    return f"the farm itself failed of {type(error).__name__}{f' ({told})' if told else ''}: report it"
