"""From a matrix to records: what `run` and `demo` share. The command line alone joins the farm to engine.offline."""

from __future__ import annotations

import contextlib
import math
import os
import secrets
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from types import FrameType

import click
from rich.console import Console
from rich.table import Table

from device_inventory import Inventory
from engine.container import Container
from engine.experts.provision import check_records
from engine.models import model_config
from engine.offline.accuracy.passages import cut
from engine.offline.tokenizer import Tokenizer
from engine.protocol import Passage
from engine.strategies import STRATEGIES
from harness.cli.estimating import CellEstimator
from harness.cli.options import cache_folder, printable
from harness.device.deploy import DEFAULT_UPLOADS, ENGINE_SOURCE, HashCache, UploadTurns, engine_bundle
from harness.device.lease import WAIT_S, Holder
from harness.device.opening import open_session
from harness.errors import UsageError
from harness.scripted import speed_of
from harness.sweep.engines import EngineStore
from harness.sweep.matrix import Accuracy, Matrix, parse_matrix
from harness.sweep.plan import Plan, make_plan
from harness.sweep.presence import Presence
from harness.sweep.progress import JsonLines, LiveTable, LogLines
from harness.sweep.runner import SweepRunner, tally
from harness.sweep.worker import Listener, Surroundings
from harness.version import farm_version
from reports import units
from reports.judging.groups import Row, compare
from reports.judging.headline import headline
from reports.metrics import METRICS
from reports.records import RunStatus, Sweep
from reports.results.connection import OUTAGE_S, Patience, sleep
from reports.results.database import ResultsDatabase

INTERRUPTED = 130
_SUMMARY = ("tpot_s", "estimated_tpot_s", "peak_resident_bytes", "expert_hit_rate", "perplexity")
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _await_database(why: str, seconds: float) -> bool:
    click.echo(f"waiting for the results database: {printable(why)}", err=True)
    return sleep(why, seconds)


PATIENT = Patience(OUTAGE_S, _await_database)  # what `run` has with a server that is away


def plan_matrix(matrix: Matrix, inventory: Inventory) -> Plan:
    """Hashes the containers, tokenises the prompts, lays out the cells. Raises UsageError, EngineError."""
    for container in matrix.containers:
        opened = Container.open(str(container.path))
        for name in matrix.strategies:
            if name in STRATEGIES:  # else the plan says what is known
                check_records(opened, STRATEGIES[name])
    cache = HashCache(cache_folder())
    tokenizer = lru_cache(Tokenizer.from_container)
    for container in matrix.containers:
        for what, path in (("profile", container.profile), ("trace", container.trace)):
            if path is not None and not path.is_file():
                raise UsageError(f"matrix {matrix.name}: no {what} {path}: `edgemoe-farm model {what}` makes one")
    return make_plan(
        matrix,
        inventory,
        container_sha256={c.name: cache.sha256(c.path) for c in matrix.containers},
        tokenise=lambda path, text: tokenizer(str(path)).encode(text),
        passages={c.name: _passages(matrix.accuracy, c.path) for c in matrix.containers if matrix.accuracy},
    )


def _passages(accuracy: Accuracy, container: Path) -> tuple[Passage, ...]:
    tokens = Tokenizer.from_container(str(container)).encode(accuracy.text)[: accuracy.tokens]
    passages = cut(tokens, accuracy.context, model_config(Container.open(str(container))))
    if not passages:
        raise UsageError(f"accuracy: the text has fewer than two tokens in {container}: give a longer one")
    return tuple(passages)


def new_sweep(plan: Plan, database: ResultsDatabase, *, purpose: str = "") -> Sweep:
    """Stores what is about to be measured; `purpose` is for one that is not all of its matrix."""
    now = datetime.now(UTC)
    sweep = Sweep(
        id=f"{now:%Y%m%d-%H%M%S}-{secrets.token_hex(2)}",
        name=f"{plan.matrix.name} ({purpose})" if purpose else plan.matrix.name,
        matrix_toml=plan.matrix.toml,
        baseline=plan.matrix.baseline,
        planned=tuple(m.key for m in plan.measurements),
        started_at=now.isoformat(),
        farm_version=farm_version(),
        matrix_folder=str(plan.matrix.folder),
        engines=engines if any(engines := tuple(m.engine_sha256 for m in plan.measurements)) else (),
    )
    database.add_sweep(sweep)
    return sweep


