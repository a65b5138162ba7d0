"""`results migrate`, `prune`, `import`, `bundle`: keep results over the years, and carry them to other labs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from engine.codec import to_json
from harness.cli.options import (
    Moment,
    json_option,
    open_results,
    print_json,
    results_option,
    to_terminal,
)
from harness.errors import UsageError
from harness.sweep.presence import is_alive
from harness.version import farm_version
from reports.nights import bundle
from reports.nights.bundle import Bundle, is_bundle
from reports.records import Sweep
from reports.results import migrations
from reports.results.connection import Place
from reports.results.database import LATEST, ResultsDatabase
from reports.results.merging import Entry, Merged, entries_of, json_lines, merge
from reports.results.retention import Retention, outdated, remove, vacuum
from reports.text import harmless


@click.command()
@results_option
@json_option
def migrate(results_place: str, as_json: bool) -> None:
    """Bring the database of an older farm to the newest schema.

    In one transaction: it is done, or nothing has changed. An SQLite file is copied to one beside it before. Steps that
    older farms do not notice are also taken whenever the database is opened; others wait for this command, since the
    farms that share it must be of one release from then on.

    \b
    Examples:
      edgemoe-farm results migrate
      edgemoe-farm results migrate --results postgresql://farm@lab/farm
    """
    done = migrations.migrate(results_place)
    if as_json:
        print_json({"database": done.name, "before": done.before, "after": done.after, "backup": _text(done.backup)})
    elif done.before == done.after:
        click.echo(f"{done.name} is at revision {done.after}, the newest")
    else:
        click.echo(f"{done.name}: revision {done.before} → {done.after}")
        if done.backup:
            click.echo(f"as it was before: {done.backup}")


@click.command()
@click.option(
    "--older-than", "before", type=Moment(), required=True, help="An age (400d) or a day: what is older goes."
)
@click.option("--keep", type=click.IntRange(min=0), default=1, show_default=True, metavar="N",
              help="The last so many sweeps of each matrix stay, however old.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Say what would go, and remove nothing.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@click.option("--vacuum/--no-vacuum", "gives_back", default=True, show_default=True,
              help="Give the room back to the disk; who writes waits meanwhile.")  # fmt: skip
@results_option
@json_option
def prune(
    before: str, keep: int, dry_run: bool, yes: bool, gives_back: bool, results_place: str, as_json: bool
) -> None:
    """Remove old sweeps with their runs from the results database.

    Baselines stay, and what is being measured; how nights ended stays, too, and with it their trend lines.

    \b
    Examples:
      edgemoe-farm results prune --older-than 400d --dry-run
      edgemoe-farm results prune --older-than 2025-01-01 --keep 30 --yes
    """
    with open_results(results_place) as database:
        known = database.controllers()
        alive = {controller.sweep_id for controller in known if is_alive(controller)}
        dead = {controller.id for controller in known if not is_alive(controller)}
        recorded = database.recorded()
        doomed = outdated(database, Retention(before, keep), running=alive)
        removed, runs = list(doomed.sweeps), 0
        resumed: list[Sweep] = []
        had = {sweep.id: recorded[sweep.id].runs if sweep.id in recorded else 0 for sweep in removed}
        if dry_run:
            runs = sum(had.values())
        if not as_json:
            for sweep, why in doomed.kept:
                click.echo(f"kept  {harmless(sweep.id)}  {harmless(sweep.name)}: {harmless(why)}")
            for sweep in doomed.sweeps if dry_run else ():
                click.echo(f"goes  {harmless(sweep.id)}  {harmless(sweep.name)}")
        if removed and not dry_run:
            if not yes:
                _confirm(len(removed), before)
            with _progress("sweeps removed", len(removed), quiet=as_json) as tell:
                for n, sweep in enumerate(doomed.sweeps, start=1):
                    gone = remove(database, sweep, dead=dead, runs=had[sweep.id])
                    if gone is None:
                        removed.remove(sweep)
                        resumed.append(sweep)
                    runs += gone or 0
                    tell(n)
            for sweep in resumed if not as_json else ():
                click.echo(f"kept  {harmless(sweep.id)}  {harmless(sweep.name)}: was resumed meanwhile")
            if gives_back and not alive:
                vacuum(database)
    if as_json:
        kept = [{"id": sweep.id, "reason": why} for sweep, why in doomed.kept]
        kept += [{"id": sweep.id, "reason": "was resumed meanwhile"} for sweep in resumed]
        print_json({"removed": [sweep.id for sweep in removed], "runs": runs, "kept": kept, "dry_run": dry_run})
        return
    click.echo(f"{'would remove' if dry_run else 'removed'} {len(removed)} sweeps from before {before}, {runs} runs")
    if removed and not dry_run and gives_back and alive:
        click.echo("the room is not given back while somebody measures: prune again later", err=True)


@click.command("import")
@click.argument("source", metavar="FILE|URL")
@results_option
@json_option
@click.pass_context
def import_results(context: click.Context, source: str, results_place: str, as_json: bool) -> None:
    """Add the results of another database, export or bundle.

    Importing twice changes nothing. Where both have something of one name and it differs, what is here stays, the
    conflict is named, and the exit code is 3.

    \b
    Examples:
      edgemoe-farm results import laptop.db
      edgemoe-farm results import night.bundle --results postgresql://farm@lab/farm
      edgemoe-farm results import runs.jsonl
    """
    with (
        _entries(source) as entries,
        open_results(results_place, create=True) as database,
        _progress("records", None, quiet=as_json) as tell,
    ):
        merged = merge(database, entries, tell)
    if as_json:
        print_json(to_json(merged))
    else:
        _show(merged, source)
    context.exit(3 if merged.conflicts else 0)


@click.command("bundle")
@click.argument("runs", metavar="[RUN]...", nargs=-1)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The file to write.")
@click.option(
    "--verify", type=click.Path(path_type=Path), metavar="FILE", help="Say what a bundle holds, if it is whole."
)
@results_option
@json_option
def bundle_sweeps(
    runs: tuple[str, ...], output: Path | None, verify: Path | None, results_place: str, as_json: bool
) -> None:
    """Write sweeps to one file that another machine can verify.

    Each RUN is a sweep's id, the beginning of it, or `latest`. It has all records, the matrix, the hashes of
    containers, workloads and engines, each device's environment, and how a night was judged. `results import FILE` adds
    it to a database, `report FILE` renders it: the same page, byte for byte. The hash that is shown says that nothing
    was changed on the way.

    \b
    Examples:
      edgemoe-farm results bundle latest -o night.bundle
      edgemoe-farm results bundle --verify night.bundle
    """
    if (verify is None) == (output is None) or (verify is not None and runs):
        raise UsageError("results bundle: give RUN... and -o FILE to write a bundle, or --verify FILE")
    if verify is None:
        assert output is not None
        with open_results(results_place) as database:
            bundle.write(database, runs or (LATEST,), output, farm_version())
    path = verify or output
    assert path is not None
    found = bundle.read(path)
    if as_json:
        print_json({"bundle": str(path), "sha256": found.sha256, **to_json(found.manifest)})
    else:
        _describe(path, found)


def _describe(path: Path, found: Bundle) -> None:
    manifest = found.manifest
    click.echo(f"{path}: whole, sha256 {found.sha256}")
    click.echo(f"  made by farm {harmless(manifest.farm_version)}; {manifest.runs} runs, {len(found.nights)} nights")
    for sweep in found.sweeps:
        click.echo(f"  sweep {harmless(sweep.id)}  {harmless(sweep.name)}")
    for kind, hashes in (("container", manifest.containers), ("workload", manifest.workloads)):
        for sha256, name in hashes.items():
            click.echo(f"  {kind} {harmless(name)}  {harmless(sha256)}")
    for sha256 in manifest.engines:
        click.echo(f"  engine {harmless(sha256)}")
    for device, facts in manifest.environment.items():
        told = (", then ".join(facts.get(name, ())) for name in ("model", "os", "kernel", "emulated"))
        click.echo(f"  device {harmless(device)}: {harmless('; '.join(filter(None, told)))}")


def _show(merged: Merged, source: str) -> None:
    new = f"{merged.sweeps} sweeps, {merged.runs} runs and {merged.nights} nights are new"
    click.echo(f"{_shown(source)}: {new}, {merged.known} records were here already")
    for conflict in merged.conflicts:
        click.echo(f"conflict: {harmless(conflict)}", err=True)


def _shown(source: str) -> str:
    return harmless(Place.parse(source).name)


@contextmanager
def _entries(source: str) -> Iterator[Iterator[Entry]]:
    """Yields the records of a database, an export or a bundle; its first bytes tell which it is."""
    file = Place.parse(source).file
    if file is None or _is_database(file):
        with ResultsDatabase.open(source, create=False, reading=True) as database:
            yield entries_of(database)
    elif not file.is_file():
        raise UsageError(f"results import: no file {file}: give a database, an export or a bundle")
    elif file.stat().st_size == 0:  # not even an export without runs tells of success where a copy went wrong
        raise UsageError(f"results import: {file} is empty: get it again")
    elif is_bundle(file):
        yield bundle.read(file).entries
    else:
        yield json_lines(file)


def _is_database(file: Path) -> bool:
    try:
        with file.open("rb") as stream:
            return stream.read(16) == b"SQLite format 3\0"
    except OSError:
        return False


def _confirm(n: int, before: str) -> None:
    if not to_terminal():
        raise UsageError(f"results prune: {n} sweeps from before {before} would go for good: say so with --yes")
    click.confirm(f"Remove {n} sweeps from before {before} for good?", abort=True, err=True)


@contextmanager
def _progress(what: str, total: int | None, *, quiet: bool) -> Iterator[Callable[[int], Any]]:
    """Shows a line that counts in a terminal, and removes it at the end."""
    columns = (SpinnerColumn(), TextColumn(what), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=quiet or not to_terminal()) as progress:
        task = progress.add_task(what, total=total)
        yield lambda n: progress.update(task, completed=n)


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
