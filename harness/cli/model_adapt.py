"""`model adapt`: gives each expert its own bitwidth, within a tolerable loss or a budget."""

from __future__ import annotations

from pathlib import Path

import click

from harness.cli.bar import progress_bar
from harness.cli.options import (
    PAIRS_HELP,
    container_argument,
    context_option,
    json_option,
    print_json,
    read_text,
    text_tokens_option,
)
from harness.errors import UsageError


@click.command()
@container_argument
@click.option(
    "--profile", type=click.Path(path_type=Path), required=True, metavar="PROFILE", help="See `model profile`."
)
@click.option("--text", type=click.Path(path_type=Path), metavar="PATH", help="Calibration, UTF-8 text.")
@click.option("--pairs", type=click.Path(path_type=Path), metavar="PATH", help=PAIRS_HELP)
@text_tokens_option
@click.option("--max-new", type=click.IntRange(1), default=64, show_default=True, help="With rouge-2: tokens to write.")
@click.option(
    "--tolerance",
    type=click.FloatRange(0, 10),
    default=0.02,
    show_default=True,
    help="Tolerable relative loss.",
)
@click.option("--budget-bytes", type=click.IntRange(1), help="Least loss within so many expert bytes, instead.")
@click.option(
    "--method",
    type=click.Choice(["paper", "best"]),
    default="best",
    show_default=True,
    help="paper: EdgeMoE's search. best: by estimated loss per byte saved, with groups and zero points.",
)
@click.option(
    "--metric",
    type=click.Choice(["perplexity", "agreement", "rouge-2"]),
    default="perplexity",
    show_default=True,
    help="agreement: of the likeliest token with the full precision's. rouge-2: of what is written, with --pairs.",
)
@context_option
@click.option("--to", type=click.Path(path_type=Path), required=True, metavar="FILE2", help="The container to write.")
@json_option
def adapt(
    container: Path,
    profile: Path,
    text: Path | None,
    pairs: Path | None,
    tokens: int | None,
    max_new: int,
    tolerance: float,
    budget_bytes: int | None,
    method: str,
    metric: str,
    context: int,
    to: Path,
    as_json: bool,
) -> None:
    """Give each expert of FILE as few bits as the loss allows.

    FILE holds its experts in full precision. The plan, with all measured losses, is written beside FILE2.

    \b
    Examples:
      edgemoe-farm model adapt model.emoe --profile model.profile.json --text train.txt --tolerance 0.02 --to small.emoe
      edgemoe-farm model adapt model.emoe --profile model.profile.json --text train.txt --budget-bytes 12000000 \\
        --to small.emoe --json
    """
    from engine.container import Container
    from engine.experts.profile import PathProfile
    from engine.models import model_config
    from engine.offline.accuracy.adapt import adapt as plan_for
    from engine.offline.accuracy.adapt import write_adapted
    from engine.offline.accuracy.calibration import Calibration
    from engine.offline.accuracy.passages import cut, passages_of, read_pairs
    from engine.offline.importing.importer import is_container
    from engine.offline.tokenizer import Tokenizer

    if to.is_file() and not is_container(to):
        raise UsageError(f"{to}: is not a container; choose another name")
    if (text is None) == (pairs is None):
        raise UsageError("give the calibration either as text (--text) or as pairs (--pairs)")
    if pairs is None and metric == "rouge-2":
        raise UsageError("--metric rouge-2 compares with what should be written: give --pairs")
    tokenizer = Tokenizer.from_container(str(container))
    if pairs is not None:
        known = read_pairs(pairs)
        targets = tuple(pair.target for pair in known) if metric == "rouge-2" else ()
        calibration = Calibration(tuple(passages_of(known, tokenizer)), targets, max_new)
    else:
        assert text is not None
        encoded = tokenizer.encode(read_text(text))[:tokens]
        calibration = Calibration(tuple(cut(encoded, context, model_config(Container.open(str(container))))))
    with progress_bar("measurements") as progress:
        plan = plan_for(
            str(container), calibration, profile=PathProfile.load(str(profile)), method=method, metric=metric,
            tolerance=tolerance, budget_bytes=budget_bytes, progress=progress,
        )  # fmt: skip
    with progress_bar("experts") as progress:
        written = write_adapted(str(container), plan, to, progress)
    plan.save(to.with_name(to.name + ".plan.json"))
    if as_json:
        print_json(
            {
                **plan.to_json(),
                "bytes_total": written.file_bytes,
                "tokens": sum(len(p.continuation) for p in calibration.passages),
            }
        )
        return
    mix = ", ".join(f"{count} in {precision}" for precision, count in plan.precisions().items())
    click.echo(
        f"{to}: {plan.bytes_experts:,} bytes of experts, {mix}; {metric} loss {plan.loss:.2%} on {text or pairs}"
    )
