"""`model replay`: tells how often each predictor and eviction policy would have been right."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

import click
from rich.console import Console
from rich.table import Table

from harness.cli.bar import progress_bar
from harness.cli.options import json_option, print_json
from harness.errors import UsageError


@click.command()
@click.argument("trace_file", metavar="TRACE", type=click.Path(path_type=Path))
@click.option(
    "--profile", type=click.Path(path_type=Path), required=True, metavar="PROFILE", help="See `model profile`."
)
@click.option("--buffer-experts", metavar="N,N...", help="Buffer sizes.  [default: shares from 1/8 to 3/4 of all]")
@click.option("--by-layer", is_flag=True, help="Also print the recall of each predictor in each MoE layer.")
@json_option
def replay(trace_file: Path, profile: Path, buffer_experts: str | None, by_layer: bool, as_json: bool) -> None:
    """Tell how often each predictor and policy would be right.

    The policies and predictors are the engine's own; belady is the most that any policy could reach. Nothing is
    preloaded, as in the paper's comparison of policies.

    \b
    Example:
      edgemoe-farm model replay held-out.trace --profile model.profile.json --buffer-experts 16,32,64
    """
    from engine.experts.profile import PathProfile
    from engine.offline.routing.replay import replay_policies, replay_predictors
    from engine.offline.routing.trace import Trace

    try:
        sizes = [int(word) for word in buffer_experts.split(",")] if buffer_experts else []
    except ValueError:
        raise UsageError(f"--buffer-experts {buffer_experts!r}: write numbers of experts, such as 16,32") from None
    loaded, known = Trace.load(str(trace_file)), PathProfile.load(str(profile))
    with progress_bar("replays") as progress:
        policies = replay_policies(loaded, known, sizes, progress=progress)
    predictors = replay_predictors(loaded, known)
    if as_json:
        print_json(
            {
                "tokens": len(loaded.tokens),
                "predictors": {
                    name: {f"recall_at_{n}": {"by_layer": rates, "mean": mean(rates)} for n, rates in recalls.items()}
                    for name, recalls in predictors.items()
                },
                "policies": {
                    name: [
                        {"buffer_experts": size, "hit_rate": h.hit_rate, "hits": h.hits, "misses": h.misses}
                        for size, h in by_size.items()
                    ]
                    for name, by_size in policies.items()
                },
            }
        )
        return
    console = Console(highlight=False, markup=False)
    table = Table("predictor", *(f"recall at {n}" for n in next(iter(predictors.values()))), box=None, pad_edge=False)
    for name, recalls in predictors.items():
        table.add_row(name, *(f"{mean(rates):.1%}" for rates in recalls.values()))
    console.print(table)
    console.print()
    if by_layer:
        at = max(n for n in next(iter(predictors.values())) if n <= max(1, loaded.top_k))
        table = Table(f"recall at {at} by layer", *predictors, box=None, pad_edge=False)
        for layer, rates in enumerate(zip(*(recalls[at] for recalls in predictors.values()), strict=True)):
            table.add_row(str(loaded.first_layer + layer), *(f"{rate:.1%}" for rate in rates))
        console.print(table)
        console.print()
    table = Table(
        "hit rate with", *(f"{size} experts" for size in next(iter(policies.values()))), box=None, pad_edge=False
    )
    for name, by_size in policies.items():
        table.add_row(name, *(f"{hits.hit_rate:.1%}" for hits in by_size.values()))
    console.print(table)
