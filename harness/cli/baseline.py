"""`baseline`: tells which sweep others are compared with."""

from __future__ import annotations

from datetime import UTC, datetime

import click
from rich.console import Console
from rich.table import Table

from harness.cli.options import (
    json_option,
    open_results,
    print_json,
    results_option,
)
from harness.errors import UsageError
from harness.process import owner
from harness.sweep.engines import EngineStore, engines_folder
from reports.records import RunStatus, Sweep
from reports.results.baselines import Baseline
from reports.results.database import LATEST, ResultsDatabase
from reports.text import harmless


@click.group()
def baseline() -> None:
    """Choose the sweep that others are compared with."""


@baseline.command()
@click.argument("name")
@click.argument("run", metavar="RUN", default=LATEST)
@click.option("--note", default="", help="Why this one.")
@results_option
def pin(name: str, run: str, note: str, results_place: str) -> None:
    """Pin RUN as the baseline NAME.

    RUN is a sweep's id, the beginning of it, or `latest`.

    \b
    Examples:
      edgemoe-farm baseline pin main
      edgemoe-farm baseline pin release 20261123-2215 --note "0.2"
    """
    with open_results(results_place) as database:
        found = database.baseline(name)
        if found is not None:
            raise UsageError(f"baseline {name} is pinned to {found.sweep_id}: `edgemoe-farm baseline move {name} RUN`")
        _pin(database, name, run, note, None)


@baseline.command()
@click.argument("name")
@click.argument("run", metavar="RUN", default=LATEST)
@click.option("--note", default="", help="Why this one.")
@results_option
def move(name: str, run: str, note: str, results_place: str) -> None:
    """Move the baseline NAME to RUN.

    Do so when what RUN measured is as it should be.

    \b
    Examples:
      edgemoe-farm baseline move main latest --note "slower on purpose: issue 12"
    """
    with open_results(results_place) as database:
        _pin(database, name, run, note, pinned_baseline(database, name))


@baseline.command("remove")
@click.argument("name")
@results_option
def remove_baseline(name: str, results_place: str) -> None:
    """Forget the baseline NAME; its sweep stays.

    \b
    Examples:
      edgemoe-farm baseline remove release
    """
    with open_results(results_place) as database:
        database.unpin(name, seen=pinned_baseline(database, name))


@baseline.command("list")
@results_option
@json_option
def list_baselines(results_place: str, as_json: bool) -> None:
    """List the baselines, and whether their engines are kept.

    An engine that is kept on this machine can be measured again.

    \b
    Examples:
      edgemoe-farm baseline list --json
    """
    kept = EngineStore(engines_folder())
    with open_results(results_place) as database:
        rows = [
            (b, all(engine in kept for engine in database.engines_of(b.sweep_id, RunStatus.OK)))
            for b in database.baselines()
        ]
    if as_json:
        print_json([{**vars(b), "engine_kept": is_kept} for b, is_kept in rows])
        return
    table = Table("baseline", "sweep", "pinned", "by", "engine", "note", box=None, pad_edge=False)
    for b, is_kept in rows:
        cells = (b.name, b.sweep_id, b.pinned_at[:16], b.pinned_by, "kept" if is_kept else "not kept here", b.note)
        table.add_row(*map(harmless, cells))
    Console(highlight=False, markup=False).print(table)


def _pin(database: ResultsDatabase, name: str, run: str, note: str, seen: Baseline | None) -> None:
    sweep = sweep_of_a_matrix(database, run)
    engines = database.engines_of(sweep.id, RunStatus.OK)
    if not engines:
        raise UsageError(f"sweep {sweep.id} has no result that is ok: pin another one")
    database.pin(Baseline(name, sweep.id, datetime.now(UTC).isoformat(), owner(), note), seen=seen)
    click.echo(f"baseline {name}: {sweep.id}, of {harmless(sweep.name)}, started {sweep.started_at[:16]}")
    kept = EngineStore(engines_folder())
    for engine in sorted(engines):
        if engine not in kept:
            click.echo(
                f"edgemoe-farm: warning: its engine {engine[:16]} is not kept on this machine: "
                "a suspected regression cannot be confirmed against it",
                err=True,
            )


def sweep_of_a_matrix(database: ResultsDatabase, run: str) -> Sweep:
    """Returns a sweep that measured a whole matrix. Raises UsageError for a confirmation."""
    sweep = database.sweep(run)
    if sweep.engines:
        raise UsageError(f"sweep {sweep.id} measured several engines in turns: name that of a matrix")
    return sweep


def pinned_baseline(database: ResultsDatabase, name: str) -> Baseline:
    """Returns the baseline of that name. Raises UsageError, which names those that there are."""
    found = database.baseline(name)
    if found is None:
        known = ", ".join(b.name for b in database.baselines()) or "none"
        raise UsageError(f"no baseline {name} (known: {known}): `edgemoe-farm baseline pin {name} RUN`")
    return found
