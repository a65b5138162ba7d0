"""`nightly`: measures a matrix, compares it with its baseline and tells people. For cron and CI."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import click

from harness.cli.options import (
    GATE_EXIT_CODES,
    inventory_option,
    json_option,
    known_hosts_option,
    load_inventory,
    offline_option,
    open_results,
    results_option,
    wait_option,
)
from harness.cli.showing import PATIENT, measure_and_show
from harness.errors import FarmError, InfrastructureError, unforeseen
from harness.night.config import NightlyConfig, read_nightly
from harness.night.run import NightRun
from harness.night.state import finish, locked, state_file
from harness.night.webhook import post, webhook_url
from harness.sweep.engines import EngineStore, engines_folder
from harness.sweep.measure import INTERRUPTED
from harness.sweep.progress import JsonLines
from reports.errors import ReportError, SelectionError
from reports.nights.night import Night
from reports.nights.summary import markdown, payload, summary_line
from reports.text import harmless


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
    """Measure a matrix and tell whether something got worse.

    CONFIG names the matrix; the exit code tells. Every device has to pass a canary run first. What looks worse than the
    pinned baseline, or than the nights before, is measured again, the baseline's engine and today's in turns on the
    same device: only what that confirms is a regression. Page, Markdown summary and JUnit XML go to the folder that
    CONFIG names, and a webhook is told. A night that was killed goes on when the command is given again; two at once
    are refused.

    \b
    Examples:
      edgemoe-farm nightly nightly.toml
      edgemoe-farm nightly nightly.toml --results postgresql://farm@lab/farm --json
    """
    settings = read_nightly(config)
    url = webhook_url(settings.webhook_env) if settings.webhook_env else ""
    with locked(settings):
        with open_results(results_place, create=True, patience=PATIENT) as database:
            measure = partial(
                measure_and_show, database=database, known_hosts=known_hosts, offline=offline, as_json=as_json,
                wait_s=wait_s,
            )  # fmt: skip
            inventory, kept = load_inventory(inventory_path), EngineStore(engines_folder())
            run = NightRun(settings, inventory, database, kept, measure=measure, say=_say)
            with _failing_as_infrastructure():
                night = run.measure_and_judge()
                if night is None:
                    context.exit(INTERRUPTED)
                run.store(night)
            page = _published(run, night)
        if url:
            _tell(url, night, settings)
        try:
            finish(settings)
        except OSError as error:
            click.echo(f"edgemoe-farm: warning: {state_file(settings)} cannot be removed: {error.strerror}", err=True)
    if as_json:
        JsonLines(sys.stdout).say("night", **payload(night), page=None if page is None else str(page))
    else:
        click.echo(markdown(night))
        if page is not None:
            click.echo(f"report: {page}")
    unpublished = page is None and night.exit_code not in (1, 3)  # which come before 4
    context.exit(InfrastructureError.exit_code if unpublished else night.exit_code)


@contextlib.contextmanager
def _failing_as_infrastructure() -> Iterator[None]:
    """Gives what fails of the results and the disk the exit code that says so: 2 means that an argument is wrong."""
    try:
        yield
    except SelectionError:
        raise
    except ReportError as error:
        raise InfrastructureError(str(error)) from error


def _published(run: NightRun, night: Night) -> Path | None:
    """Returns the page; None where it could not be written: the night is stored, and its verdict stands."""
    try:
        return run.publish(night)
    except Exception as error:  # noqa: BLE001 - the verdict must not get lost with the page
        why = str(error) if isinstance(error, (FarmError, ReportError)) else unforeseen(error)
        remedy = f"`edgemoe-farm report {night.sweep_id}` makes it once that is mended"
        click.echo(f"edgemoe-farm: warning: the page was not published: {harmless(why)}: {remedy}", err=True)
        return None


def _say(news: str) -> None:
    click.echo(harmless(news), err=True)


def _tell(url: str, night: Night, config: NightlyConfig) -> None:
    try:
        failure = post(url, payload(night), deadline_s=config.webhook_deadline_s)
    except Exception as error:  # noqa: BLE001 - a message that fails is dropped
        failure = type(error).__name__
    if failure is not None:
        what = f"webhook ({config.webhook_env}): {failure}: {summary_line(night)}"
        click.echo(f"edgemoe-farm: warning: {harmless(what)}", err=True)
