"""`devices` with its locks, `trust`, `probe`: which devices there are, and whether they can be used."""

from __future__ import annotations

import concurrent.futures
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from rich.console import Console
from rich.table import Table

from device_inventory import Device
from engine.codec import to_json
from harness.cli.devices_health import health, health_in_words, known_health, prune
from harness.cli.devices_locks import locks, unlock
from harness.cli.options import (
    inventory_option,
    json_option,
    known_hosts_option,
    load_inventory,
    offline_option,
    print_json,
    printable,
    results_option,
)
from harness.device.deploy import cache_folder
from harness.device.kinds import kind_of
from harness.device.opening import open_session
from harness.device.trust import trust as trust_device
from harness.errors import DeviceError, UsageError
from harness.transport.known_hosts import HostKey
from reports.results.health import DeviceHealth, Health

_MAX_PROBES_AT_ONCE = 32
# What watching tells of a run, and not of a moment.
_OF_A_RUN = (
    "readings",
    "period_s",
    "watched_s",
    "cpu_s",
    "waited_s",
    "unsettled",
    "energy_j",
    "governor_after",
    "power_after",
)


@click.group(invoke_without_command=True)
@inventory_option
@results_option
@json_option
@click.pass_context
def devices(context: click.Context, inventory_path: Path, results_place: str, as_json: bool) -> None:
    """List the devices that the inventory declares, each with its health; or see who holds them, and take one back.

    \b
    Examples:
      edgemoe-farm devices
      edgemoe-farm devices --json --inventory lab.toml
      edgemoe-farm devices locks
      edgemoe-farm devices unlock pi5
    """
    if context.invoked_subcommand is not None:
        given = [n for n in context.params if context.get_parameter_source(n) is ParameterSource.COMMANDLINE]
        if given:  # they would be ignored, and the command's own defaults taken instead
            raise UsageError(f"devices: give options after `{context.invoked_subcommand}`")
        return
    declared = list(load_inventory(inventory_path).devices.values())
    known = known_health(results_place, declared)
    if as_json:
        print_json([{**to_json(device), **_health(known[device.name])} for device in declared])
        return
    table = Table("device", "health", "address", "tags", "emulated", box=None, pad_edge=False)
    for device in declared:
        rate = device.emulated_read_bytes_per_s
        table.add_row(
            device.name,
            known[device.name].health.value,
            kind_of(device).address(device),
            " ".join(device.tags),
            "" if rate is None else f"storage {rate / 1e6:g} MB/s",
        )
    Console(highlight=False, markup=False).print(table)
    for name, state in known.items():
        if state.health is not Health.GOOD:
            click.echo(f"{name}: {health_in_words(state)}")


devices.add_command(health)
devices.add_command(prune)


def _health(state: DeviceHealth) -> dict[str, Any]:
    return {"health": state.health, "health_reason": state.reason, "health_since": state.since}


devices.add_command(locks)
devices.add_command(unlock)


@click.command()
@click.argument("device")
@click.option("--yes", is_flag=True, help="Store the key without asking: only on a network that you trust.")
@click.option("--replace", is_flag=True, help="Replace a key that has changed, after the device was set up anew.")
@inventory_option
@known_hosts_option
def trust(device: str, yes: bool, replace: bool, inventory_path: Path, known_hosts: Path) -> None:
    """Show the host key of DEVICE and store it, once it was accepted.

    No command of the farm talks to a device whose key is unknown or has changed. Compare the fingerprint with what
    `ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub` prints on the device itself.

    \b
    Example:
      edgemoe-farm trust pi5
    """

    def accept(key: HostKey) -> bool:
        click.echo(f"{device}: {key.host} has the {key.kind} key {key.fingerprint}")
        return yes or click.confirm("Is this the key of the device?", default=False)

    for trusted in trust_device(load_inventory(inventory_path)[device], known_hosts, accept, replace=replace):
        state = "is trusted now" if trusted.stored else "was trusted before"
        click.echo(f"{device}: {trusted.key.host} {trusted.key.fingerprint} {state} ({known_hosts})")


@click.command()
@click.argument("names", metavar="DEVICE...", nargs=-1)
@offline_option
@inventory_option
@known_hosts_option
@json_option
def probe(names: tuple[str, ...], offline: bool, inventory_path: Path, known_hosts: Path, as_json: bool) -> None:
    """Connect to each DEVICE (default: all), deploy the engine, and show what the device says of itself.

    Exit code 4 when a device cannot be used; the others are shown all the same.

    \b
    Examples:
      edgemoe-farm probe pi5 phone
      edgemoe-farm probe --json
    """
    inventory = load_inventory(inventory_path)
    chosen = [inventory[name] for name in names] or list(inventory.devices.values())
    with concurrent.futures.ThreadPoolExecutor(min(len(chosen), _MAX_PROBES_AT_ONCE) or 1) as pool:
        answers = list(pool.map(lambda device: _probe(device, known_hosts, offline), chosen))
    if as_json:
        print_json(answers)
    else:
        _show(answers)
    failed = [answer["device"] for answer in answers if answer["error"]]
    if failed:
        raise DeviceError(f"{len(failed)} of {len(answers)} devices cannot be used: {', '.join(failed)}")


def _probe(device: Device, known_hosts: Path, offline: bool) -> dict[str, Any]:
    answer: dict[str, Any] = {"device": device.name, "facts": None, "error": None}
    try:
        session = open_session(device, known_hosts=known_hosts, cache_dir=cache_folder(), offline=offline)
    except DeviceError as error:
        return {**answer, "error": str(error)}
    try:
        return {**answer, "facts": to_json(session.facts)}
    finally:
        session.close()


def _show(answers: list[dict[str, Any]]) -> None:
    console = Console(highlight=False, markup=False)
    for answer in answers:
        console.print(printable(answer["device"]), style="bold")
        if answer["error"]:
            console.print(f"  {printable(answer['error'])}", style="red")
            continue
        facts = dict(answer["facts"])
        now = facts.pop("now", None) or {}
        for name, value in facts.items():
            console.print(f"  {name:<23} {_words(value)}")
        console.print("  now")
        for name, value in now.items():
            if name not in _OF_A_RUN:
                console.print(f"    {name:<21} {_words(value['before'] if isinstance(value, dict) else value)}")


def _words(value: Any) -> str:
    """A fact for people: nothing is unknown, a list is its entries, an object its values."""
    if value is None or value == [] or value == {}:
        return "unknown" if value is None else "none"
    if isinstance(value, dict):
        value = " ".join(f"{name} {_words(part)}" for name, part in value.items())
    elif isinstance(value, list):
        value = ", ".join(_words(part) for part in value)
    return printable(value)
