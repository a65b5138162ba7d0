"""`devices health` and `devices prune`: keep devices in use."""

from __future__ import annotations

import dataclasses
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import click

from device_inventory import Device
from harness.cli.options import (
    inventory_option,
    json_option,
    known_hosts_option,
    load_inventory,
    offline_option,
    open_results,
    print_json,
    results_option,
)
from harness.device.deploy import cache_folder
from harness.device.opening import open_session, prune_device
from harness.doctor.survey import Pruned
from harness.errors import DeviceBusyError, DeviceError, UsageError, of_one_device
from harness.sweep.health import HealthBook
from reports.errors import ReportError
from reports.results.health import DeviceHealth, Mark
from reports.text import harmless

_WORDS = {"engines": "engine", "sites": "numpy", "blobs": "container or profile", "runs": "run"}


@click.command()
@click.argument("name", metavar="DEVICE")
@click.option("--maintenance", is_flag=True, help="Measure nothing on it, in any sweep, until --good.")
@click.option("--good", is_flag=True, help="Use it again, and forgive what was before.")
@click.option("--canary", is_flag=True, help="Run the engine's self-test there: if that holds, quarantine ends.")
@click.option("--note", default="", metavar="TEXT", help="Why; shown wherever the device is left out.")
@offline_option
@inventory_option
@results_option
@known_hosts_option
@json_option
def health(
    name: str,
    maintenance: bool,
    good: bool,
    canary: bool,
    note: str,
    offline: bool,
    inventory_path: Path,
    results_place: str,
    known_hosts: Path,
    as_json: bool,
) -> None:
    """Show the health of DEVICE, or say what it is.

    It follows from the last attempts at measuring on it: suspect when one failed of the infrastructure, quarantined
    when the last three did. A run begins with a canary on a quarantined device, and measures where that succeeds.

    \b
    Examples:
      edgemoe-farm devices health pi5
      edgemoe-farm devices health pi5 --maintenance --note "new SD card"
      edgemoe-farm devices health pi5 --good
      edgemoe-farm devices health pi5 --canary
    """
    if maintenance + good + canary > 1:
        raise UsageError("devices health: give one of --maintenance, --good and --canary")
    device = load_inventory(inventory_path)[name]
    failure = None
    if maintenance or good or canary:
        with open_results(results_place, create=True) as database:
            book = HealthBook(database)
            if canary:
                failure = _canary_failure(device, known_hosts, offline)
                book.note(name, Mark.CANARY_FAILED if failure else Mark.CANARY_OK, str(failure or note))
            else:
                book.note(name, Mark.MAINTENANCE if maintenance else Mark.GOOD, note)
    state = known_health(results_place, [device])[name]
    if as_json:
        print_json({"device": name, **dataclasses.asdict(state)})
    else:
        click.echo(f"{name}: {health_in_words(state)}")
    if failure is not None:
        raise failure


def known_health(place: str, devices: list[Device]) -> dict[str, DeviceHealth]:
    """Returns the health of each device; all are good where there are no results yet."""
    try:
        with open_results(place) as database:
            return {device.name: database.health(device.name) for device in devices}
    except ReportError:
        return {device.name: DeviceHealth() for device in devices}


def health_in_words(state: DeviceHealth) -> str:
    since = f" (since {state.since[:16].replace('T', ' ')} UTC)" if state.since else ""
    return f"{state.health.value}{since}{': ' if state.reason else ''}{harmless(state.reason)}"


def _canary_failure(device: Device, known_hosts: Path, offline: bool) -> DeviceError | None:
    """Runs the canary; returns what failed, or None. Raises DeviceBusyError, which says nothing about the device."""
    try:
        with of_one_device(device.name):
            opener = partial(open_session, device, known_hosts=known_hosts, cache_dir=cache_folder(), offline=offline)
            with closing(opener(wait_s=0.0)) as session:
                session.selftest()
    except DeviceBusyError:
        raise
    except DeviceError as error:
        return error
    return None


@click.command()
@click.argument("names", metavar="DEVICE...", nargs=-1, required=True)
@click.option(
    "--days",
    default=30.0,
    show_default=True,
    help="Remove what nobody used for so long; 0: everything. What a run may be using stays for a day.",
)
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@inventory_option
@known_hosts_option
@json_option
def prune(
    names: tuple[str, ...], days: float, dry_run: bool, inventory_path: Path, known_hosts: Path, as_json: bool
) -> None:
    """Remove from each DEVICE what nobody used of late.

    This frees its disk of the farm's engines, containers and runs. What is removed is sent again when it is needed.
    Runs that are alive stay, and nothing outside the farm's own folder is touched.

    \b
    Examples:
      edgemoe-farm devices prune pi5 --dry-run
      edgemoe-farm devices prune pi5 --days 7
    """
    if not 0 <= days < 1e5:
        raise UsageError("devices prune: --days must be between 0 and 100000")
    inventory = load_inventory(inventory_path)
    answers: list[dict[str, Any]] = []
    failures: list[DeviceError] = []
    for device in [inventory[name] for name in names]:
        try:
            with of_one_device(device.name):
                pruned = prune_device(device, known_hosts=known_hosts, days=days, dry=dry_run)
        except DeviceError as error:
            failures.append(error)
            continue
        answers.append({"device": device.name, "dry_run": dry_run, **dataclasses.asdict(pruned)})
        if not as_json:
            _show(device.name, pruned, dry_run)
    if as_json:
        print_json(answers)
    for failure in failures[:-1]:
        click.echo(f"edgemoe-farm: error: {harmless(failure)}", err=True)
    if failures:
        raise failures[-1]


def _show(name: str, pruned: Pruned, dry_run: bool) -> None:
    for removed in pruned.removed:
        click.echo(
            f"  {_WORDS.get(removed.kind, removed.kind)} {harmless(removed.name)[:24]}, {removed.bytes / 1e6:.1f} MB"
        )
    size, left = sum(removed.bytes for removed in pruned.removed), sum(pruned.left_bytes.values())
    does = "would be removed" if dry_run else "removed"
    click.echo(f"{name}: {size / 1e6:.1f} MB {does}, the farm's folder there holds {left / 1e6:.1f} MB")
