"""Defines what the scheduler asks of one device in use, with its engine deployed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from engine.protocol import ArithmeticTimes, DeviceFacts, Load, RunRequest, Sample, StorageRates, Totals
from harness.device.deploy import EngineBundle
from reports.records import Conditions, Fault, RunStatus


@dataclass(frozen=True)
class Outcome:
    """Holds what came back from one engine process."""

    status: RunStatus
    reasons: tuple[str, ...]
    fault: Fault | None = None  # None: what the status says
    facts: DeviceFacts | None = None
    load: Load | None = None
    samples: tuple[Sample, ...] = ()
    totals: Totals | None = None
    conditions: Conditions | None = None
    command: str = ""
    log_tail: str = ""


class Session(Protocol):
    """Separates a device from the scheduler: harness/sweep/runner.py knows nothing else of a device."""

    facts: DeviceFacts
    engine_sha256: str

    @property
    def bytes_sent(self) -> int:
        """Returns the payload so far: engine, containers, profiles. 0 where the device had them all."""
        ...

    def hold(self, waiting: Callable[[str], None] = ..., tick: Callable[[], None] = ...) -> int:
        """Makes sure that this controller alone measures there, and waits for that; returns the fencing token.

        `waiting` hears what is waited for; `tick` is called about once a second meanwhile, and an exception from it
        ends that. Raises DeviceBusyError, UnreachableError.
        """
        ...

    def put(self, source: Path, *, sha256: str | None = None, progress: Callable[[int], None] | None = None) -> str:
        """Deploys a container or profile by content hash; returns its path on the device.

        `sha256`: the hash that was planned, which both ends must find. Raises DeviceError, UsageError.
        """
        ...

    def damage(self, *, thorough: bool) -> str | None:
        """Looks whether the device still has what was sent, and mends it; returns what was wrong, or None.

        `thorough` reads all of the containers again. Raises DeviceError where it cannot be told or mended.
        """
        ...

    def use(self, bundle: EngineBundle) -> None:
        """Deploys another engine by content hash: it is the one that runs from now on. Raises DeviceError."""
        ...

    def deployed(self, source: Path) -> str | None:
        """Returns the path on the device of a container or profile that is there, else None; sends nothing."""
        ...

    def arithmetic(self, container: str, *, backend: str, threads: int) -> ArithmeticTimes:
        """Returns how long a token of `container`, a path on the device, takes there. Raises DeviceError."""
        ...

    def storage(self, container: str) -> StorageRates:
        """Returns how fast `container`, a path on the device, is read there, measured lately. Raises DeviceError."""
        ...

    def execute(
        self,
        request: RunRequest,
        *,
        on_event: Callable[[str, dict[str, Any]], None] | None = None,
        keep: bool = False,
    ) -> Outcome:
        """Runs the engine detached, follows it across lost links, collects it. Never raises for a device's failure.

        `keep`: what the run left stays on the device until `forget`, so that a controller that dies before it has
        stored the outcome finds it there again.
        """
        ...

    def forget(self, run_id: str) -> None:
        """Removes what a run left on the device, and ends what still runs of it: its outcome is stored."""
        ...

    def selftest(self) -> None:
        """Runs the engine's own self-test on the device, as a canary. Raises DeviceError where it does not hold."""
        ...

    def cancel(self) -> None:
        """Kills the engine in flight on the device, from another thread; `execute` then returns soon (failed)."""
        ...

    def close(self) -> None: ...
