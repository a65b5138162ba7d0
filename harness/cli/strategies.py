"""`strategies`: what the engine can do, from the engine's own table."""

from __future__ import annotations

import click
from rich.console import Console
from rich.table import Table

from engine.offline.catalogue import strategies as catalogue
from harness.cli.options import json_option, print_json
from harness.plan import StrategyTraits


@click.command()
@json_option
def strategies(as_json: bool) -> None:
    """List the strategies that a matrix may name.

    \b
    Example:
      edgemoe-farm strategies --json
    """
    rows = catalogue()
    if as_json:
        print_json(rows)
        return
    table = Table("strategy", "what it does", "after", box=None, pad_edge=False)
    for row in rows:
        table.add_row(row["name"], row["summary"], row["source"])
    Console(highlight=False).print(table)


def traits() -> dict[str, StrategyTraits]:
    """Of every strategy, by name."""
    return {
        row["name"]: StrategyTraits(
            row["name"],
            has_buffer=row["has_budget"],
            needs_profile=row["needs_profile"],
        )
        for row in catalogue()
    }
