"""`compare`: compares two sides of what was measured, cell by cell."""

from __future__ import annotations

import sys

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from harness.cli.options import MetricShare, json_option, open_results, results_option
from reports.judging.judgement import GATED, THRESHOLD, Comparison, Mark, compare_sides, exit_code
from reports.judging.noise import noise_before
from reports.judging.selection import select
from reports.judging.tables import FORMATS, HEADINGS, cells, totals
from reports.metrics import METRICS
from reports.text import harmless

_STYLES = {
    Mark.BETTER: "green",
    Mark.WORSE: "bold red",
    Mark.FAILING: "bold red",
    Mark.GONE: "red",
    Mark.INCONCLUSIVE: "yellow",
    Mark.SUSPECT: "yellow",
}

_GATE_CODES = """\b
Exit codes with --gate:
  1    a regression: worse, another answer, or failing by the engine's own fault
  3    incomplete: a result is missing
  4    infrastructure: the candidate has no result at all
  5    inconclusive: suspect runs, too few of them, too much noise, or not comparable
  0    nothing of all that
  2    usage
  130  interrupted
"""


@click.command(epilog=_GATE_CODES)
@click.argument("baseline", metavar="A", default="latest~1")
@click.argument("candidate", metavar="B", default="latest")
@click.option("--metric", "names", multiple=True, type=click.Choice(tuple(METRICS)), metavar="NAME",
              help=f"What to compare, as often as wanted.  [default: {', '.join(GATED)}]")  # fmt: skip
@click.option("--threshold", "thresholds", multiple=True, type=MetricShare(METRICS),
              help="The change that matters: of all metrics, or of one.  [default: "
              + ", ".join(f"{name}={share}" for name, share in GATED.items()) + f", others {THRESHOLD}]")  # fmt: skip
@click.option("--gate", is_flag=True, help="Tell by the exit code whether B is worse than A.")
@click.option("--changed", is_flag=True, help="In the terminal, leave out what is unchanged.")
@click.option("--format", "format_name", type=click.Choice(("terminal", *FORMATS)), default="terminal",
              show_default=True, help="How to show it.")  # fmt: skip
@results_option
@json_option
@click.pass_context
def compare(
    context: click.Context,
    baseline: str,
    candidate: str,
    names: tuple[str, ...],
    thresholds: tuple[tuple[str, float], ...],
    gate: bool,
    changed: bool,
    format_name: str,
    results_place: str,
    as_json: bool,
) -> None:
    """Compare B, the candidate, with A, the baseline, cell by cell.

    Both may be sweeps, devices, strategies or engines. By default the latest sweep is compared with the one before it
    of the same matrix.

    \b
    A and B are each one of
      SWEEP              latest, a sweep's id or its beginning, or a matrix's name;
                         with ~N, the Nth sweep of its matrix before that
      PART:NAME,...      some of the latest sweep, where PART is device, strategy, container,
                         workload, budget or cache; engine:SHA256 and commit:HASH are of
                         the newest sweep that they measured
      PART:NAME@SWEEP    some of that sweep
      RUN                the id of one run

    A part that only one side names holds for both. Only what was measured under the same conditions is compared; the
    rest is listed with the reason. Ratios are B over A, with a 95 % interval from the blocks: in pairs where both sides
    are of one sweep. A change is better or worse where it is larger than the threshold and than the device's noise (how
    sweeps of one engine differed there), and the interval leaves no doubt.

    \b
    Examples:
      edgemoe-farm compare                                         the latest two sweeps of a matrix
      edgemoe-farm compare latest~7 latest --gate
      edgemoe-farm compare 20261123-2215 20261124-2215 --changed
      edgemoe-farm compare device:pi4 device:pi5                   of the latest sweep
      edgemoe-farm compare strategy:naive-swap strategy:edgemoe --format latex
      edgemoe-farm compare strategy:edgemoe,device:pi5@latest~1 latest
      edgemoe-farm compare engine:3f2a91 engine:b07c42 --metric tpot_s --threshold 2%
      edgemoe-farm compare commit:1a2b3c commit:4d5e6f --gate
      edgemoe-farm compare nightly~1 nightly --json | jq '.pairs[] | select(.verdict == "worse")'
    """
    every = dict(thresholds).get("")
    metrics = {name: GATED.get(name, THRESHOLD) if every is None else every for name in names or GATED}
    metrics |= {name: share for name, share in thresholds if name in metrics}
    with open_results(results_place) as database:
        chosen = select(database, baseline, candidate)
        is_between = chosen.between[0].id != chosen.between[1].id and not chosen.across
        noise = noise_before(database, chosen.between[1], metrics) if is_between else {}
    found = compare_sides(chosen.baseline, chosen.candidate, metrics, noise=noise, across=chosen.across)
    if as_json:
        format_name = "json"
    if format_name == "terminal":
        _show(found, changed)
    else:
        click.echo(FORMATS[format_name](found), nl=False)
    if gate:
        context.exit(exit_code(found))


def _show(comparison: Comparison, only_changed: bool) -> None:
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 180)
    table = Table(*HEADINGS, box=None, pad_edge=False)
    for judged in comparison.judged:
        if not (only_changed and judged.mark is Mark.UNCHANGED):
            *texts, verdict, why = map(harmless, cells(judged))
            table.add_row(*texts, Text(verdict, _STYLES.get(judged.mark, "")), why)
    console.print(f"{harmless(comparison.candidate)} against {harmless(comparison.baseline)}")
    if table.row_count:
        console.print(table)
    for cell, reason in comparison.incomparable:
        console.print(f"not comparable: {harmless(cell)}: {harmless(reason)}")
    for what, before, after in comparison.environment:
        console.print(f"different, too: {harmless(what)}: {harmless(before)} → {harmless(after)}")
    console.print(totals(comparison))
