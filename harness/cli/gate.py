"""`gate`, `baseline`, `ack`: a sweep against a pinned one, which one that is, and what is known to be worse."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from harness.cli.options import (
    GATE_EXIT_CODES,
    Duration,
    MetricShare,
    json_option,
    open_results,
    print_json,
    printable,
    results_option,
)
from harness.errors import UsageError
from harness.night.config import read_nightly
from harness.process import owner
from harness.sweep.engines import EngineStore, engines_folder
from reports.files import replacing
from reports.judging.judgement import ANSWER, GATED, RESULT
from reports.judging.noise import noise_before
from reports.nights.gate import Measured, against_baseline
from reports.nights.outcome import Context, judge_sweep
from reports.nights.summary import junit, markdown, payload
from reports.records import RunStatus, Sweep
from reports.results.baselines import Acknowledgement, Baseline
from reports.results.database import LATEST, ResultsDatabase

_METRICS = (*GATED, ANSWER, RESULT)


@click.command(epilog=GATE_EXIT_CODES)
@click.argument("run", metavar="RUN", default=LATEST)
@click.option("--baseline", "name", default="main", show_default=True, help="The name under which it is pinned.")
@click.option(
    "--config", type=click.Path(path_type=Path), help="Take limits and baseline from a nightly configuration."
)
@click.option("--limit", "limits", type=MetricShare(GATED), multiple=True,
              help="By which share a metric, or all, may get worse.")  # fmt: skip
@click.option("--junit", "junit_file", type=click.Path(path_type=Path), help="Write JUnit XML there.")
@click.option("--markdown", "markdown_file", type=click.Path(path_type=Path), help="Write a summary there.")
@results_option
@json_option
@click.pass_context
def gate(
    context: click.Context,
    run: str,
    name: str,
    config: Path | None,
    limits: tuple[tuple[str, float], ...],
    junit_file: Path | None,
    markdown_file: Path | None,
    results_place: str,
    as_json: bool,
) -> None:
    """Hold RUN (a sweep's id, the beginning of it, or `latest`) against the pinned baseline; the exit code tells.

    Nothing is measured: what is worse by more than its limit is a regression where the interval and the device's noise
    allow no other answer, else inconclusive. `nightly` measures again what it suspects.

    \b
    Examples:
      edgemoe-farm gate
      edgemoe-farm gate 20261123-2215 --baseline main --limit tpot_s=0.05
      edgemoe-farm gate latest --config nightly.toml --junit junit.xml
    """
    allowed = dict(GATED)
    if config is not None:
        settings = read_nightly(config)
        allowed, name = dict(settings.limits), settings.baseline
    if "" in dict(limits):
        allowed = dict.fromkeys(allowed, dict(limits)[""])
    allowed.update((name, share) for name, share in limits if name)
    at = _now().isoformat()
    with open_results(results_place) as database:
        sweep = _of_a_matrix(database, run)
        pinned = _pinned(database, name)
        baseline = Measured.read(database, database.sweep(pinned.sweep_id))
        candidate = Measured.read(database, sweep)
        noise = noise_before(database, sweep, allowed)
        comparison = against_baseline(pinned.name, baseline, candidate, allowed, noise)
        known = Context(allowed, acknowledgements=database.acknowledgements(at=at))
    night = judge_sweep(sweep.name, comparison, candidate, known, at)
    if as_json:
        print_json(payload(night))
    else:
        click.echo(markdown(night))
    for path, content in ((junit_file, junit(night)), (markdown_file, markdown(night).encode())):
        if path is not None:  # after the verdict was said: it must not get lost with a file
            with replacing(path) as file:
                file.write(content)
    context.exit(night.exit_code)


# --- baselines --------------------------------------------------------------------------------------------------------


@click.group()
def baseline() -> None:
    """Say which sweep is the one that others are compared with."""


@baseline.command()
@click.argument("name")
@click.argument("run", metavar="RUN", default=LATEST)
@click.option("--note", default="", help="Why this one.")
@results_option
def pin(name: str, run: str, note: str, results_place: str) -> None:
    """Pin RUN (a sweep's id, the beginning of it, or `latest`) as the baseline NAME.

    \b
    Examples:
      edgemoe-farm baseline pin main
      edgemoe-farm baseline pin release 20261123-2215 --note "0.2"
    """
    with open_results(results_place) as database:
        found = database.baseline(name)
        if found is not None:
            raise UsageError(f"baseline {name} is pinned to {found.sweep_id}: `edgemoe-farm baseline move {name} RUN`")
        _pin(database, name, run, note)


@baseline.command()
@click.argument("name")
@click.argument("run", metavar="RUN", default=LATEST)
@click.option("--note", default="", help="Why this one.")
@results_option
def move(name: str, run: str, note: str, results_place: str) -> None:
    """Move the baseline NAME to RUN: what is now is as it should be.

    \b
    Examples:
      edgemoe-farm baseline move main latest --note "slower on purpose: issue 12"
    """
    with open_results(results_place) as database:
        _pinned(database, name)
        _pin(database, name, run, note)


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
        _pinned(database, name)
        database.unpin(name)


@baseline.command("list")
@results_option
@json_option
def list_baselines(results_place: str, as_json: bool) -> None:
    """List the baselines, and whether their engines are kept here, to be measured again.

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
        table.add_row(*map(printable, cells))
    Console(highlight=False, markup=False).print(table)


def _pin(database: ResultsDatabase, name: str, run: str, note: str) -> None:
    sweep = _of_a_matrix(database, run)
    engines = database.engines_of(sweep.id, RunStatus.OK)
    if not engines:
        raise UsageError(f"sweep {sweep.id} has no result that is ok: pin another one")
    database.pin(Baseline(name, sweep.id, _now().isoformat(), owner(), note))
    click.echo(f"baseline {name}: {sweep.id}")
    kept = EngineStore(engines_folder())
    for engine in sorted(engines):
        if engine not in kept:
            click.echo(
                f"edgemoe-farm: warning: its engine {engine[:16]} is not kept on this machine: "
                "a suspected regression cannot be confirmed against it",
                err=True,
            )


def _of_a_matrix(database: ResultsDatabase, run: str) -> Sweep:
    sweep = database.sweep(run)
    if sweep.engines:
        raise UsageError(f"sweep {sweep.id} measured several engines in turns: name that of a matrix")
    return sweep


def _pinned(database: ResultsDatabase, name: str) -> Baseline:
    found = database.baseline(name)
    if found is None:
        known = ", ".join(b.name for b in database.baselines()) or "none"
        raise UsageError(f"no baseline {name} (known: {known}): `edgemoe-farm baseline pin {name} RUN`")
    return found


# --- acknowledgements -------------------------------------------------------------------------------------------------


@click.group()
def ack() -> None:
    """Acknowledge regressions that are known: they are shown, and fail no gate, until a day."""


@ack.command()
@click.option("--device", required=True, help="Its name in the inventory.")
@click.option("--strategy", required=True, help="Its name.")
@click.option("--metric", required=True, type=click.Choice(_METRICS), help="What got worse.")
@click.option("--cell", default="", help="Its key, as reports show it; by default all of the strategy on the device.")
@click.option("--reason", required=True, help="Why it may be so.")
@click.option("--for", "for_s", type=Duration(), default="30d", show_default=True, help="Until when, from now.")
@results_option
def add(device: str, strategy: str, metric: str, cell: str, reason: str, for_s: float, results_place: str) -> None:
    """Acknowledge a regression of one strategy on one device.

    \b
    Examples:
      edgemoe-farm ack add --device pi5 --strategy edgemoe --metric tpot_s --reason "issue 12" --for 14d
    """
    now = _now()
    try:
        expires = now + timedelta(seconds=for_s)
    except OverflowError:
        raise UsageError("--for is too long: acknowledge it for some weeks") from None
    known = Acknowledgement(device, strategy, metric, cell, reason, owner(), now.isoformat(), expires.isoformat())
    with open_results(results_place) as database:
        database.acknowledge(known)
    click.echo(f"acknowledged until {expires:%Y-%m-%d %H:%M} UTC")


@ack.command("list")
@click.option("--all", "expired_too", is_flag=True, help="Those that have expired, too.")
@results_option
@json_option
def list_acknowledgements(expired_too: bool, results_place: str, as_json: bool) -> None:
    """List what is acknowledged, and until when.

    \b
    Examples:
      edgemoe-farm ack list --all
    """
    with open_results(results_place) as database:
        known = database.acknowledgements(at=None if expired_too else _now().isoformat())
    if as_json:
        print_json(known)
        return
    table = Table("device", "strategy", "metric", "cell", "until", "by", "reason", box=None, pad_edge=False)
    for a in known:
        cells = (a.device, a.strategy, a.metric, a.cell or "all", a.expires_at[:16], a.by, a.reason)
        table.add_row(*map(printable, cells))
    Console(highlight=False, markup=False).print(table)


@ack.command("remove")
@click.option("--device", required=True, help="Its name in the inventory.")
@click.option("--strategy", required=True, help="Its name.")
@click.option("--metric", required=True, type=click.Choice(_METRICS), help="What got worse.")
@click.option("--cell", default="", help="Its key; by default what was acknowledged for all cells.")
@results_option
def remove_acknowledgement(device: str, strategy: str, metric: str, cell: str, results_place: str) -> None:
    """Take an acknowledgement back: the regression fails the gate again.

    \b
    Examples:
      edgemoe-farm ack remove --device pi5 --strategy edgemoe --metric tpot_s
    """
    wanted = (device, strategy, metric, cell)
    with open_results(results_place) as database:
        found = [a for a in database.acknowledgements() if (a.device, a.strategy, a.metric, a.cell) == wanted]
        if not found:
            raise UsageError(
                f"nothing is acknowledged of {metric} of {strategy} on {device}: see `edgemoe-farm ack list`"
            )
        for acknowledgement in found:
            database.withdraw(acknowledgement)


def _now() -> datetime:
    return datetime.now(UTC)
