"""Checks the files on the controller that SSH needs: the farm's known_hosts and the devices' private keys."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from device_inventory import Device
from harness.findings import Severity, Told
from harness.transport import Keyring


def check_known_hosts(keyring: Keyring, devices: Sequence[Device]) -> Iterator[Told]:
    path = keyring.known_hosts
    if not path.exists():
        yield (
            Severity.WARNING,
            f"{path} is not there: no device is trusted yet",
            f"`edgemoe-farm trust {devices[0].name}`",
        )
        return
    if not os.access(path, os.R_OK):
        yield Severity.ERROR, f"{path} cannot be read", f"`sudo chown $USER {path}`"
        return
    for place in (path, path.parent):
        if stat.S_IMODE(place.stat().st_mode) & 0o022:
            finding = f"{place} can be written by others: they could make you trust their machine"
            yield Severity.ERROR, finding, f"`chmod go-w {place}`"


def check_keys(keyring: Keyring, devices: Sequence[Device]) -> Iterator[Told]:
    for name in sorted({device.identity_file for device in devices if device.identity_file}):
        path = Path(name).expanduser()
        if not path.is_file():
            remedy = "correct identity_file in the inventory, or make one with `ssh-keygen -t ed25519`"
            yield Severity.ERROR, f"the key {path} is not there", remedy
        elif not os.access(path, os.R_OK):
            yield Severity.ERROR, f"the key {path} cannot be read", f"`sudo chown $USER {path}`"
        elif stat.S_IMODE(path.stat().st_mode) & 0o077:
            yield Severity.WARNING, f"the key {path} can be read by others: ssh refuses it", f"`chmod 600 {path}`"
