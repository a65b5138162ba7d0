"""`demo --faults`: shows what each kind of fault costs, on scripted devices."""

from __future__ import annotations

import sys
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from harness.cli.options import open_results
from harness.cli.showing import measure_and_show
from harness.demo.faults import costs, faulty_devices, matrix_of_faults
from harness.sweep.planning import new_sweep, plan_matrix
from harness.sweep.presence import at_work
from reports.pages import render
from reports.records import Run, Sweep, last_attempts
from reports.text import harmless


def demonstrate(output: Path, work: Path) -> bool:
    """Measures, renders `output`/report.html and shows what each fault cost; returns whether every cell ended."""
    matrix, inventory = matrix_of_faults(output), faulty_devices(work)
    with open_results(str(output / "results.db"), create=True) as database:
        plan = plan_matrix(matrix, inventory)
        sweep = new_sweep(plan, database)
        hosts = work / "known_hosts"
        with at_work(database, sweep.id) as presence:
            measure_and_show(sweep, plan, database, presence, known_hosts=hosts, cache=work / "cache", summary=False)
        render(database, [sweep.id], output / "report.html")
        return _show(sweep, database.runs(sweep_id=sweep.id))


def _show(sweep: Sweep, attempts: list[Run]) -> bool:
    table = Table("device", "what happens in one of its runs", "ok", "what it cost", box=None, pad_edge=False)
    for found in costs(attempts):
        table.add_row(found.device, found.what_happens, f"{found.ok}/{found.cells}", harmless(found.cost))
    Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 200).print(table)
    ended = len(last_attempts(attempts))
    click.echo(f"{ended} of {len(sweep.planned)} cells ended in a final state; no device was measured")
    return ended == len(sweep.planned)
