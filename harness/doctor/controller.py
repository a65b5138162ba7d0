"""The checks of the machine that drives the farm."""

from __future__ import annotations

import importlib.util
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from device_inventory import Device
from harness.device.deploy import ENGINE_SOURCE
from harness.doctor import CONTROLLER, Finding, Severity
from reports.errors import ReportError
from reports.results.database import ResultsDatabase

LITTLE_FREE_BYTES = 1 << 30

Told = tuple[Severity, str, str]


@dataclass(frozen=True)
class Controller:
    """Where this machine keeps what it needs."""

    known_hosts: Path
    results: str  # file or URL
    cache: Path
    devices: tuple[Device, ...]


def examine(controller: Controller) -> list[Finding]:
    return [
        Finding(CONTROLLER, name, severity, finding, remedy)
        for name, check in CHECKS.items()
        for severity, finding, remedy in check(controller)
    ]


def _known_hosts(controller: Controller) -> Iterator[Told]:
    path = controller.known_hosts
    if not path.exists():
        names = controller.devices[0].name if controller.devices else "DEVICE"
        yield Severity.WARNING, f"{path} is not there: no device is trusted yet", f"`edgemoe-farm trust {names}`"
        return
    if not os.access(path, os.R_OK):
        yield Severity.ERROR, f"{path} cannot be read", f"`sudo chown $USER {path}`"
        return
    for place in (path, path.parent):
        if stat.S_IMODE(place.stat().st_mode) & 0o022:
            finding = f"{place} can be written by others: they could make you trust their machine"
            yield Severity.ERROR, finding, f"`chmod go-w {place}`"


def _keys(controller: Controller) -> Iterator[Told]:
    for name in sorted({device.identity_file for device in controller.devices if device.identity_file}):
        path = Path(name).expanduser()
        if not path.is_file():
            remedy = "correct identity_file in the inventory, or make one with `ssh-keygen -t ed25519`"
            yield Severity.ERROR, f"the key {path} is not there", remedy
        elif not os.access(path, os.R_OK):
            yield Severity.ERROR, f"the key {path} cannot be read", f"`sudo chown $USER {path}`"
        elif stat.S_IMODE(path.stat().st_mode) & 0o077:
            yield Severity.WARNING, f"the key {path} can be read by others: ssh refuses it", f"`chmod 600 {path}`"


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
        finding, _, remedy = str(error).rpartition(": ")
        yield Severity.ERROR, finding or remedy, remedy
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
    "known-hosts": _known_hosts,
    "keys": _keys,
    "results": _results,
    "free-space": _free_space,
    "engine": _engine,
    "pip": _pip,
}
