"""`model adapt`: bits for each expert, within a tolerable loss or a budget."""

from __future__ import annotations

from pathlib import Path

import click

from harness.cli.options import json_option, print_json
from harness.errors import UsageError


@click.command()
@click.argument("container", metavar="FILE", type=click.Path(path_type=Path))
@click.option(
    "--profile", type=click.Path(path_type=Path), required=True, metavar="PROFILE", help="See `model profile`."
)
@click.option("--text", type=click.Path(path_type=Path), required=True, metavar="PATH", help="Calibration, UTF-8 text.")
@click.option("--tokens", type=click.IntRange(2), help="Use no more of the text than so many tokens.  [default: all]")
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
    type=click.Choice(["perplexity", "agreement"]),
    default="perplexity",
    show_default=True,
    help="agreement: of the likeliest token with the full precision's.",
)
@click.option("--context", type=click.IntRange(2), default=256, show_default=True, help="Tokens of a window.")
@click.option("--to", type=click.Path(path_type=Path), required=True, metavar="FILE2", help="The container to write.")
@json_option
def adapt(
    container: Path,
    profile: Path,
    text: Path,
    tokens: int | None,
    tolerance: float,
    budget_bytes: int | None,
    method: str,
    metric: str,
    context: int,
    to: Path,
    as_json: bool,
) -> None:
    """Give each expert of FILE its own bitwidth, as few as the loss allows.

    FILE holds its experts in full precision. The plan, with all measured losses, is written beside FILE2.

    \b
    Examples:
      edgemoe-farm model adapt model.emoe --profile model.profile.json --text train.txt --tolerance 0.02 --to small.emoe
      edgemoe-farm model adapt model.emoe --profile model.profile.json --text train.txt --budget-bytes 12000000 \\
        --to small.emoe --json
    """
    from engine.experts.profile import PathProfile
    from engine.offline.adapt import adapt as plan_for
    from engine.offline.adapt import write_adapted
    from engine.offline.importer import is_container
    from engine.offline.tokenizer import Tokenizer
    from harness.cli.model import progress_bar, read_text

    if to.is_file() and not is_container(to):
        raise UsageError(f"{to}: is not a container; choose another name")
    calibration = Tokenizer.from_container(str(container)).encode(read_text(text))[:tokens]
    with progress_bar("measurements") as progress:
        plan = plan_for(
            str(container), calibration, profile=PathProfile.load(str(profile)), method=method, metric=metric,
            tolerance=tolerance, budget_bytes=budget_bytes, context=context, progress=progress,
        )  # fmt: skip
    with progress_bar("experts") as progress:
        written = write_adapted(str(container), plan, to, progress)
    plan.save(to.with_name(to.name + ".plan.json"))
    if as_json:
        print_json({**plan.to_json(), "bytes_total": written.file_bytes, "tokens": len(calibration)})
        return
    mix = ", ".join(f"{count} in {precision}" for precision, count in plan.precisions().items())
    click.echo(f"{to}: {plan.bytes_experts:,} bytes of experts, {mix}; {metric} loss {plan.loss:.2%} on {text}")
