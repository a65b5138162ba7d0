"""`ack`: keeps known regressions from failing the gate."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import click
from rich.console import Console
from rich.table import Table

from harness.cli.options import (
    Duration,
    json_option,
    open_results,
    print_json,
    results_option,
)
from harness.errors import UsageError
from harness.process import owner
from reports.judging.judgement import ANSWER, GATED, RESULT
from reports.results.baselines import Acknowledgement
from reports.text import harmless

_METRICS = (*GATED, ANSWER, RESULT)


@click.group()
def ack() -> None:
    """Keep known regressions from failing the gate until a day."""


@ack.command()
@click.option("--device", required=True, help="The device, by its name in the inventory.")
@click.option("--strategy", required=True, help="The strategy, by its name.")
@click.option("--metric", required=True, type=click.Choice(_METRICS), help="What got worse.")
@click.option(
    "--cell", default="", help="The cell's key, as reports show it; by default all cells of the strategy on the device."
)
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
        table.add_row(*map(harmless, cells))
    Console(highlight=False, markup=False).print(table)


@ack.command("remove")
@click.option("--device", required=True, help="The device, by its name in the inventory.")
@click.option("--strategy", required=True, help="The strategy, by its name.")
@click.option("--metric", required=True, type=click.Choice(_METRICS), help="What got worse.")
@click.option("--cell", default="", help="The cell's key; by default what was acknowledged for all cells.")
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
