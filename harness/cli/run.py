"""`run`: measures a matrix, or what is missing of a sweep."""

from __future__ import annotations

import math
from collections import Counter
from functools import partial
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from harness.cli.options import (
    EXIT_CODES,
    Duration,
    inventory_option,
    json_option,
    known_hosts_option,
    load_inventory,
    offline_option,
    open_results,
    print_json,
    results_option,
    wait_option,
)
from harness.cli.showing import PATIENT, measure_and_show
from harness.device.deploy import DEFAULT_UPLOADS
from harness.errors import UsageError
from harness.sweep.engines import EngineStore, engines_folder
from harness.sweep.matrix import read_matrix
from harness.sweep.plan import Plan
from harness.sweep.planning import new_sweep, plan_again, plan_matrix
from harness.sweep.presence import at_work
from reports.results.database import LATEST


@click.command(epilog=EXIT_CODES)
@click.argument("matrix", required=False, type=click.Path(path_type=Path))
@click.option("--plan", "--dry-run", "only_plan", is_flag=True, help="Show what would be measured, in order, and end.")
@click.option(
    "--resume",
    metavar="[SWEEP]",
    is_flag=False,
    flag_value=LATEST,
    help="Finish what is missing of a sweep (its id, the beginning of it, or by default the latest).",
)
@wait_option
@click.option("--retry-failed", is_flag=True, help="With --resume: measure what failed once more, too.")
@click.option(
    "--deadline",
    "deadline_s",
    type=Duration(),
    default=math.inf,
    help="Start no cell later than this, such as 6h; --resume goes on from there.",
)
@offline_option
@click.option(
    "--uploads",
    type=click.IntRange(1),
    default=DEFAULT_UPLOADS,
    show_default=True,
    metavar="N",
    help="Devices that containers are sent to at once; the others that lack one wait for their turn.",
)
@inventory_option
@results_option
@known_hosts_option
@json_option
@click.pass_context
def run(
    context: click.Context,
    matrix: Path | None,
    only_plan: bool,
    resume: str | None,
    wait_s: float,
    retry_failed: bool,
    deadline_s: float,
    offline: bool,
    uploads: int,
    inventory_path: Path,
    results_place: str,
    known_hosts: Path,
    as_json: bool,
) -> None:
    """Measure what MATRIX says on its devices.

    Devices are measured side by side, one engine at a time on each, and every record is stored at once. Ctrl-C ends it
    cleanly; the cell in flight is lost, the others are kept, and --resume goes on from there. A cell that fails, or a
    device that cannot be reached, is recorded with its reason and does not stop the others; what the infrastructure is
    to blame for (a lost link, a restart, a full disk) is tried again a few times. A device that another controller uses
    is waited for, see `edgemoe-farm devices locks`.

    \b
    Examples:
      edgemoe-farm run matrix.toml --plan
      edgemoe-farm run matrix.toml
      edgemoe-farm run --resume
      edgemoe-farm run matrix.toml --deadline 6h
      edgemoe-farm run matrix.toml --json > progress.jsonl
    """
    if matrix is None and resume is None:
        raise UsageError("run: give a matrix, as in `edgemoe-farm run matrix.toml`, or --resume to go on with a sweep")
    if matrix is not None and resume is not None:
        raise UsageError("run: give a matrix or --resume, not both: a sweep that goes on has its matrix")
    if retry_failed and resume is None:
        raise UsageError("run: --retry-failed goes with --resume")
    measured = partial(
        measure_and_show, known_hosts=known_hosts, deadline_s=deadline_s, offline=offline, as_json=as_json,
        wait_s=wait_s, uploads=uploads, kept=EngineStore(engines_folder()),
    )  # fmt: skip
    inventory = load_inventory(inventory_path)
    if matrix is not None:
        plan = plan_matrix(read_matrix(matrix), inventory)
        if only_plan:
            show_plan(plan, as_json)
            return
        with open_results(results_place, create=True, patience=PATIENT) as database:
            sweep = new_sweep(plan, database)
            with at_work(database, sweep.id) as presence:
                context.exit(measured(sweep, plan, database, presence))
    with open_results(results_place, patience=PATIENT) as database:
        sweep = database.sweep(resume or LATEST, own=True)
        if database.is_imported(sweep.id):
            raise UsageError(
                f"sweep {sweep.id} was imported: only where it was measured can it be resumed; start a new sweep here"
            )
        if only_plan:
            show_plan(plan_again(sweep, inventory, database, failed_too=retry_failed), as_json)
            return
        with at_work(database, sweep.id) as presence:  # before the plan: nobody else may measure what it lacks
            plan = plan_again(sweep, inventory, database, failed_too=retry_failed)
            context.exit(measured(sweep, plan, database, presence))


def show_plan(plan: Plan, as_json: bool) -> None:
    """Shows every measurement in its order, and how many there are."""
    if as_json:
        print_json([{"cell": m.cell, "block": m.block} for m in plan.measurements])
        return
    table = Table("device", "block", "container", "workload", "strategy", "budget", "cache", box=None, pad_edge=False)
    for measurement in plan.measurements:
        cell = measurement.cell
        table.add_row(
            cell.device,
            str(measurement.block),
            cell.container,
            cell.workload,
            cell.strategy,
            cell.expert_budget,
            cell.page_cache,
        )
    Console(highlight=False, markup=False).print(table)
    cells = len({m.cell.key for m in plan.measurements})
    by_device = Counter(m.cell.device for m in plan.measurements)
    click.echo(
        f"{len(plan.measurements)} runs of {cells} cells: " + ", ".join(f"{n} on {d}" for d, n in by_device.items())
    )
