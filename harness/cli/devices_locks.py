"""`devices locks`, `devices unlock`: show who measures on which device, and take one back."""

from __future__ import annotations

import concurrent.futures
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from device_inventory import Device
from harness.cli.options import inventory_option, json_option, known_hosts_option, load_inventory, print_json
from harness.device.lease import LeaseState
from harness.device.opening import open_lease
from harness.errors import DeviceBusyError, DeviceError, of_one_device
from reports.text import harmless

_MAX_AT_ONCE = 32
_COLUMNS = ("device", "state", "holder", "sweep", "token", "since", "sign of life", "expires in", "queue")


@click.command()
@click.argument("names", metavar="[DEVICE]...", nargs=-1)
@inventory_option
@known_hosts_option
@json_option
def locks(names: tuple[str, ...], inventory_path: Path, known_hosts: Path, as_json: bool) -> None:
    """Show who holds each DEVICE, since when, and who waits.

    By default all devices are asked.

    The lease of a controller that was killed expires by itself three minutes after its last sign of life. Exit code 4
    when a device cannot be asked; the others are shown all the same.

    \b
    Examples:
      edgemoe-farm devices locks
      edgemoe-farm devices locks pi5 --json
    """
    inventory = load_inventory(inventory_path)
    chosen = [inventory[name] for name in names] or list(inventory.devices.values())
    with concurrent.futures.ThreadPoolExecutor(min(len(chosen), _MAX_AT_ONCE) or 1) as pool:
        answers = list(pool.map(lambda device: _look(device, known_hosts), chosen))
    if as_json:
        print_json(answers)
    else:
        _show(answers)
    failed = [answer["device"] for answer in answers if answer["error"]]
    if failed:
        raise DeviceError(f"{len(failed)} of {len(answers)} devices cannot be asked: {', '.join(failed)}")


@click.command()
@click.argument("name", metavar="DEVICE")
@click.option("--yes", is_flag=True, help="Do not ask, even if its holder gave a sign of life a moment ago.")
@inventory_option
@known_hosts_option
def unlock(name: str, yes: bool, inventory_path: Path, known_hosts: Path) -> None:
    """Take the lease of DEVICE away from whoever holds it.

    Whoever is next in the queue gets it. Its engine is ended by the next holder, before that one measures; a former
    holder that is alive after all starts nothing any more under the old lease, records the run in flight as
    unreachable, and queues up again.

    \b
    Example:
      edgemoe-farm devices unlock pi5
    """
    device = load_inventory(inventory_path)[name]
    with open_lease(device, known_hosts=known_hosts) as lease:
        seen = lease.look()
        if seen.owner is None:
            click.echo(f"{name}: is free, there is nothing to unlock")
            return
        click.echo(f"{name}: {seen.state}, {seen.owner}, last sign of life {_age(seen.heartbeat_age_s)} ago")
        if seen.state == "held" and not yes and not _confirmed("Its run in flight will be lost. Take it away?"):
            raise DeviceBusyError(f"{name}: left to {seen.owner}; --yes takes it away without a question")
        after = lease.unlock(seen.token)
        if after.token == seen.token or after.holder == seen.holder:
            raise DeviceBusyError(f"{name}: could not be unlocked: look again")
        then = f"{after.owner or after.queue[0].owner} is next" if after.owner or after.queue else "free now"
        click.echo(f"{name}: unlocked, {then}")


def _confirmed(question: str) -> bool:
    try:
        return click.confirm(question, default=False)
    except click.Abort:  # nobody is there to answer
        return False


def _look(device: Device, known_hosts: Path) -> dict[str, Any]:
    answer: dict[str, Any] = dict.fromkeys(
        ("state", "holder", "sweep", "token", "since_s", "heartbeat_age_s", "expires_in_s")
    )
    try:
        with of_one_device(device.name), open_lease(device, known_hosts=known_hosts) as lease:
            answer |= _plain(lease.look())
    except DeviceError as error:
        return {"device": device.name, **answer, "queue": [], "error": str(error)}
    return {"device": device.name, **answer, "error": None}


def _plain(seen: LeaseState) -> dict[str, Any]:
    owner = seen.owner
    return {
        "state": seen.state,
        "holder": owner.who if owner else None,
        "sweep": (owner.sweep or None) if owner else None,
        "token": seen.token,
        "since_s": seen.since_s,
        "heartbeat_age_s": seen.heartbeat_age_s,
        "expires_in_s": seen.expires_in_s,
        "queue": [{"who": w.owner.who, "sweep": w.owner.sweep or None, "since_s": w.since_s} for w in seen.queue],
    }


def _show(answers: list[dict[str, Any]]) -> None:
    table = Table(*_COLUMNS, box=None, pad_edge=False)
    for answer in answers:
        held = answer["holder"] is not None
        waiting = [f"{place}. {waiter['who']}" for place, waiter in enumerate(answer["queue"], 1)]
        cells = (
            answer["device"],
            answer["error"] or answer["state"],
            answer["holder"] or "",
            answer["sweep"] or "",
            "" if answer["token"] is None else answer["token"],
            _age(answer["since_s"]) if held else "",
            f"{_age(answer['heartbeat_age_s'])} ago" if held else "",
            _age(answer["expires_in_s"]) if answer["state"] == "held" else "",
            "  ".join(waiting),
        )
        table.add_row(*(harmless(cell) for cell in cells))
    Console(highlight=False, markup=False).print(table)


def _age(seconds: float | None) -> str:
    if seconds is None:
        return "long"
    for size, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {name}"
    return f"{seconds:.0f} s"
