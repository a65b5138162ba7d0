"""`model generate`: continues a prompt on this machine, in an engine process."""

from __future__ import annotations

from pathlib import Path

import click

from engine.protocol import MOST_LANES, PAGE_CACHES, READERS, ExpertBudget, RunRequest, Sample, Sampling, to_json
from harness.cli.options import Budget, TokenIds, json_option, print_json, printable
from harness.errors import UsageError


@click.command()
@click.argument("container", metavar="FILE", type=click.Path(path_type=Path))
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
