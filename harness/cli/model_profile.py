"""`model profile`: counts which experts a text activates."""

from __future__ import annotations

from pathlib import Path

import click

from harness.cli.bar import progress_bar
from harness.cli.options import container_argument, context_option, read_text


@click.command()
@container_argument
@click.option("--text", "texts", type=click.Path(path_type=Path), required=True, multiple=True, metavar="PATH",
              help="UTF-8 text like what the model will see; several may follow.")  # fmt: skip
@click.option("--to", type=click.Path(path_type=Path), required=True, metavar="PROFILE", help="The profile to write.")
@context_option
@click.argument("more", metavar="[PATH]...", nargs=-1, type=click.Path(path_type=Path))
def profile(container: Path, texts: tuple[Path, ...], to: Path, context: int, more: tuple[Path, ...]) -> None:
    """Count which experts a text activates, and along which paths.

    The path predictor needs this. What was counted stands in PROFILE.partial until the end: the same command, given
    again after an interruption, goes on from there.

    \b
    Example:
      edgemoe-farm model profile model.emoe --text news.txt stories.txt --to model.profile.json
    """
    from engine.offline.accuracy.model import counting_model
    from engine.offline.routing.activations import profile_texts
    from engine.offline.tokenizer import Tokenizer

    contents = [read_text(path) for path in texts + more]
    partial = to.with_name(to.name + ".partial")
    with counting_model(str(container)) as offline, progress_bar("windows") as progress:
        tokenizer = Tokenizer.from_container(str(container))
        encoded = [tokenizer.encode(content) for content in contents]
        counted = profile_texts(offline, encoded, context, progress, partial)
    counted.save(str(to))
    click.echo(f"{to}: {counted.tokens} tokens, {counted.layers} layers of {counted.experts} experts")
