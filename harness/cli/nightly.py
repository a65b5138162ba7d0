"""`nightly`: a matrix measured, compared with its baseline, doubts measured again, and people told. For cron and CI."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import click

from device_inventory import Inventory
from engine.errors import EngineError
from harness.cli.measuring import INTERRUPTED, PATIENT, measure, new_sweep, plan_again, plan_matrix
from harness.cli.options import (
    inventory_option,
    json_option,
    known_hosts_option,
    load_inventory,
    offline_option,
    open_results,
    printable,
    results_option,
    wait_option,
)
from harness.errors import FarmError, InfrastructureError, UsageError
from harness.night.config import (
    NightlyConfig,
    Progress,
    finish,
    locked,
    night_folder,
    prune_reports,
    read_nightly,
    state_file,
    unfinished,
)
from harness.night.webhook import post, webhook_url
from harness.sweep.engines import EngineStore, engines_folder
from harness.sweep.matrix import parse_matrix, read_matrix
from harness.sweep.plan import Plan
from harness.sweep.presence import at_work
from harness.sweep.progress import JsonLines
from reports.errors import ReportError, UnknownSweepError
from reports.files import replacing
from reports.nights.confirmation import Suspicion
from reports.nights.gate import Measured, against_baseline
from reports.nights.night import Night
from reports.nights.outcome import Context, judge_night, without_baseline
from reports.nights.summary import junit, markdown, payload, summary_line
from reports.nights.trends import NIGHTS, trends
from reports.pages import render
from reports.records import Run, Sweep
from reports.results.baselines import NightRecord
from reports.results.database import ResultsDatabase

GATE_EXIT_CODES = """\b
Exit codes:
  0    no regression
  1    a regression: slower, larger, less accurate, another answer, or no result any more
  2    usage: an argument or a file is wrong
  3    incomplete: a result is missing
  4    infrastructure: no device could be used, another nightly run is at work, or the farm itself failed
  5    inconclusive: suspect runs, too much noise (for nightly: to decide a suspicion), or nothing to compare with
  130  interrupted; the same command goes on
