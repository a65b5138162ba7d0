"""Checks the machine that drives the farm."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from device_inventory import Device
from harness.device.deploy import ENGINE_SOURCE
from harness.device.kinds import TRANSPORTS, by_kind
from harness.errors import unforeseen
from harness.findings import CONTROLLER, Finding, Severity, Told, parted
from harness.transport import Keyring
from reports.errors import ReportError
from reports.results.database import ResultsDatabase

LITTLE_FREE_BYTES = 1 << 30


@dataclass(frozen=True)
class Controller:
    """Says where this machine keeps what it needs."""

    known_hosts: Path
    results: str  # file or URL
    cache: Path
    devices: tuple[Device, ...]


def examine(controller: Controller) -> list[Finding]:
    """Returns all that the checks find, those of the devices' transports first."""
    keyring = Keyring(controller.known_hosts)
    told = [
        (name, found)
        for kind, devices in by_kind(controller.devices).items()
        for name, check in TRANSPORTS[kind].checks.items()
        for found in _found(partial(check, keyring, devices))
    ]
    told += [(name, found) for name, check in CHECKS.items() for found in _found(partial(check, controller))]
    return [Finding(CONTROLLER, name, *found) for name, found in told]


def _found(check: Callable[[], Iterator[Told]]) -> list[Told]:
    """Returns what a check finds. One that fails itself is a finding, and the others are made all the same."""
    found: list[Told] = []
    try:
        found.extend(check())
    except Exception as error:  # noqa: BLE001 - a check is a boundary
        finding, remedy = parted(unforeseen(error))
        found.append((Severity.ERROR, f"this check could not be made: {finding}", remedy))
    return found


def _results(controller: Controller) -> Iterator[Told]:
    place = controller.results
    is_file = "://" not in place
    if is_file and not Path(place).exists():
        folder = next(parent for parent in Path(place).absolute().parents if parent.exists())
        if not os.access(folder, os.W_OK):
            yield Severity.ERROR, f"the results database {place} cannot be made in {folder}", "name another: --results"
        return
    try:
        with ResultsDatabase.open(place, create=False):
            pass
    except ReportError as error:
        yield Severity.ERROR, *parted(str(error))
        return
    if is_file and not (os.access(place, os.W_OK) and os.access(Path(place).absolute().parent, os.W_OK)):
        yield Severity.ERROR, f"the results database {place} cannot be written", f"`sudo chown $USER {place}`"


def _free_space(controller: Controller) -> Iterator[Told]:
    places = [controller.cache] + ([Path(controller.results)] if "://" not in controller.results else [])
    for place in dict.fromkeys(places):
        folder = next(p for p in (place.absolute(), *place.absolute().parents) if p.is_dir())
        free = shutil.disk_usage(folder).free
        if free < LITTLE_FREE_BYTES:
            finding = f"the disk of {folder} has {free / 1e6:.0f} MB free: a sweep ends when no record can be stored"
            yield Severity.WARNING, finding, "free some space, or name another place: --results, XDG_CACHE_HOME"
        if not os.access(folder, os.W_OK):
            yield Severity.ERROR, f"{folder} cannot be written", f"`sudo chown $USER {folder}`"


def _engine(controller: Controller) -> Iterator[Told]:
    if not list((ENGINE_SOURCE / "kernels" / "lib").glob("*.so")):
        finding = f"{ENGINE_SOURCE} holds no native kernels: every device computes with numpy, slower"
        yield Severity.WARNING, finding, "`ci/build-kernels`, or install the farm anew"


def _pip(controller: Controller) -> Iterator[Told]:
    if importlib.util.find_spec("pip") is None and any(device.bootstrap for device in controller.devices):
        finding = "this Python has no pip: numpy cannot be fetched for a device that lacks it"
        yield Severity.NOTE, finding, "`python3 -m ensurepip`"


CHECKS: dict[str, Callable[[Controller], Iterator[Told]]] = {
    "results": _results,
    "free-space": _free_space,
    "engine": _engine,
    "pip": _pip,
}
