"""`model`: from a checkpoint to a container, and everything that one may want to know of a container."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from engine.codec import to_json
from engine.protocol import MOST_LANES, PAGE_CACHES, READERS, ExpertBudget, RunRequest, Sample, Sampling
from harness.cli.adapting import adapt
from harness.cli.bar import progress_bar
from harness.cli.evaluating import evaluate_command, profile
from harness.cli.options import Budget, json_option, print_json, printable
from harness.cli.tracing import replay, trace
from harness.cli.viewing import view
from harness.errors import UsageError

# engine.offline brings numpy and its friends: each command imports what it needs, so that help stays quick.

_PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int4", "int3", "int2")

_container = click.argument("container", metavar="FILE", type=click.Path(path_type=Path))


class TokenIds(click.ParamType[tuple[int, ...]]):
    """5,6,7"""

    name = "IDS"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            ids = tuple(int(word) for word in value.split(","))
        except ValueError:
            self.fail(f"{value[:60]!r} is not a list of token ids such as 5,6,7", param, ctx)
        if min(ids) < 0:
            self.fail(f"{min(ids)} is not a token id: they count from 0", param, ctx)
        return ids


@click.group()
def model() -> None:
    """Import a trained model, and look into what was imported.

    \b
    A checkpoint (config.json and safetensors; Mixtral or Switch Transformers) becomes one file, a container, with each
    expert in a record of its own. Devices read containers; so do all commands here.
    """


@model.command("import")
@click.argument("checkpoint", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--to", type=click.Path(path_type=Path), required=True, metavar="FILE", help="The container to write.")
@click.option(
    "--precision",
    "precisions",
    type=click.Choice(_PRECISIONS),
    multiple=True,
    help="Of the experts; may be repeated, the first is the one used.  [default: the checkpoint's own]",
)
@click.option(
    "--group",
    type=click.Choice(["0", "32", "64"]),
    help="Columns that share a scale in int formats; 0: one scale per output channel.  [default: 32]",
)
@click.option(
    "--symmetric/--asymmetric",
    "symmetric",
    default=None,
    help="Int formats without or with a zero point, which matters most at two bits.  [default: asymmetric]",
)
@click.option(
    "--non-experts",
    type=click.Choice(["stored", "int8"]),
    default="stored",
    show_default=True,
    help="Precision of embedding, attention and head: the checkpoint's own, or INT8, 32 columns to a scale.",
)
@click.option("--origin", metavar="TEXT", help="Where the model comes from: kept in the container.")
@click.option("--licence", metavar="TEXT", help="Its licence: kept in the container.")
@click.option("--force", is_flag=True, help="Overwrite FILE even if it is not a container.")
def import_command(
    checkpoint: Path,
    to: Path,
    precisions: tuple[str, ...],
    group: str | None,
    symmetric: bool | None,
    non_experts: str,
    origin: str | None,
    licence: str | None,
    force: bool,
) -> None:
    """Turn the Hugging Face checkpoint in DIR into a container.

    A tokenizer.json beside config.json goes along. An
    existing container is replaced, once the new one is whole.

    \b
    Examples:
      edgemoe-farm model import mixtral/ --to mixtral.emoe
      edgemoe-farm model import mixtral/ --to mixtral-int4.emoe --precision int4
      edgemoe-farm model import mixtral/ --to small.emoe --precision int4 --non-experts int8
      edgemoe-farm model import mixtral/ --to both.emoe --precision int8 --precision int2 --group 64
    """
    from engine.offline.importing.importer import formats_of, import_checkpoint, is_container

    if not force and to.is_file() and not is_container(to):
        raise UsageError(f"{to}: is not a container; choose another name, or overwrite it with --force")
    formats = formats_of(precisions, None if group is None else int(group), symmetric)
    known = {"origin": origin, "licence": licence}
    start = time.monotonic()
    with progress_bar("experts") as progress:
        container = import_checkpoint(
            checkpoint, to, formats, int8_non_experts=non_experts == "int8",
            origin={k: v for k, v in known.items() if v is not None}, progress=progress,
        )  # fmt: skip
    labels = ", ".join(f.label for f in container.formats)
    click.echo(
        f"{to}: {len(container.primary)} experts in {labels}, {container.file_bytes / 1e6:.1f} MB,"
        f" in {time.monotonic() - start:.1f} s"
    )


@model.command()
@_container
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
        table.add_row(key.replace("_", " "), printable(value))
    Console(highlight=False, markup=False).print(table)


@model.command()
@_container
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
@_container
@click.option("--tokens", type=TokenIds(), required=True, help="The sequence, such as 5,6,7.")
@click.option("--to", type=click.Path(path_type=Path), required=True, metavar="OUT.npy", help="The file to write.")
@click.option("--decoder-tokens", type=TokenIds(), help="Only for models with an encoder and a decoder.")
def logits(container: Path, tokens: tuple[int, ...], to: Path, decoder_tokens: tuple[int, ...] | None) -> None:
    """Write the logits after each token, float32 (positions, vocabulary).

    A model with an encoder reads TOKENS there; the logits are those after each of the decoder's tokens.

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


