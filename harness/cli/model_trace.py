"""`model trace`: records which experts a text activates, token by token."""

from __future__ import annotations

from pathlib import Path

import click

from harness.cli.bar import progress_bar
from harness.cli.options import container_argument, context_option, read_text, text_tokens_option


@click.command()
@container_argument
@click.option("--text", type=click.Path(path_type=Path), required=True, metavar="PATH", help="UTF-8 text.")
@text_tokens_option
@context_option
@click.option("--to", type=click.Path(path_type=Path), required=True, metavar="TRACE", help="The trace to write.")
def trace(container: Path, text: Path, tokens: int | None, context: int, to: Path) -> None:
    """Record which experts a text activates, token by token.

    \b
    Example:
      edgemoe-farm model trace model.emoe --text held-out.txt --to held-out.trace
    """
    from engine.container import Container
    from engine.offline.routing.trace import record_trace
    from engine.offline.tokenizer import Tokenizer

    opened = Container.open(str(container))
    given = Tokenizer.from_container(str(container)).encode(read_text(text))[:tokens]
    with progress_bar("windows") as progress:
        recorded = record_trace(opened, given, context, progress)
    recorded.save(str(to))
    click.echo(f"{to}: {len(recorded.tokens)} tokens, {recorded.layers} layers of {recorded.experts} experts")
