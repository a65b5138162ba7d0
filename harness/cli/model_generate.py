"""`model generate`: continues a prompt on this machine, in an engine process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from engine.codec import to_json
from engine.options import generation_request
from engine.protocol import Sample
from harness.cli.options import (
    TokenIds,
    container_argument,
    generation_options,
    json_option,
    print_json,
)
from harness.errors import UsageError
from reports.metrics import tpot_s
from reports.text import harmless


@click.command()
@container_argument
@click.option("--prompt", metavar="TEXT", help="The prompt as text.")
@click.option("--tokens", type=TokenIds(), help="The prompt as token ids, such as 5,6,7.")
@generation_options
@json_option
def generate(
    container: Path,
    prompt: str | None,
    tokens: tuple[int, ...] | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Continue a prompt on this machine, and say what it cost.

    The engine runs in a process of its own, as on a device.

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
    result = generate_offline(generation_request("model-generate", str(container), tokens, options))
    (sample,) = result.samples
    tokenizer = Tokenizer.find(str(container))
    text = None if tokenizer is None else tokenizer.decode(sample.tokens)
    if as_json:
        content = {"tokens": sample.tokens, "text": text, "prompt_tokens": tokens, "strategy": options["strategy"]}
        print_json({**content, **to_json({"sample": sample, "load": result.load, "totals": result.totals})})
        return
    shown = ",".join(map(str, sample.tokens)) if text is None else (prompt or "") + text
    click.echo(harmless(shown, lines=True))
    for warning in result.load.warnings + result.load.notes:
        click.echo(f"note: {harmless(warning)}", err=True)
    click.echo(_cost(sample, result.totals.peak_resident_bytes), err=True)


def _cost(sample: Sample, peak_bytes: int | None) -> str:
    steps = sample.steps
    token_s = tpot_s(sample)
    asked = sum(steps.hits) + sum(steps.late) + sum(steps.misses)
    parts = [f"prefill {steps.time_s[0] * 1e3:.1f} ms"]
    if token_s is not None:
        stalled = sum(steps.stall_s[1:]) / sum(steps.time_s[1:])
        parts.append(f"{token_s * 1e3:.2f} ms a token, {stalled:.0%} stalled")
    if asked:
        parts.append(f"expert hits {sum(steps.hits) / asked:.0%}")
    parts.append(f"{sum(steps.read_bytes) / 1e6:.1f} MB read")
    if peak_bytes is not None:
        parts.append(f"peak {peak_bytes / 1e6:.0f} MB")
    return ", ".join(parts)
