"""`results`: shows and exports what was measured."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from engine.codec import to_json
from harness.cli.options import Moment, json_option, open_results, print_json, results_option
from harness.cli.results_keeping import bundle_sweeps, import_results, migrate, prune
from harness.errors import UsageError
from harness.sweep.presence import is_alive
from harness.sweep.runner import Tally
from reports.records import RunStatus, Sweep, Verdict, last_attempts, run_to_json
from reports.results.controllers import Controller
from reports.results.database import LATEST
from reports.results.export import FORMATS, export
from reports.results.history import Endings
from reports.text import harmless


@click.group()
def results() -> None:
    """Look into the results database, and take records out of it."""


@results.command("list")
@click.option("--name", help="Only the sweeps of this matrix.")
@click.option("--last", type=click.IntRange(min=1), metavar="N", help="Only the last so many.")
@results_option
@json_option
def list_sweeps(name: str | None, last: int | None, results_place: str, as_json: bool) -> None:
    """List the sweeps, the oldest first, and who measures them.

    A sweep is `running`, `complete`, `incomplete`, or `stale`: its controller was lost and `run --resume` goes on.

    \b
    Examples:
      edgemoe-farm results list
      edgemoe-farm results list --name nightly --last 14
      edgemoe-farm results list --results postgresql://farm@lab/farm
    """
    with open_results(results_place) as database:
        controllers = {controller.sweep_id: controller for controller in database.controllers()}
        endings = database.endings()
        rows = [(sweep, _tally(sweep, endings.get(sweep.id, {}))) for sweep in database.sweeps(name=name, last=last)]
    if as_json:
        print_json(
            [
                {
                    "id": sweep.id,
                    "name": sweep.name,
                    "started_at": sweep.started_at,
                    "state": _state(controllers.get(sweep.id), result),
                    "controller": controllers.get(sweep.id),
                    "planned": len(sweep.planned),
                    "missing": result.missing,
                    "suspect": result.suspect,
                    **{status.value: result.counts.get(status, 0) for status in RunStatus},
                }
                for sweep, result in rows
            ]
        )
        return
    table = Table("sweep", "matrix", "planned", "ok", "suspect", "not ok", "missing", "state", box=None, pad_edge=False)
    for sweep, result in rows:
        ok = result.counts.get(RunStatus.OK, 0)
        numbers = (len(sweep.planned), ok, result.suspect, sum(result.counts.values()) - ok, result.missing)
        controller = controllers.get(sweep.id)
        state = _state(controller, result)
        if controller is not None:
            state += f": {harmless(controller)}"
        if state.startswith("stale") and controller is not None:
            state += f", silent for {controller.silent_s / 60:.0f} min"
        table.add_row(harmless(sweep.id), harmless(sweep.name), *map(str, numbers), state)
    Console(highlight=False, markup=False).print(table)


def _tally(sweep: Sweep, endings: Endings) -> Tally:
    """Returns what the list shows of `harness.sweep.runner.tally`, without reading a record."""
    counts: Counter[RunStatus] = Counter()
    for (status, _), n in endings.items():
        counts[status] += n
    suspect = sum(n for (_, verdict), n in endings.items() if verdict is Verdict.SUSPECT)
    return Tally(counts=dict(counts), missing=len(sweep.planned) - sum(counts.values()), suspect=suspect)


def _state(controller: Controller | None, result: Tally) -> str:
    if controller is not None:
        return "running" if is_alive(controller) else "stale"
    return "incomplete" if result.missing else "complete"


@results.command()
@click.argument("run", metavar="RUN", default=LATEST)
@results_option
@json_option
def show(run: str, results_place: str, as_json: bool) -> None:
    """Show status, verdict and reasons of each run of RUN.

    RUN is a sweep's id, the beginning of it, or `latest`.

    \b
    Examples:
      edgemoe-farm results show
      edgemoe-farm results show 20261123 --json
    """
    with open_results(results_place) as database:
        sweep = database.sweep(run)
        runs = last_attempts(database.stream(sweep_id=sweep.id))
    if as_json:
        print_json({"sweep": to_json(sweep), "runs": [run_to_json(r) for r in runs]})
        return
    table = Table("cell", "block", "status", "verdict", "reasons", box=None, pad_edge=False)
    for found in runs:
        reasons = harmless("; ".join(found.reasons))
        table.add_row(found.cell.key, str(found.block), found.status.value, found.verdict.value, reasons)
    Console(highlight=False, markup=False).print(table)


@results.command("export")
@click.argument("run", metavar="[RUN]", required=False)
@click.option("--format", "format_name", type=click.Choice(FORMATS), default="jsonl", show_default=True,
              help="JSON lines keep everything; CSV and Parquet have the metrics as columns.")  # fmt: skip
@click.option("-o", "--output", type=click.Path(path_type=Path), help="A file instead of standard output.")
@click.option("--since", type=Moment(), help="Only runs that were started then or later: a day, or 30d ago.")
@click.option("--device", help="Only runs on it.")
@click.option("--container", help="Only runs of it, by its name in the matrix.")
@click.option("--strategy", help="Only runs of it.")
@click.option("--workload", help="Only runs of it.")
@click.option("--status", type=click.Choice(RunStatus, case_sensitive=False), help="Only runs that ended so.")
@click.option("--with-sweeps", is_flag=True, help="JSON lines of the sweeps first, for `results import`.")
@results_option
def export_runs(
    run: str | None,
    format_name: str,
    output: Path | None,
    since: str | None,
    status: RunStatus | None,
    with_sweeps: bool,
    results_place: str,
    **wanted: str | None,
) -> None:
    """Export all runs, or those of RUN, one line or row each.

    A line has request, facts, samples, status and verdict.

    \b
    Examples:
      edgemoe-farm results export --format jsonl | jq .status
      edgemoe-farm results export latest --format parquet -o runs.parquet
      edgemoe-farm results export --since 30d --device pi5 --format csv -o month.csv
    """
    if with_sweeps and format_name != "jsonl":
        raise UsageError("results export: --with-sweeps is for --format jsonl")
    with open_results(results_place) as database:
        sweep = database.sweep(run) if run else None
        runs = database.stream(sweep_id=sweep.id if sweep else None, since=since, status=status, **wanted)
        sweeps = ([sweep] if sweep else database.sweeps()) if with_sweeps else None
        count = export(runs, format_name, output or sys.stdout.buffer, sweeps=sweeps)
    if output:
        click.echo(f"{count} runs: {output}", err=True)


for _command in (migrate, prune, import_results, bundle_sweeps):
    results.add_command(_command)
