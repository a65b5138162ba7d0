"""`devices`: lists the devices that the inventory declares; its commands keep them in use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from rich.console import Console
from rich.table import Table

from engine.codec import to_json
from harness.cli.devices_health import health, health_in_words, known_health, prune
from harness.cli.devices_locks import locks, unlock
from harness.cli.options import (
    inventory_option,
    json_option,
    load_inventory,
    print_json,
    results_option,
)
from harness.device.kinds import kind_of
from harness.errors import UsageError
from reports.results.health import DeviceHealth, Health


@click.group(invoke_without_command=True)
@inventory_option
@results_option
@json_option
@click.pass_context
def devices(context: click.Context, inventory_path: Path, results_place: str, as_json: bool) -> None:
    """List the devices of the inventory, each with its health.

    The commands show who holds a device, take one back, change its health and free its disk.

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


def _health(state: DeviceHealth) -> dict[str, Any]:
    return {"health": state.health, "health_reason": state.reason, "health_since": state.since}


for _command in (health, locks, prune, unlock):
    devices.add_command(_command)
