"""`nightly`: a matrix measured, compared with its baseline, doubts measured again, and people told. For cron and CI."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import click

from engine.errors import EngineError
from harness.cli.options import (
    GATE_EXIT_CODES,
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
from harness.cli.showing import PATIENT, measure_and_show
from harness.errors import FarmError, InfrastructureError
from harness.night.config import (
    NightlyConfig,
    finish,
    locked,
    read_nightly,
)
from harness.night.run import NightRun
from harness.night.webhook import post, webhook_url
from harness.sweep.measure import INTERRUPTED
from harness.sweep.progress import JsonLines
from reports.errors import ReportError
from reports.nights.night import Night
from reports.nights.summary import markdown, payload, summary_line


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
                    measure_and_show, database=database, known_hosts=known_hosts, offline=offline, as_json=as_json,
                    wait_s=wait_s,
                )  # fmt: skip
                run = NightRun(settings, load_inventory(inventory_path), database, measured, _say)
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


def _say(news: str) -> None:
    click.echo(printable(news), err=True)


def _tell(url: str, night: Night, config: NightlyConfig) -> None:
    failure = post(url, payload(night), deadline_s=config.webhook_deadline_s)
    if failure is not None:
        what = f"webhook ({config.webhook_env}): {failure}: {summary_line(night)}"
        click.echo(f"edgemoe-farm: warning: {printable(what)}", err=True)
