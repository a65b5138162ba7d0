"""`probe`: connects to devices and shows what they say of themselves."""

from __future__ import annotations

import concurrent.futures
from contextlib import closing
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from device_inventory import Device
from engine.codec import to_json
from harness.cli.options import (
    inventory_option,
    json_option,
    known_hosts_option,
    load_inventory,
    offline_option,
    print_json,
)
from harness.device.deploy import cache_folder
from harness.device.opening import open_session
from harness.errors import DeviceError, of_one_device
from reports.text import harmless

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


@click.command()
@click.argument("names", metavar="DEVICE...", nargs=-1)
@offline_option
@inventory_option
@known_hosts_option
@json_option
def probe(names: tuple[str, ...], offline: bool, inventory_path: Path, known_hosts: Path, as_json: bool) -> None:
    """Show what each DEVICE says of itself.

    Connects to each device, by default to all, and deploys the engine. Exit code 4 when a device cannot be used; the
    others are shown all the same.

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
        with of_one_device(device.name):
            session = open_session(device, known_hosts=known_hosts, cache_dir=cache_folder(), offline=offline)
            with closing(session):
                return {**answer, "facts": to_json(session.facts)}
    except DeviceError as error:
        return {**answer, "error": str(error)}


def _show(answers: list[dict[str, Any]]) -> None:
    console = Console(highlight=False, markup=False)
    for answer in answers:
        console.print(harmless(answer["device"]), style="bold")
        if answer["error"]:
            console.print(f"  {harmless(answer['error'])}", style="red")
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
    """Returns a fact for people: None is unknown, a list is its entries, an object its values."""
    if value is None or value == [] or value == {}:
        return "unknown" if value is None else "none"
    if isinstance(value, dict):
        value = " ".join(f"{name} {_words(part)}" for name, part in value.items())
    elif isinstance(value, list):
        value = ", ".join(_words(part) for part in value)
    return harmless(value)
