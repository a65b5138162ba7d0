"""`bench`: measurements on this machine, side by side in one run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from engine.protocol import ExpertBudget
from harness.cli.options import Budget, json_option, print_json
from harness.errors import UsageError


@click.group()
def bench() -> None:
    """Measure side by side on this machine, and print ratios."""


def _measuring_options(command: Any) -> Any:
    for option in reversed((
        click.option("--text", type=click.Path(path_type=Path), required=True, metavar="PATH",
                     help="UTF-8 text: prompts are cut out of it."),
        click.option("--profile", type=click.Path(path_type=Path), metavar="PROFILE", help="See `model profile`."),
        click.option("--expert-budget", type=Budget(), help="Of each expert buffer, such as 64MiB or 10-experts."),
        click.option("--rates", default="43,200,550", show_default=True, metavar="MB/S,...",
                     help="Rates of storage to emulate; those of the paper's devices by default."),
        click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Turns of each candidate."),
        click.option("--tokens", "new_tokens", type=click.IntRange(2), default=48, show_default=True,
                     help="Tokens to generate in a turn."),
        json_option,
    )):  # fmt: skip
        command = option(command)
    return command


@bench.command()
@click.argument("candidates", metavar="STRATEGY=CONTAINER...", nargs=-1, required=True)
@_measuring_options
def strategies(candidates: tuple[str, ...], **options: Any) -> None:
    """Compare strategies, each on its container, under emulated storage.

    Every round all of them continue the same prompt, in turns that rotate; ratios are to the first, round by round.
    The floor is what no pipeline could beat: the bytes that a strategy missed at the storage's rate, or its arithmetic
    (the same container with all experts in memory), whichever is more. Strategies that lose nothing must give the same
    tokens on one container.

    \b
    Example:
      edgemoe-farm bench strategies naive-swap=model.emoe edgemoe=small.emoe --text held-out.txt \\
        --profile model.profile.json --expert-budget 12MiB --rates 200
    """
    _compare(candidates, None, **options)


@bench.command()
@click.argument("full", metavar="FULL", type=click.Path(path_type=Path))
@click.argument("adapted", metavar="ADAPTED", type=click.Path(path_type=Path))
@_measuring_options
def ablation(full: Path, adapted: Path, **options: Any) -> None:
    """Repeat the paper's ablation: naive-swap in full precision, then one part of EdgeMoE after another.

    FULL holds the experts in full precision, ADAPTED in the bitwidths that `model adapt` gave them. The paper's ratios
    (switch-base-8, Jetson TX2) stand beside those measured; what came after the paper follows.

    \b
    Example:
      edgemoe-farm bench ablation model.emoe small.emoe --text held-out.txt --profile model.profile.json
    """
    from engine.offline.benchmarks import ABLATION

    later = ("edgemoe-buffer", "edgemoe-lookahead", "edgemoe-adaptive")
    chain = [f"{name}={full if name == 'naive-swap' else adapted}" for name in (*ABLATION, *later)]
    _compare(tuple(chain), ABLATION, **options)


def _compare(
    candidates: tuple[str, ...],
    paper: dict[str, float] | None,
    text: Path,
    profile: Path | None,
    expert_budget: ExpertBudget | None,
    rates: str,
    rounds: int,
    new_tokens: int,
    as_json: bool,
) -> None:
    from engine.experts.profile import PathProfile
    from engine.offline.benchmarks import Candidate, compare, summarise
    from engine.offline.tokenizer import Tokenizer
    from harness.cli.model import progress_bar, read_text

    parsed = [Candidate.parse(candidate) for candidate in candidates]
    try:
        bytes_per_s = [float(rate) * 1e6 for rate in rates.split(",")]
    except ValueError:
        bytes_per_s = []
    if not bytes_per_s or min(bytes_per_s) <= 0:
        raise UsageError(f"--rates {rates!r}: write rates in MB/s, such as 43,200")
    tokens = Tokenizer.from_container(parsed[0].container).encode(read_text(text))
    known = None if profile is None else PathProfile.load(str(profile))
    turns, rows = len(bytes_per_s) * (rounds + 1) * len(parsed), []
    with progress_bar("turns") as progress:
        done = 0

        def advance() -> None:
            nonlocal done
            progress(done, turns)
            done += 1

        for rate in bytes_per_s:
            measured = compare(
                parsed, tokens, rate, budget=expert_budget, profile=known, rounds=rounds, new_tokens=new_tokens,
                progress=advance,
            )  # fmt: skip
            rows += summarise(measured, rate, paper)
    if as_json:
        print_json({"rounds": rounds, "tokens": new_tokens, "candidates": rows})
        return
    for rate in bytes_per_s:
        _print_table(rate, [row for row in rows if row["bytes_per_s"] == rate], paper is not None)


def _print_table(bytes_per_s: float, rows: list[dict[str, Any]], with_paper: bool) -> None:
    names = ["strategy", "ms a token", "ratio", "least to most"] + ["paper"] * with_paper
    table = Table(
        *names, "floor ms", "x floor", "stalled", "hits", "MB a token", "recall", box=None, pad_edge=False,
        title=f"emulated storage, {bytes_per_s / 1e6:g} MB/s", title_justify="left",
    )  # fmt: skip
    for row in rows:
        paper = [] if not with_paper else ["" if row["paper_ratio"] is None else f"{row['paper_ratio']:.2f}"]
        table.add_row(
            row["strategy"], f"{row['tpot_ms']:.2f}", f"{row['ratio']:.2f}",
            f"{row['ratio_least']:.2f} to {row['ratio_most']:.2f}", *paper, f"{row['floor_ms']:.2f}",
            f"{row['times_floor']:.2f}", f"{row['stall_share']:.0%}", f"{row['hit_rate']:.0%}",
            f"{row['read_bytes_per_token'] / 1e6:.2f}",
            "" if row["recall_at_k"] is None else f"{row['recall_at_k']:.0%}",
        )  # fmt: skip
    console = Console(highlight=False, markup=False)
    console.print(table)
    console.print()
