"""`demo --faults`: scripted devices, each of which meets one kind of fault, and what that cost."""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import median

import click
from rich.console import Console
from rich.table import Table

from device_inventory import Inventory
from engine.container import Container
from engine.quantize import Format
from engine.selftest import selftest_profile, write_random_model
from harness.cli.options import open_results, printable
from harness.cli.showing import measure_and_show
from harness.scripted import WHAT_HAPPENS, FaultKind, FaultScript, declare
from harness.sweep.matrix import parse_matrix
from harness.sweep.planning import new_sweep, plan_matrix
from harness.sweep.presence import at_work
from reports.metrics import METRICS
from reports.pages import render
from reports.records import Run, RunStatus, Sweep, last_attempts
from reports.results.database import ResultsDatabase

HEALTHY = "healthy"
SPEED = 60.0  # of the devices' time: a minute of waiting for a link takes a second
FAULTY_RUN = 2  # of each device; its deployment and its other runs go well
MATRIX = """\
# What the demonstration of faults asks for. Nothing is measured: every number is made up.
name = "faults"
baseline = "naive-swap"
strategies = ["full-load", "naive-swap", "edgemoe"]
expert_budgets = ["4-experts"]
warmups = 0
repetitions = 2
blocks = 2
deadline_s = 60.0

[[containers]]
name = "tiny"
path = "tiny.emoe"
profile = "tiny.profile.json"

[[workloads]]
name = "ids"
tokens = [[1, 17, 5, 80, 33], [2, 3]]
max_new_tokens = 8
"""


def demonstrate(output: Path, work: Path) -> bool:
    """Measures, renders `output`/report.html, shows what each fault cost; whether every cell ended."""
    write_model(output)
    matrix = parse_matrix(MATRIX, source="the matrix of the demonstration", folder=output)
    schedules = {HEALTHY: FaultScript()} | {
        kind.value: FaultScript(schedule=((FAULTY_RUN, kind),)) for kind in FaultKind
    }
    inventory = Inventory(
        {name: declare(work / name, name, faults=faults, speed=SPEED) for name, faults in schedules.items()}
    )
    database_file = output / "results.db"
    with open_results(str(database_file), create=True) as database:
        plan = plan_matrix(matrix, inventory)
        sweep = new_sweep(plan, database)
        hosts = work / "known_hosts"
        with at_work(database, sweep.id) as presence:
            measure_and_show(sweep, plan, database, presence, known_hosts=hosts, cache=work / "cache", summary=False)
        render(database, [sweep.id], output / "report.html")
        return _show(sweep, database)


def write_model(folder: Path) -> None:
    """tiny.emoe and tiny.profile.json: what a matrix needs where nobody computes with it."""
    container = folder / "tiny.emoe"
    write_random_model(str(container), [Format("int8", 32)])
    selftest_profile(Container.open(str(container))).save(str(folder / "tiny.profile.json"))


def _show(sweep: Sweep, database: ResultsDatabase) -> bool:
    attempts = database.runs(sweep_id=sweep.id)
    last = last_attempts(attempts)
    table = Table("device", "what happens in one of its runs", "ok", "what it cost", box=None, pad_edge=False)
    for name in dict.fromkeys(run.cell.device for run in last):
        runs = [run for run in last if run.cell.device == name]
        fault = "nothing" if name == HEALTHY else WHAT_HAPPENS[FaultKind(name)]
        failed = [run for run in attempts if run.cell.device == name and run.status is not RunStatus.OK]
        table.add_row(
            name, fault, f"{sum(run.status is RunStatus.OK for run in runs)}/{len(runs)}", _cost(runs, failed)
        )
    Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 200).print(table)
    click.echo(f"{len(last)} of {len(sweep.planned)} cells ended in a final state; no device was measured")
    return len(last) == len(sweep.planned)


def _cost(runs: list[Run], failed: list[Run]) -> str:
    """`runs`: the last attempts at a device's cells; `failed`: its attempts that did not end well."""
    if failed:
        lost = sum(run in failed for run in runs)
        how = "its cell" if lost == 1 else f"{lost} cells" if lost else "one more attempt"
        return printable(f"{how}: {failed[0].status.value.replace('_', ' ')} ({failed[0].reasons[0]})")
    slowest = max(_slowness(run, runs) for run in runs)
    return "nothing" if slowest < 1.2 else f"no run; one took {slowest:.1f} times as long"


def _slowness(run: Run, runs: list[Run]) -> float:
    """The time of a token against that of the same cell in the other blocks."""
    tpot = METRICS["tpot_s"].of
    others = [value for other in runs if other.cell == run.cell and other is not run and (value := tpot(other))]
    own = tpot(run)
    return own / median(others) if own and others else 1.0
