"""Examines one device for `edgemoe-farm doctor`: connect, survey, deploy, self-test, look for waste."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from typing import Protocol

from device_inventory import Device
from engine.protocol import DeviceFacts
from harness.device.probe import KernelReport
from harness.doctor.device import Examined, examine
from harness.doctor.survey import Pruned, Survey
from harness.errors import (
    DeviceError,
    DiskFullError,
    HostKeyError,
    PythonMissingError,
    UnreachableError,
    of_one_device,
)
from harness.findings import Finding, Severity, parted
from reports.results.health import DeviceHealth, Health

UNUSED_DAYS = 30.0
MUCH_UNUSED_BYTES = 256 << 20
_CHECK_OF = ((HostKeyError, "host-key"), (UnreachableError, "reachable"), (PythonMissingError, "python"),
             (DiskFullError, "free-space"), (DeviceError, "engine"))  # fmt: skip


class Patient(Protocol):
    """Defines what an examination needs of a session."""

    facts: DeviceFacts

    def kernels(self) -> KernelReport: ...

    def selftest(self) -> None: ...

    def prune(self, *, days: float, dry: bool) -> Pruned: ...

    def close(self) -> None: ...


def examine_device(
    device: Device,
    open_session: Callable[[Callable[[str, Survey], None]], Patient],
    *,
    health: DeviceHealth,
    selftest: bool = True,
) -> list[Finding]:
    """Returns all that is found. `open_session` gets a gate that is shown the survey."""
    seen: list[Examined] = []
    findings = _of_health(device.name, health)
    try:
        with of_one_device(device.name):
            session = open_session(lambda root, survey: seen.append(Examined(device, root, survey)))
    except DeviceError as error:
        known = [finding for found in seen for finding in examine(found)]
        return findings + known + [_of_error(device.name, error)]
    with closing(session):
        found = Examined(device, seen[0].root, seen[0].survey, session.facts)
        findings += examine(found)
        try:
            with of_one_device(device.name):
                findings += _of_kernels(device.name, session.kernels())
                if selftest:
                    session.selftest()
                unused = session.prune(days=UNUSED_DAYS, dry=True)
        except DeviceError as error:
            return [*findings, _of_error(device.name, error)]
    size = sum(removed.bytes for removed in unused.removed)
    if size > MUCH_UNUSED_BYTES:
        what = f"{size / 1e6:.0f} MB of the farm's folder were not used for {UNUSED_DAYS:.0f} days"
        remedy = f"`edgemoe-farm devices prune {device.name}`"
        findings.append(Finding(device.name, "unused", Severity.NOTE, what, remedy))
    return findings


def _of_kernels(name: str, kernels: KernelReport) -> list[Finding]:
    if kernels.backend == "native":
        return []
    what = (
        f"native kernels do not engage, {kernels.backend} computes: {'; '.join(kernels.notes) or 'it does not say why'}"
    )
    remedy = "compare it with the devices that ci/build-kernels makes libraries for; a noexec disk forbids them, too"
    return [Finding(name, "kernels", Severity.WARNING, what, remedy)]


def _of_error(name: str, error: DeviceError) -> Finding:
    """Returns a finding from an error, whose message is `device: what is wrong: what helps`."""
    check = next(check for kind, check in _CHECK_OF if isinstance(error, kind))
    return Finding(name, check, Severity.ERROR, *parted(str(error).removeprefix(f"{name}: ")))


def _of_health(name: str, health: DeviceHealth) -> list[Finding]:
    again = f"`edgemoe-farm devices health {name} --good`"
    canary = f"`edgemoe-farm devices health {name} --canary`"
    if health.health is Health.MAINTENANCE:
        return [Finding(name, "health", Severity.WARNING, f"{health.reason} since {health.since[:16]}", again)]
    if health.health is Health.QUARANTINED:
        what = f"quarantined: its last {health.faults_in_a_row} attempts failed ({health.reason})"
        return [Finding(name, "health", Severity.WARNING, what, canary)]
    if health.health is Health.SUSPECT:
        what = f"{health.faults} of its last attempts failed of the infrastructure (the last: {health.reason})"
        return [Finding(name, "health", Severity.NOTE, what, "look at its power supply, network and storage")]
    return []