def plan_again(sweep: Sweep, inventory: Inventory, database: ResultsDatabase, *, failed_too: bool) -> Plan:
    """What `sweep` still lacks. Raises UsageError where inventory or containers are no longer what they were."""
    matrix = parse_matrix(sweep.matrix_toml, source=f"matrix of sweep {sweep.id}", folder=Path(sweep.matrix_folder))
    plan = plan_matrix(matrix, inventory)
    if sweep.engines:
        plan = plan.in_turns(sweep.planned, sweep.engines)
    for key in dict.fromkeys(key for key, _ in set(sweep.planned) - {m.key for m in plan.measurements}):
        raise UsageError(
            f"sweep {sweep.id}: {key} was planned, but the inventory or a strategy has changed: restore it"
        )
    cells = {m.cell.key: m.cell for m in plan.measurements}
    for run in database.stream(sweep_id=sweep.id):
        cell = cells.get(run.cell.key, run.cell)
        for part in ("container_sha256", "workload_sha256"):
            if getattr(cell, part) != getattr(run.cell, part):
                what = f"container {cell.container}" if part.startswith("c") else f"workload {cell.workload}"
                raise UsageError(f"sweep {sweep.id}: {what} has changed since it was measured: start a new sweep")
    again = {RunStatus.UNREACHABLE, RunStatus.SKIPPED}
    if failed_too:
        again |= set(RunStatus) - {RunStatus.OK}
    surplus = {m.key for m in plan.measurements} - set(sweep.planned)  # devices that joined the inventory later
    return plan.without(surplus | database.done(sweep.id, again=again))


def measure(
    sweep: Sweep,
    plan: Plan,
    database: ResultsDatabase,
    presence: Presence,
    *,
    known_hosts: Path,
    deadline_s: float = math.inf,
    offline: bool = False,
    as_json: bool = False,
    cache: Path | None = None,
    wait_s: float = WAIT_S,
    uploads: int = DEFAULT_UPLOADS,
    summary: bool = True,
    canary: bool = False,
    kept: EngineStore | None = None,
) -> int:
    """Measures `plan` until its end, the deadline or a signal; shows progress and `summary`; returns the exit code.

    `wait_s`: for a device that another controller uses; `canary`: each device proves itself first; `kept`: where
    engines are kept, the farm's own from now on. Raises UsageError where the plan names one that is not.
    """
    engines = {}
    if kept is not None:
        kept.keep(engine_bundle(ENGINE_SOURCE))
        engines = {name: kept.get(name) for name in {m.engine_sha256 for m in plan.measurements} - {""}}
    holder = Holder.this_process(sweep.id)
    turns, speed = UploadTurns(uploads), speed_of(plan.devices)
    surroundings = Surroundings(
        sweep,
        lambda device: open_session(
            device,
            known_hosts=known_hosts,
            cache_dir=cache or cache_folder(),
            offline=offline,
            holder=holder,
            wait_s=wait_s,
            uploads=turns,
        ),
        pause=lambda stopping, seconds: stopping.wait(seconds / speed),
        farm_version=farm_version(),
        earlier=database.stream(sweep_id=sweep.id),
        estimate=CellEstimator(),
        canary=canary,
        engines=engines,
    )
    totals = dict(Counter(m.cell.device for m in plan.measurements))
    for other in presence.others():
        click.echo(f"also at work: {printable(other)} on sweep {other.sweep_id} since {other.started_at}", err=True)
    with _listener(totals, as_json) as listener:
        runner = SweepRunner(plan, database, listener, surroundings, deadline_s=deadline_s, tick=presence.beat)
        with _stopping(runner.stop) as interrupted:
            runner.measure()
    result = tally(sweep, database.stream(sweep_id=sweep.id))
    code = INTERRUPTED if interrupted and result.missing else result.exit_code
    if as_json:
        counts = {status.value: result.counts.get(status, 0) for status in RunStatus}
        content = {"sweep": sweep.id, **counts, "missing": result.missing, "suspect": result.suspect, "exit_code": code}
        JsonLines(sys.stdout).say("summary", **content)
        return code
    if not summary:
        return code
    _show_summary(sweep, database)
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


@contextlib.contextmanager
def _stopping(stop: Callable[[], None]) -> Iterator[list[int]]:
    """The first signal stops cleanly, the second at once; yields the list of those that came."""
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if received:
            os._exit(INTERRUPTED)
        received.append(number)
        stop()

    before = {number: signal.signal(number, handle) for number in _SIGNALS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
