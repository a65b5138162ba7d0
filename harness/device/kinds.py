"""Lists the ways to reach devices: another one is a file that describes itself, and a row here."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from device_inventory import Device
from harness.errors import UsageError
from harness.scripted.wire import SCRIPTED
from harness.transport import TransportKind
from harness.transport.ssh import SSH

TRANSPORTS: dict[str, TransportKind] = {
    "ssh": SSH,
    "scripted": SCRIPTED,
}


def kind_of(device: Device) -> TransportKind:
    """Returns the row of the device's transport. Raises UsageError where the inventory does not fit it."""
    name = device.transport
    if name not in TRANSPORTS:
        raise UsageError(f"{device.name}: unknown transport {name!r}{_meant(name, TRANSPORTS)}")
    kind = TRANSPORTS[name]
    for key, value in device.options.items():
        if key not in kind.options:
            raise UsageError(f"{device.name}: transport {name!r} has no option {key!r}{_meant(key, kind.options)}")
        if type(value) is not kind.options[key]:
            wanted = kind.options[key].__name__
            raise UsageError(f"{device.name}: option {key!r} of transport {name!r} must be of type {wanted}")
    for key in kind.required:
        if key not in device.options:
            where = f"[devices.{device.name}.{name}]"
            raise UsageError(f"{device.name}: transport {name!r} needs the option {key!r}: write it under {where}")
    return kind


def by_kind(devices: Iterable[Device]) -> dict[str, list[Device]]:
    """Returns the devices under the names of their transports."""
    found: dict[str, list[Device]] = {}
    for device in devices:
        found.setdefault(device.transport, []).append(device)
    return found


def _meant(word: str, known: Iterable[str]) -> str:
    names = sorted(known)
    near = difflib.get_close_matches(word, names, n=1)
    return f", did you mean {near[0]!r}?" if near else f" (known: {', '.join(names) or 'none'})"
