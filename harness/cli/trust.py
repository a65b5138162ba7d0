"""`trust`: stores the host key of a device, once it was accepted."""

from __future__ import annotations

from pathlib import Path

import click

from harness.cli.options import (
    inventory_option,
    known_hosts_option,
    load_inventory,
)
from harness.device.trust import trust as trust_device
from harness.transport.known_hosts import HostKey


@click.command()
@click.argument("device")
@click.option("--yes", is_flag=True, help="Store the key without asking: only on a network that you trust.")
@click.option("--replace", is_flag=True, help="Replace a key that has changed, after the device was set up anew.")
@inventory_option
@known_hosts_option
def trust(device: str, yes: bool, replace: bool, inventory_path: Path, known_hosts: Path) -> None:
    """Show the host key of DEVICE and store it once accepted.

    No command of the farm talks to a device whose key is unknown or has changed. Compare the fingerprint with what
    `ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub` prints on the device itself.

    \b
    Example:
      edgemoe-farm trust pi5
    """

    def accept(key: HostKey) -> bool:
        click.echo(f"{device}: {key.whose}, {key.host}, has the {key.kind} key {key.fingerprint}")
        return yes or click.confirm(f"Is this the key of {key.whose}?", default=False)

    for trusted in trust_device(load_inventory(inventory_path)[device], known_hosts, accept, replace=replace):
        state = "is trusted now" if trusted.stored else "was trusted before"
        click.echo(f"{device}: {trusted.key.host} {trusted.key.fingerprint} {state} ({known_hosts})")
