"""`gate`: compares a sweep with a pinned one and tells by the exit code whether something got worse."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import click

from harness.cli.baseline import pinned_baseline, sweep_of_a_matrix
from harness.cli.options import (
    GATE_EXIT_CODES,
    MetricShare,
    json_option,
    open_results,
    print_json,
    results_option,
)
from harness.night.config import read_nightly
from reports.files import replacing
from reports.judging.judgement import GATED
from reports.judging.noise import noise_before
from reports.nights.gate import Measured, against_baseline
from reports.nights.outcome import Context, judge_sweep
from reports.nights.summary import junit, markdown, payload
from reports.results.database import LATEST


@click.command(epilog=GATE_EXIT_CODES)
@click.argument("run", metavar="RUN", default=LATEST)
@click.option("--baseline", "name", default="main", show_default=True, help="The name under which it is pinned.")
@click.option(
    "--config", type=click.Path(path_type=Path), help="Take limits and baseline from a nightly configuration."
)
@click.option("--limit", "limits", type=MetricShare(GATED), multiple=True,
              help="The share by which a metric, or all, may get worse.")  # fmt: skip
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
    """Compare RUN with the pinned baseline; the exit code tells.

    RUN is a sweep's id, the beginning of it, or `latest`. Nothing is measured: what is worse by more than its limit is
    a regression if the interval and the device's noise allow no other answer, else inconclusive. `nightly` measures
    again what it suspects.

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
    at = datetime.now(UTC).isoformat()
    with open_results(results_place) as database:
        sweep = sweep_of_a_matrix(database, run)
        pinned = pinned_baseline(database, name)
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
