"""`model eval`: measures how well a model predicts text."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import click

from engine.codec import to_json
from engine.protocol import ExpertBudget
from harness.cli.bar import progress_bar
from harness.cli.options import (
    PAIRS_HELP,
    Budget,
    container_argument,
    context_option,
    json_option,
    print_json,
    read_text,
    text_tokens_option,
)
from harness.errors import UsageError


@click.command("eval")
@container_argument
@click.option("--text", type=click.Path(path_type=Path), metavar="PATH", help="UTF-8 text.")
@click.option("--pairs", type=click.Path(path_type=Path), metavar="PATH", help=PAIRS_HELP)
@context_option
@text_tokens_option
@click.option("--max-new", type=click.IntRange(1), default=64, show_default=True, help="With --pairs: tokens to write.")
@click.option(
    "--against", type=click.Path(path_type=Path), metavar="REFERENCE",
    help="A container, such as the full precision's: say how often both hold the same token likeliest.",
)  # fmt: skip
@click.option("--strategy", help="Decode token by token under this strategy: what a lossy one loses.")
@click.option("--expert-budget", type=Budget(), help="With --strategy: size of its expert buffer.")
@click.option(
    "--profile", type=click.Path(path_type=Path), metavar="PROFILE", help="With --strategy: see `model profile`."
)
@json_option
def evaluate(
    container: Path,
    text: Path | None,
    pairs: Path | None,
    context: int,
    tokens: int | None,
    max_new: int,
    against: Path | None,
    strategy: str | None,
    expert_budget: ExpertBudget | None,
    profile: Path | None,
    as_json: bool,
) -> None:
    """Measure how well FILE predicts a text.

    The measure is perplexity over windows without overlap. The first token of each window is not scored, having nothing
    to be predicted from; a model with an encoder reads the first half of each window there and is scored on the second.
    Bits per byte can be compared between models with different tokenizers. With pairs, their targets are scored, and
    what the model writes itself in Rouge-2.

    \b
    Examples:
      edgemoe-farm model eval model.emoe --text held-out.txt --json
      edgemoe-farm model eval small.emoe --text held-out.txt --against model.emoe
      edgemoe-farm model eval switch.emoe --pairs xsum.jsonl
      edgemoe-farm model eval model.emoe --text held-out.txt --strategy edgemoe-cacheaware --profile model.profile.json
    """
    from engine.offline.accuracy.decoding import DecodingModel
    from engine.offline.accuracy.model import OfflineModel
    from engine.offline.accuracy.passages import passages_of, read_pairs, rouge_2
    from engine.offline.accuracy.perplexity import evaluate as evaluate_windows
    from engine.offline.accuracy.perplexity import evaluate_passages
    from engine.offline.tokenizer import Tokenizer

    if (text is None) == (pairs is None):
        raise UsageError("give either a text (--text) or pairs (--pairs)")
    if strategy is None and (expert_budget is not None or profile is not None):
        raise UsageError("--expert-budget and --profile say how a strategy decodes: give --strategy too")
    tokenizer = Tokenizer.from_container(str(container))
    with ExitStack() as stack:
        model = (
            OfflineModel.open(str(container))
            if strategy is None
            else stack.enter_context(
                DecodingModel(
                    str(container),
                    strategy,
                    expert_budget=expert_budget,
                    profile=None if profile is None else str(profile),
                )
            )
        )
        reference = None if against is None else OfflineModel.open(str(against))
        progress = stack.enter_context(progress_bar("passages"))
        rouge = None
        if text is not None:
            content = read_text(text)
            encoded = tokenizer.encode(content)
            size = len(content.encode())
            if tokens is not None and tokens < len(encoded):
                encoded = encoded[:tokens]
                size = len(tokenizer.decode(encoded).encode())
            result = evaluate_windows(model, encoded, size, context, progress, reference)
        else:
            assert pairs is not None
            known = read_pairs(pairs)
            passages = passages_of(known, tokenizer)
            size, count = sum(len(p.target.encode()) for p in known), sum(len(p.continuation) for p in passages)
            result = evaluate_passages(model, passages, count, size, None, progress, reference)
            written = []
            for done, passage in enumerate(passages):
                progress(done, len(passages))
                written.append(tokenizer.decode(model.generate(passage.prompt, max_new)))
            rouge = rouge_2([pair.target for pair in known], written)
    if as_json:
        derived = {"perplexity": result.perplexity, "bits_per_byte": result.bits_per_byte, "rouge_2": rouge}
        print_json({**to_json(result), **derived})
        return
    parts = [
        f"perplexity {result.perplexity:.3f}, {result.nats_per_token:.4f} nats a token",
        f"{result.bits_per_byte:.3f} bits a byte",
        f"top-1 accuracy {result.top1_accuracy:.1%}",
    ]
    if result.top1_agreement is not None:
        parts.append(f"top-1 agreement {result.top1_agreement:.1%}, divergence {result.divergence_nats:.4f} nats")
    if rouge is not None:
        parts.append(f"Rouge-2 {rouge:.4f}")
    scored = f"{result.scored_tokens} tokens scored" + ("" if text is None else f" in windows of {context}")
    click.echo(f"{text or pairs}: {', '.join(parts)}; {scored}")
