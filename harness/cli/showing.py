"""Shows progress and results for `run`, `demo` and `nightly`."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from harness.errors import unforeseen
from harness.sweep.measure import measure
from harness.sweep.plan import Plan
from harness.sweep.presence import Presence
from harness.sweep.progress import JsonLines, LiveTable, LogLines
from harness.sweep.worker import Listener
from reports import units
from reports.judging.groups import Row, compare
from reports.judging.headline import headline
from reports.metrics import METRICS
from reports.records import RunStatus, Sweep
from reports.results.connection import OUTAGE_S, Patience, sleep
from reports.results.database import ResultsDatabase
from reports.text import harmless

_SUMMARY = ("tpot_s", "estimated_tpot_s", "peak_resident_bytes", "expert_hit_rate", "perplexity")


def _await_database(why: str, seconds: float) -> bool:
    click.echo(f"waiting for the results database: {harmless(why)}", err=True)
    return sleep(why, seconds)


PATIENT = Patience(OUTAGE_S, _await_database)  # what `run` has with a server that is away


def measure_and_show(
    sweep: Sweep,
    plan: Plan,
    database: ResultsDatabase,
    presence: Presence,
    *,
    as_json: bool = False,
    summary: bool = True,
    **settings: Any,
) -> int:
    """Measures with `settings`, see harness.sweep.measure; shows progress and `summary`; returns the exit code."""
    for other in presence.others():
        click.echo(f"also at work: {harmless(other)} on sweep {other.sweep_id} since {other.started_at}", err=True)
    totals = dict(Counter(m.cell.device for m in plan.measurements))
    with _listener(totals, as_json) as listener:
        ended = measure(sweep, plan, database, presence, listener, **settings)
    result, code = ended.tally, ended.exit_code
    if as_json:
        counts = {status.value: result.counts.get(status, 0) for status in RunStatus}
        content = {"sweep": sweep.id, **counts, "missing": result.missing, "suspect": result.suspect, "exit_code": code}
        JsonLines(sys.stdout).say("summary", **content)
        return code
    if not summary:
        return code
    try:
        _show_summary(sweep, database)
    except Exception as error:  # noqa: BLE001 - it is measured and stored, whatever fails of showing it
        click.echo(f"edgemoe-farm: warning: no summary: {harmless(unforeseen(error))}", err=True)
    click.echo(_sentence(sweep, result.counts, result.missing, result.suspect))
    if result.missing or result.to_repeat:
        click.echo(f"To measure what is missing: edgemoe-farm run --resume {sweep.id}")
    return code


@contextlib.contextmanager
def _listener(totals: dict[str, int], as_json: bool) -> Iterator[Listener]:
    if as_json:
        yield JsonLines(sys.stdout)
    elif sys.stderr.isatty():
        with LiveTable(totals, Console(stderr=True)) as table:
            yield table
    else:
        yield LogLines(totals, sys.stderr)


def _show_summary(sweep: Sweep, database: ResultsDatabase) -> None:
    groups = compare(sweep, database.runs(sweep_id=sweep.id))
    table = Table("device", "container", "workload", "strategy", box=None, pad_edge=False)
    for title in (
        "TPOT",
        "estimated",
        f"speed-up over {sweep.baseline}",
        "peak memory",
        "hit rate",
        "perplexity",
        "verdict",
    ):
        table.add_column(title, justify="right")
    for group in groups:
        for row in group.rows:
            tpot, estimated, *others = (_median(row, name) for name in _SUMMARY)
            speed = f"{units.ratio(row.speed_up.ratio)}×" if row.speed_up else ""
            loss = ["not measured"] if row.is_lossy and not others[-1] else others[-1:]
            table.add_row(
                group.device, group.container, group.workload, row.name, tpot, estimated, speed, *others[:-1], *loss,
                row.verdict.value,
            )  # fmt: skip
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 140)
    console.print(table)
    for condition in dict.fromkeys(c for group in groups for c in group.emulated):
        console.print(f"emulated: {condition}")
    click.echo(headline(groups))


def _median(row: Row, metric: str) -> str:
    summary = row.summaries[metric]
    return "" if summary is None else units.text(summary.median, METRICS[metric].unit)


def _sentence(sweep: Sweep, counts: dict[RunStatus, int], missing: int, suspect: int) -> str:
    parts = [f"{n} {status.value.replace('_', ' ')}" for status, n in counts.items()]
    if suspect:
        parts.append(f"{suspect} of them suspect")
    if missing:
        parts.append(f"{missing} missing")
    return f"sweep {sweep.id}: {', '.join(parts) or 'nothing measured'}"
