"""`demo`: does the whole job on this machine, from the checkpoint to the report, on emulated devices."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import click

from harness.cli.demo_faults import demonstrate
from harness.cli.options import EXIT_CODES, backend_option, open_results
from harness.cli.showing import measure_and_show
from harness.demo.loopback import LoopbackFarm
from harness.demo.preparation import DEVICES, count_paths, import_model, write_matrix
from harness.device.trust import trust
from harness.errors import UsageError
from harness.sweep.planning import new_sweep, plan_matrix
from harness.sweep.presence import at_work
from reports.pages import render


@click.command(epilog=EXIT_CODES)
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default="results/demo",
    show_default=True,
    metavar="DIR",
    help="Where report, results, container and profile go.",
)
@click.option("--quick", is_flag=True, help="One block instead of three: a first look, without spread.")
@backend_option
@click.option("--faults", is_flag=True, help="Show faults on scripted devices instead: half a minute, all made up.")
@click.option("--keep", is_flag=True, help="Keep the devices' folders, keys and matrix, to look at.")
@click.pass_context
def demo(context: click.Context, output: Path, quick: bool, backend: str, faults: bool, keep: bool) -> None:
    """Do the whole job on this machine, without any device.

    This takes about two minutes and needs no root. It imports the trained model that ships with the farm, counts its
    activation paths, starts two SSH devices on 127.0.0.1, trusts them, deploys to them, measures three strategies in
    interleaved blocks, and renders the report. The devices' storage is emulated: the engine limits its expert reads to
    the rate of the board that they stand for, and every record and page says so. The last line printed is the report's
    path.

    With --faults nothing is measured at all. Scripted devices, which only play their part, meet one kind of fault each:
    a lost link, a hang, a throttled processor, a power cut, slow and full storage, damaged output, too little memory.
    The real controller has to cope, and shows what each fault cost; every record and page says that it is made up.

    \b
    Examples:
      edgemoe-farm demo
      edgemoe-farm demo --faults --output results/faults
    """
    start = time.monotonic()
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output {output}: {error.strerror}; choose a folder that can be written") from None
    output = output.resolve()
    work = output / "work"
    _clear(work)
    try:
        if faults:
            all_ended = demonstrate(output, work)
            click.echo(f"report: {output / 'report.html'}")
            context.exit(0 if all_ended else 1)
        container = import_model(output)
        _say(start, f"imported {container}")
        profile = count_paths(container)
        _say(start, f"counted activation paths: {profile}")
        code = _measure(start, output, work, quick, backend)
    finally:
        if not keep:
            shutil.rmtree(work, ignore_errors=True)
    _say(start, "done")
    click.echo(f"report: {output / 'report.html'}")
    context.exit(code)


def _clear(work: Path) -> None:
    """Makes an empty folder for the demonstration; one that it did not make itself is left alone."""
    marker = work / ".edgemoe-farm-demo"
    try:
        if work.is_symlink() or (work.exists() and any(work.iterdir()) and not marker.is_file()):
            raise UsageError(f"{work} is not empty, and no demonstration made it: choose another --output")
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(exist_ok=True)
        marker.touch()
    except OSError as error:
        raise UsageError(f"{work}: {error.strerror}; choose another --output") from None


def _measure(start: float, output: Path, work: Path, quick: bool, backend: str) -> int:
    matrix = write_matrix(output, quick=quick, backend=backend)
    known_hosts = work / "known_hosts"
    with (
        LoopbackFarm(work / "devices", list(DEVICES)) as inventory,
        open_results(str(output / "results.db"), create=True) as database,
    ):
        for device in inventory.devices.values():
            # No person is asked: the server is ours, started a moment ago on this machine.
            for trusted in trust(device, known_hosts, lambda key: True):
                _say(start, f"trusted {device.name}, {device.host} port {device.port}, {trusted.key.fingerprint}")
        plan = plan_matrix(matrix, inventory)
        sweep = new_sweep(plan, database)
        _say(start, f"measuring {len(plan.measurements)} runs on {len(inventory.devices)} devices")
        with at_work(database, sweep.id) as presence:
            code = measure_and_show(sweep, plan, database, presence, known_hosts=known_hosts, cache=work / "cache")
        render(database, [sweep.id], output / "report.html")
    return code


def _say(start: float, what: str) -> None:
    click.echo(f"[{time.monotonic() - start:5.1f} s] {what}", err=True)
