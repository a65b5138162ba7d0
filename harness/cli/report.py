"""`report`: writes a page of what was measured."""

from __future__ import annotations

from pathlib import Path

import click

from harness.cli.options import open_results, results_option
from harness.errors import UsageError
from reports.errors import UnknownSweepError
from reports.nights import bundle
from reports.nights.bundle import is_bundle
from reports.pages import KINDS, PageKind, render
from reports.results.database import LATEST


@click.command()
@click.argument("runs", metavar="[RUN]...", nargs=-1)
@click.option("-o", "--output", type=click.Path(path_type=Path), default="report.html", show_default=True,
              help="The page to write.")  # fmt: skip
@click.option("--kind", type=click.Choice(KINDS), default="auto", show_default=True,
              help="What the page is for.")  # fmt: skip
@results_option
def report(runs: tuple[str, ...], output: Path, kind: PageKind, results_place: str) -> None:
    """Write a page of what was measured.

    RUN is a sweep's id, the beginning of it, `latest`, or a bundle's file. Several sweeps have one page.

    \b
    --kind:
      nightly      what changed against the baseline, where, and since when, of a sweep that `nightly` judged
      devices      what runs where, how fast and in how much memory
      strategies   strategies side by side on each device
      auto         nightly for such a sweep, devices where those outnumber the strategies, else strategies

    The page is one file without any reference outside itself: mail it, archive it, print it. Every number in it leads
    to its raw samples, conditions, verdict and command.

    \b
    Examples:
      edgemoe-farm report latest -o page.html
      edgemoe-farm report 20261123-2215 --kind strategies -o page.html
      edgemoe-farm report pi-sweep jetson-sweep --kind devices -o devices.html
      edgemoe-farm report night.bundle -o page.html
    """
    bundles = [Path(run) for run in runs if is_bundle(Path(run))]
    if bundles and len(runs) > 1:
        raise UsageError(f"report: {bundles[0]} is a bundle, which has a page of its own: give it alone")
    if bundles:
        found = bundle.read(bundles[0])
        with found.database() as database:
            page = render(database, [found.subject], output, kind)
    else:
        with open_results(results_place) as database:
            try:
                page = render(database, runs or (LATEST,), output, kind)
            except UnknownSweepError as error:
                files = [run for run in runs if Path(run).is_file()]
                if not files:
                    raise
                raise UsageError(f"report: {files[0]} is no bundle, and {error}") from None
    click.echo(f"report: {page}")
