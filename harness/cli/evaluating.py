"""`model eval` and `model profile`: how well a model predicts text, and what it activates on the way."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import click

from engine.codec import to_json
from engine.protocol import ExpertBudget
from harness.cli.bar import progress_bar
from harness.cli.options import PAIRS_HELP, Budget, json_option, print_json, read_text
from harness.errors import UsageError


@click.command("eval")
@click.argument("container", metavar="FILE", type=click.Path(path_type=Path))
@click.option("--text", type=click.Path(path_type=Path), metavar="PATH", help="UTF-8 text.")
@click.option("--pairs", type=click.Path(path_type=Path), metavar="PATH", help=PAIRS_HELP)
@click.option("--context", type=click.IntRange(2), default=256, show_default=True, help="Tokens of a window.")
@click.option("--tokens", type=click.IntRange(2), help="Use no more of the text than so many tokens.  [default: all]")
@click.option("--max-new", type=click.IntRange(1), default=64, show_default=True, help="With --pairs: tokens to write.")
@click.option(
    "--against", type=click.Path(path_type=Path), metavar="REFERENCE",
    help="A container, such as the full precision's: say how often both hold the same token likeliest.",
)  # fmt: skip
@click.option("--strategy", help="Decode token by token under this strategy: what a lossy one loses.")
@click.option("--expert-budget", type=Budget(), help="With --strategy: of its expert buffer.")
@click.option(
    "--profile", type=click.Path(path_type=Path), metavar="PROFILE", help="With --strategy: see `model profile`."
)
@json_option
def evaluate_command(
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
    """Measure how well FILE predicts a text: perplexity over windows without overlap.

    The first token of each window is not scored, having nothing to be predicted from; a model with an encoder reads the
    first half of each window there and is scored on the second. Bits per byte can be compared between models with
    different tokenizers. With pairs, their targets are scored, and what the model writes itself in Rouge-2.

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
    from engine.offline.accuracy.perplexity import evaluate, evaluate_passages
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
            result = evaluate(model, encoded, size, context, progress, reference)
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


@click.command()
@click.argument("container", metavar="FILE", type=click.Path(path_type=Path))
@click.option("--text", "texts", type=click.Path(path_type=Path), required=True, multiple=True, metavar="PATH",
              help="UTF-8 text like what the model will see; several may follow.")  # fmt: skip
@click.option("--to", type=click.Path(path_type=Path), required=True, metavar="PROFILE", help="The profile to write.")
@click.option("--context", type=click.IntRange(2), default=256, show_default=True, help="Tokens of a window.")
@click.argument("more", metavar="[PATH]...", nargs=-1, type=click.Path(path_type=Path))
def profile(container: Path, texts: tuple[Path, ...], to: Path, context: int, more: tuple[Path, ...]) -> None:
    """Count which experts a text activates, and which follow on which: what the path predictor knows.

    What was counted stands in PROFILE.partial until the end: the same command, given again after an interruption, goes
    on from there.

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