Of several, 1 comes before 3, 3 before 4, 4 before 5.
"""

Measure = Callable[..., int]


@click.command(epilog=GATE_EXIT_CODES)
@click.argument("config", type=click.Path(path_type=Path))
@wait_option
@offline_option
@inventory_option
@results_option
@known_hosts_option
@json_option
@click.pass_context
def nightly(
    context: click.Context,
    config: Path,
    wait_s: float,
    offline: bool,
    inventory_path: Path,
    results_place: str,
    known_hosts: Path,
    as_json: bool,
) -> None:
    """Measure the matrix that CONFIG names, and say by the exit code whether something got worse.

    Every device has to pass a canary run first. What looks worse than the pinned baseline, or than the nights before,
    is measured again, the baseline's engine and today's in turns on the same device: only what that confirms is a
    regression. Page, Markdown summary and JUnit XML go to the folder that CONFIG names, and a webhook is told. A night
    that was killed goes on when the command is given again; two at once are refused.

    \b
    Examples:
      edgemoe-farm nightly nightly.toml
      edgemoe-farm nightly nightly.toml --results postgresql://farm@lab/farm --json
    """
    settings = read_nightly(config)
    url = webhook_url(settings.webhook_env) if settings.webhook_env else ""
    with locked(settings):
        try:
            with open_results(results_place, create=True, patience=PATIENT) as database:
                measured = partial(
                    measure, database=database, known_hosts=known_hosts, offline=offline, as_json=as_json, wait_s=wait_s
                )
                run = _NightRun(settings, load_inventory(inventory_path), database, measured)
                night = run.measure_and_judge()
                if night is None:
                    context.exit(INTERRUPTED)
                page = run.publish(night)
        except (FarmError, ReportError, EngineError) as error:
            if getattr(error, "exit_code", 1) != 1:
                raise
            raise InfrastructureError(str(error)) from None  # 1 means a regression here
        if url:
            _tell(url, night, settings)
        finish(settings)
    if as_json:
        JsonLines(sys.stdout).say("night", **payload(night), page=str(page))
    else:
        click.echo(markdown(night))
        click.echo(f"report: {page}")
    context.exit(night.exit_code)


class _Interrupted(Exception):
    """By a signal, while something was measured."""


class _NightRun:
    """One night, from the plan to the page."""

    def __init__(
        self,
        config: NightlyConfig,
        inventory: Inventory,
        database: ResultsDatabase,
        measured: Measure,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._config, self._inventory, self._database, self._now = config, inventory, database, now
        self._kept = EngineStore(engines_folder())
        self._measured = measured
        self._progress = unfinished(config, now())
        self._baseline_sweep: str | None = None

    def measure_and_judge(self) -> Night | None:
        """None where it was interrupted: what is measured is stored, and the next call goes on."""
        try:
            return self._judge(self._measure_matrix())
        except _Interrupted:
            return None

    def publish(self, night: Night) -> Path:
        """Stores the night, writes its page and summaries, removes what is too old; the page's path."""
        record = NightRecord(
            night.sweep_id, night.name, self._baseline_sweep, night.at, night.exit_code, night.to_json()
        )
        self._database.add_night(record)
        folder = night_folder(self._config, night.sweep_id)
        page = render(self._database, [night.sweep_id], folder / "report.html", "nightly")
        contents = {
            "summary.md": markdown(night).encode(),
            "junit.xml": junit(night),
            "night.json": json.dumps(payload(night), indent=2).encode(),  # last: by it prune_reports knows the folder
        }
        for name, content in contents.items():
            with replacing(folder / name) as file:
                file.write(content)
        prune_reports(self._config)
        wanted = {engine for b in self._database.baselines() for engine in self._database.engines_of(b.sweep_id)}
        self._kept.prune(days=self._config.keep_engines_days, wanted=wanted)
        return page

    def _measure_matrix(self) -> Sweep:
        if self._progress is not None:
            click.echo(
                f"going on with the night that began at {self._progress.began[:16]}, sweep {self._progress.sweep_id}",
                err=True,
            )
            try:
                sweep = self._database.sweep(self._progress.sweep_id)
                plan_again(sweep, self._inventory, self._database, failed_too=False)
            except (UsageError, UnknownSweepError) as error:
                raise UsageError(f"{error}; or remove {state_file(self._config)}, for a new night") from None
        else:
            plan = plan_matrix(read_matrix(self._config.matrix), self._inventory)
            sweep = new_sweep(plan, self._database)
            self._progress = Progress(self._now().isoformat(), sweep.id)
            self._progress.save(self._config)
        self._measure(sweep, canary=True)
        return sweep

    def _measure(self, sweep: Sweep, *, canary: bool) -> None:
        with at_work(self._database, sweep.id) as presence:
            plan = plan_again(sweep, self._inventory, self._database, failed_too=False)
            code = self._measured(
                sweep, plan, presence=presence, deadline_s=max(0.0, self._left_s()), canary=canary, kept=self._kept,
                summary=canary,
            )  # fmt: skip
        if code == INTERRUPTED:
            raise _Interrupted

    def _left_s(self) -> float:
        assert self._progress is not None
        return self._config.deadline_s - self._progress.age_s(self._now())

    def _judge(self, sweep: Sweep) -> Night:
        config = self._config
        candidate = Measured.read(self._database, sweep)
        records = [r for r in self._database.nights(name=config.name, last=NIGHTS) if r.sweep_id != sweep.id]
        earlier = [Night.from_json(record.record, trends_only=True) for record in records]
        lines = trends(candidate, config.limits, earlier)
        pinned = self._database.baseline(config.baseline)
        if pinned is None:
            hint = (
                f"no baseline {config.baseline} is pinned, so nothing was compared: "
                f"`edgemoe-farm baseline pin {config.baseline} {sweep.id}`"
            )
            return without_baseline(config.name, candidate, lines, hint, self._now().isoformat())
        self._baseline_sweep = pinned.sweep_id
        held = against_baseline(self._database, pinned, sweep, config.limits)
        at = self._now().isoformat()
        context = Context(config.limits, config.rounds, self._database.acknowledgements(at=at))
        return judge_night(
            config.name, held.comparison, held.baseline, held.candidate, lines, context, partial(self._again, sweep),
            self._kept.__contains__, at,
        )  # fmt: skip

    def _again(self, night: Sweep, suspicions: Sequence[Suspicion], round_: int) -> tuple[str, Sequence[Run]] | None:
        """Measures old and new engine in turns: a sweep of its own for each round."""
        assert self._progress is not None
        if round_ < len(self._progress.rounds):
            sweep = self._database.sweep(self._progress.rounds[round_])
        elif self._left_s() <= 0:
            return None
        else:
            matrix = parse_matrix(
                night.matrix_toml, source=f"matrix of sweep {night.id}", folder=Path(night.matrix_folder)
            )
            plan = in_turns(plan_matrix(matrix, self._inventory), suspicions, self._config.pairs)
            what = ", ".join(dict.fromkeys(f"{s.cell.strategy} on {s.cell.device}" for s in suspicions))
            click.echo(f"measuring again, old and new engine in turns: {printable(what)}", err=True)
            sweep = new_sweep(plan, self._database, purpose="confirmation")
            self._progress = self._progress.with_round(sweep.id)
            self._progress.save(self._config)
        self._measure(sweep, canary=False)
        return sweep.id, Measured.read(self._database, sweep).runs


def in_turns(plan: Plan, suspicions: Sequence[Suspicion], pairs: int) -> Plan:
    """Pairs of blocks, 2 i and 2 i + 1, of old and new engine; who comes first changes from pair to pair."""
    cells = {s.cell.key: (s.old_sha256, s.new_sha256) for s in suspicions}
    turns = [
        ((key, 2 * pair + turn), engine)
        for pair in range(pairs)
        for i, (key, engines) in enumerate(cells.items())
        for turn, engine in enumerate(engines if (pair + i) % 2 == 0 else engines[::-1])
    ]
    return plan.in_turns([key for key, _ in turns], [engine for _, engine in turns])


def _tell(url: str, night: Night, config: NightlyConfig) -> None:
    failure = post(url, payload(night), deadline_s=config.webhook_deadline_s)
    if failure is not None:
        what = f"webhook ({config.webhook_env}): {failure}: {summary_line(night)}"
        click.echo(f"edgemoe-farm: warning: {printable(what)}", err=True)
