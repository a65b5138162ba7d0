"""`strategies`: lists what the engine can do, from the engine's own table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table

from engine.protocol import ExpertBudget
from engine.strategies import STRATEGIES
from harness.cli.bar import progress_bar
from harness.cli.options import Budget, context_option, json_option, print_json, profile_option, read_text
from harness.errors import UsageError

if TYPE_CHECKING:
    from engine.offline.accuracy.losses import MeasuredLoss


@click.command()
@click.option(
    "--loss-on", "container", type=click.Path(path_type=Path), metavar="CONTAINER",
    help="Measure what each lossy strategy loses on it.",
)  # fmt: skip
@click.option("--text", type=click.Path(path_type=Path), metavar="PATH", help="With --loss-on: held-out UTF-8 text.")
@click.option("--tokens", type=click.IntRange(2), default=2000, show_default=True, help="Use so many tokens of it.")
@context_option
@click.option("--expert-budget", type=Budget(), help="Size of the expert buffer.  [default: the strategy's own]")
@profile_option
@json_option
def strategies(
    container: Path | None,
    text: Path | None,
    tokens: int,
    context: int,
    expert_budget: ExpertBudget | None,
    profile: Path | None,
    as_json: bool,
) -> None:
    """List the strategies that a matrix may name.

    Lossless ones generate the same tokens on one container. What the others lose depends on container, budget and text:
    --loss-on measures it, as perplexity on a text that is fed token by token.

    \b
    Examples:
      edgemoe-farm strategies --json
      edgemoe-farm strategies --loss-on model.emoe --text held-out.txt --profile model.profile.json
    """
    if (container is None) != (text is None):
        raise UsageError("--loss-on needs a text to measure on, and --text a container: give both")
    losses: dict[str, MeasuredLoss] = {}
    if container is not None and text is not None:
        losses = _measure(container, text, tokens, context, expert_budget, profile)
    rows = [{**row.describe(), "measured_loss": losses.get(name)} for name, row in STRATEGIES.items()]
    if as_json:
        print_json(rows)
        return
    table = Table("strategy", "what it does", "after", "loss", box=None, pad_edge=False)
    for row in rows:
        table.add_row(row["name"], row["summary"], row["source"], _loss(row["lossless"], row["measured_loss"]))
    Console(highlight=False, markup=False).print(table)
    for name, loss in losses.items():
        if loss.unfit:
            click.echo(f"{name}: {loss.unfit}", err=True)


def _measure(
    container: Path, text: Path, tokens: int, context: int, budget: ExpertBudget | None, profile: Path | None
) -> dict[str, MeasuredLoss]:
    from engine.offline.accuracy.losses import measured_losses
    from engine.offline.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_container(str(container))
    encoded = tokenizer.encode(read_text(text))[:tokens]
    with progress_bar("passages") as progress:
        return measured_losses(
            str(container),
            encoded,
            len(tokenizer.decode(encoded).encode()),
            expert_budget=budget,
            profile=None if profile is None else str(profile),
            context=context,
            progress=progress,
        )


def _loss(lossless: bool, measured: MeasuredLoss | None) -> str:
    if lossless:
        return "none"
    if measured is None:
        return "not measured"
    return "does not fit" if measured.perplexity_rise is None else f"{measured.perplexity_rise:+.2%} perplexity"
