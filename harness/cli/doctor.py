"""`doctor`: what is wrong, each finding with the line that fixes it."""

from __future__ import annotations

import concurrent.futures
from collections import Counter
from functools import partial
from pathlib import Path

import click
from rich.console import Console

from device_inventory import Device
from harness.cli.devices_health import known_health
from harness.cli.options import (
    inventory_option,
    json_option,
    known_hosts_option,
    load_inventory,
    offline_option,
    print_json,
    printable,
    results_option,
    to_terminal,
)
from harness.device.deploy import cache_folder
from harness.device.opening import open_session
from harness.doctor import controller as controller_checks
from harness.doctor.examination import examine_device
from harness.errors import DeviceError
from harness.findings import CONTROLLER, Finding, Severity

_MAX_AT_ONCE = 32
_COLOURS = {Severity.ERROR: "red", Severity.WARNING: "yellow", Severity.NOTE: "cyan"}


@click.command()
@click.argument("names", metavar="DEVICE...", nargs=-1)
@click.option("--quick", is_flag=True, help="Leave out the engine's self-test, which takes minutes on a slow device.")
@offline_option
@inventory_option
@results_option
@known_hosts_option
@json_option
def doctor(
    names: tuple[str, ...],
    quick: bool,
    offline: bool,
    inventory_path: Path,
    results_place: str,
    known_hosts: Path,
    as_json: bool,
) -> None:
    """Examine this machine and each DEVICE (default: all), and name every finding with the line that fixes it.

    An error means that nothing can be measured like this; a run refuses such a device with the same words. A warning
    means that numbers may suffer. Exit code 4 when there is an error.

    \b
    Examples:
      edgemoe-farm doctor
      edgemoe-farm doctor pi5 phone --quick
      edgemoe-farm doctor --json
    """
    inventory = load_inventory(inventory_path)
    chosen = [inventory[name] for name in names] or list(inventory.devices.values())
    here = controller_checks.Controller(known_hosts, results_place, cache_folder(), tuple(chosen))
    findings = controller_checks.examine(here)
    health = known_health(results_place, chosen)

    def examine(device: Device) -> list[Finding]:
        opener = partial(open_session, device, known_hosts=known_hosts, cache_dir=cache_folder(), offline=offline)
        known = health[device.name]
        found = examine_device(device, lambda gate: opener(gate=gate), health=known, selftest=not quick)
        if to_terminal() and not as_json:
            click.echo(f"{device.name}: examined", err=True)
        return found

    with concurrent.futures.ThreadPoolExecutor(min(len(chosen), _MAX_AT_ONCE) or 1) as pool:
        findings += [finding for found in pool.map(examine, chosen) for finding in found]
    counts = Counter(finding.severity for finding in findings)
    if as_json:
        examined = [CONTROLLER, *(device.name for device in chosen)]
        print_json({"examined": examined, "findings": findings, **{f"{s.value}s": counts[s] for s in Severity}})
    else:
        _show([CONTROLLER, *(device.name for device in chosen)], findings)
    if counts[Severity.ERROR]:
        where = ", ".join(dict.fromkeys(f.where for f in findings if f.severity is Severity.ERROR))
        raise DeviceError(f"{counts[Severity.ERROR]} errors, on {where}: each stands above with the line that fixes it")


def _show(examined: list[str], findings: list[Finding]) -> None:
    console = Console(highlight=False, markup=False, soft_wrap=True)
    for where in examined:
        console.print(where, style="bold")
        mine = [finding for finding in findings if finding.where == where]
        for finding in mine:
            console.print(
                f"  {finding.severity.value:<8}{printable(finding.finding)}", style=_COLOURS[finding.severity]
            )
            console.print(f"          -> {printable(finding.remedy)}")
        if not mine:
            console.print("  nothing found", style="green")
