"""`model`: tells what a container holds, and has the commands on models as its own."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from harness.cli.bar import progress_bar
from harness.cli.model_adapt import adapt
from harness.cli.model_eval import evaluate
from harness.cli.model_generate import generate
from harness.cli.model_import import import_model
from harness.cli.model_profile import profile
from harness.cli.model_replay import replay
from harness.cli.model_trace import trace
from harness.cli.model_view import view
from harness.cli.options import TokenIds, container_argument, json_option, print_json
from harness.errors import UsageError
from reports.text import harmless

# engine.offline brings numpy and its friends: each command imports what it needs, so that help stays quick.


@click.group()
def model() -> None:
    """Import a trained model, and look into what was imported.

    \b
    A checkpoint (config.json and safetensors; Mixtral or Switch Transformers) becomes one file, a container, with each
    expert in a record of its own. Devices read containers; so do all commands here.
    """


@model.command()
@container_argument
@json_option
def info(container: Path, as_json: bool) -> None:
    """Say what FILE holds.

    \b
    Example:
      edgemoe-farm model info model.emoe --json
    """
    from engine.offline.summary import container_summary

    summary = container_summary(str(container))
    if as_json:
        print_json(summary)
        return
    table = Table(box=None, show_header=False, pad_edge=False)
    for key, value in summary.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k} {v}" for k, v in value.items())
        elif key.startswith("bytes_"):
            value = f"{value:,}"
        table.add_row(key.replace("_", " "), harmless(value))
    Console(highlight=False, markup=False).print(table)


@model.command()
@container_argument
@json_option
def verify(container: Path, as_json: bool) -> None:
    """Read all of FILE and check every checksum.

    \b
    Example:
      edgemoe-farm model verify model.emoe
    """
    from engine.offline.summary import verify as verify_container

    with progress_bar("parts") as progress:
        parts, size = verify_container(str(container), progress)
    if as_json:
        print_json({"sound": True, "parts": parts, "bytes": size})
    else:
        click.echo(f"{container}: sound; {parts} checksums, {size:,} bytes")


@model.command()
@container_argument
@click.option("--tokens", type=TokenIds(), required=True, help="The sequence, such as 5,6,7.")
@click.option("--to", type=click.Path(path_type=Path), required=True, metavar="OUT.npy", help="The file to write.")
@click.option("--decoder-tokens", type=TokenIds(), help="Only for models with an encoder and a decoder.")
def logits(container: Path, tokens: tuple[int, ...], to: Path, decoder_tokens: tuple[int, ...] | None) -> None:
    """Write the logits after each token.

    They are float32 (positions, vocabulary). A model with an encoder reads TOKENS there; the logits are those after
    each of the decoder's tokens.

    \b
    Examples:
      edgemoe-farm model logits model.emoe --tokens 5,6,7 --to logits.npy
      edgemoe-farm model logits switch.emoe --tokens 5,6,7,1 --decoder-tokens 0,8,9 --to logits.npy
    """
    from engine.offline.accuracy.model import OfflineModel, save_logits

    offline = OfflineModel.open(str(container))
    if offline.has_encoder and decoder_tokens is None:
        raise UsageError(f"{container}: this model has a decoder of its own; give --decoder-tokens, start token first")
    if not offline.has_encoder and decoder_tokens is not None:
        raise UsageError(f"{container}: this model has no encoder; leave --decoder-tokens out")
    result = offline.logits(tokens, decoder_tokens)
    save_logits(to, result)
    click.echo(f"{to}: {result.shape[0]} positions of {result.shape[1]} logits")


for command in (adapt, evaluate, generate, import_model, profile, replay, trace, view):
    model.add_command(command)