@model.command()
@_container
@click.option("--prompt", metavar="TEXT", help="The prompt as text.")
@click.option("--tokens", type=TokenIds(), help="The prompt as token ids, such as 5,6,7.")
@click.option("--max-new", type=click.IntRange(1), default=32, show_default=True, help="Tokens to generate.")
@click.option("--strategy", default="full-load", show_default=True, help="See `edgemoe-farm strategies`.")
@click.option("--expert-budget", type=Budget(), help="Of the expert buffer, such as 64MiB or 10-experts.")
@click.option(
    "--profile",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="For strategies that predict: see `model profile`.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the sampling.")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-p", type=float, default=1.0, show_default=True, help="Sample from the likeliest tokens only.")
@click.option("--stop-at-eos", is_flag=True, help="Stop at the model's end-of-sequence token.")
@click.option(
    "--reader",
    type=click.Choice(("auto", *READERS)),
    default="auto",
    show_default=True,
    help="How experts are read; auto: cold, what a probe of the storage finds fastest.",
)
@click.option(
    "--lanes", type=click.IntRange(0, MOST_LANES), default=0, help="Threads that read.  [default: as the probe finds]"
)
@click.option(
    "--page-cache",
    type=click.Choice(PAGE_CACHES),
    default="warm",
    show_default=True,
    help="cold: emptied before, and reading experts leaves nothing in it.",
)
@click.option(
    "--threads", type=click.IntRange(0), default=0, help="Of the arithmetic.  [default: what suits the cores]"
)
@click.option(
    "--emulated-read-bytes-per-s", type=float, metavar="RATE", help="Slow expert reads down to this rate: emulation."
)
@json_option
def generate(
    container: Path,
    prompt: str | None,
    tokens: tuple[int, ...] | None,
    max_new: int,
    strategy: str,
    expert_budget: ExpertBudget | None,
    profile: Path | None,
    seed: int,
    temperature: float,
    top_p: float,
    stop_at_eos: bool,
    reader: str,
    lanes: int,
    page_cache: str,
    threads: int,
    emulated_read_bytes_per_s: float | None,
    as_json: bool,
) -> None:
    """Continue a prompt on this machine, in an engine process as on a device, and say what each token cost.

    \b
    Examples:
      edgemoe-farm model generate model.emoe --prompt "In the beginning" --max-new 40
      edgemoe-farm model generate model.emoe --tokens 5,6,7 --strategy edgemoe --profile model.profile \\
        --expert-budget 12-experts --page-cache cold --json
    """
    from engine.offline.generation import generate as generate_offline
    from engine.offline.tokenizer import Tokenizer

    if (prompt is None) == (tokens is None):
        raise UsageError("give the prompt either as text (--prompt) or as token ids (--tokens)")
    if prompt is not None:
        tokens = Tokenizer.from_container(str(container)).encode(prompt)
    if not tokens:
        raise UsageError("the prompt is empty: give at least one token")
    result = generate_offline(
        RunRequest(
            run_id="model-generate",
            container=str(container),
            strategy=strategy,
            prompts=(tokens,),
            max_new_tokens=max_new,
            expert_budget=expert_budget,
            profile=None if profile is None else str(profile),
            sampling=Sampling(temperature, top_p, seed),
            stop_at_eos=stop_at_eos,
            reader=reader,
            lanes=lanes,
            page_cache=page_cache,
            emulated_read_bytes_per_s=emulated_read_bytes_per_s,
            threads=threads,
        )
    )
    (sample,) = result.samples
    tokenizer = Tokenizer.find(str(container))
    text = None if tokenizer is None else tokenizer.decode(sample.tokens)
    if as_json:
        content = {"tokens": sample.tokens, "text": text, "prompt_tokens": tokens, "strategy": strategy}
        print_json({**content, **to_json({"sample": sample, "load": result.load, "totals": result.totals})})
        return
    shown = ",".join(map(str, sample.tokens)) if text is None else (prompt or "") + text
    click.echo("".join(c if c.isprintable() or c == "\n" else " " for c in shown))
    for warning in result.load.warnings + result.load.notes:
        click.echo(f"note: {printable(warning)}", err=True)
    click.echo(_cost(sample, result.totals.peak_resident_bytes), err=True)


def _cost(sample: Sample, peak_bytes: int | None) -> str:
    steps = sample.steps
    decode = steps.time_s[1:]
    asked = sum(steps.hits) + sum(steps.late) + sum(steps.misses)
    parts = [f"prefill {steps.time_s[0] * 1e3:.1f} ms"]
    if decode:
        parts.append(
            f"{sum(decode) / len(decode) * 1e3:.2f} ms a token, {sum(steps.stall_s[1:]) / sum(decode):.0%} stalled"
        )
    if asked:
        parts.append(f"expert hits {sum(steps.hits) / asked:.0%}")
    parts.append(f"{sum(steps.read_bytes) / 1e6:.1f} MB read")
    if peak_bytes is not None:
        parts.append(f"peak {peak_bytes / 1e6:.0f} MB")
    return ", ".join(parts)


for command in (evaluate_command, profile, adapt, trace, replay, view):
    model.add_command(command)
