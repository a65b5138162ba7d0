"""Fetches a device's host key, has a person accept it, and stores it in the farm's own known_hosts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from device_inventory import Device
from harness.device.kinds import kind_of
from harness.errors import HostKeyError, UsageError
from harness.transport import Keyring
from harness.transport.known_hosts import HostKey, KnownHosts


@dataclass(frozen=True)
class Trusted:
    """Holds a host key that is in the file now."""

    key: HostKey
    stored: bool  # False: it was there before


def trust(
    device: Device,
    known_hosts: Path,
    accept: Callable[[HostKey], bool],
    *,
    replace: bool = False,
    ssh_config: Path | None = None,
) -> tuple[Trusted, ...]:
    """Stores the keys of a device and, before it, of its jump hosts.

    `accept` is asked for each key that is not yet known; it shows `key.fingerprint` to a person. A changed key is
    replaced only with `replace`, and `accept` is asked then too. Raises HostKeyError, UnreachableError, and UsageError
    where the device has no host key.
    """
    presented = kind_of(device).trust
    if presented is None:
        raise UsageError(f"{device.name}: transport {device.transport!r} has no host key: there is nothing to trust")
    store = KnownHosts(known_hosts)
    trusted = []
    for key in presented(device, Keyring(known_hosts, ssh_config)):
        known = store.find(key.host)
        if key in known:
            trusted.append(Trusted(key, stored=False))
            continue
        if known and not replace:
            raise HostKeyError(
                f"{device.name}: the host key of {key.host} has CHANGED: {known_hosts} has {known[0].fingerprint}, "
                f"{key.fingerprint} was presented. If the device was set up anew: "
                f"`edgemoe-farm trust {device.name} --replace`"
            )
        if not accept(key):
            raise HostKeyError(f"{device.name}: the host key {key} was not accepted, nothing was stored")
        store.store(key)
        trusted.append(Trusted(key, stored=True))
    return tuple(trusted)
