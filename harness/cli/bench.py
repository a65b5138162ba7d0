"""`bench`: measures on this machine, side by side in one run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from engine.protocol import ExpertBudget
from engine.strategies import strategy_named
from harness.cli.bar import progress_bar
from harness.cli.options import (
    Budget,
    backend_option,
    container_argument,
    json_option,
    print_json,
    profile_option,
    read_text,
)
from harness.errors import UsageError


@click.group()
def bench() -> None:
    """Measure side by side on this machine, and print ratios."""


def _measuring_options(command: Any) -> Any:
    for option in reversed((
        click.option("--text", type=click.Path(path_type=Path), required=True, metavar="PATH",
                     help="UTF-8 text: prompts are cut out of it."),
        profile_option,
        click.option("--expert-budget", type=Budget(), help="Size of each expert buffer, such as 64MiB or 10-experts."),
        click.option("--rates", default="43,200,550", show_default=True, metavar="MB/S,...",
                     help="Rates of storage to emulate; those of the paper's devices by default."),
        click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Turns of each candidate."),
        click.option("--tokens", "new_tokens", type=click.IntRange(2), default=48, show_default=True,
                     help="Tokens to generate in a turn."),
        json_option,
    )):  # fmt: skip
        command = option(command)
    return command


_threads = click.option(
    "--threads",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Threads of the arithmetic, and of numpy's BLAS.",
)


@bench.command()
@click.argument("candidates", metavar="STRATEGY=CONTAINER...", nargs=-1, required=True)
@_measuring_options
def strategies(candidates: tuple[str, ...], **options: Any) -> None:
    """Compare strategies under emulated storage.

    Each runs on its own container. Every round all of them continue the same prompt, in turns that rotate; ratios are
    to the first, round by round. The floor is what no pipeline could beat: the bytes that a strategy missed at the
    storage's rate, or its arithmetic (the same container with all experts in memory), whichever is more. Strategies
    that lose nothing must give the same tokens on one container.

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
    """Repeat the paper's ablation of EdgeMoE, part by part.

    It begins with naive-swap in full precision. FULL holds the experts in full precision, ADAPTED in the bitwidths that
    `model adapt` gave them. The paper's ratios (switch-base-8, Jetson TX2) stand beside those measured; what came after
    the paper follows.

    \b
    Example:
      edgemoe-farm bench ablation model.emoe small.emoe --text held-out.txt --profile model.profile.json
    """
    from engine.offline.benchmarks.strategies import ABLATION

    later = ("edgemoe-buffer", "edgemoe-lookahead", "edgemoe-adaptive")
    chain = [f"{name}={full if name == 'naive-swap' else adapted}" for name in (*ABLATION, *later)]
    _compare(tuple(chain), ABLATION, **options)


@bench.command()
@click.option("--rows", type=click.IntRange(1, 1 << 20), default=14336, show_default=True, help="Rows of the matrix.")
@click.option(
    "--columns", type=click.IntRange(1, 1 << 20), default=4096, show_default=True, help="Columns of the matrix."
)
@click.option("--batch", type=click.IntRange(1, 4096), default=1, show_default=True, help="Vectors in a product.")
@click.option("--rounds", type=click.IntRange(2), default=9, show_default=True, help="Turns of each kernel.")
@_threads
@json_option
def kernels(rows: int, columns: int, batch: int, rounds: int, threads: int, as_json: bool) -> None:
    """Compare native kernels with numpy and a plain memory read.

    Each product walks over copies of the matrix that no cache holds. The last column but one is the rate at which a
    product gets through packed weights, over the rate at which as many threads read memory and do nothing else.

    \b
    Example:
      edgemoe-farm bench kernels --rows 3584 --columns 1024
    """
    from engine.offline.benchmarks.kernels import bench_kernels

    with threadpool_limits(threads), progress_bar("formats") as progress:
        found = bench_kernels(rows, columns, batch, rounds=rounds, threads=threads, progress=progress)
    if as_json:
        print_json(found)
        return
    table = Table("format", "kernels", "ms", "least to most", "over numpy", "GB/s", "of memory", "error", box=None,
                  pad_edge=False, title=f"{rows} x {columns}, batch of {batch}, threads: {threads}; memory reads at "
                  f"{found[-1]['dram_bytes_per_s'] / 1e9:.1f} GB/s", title_justify="left")  # fmt: skip
    for row in found:
        table.add_row(
            f"{row['precision']}{' in groups of ' + str(row['group']) if row['group'] else ''}",
            row["variant"] or row["backend"], f"{row['ms_median']:.2f}",
            f"{row['ms_least']:.2f} to {row['ms_most']:.2f}", f"{row['numpy_ratio']:.1f}",
            f"{row['bytes_per_s'] / 1e9:.1f}", f"{row['dram_fraction']:.0%}", f"{row['relative_error']:.0e}",
        )  # fmt: skip
    Console(highlight=False, markup=False).print(table)


@bench.command()
@click.argument("path", metavar="PATH", type=click.Path(path_type=Path))
@click.option("--block-bytes", type=click.IntRange(4096), help="Read at once.  [default: a container's largest expert, "
              "else 2.75 MiB]")  # fmt: skip
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Turns of each method.")
@click.option("--seconds", type=click.FloatRange(0.05, 60), default=1.0, show_default=True, help="Longest turn.")
@json_option
def storage(path: Path, block_bytes: int | None, rounds: int, seconds: float, as_json: bool) -> None:
    """Compare ways of reading experts from PATH, cold.

    They are compared with the storage's sequential rate past the page cache. PATH is a container or any other large
    file; it is only read, and leaves the page cache.

    \b
    Example:
      edgemoe-farm bench storage model.emoe
    """
    from engine.container import Container
    from engine.offline.benchmarks.storage import bench_storage
    from engine.offline.importing.importer import is_container

    if block_bytes is None:
        known = path.is_file() and is_container(path)
        block_bytes = Container.open(str(path)).largest_slot_bytes if known else 11 << 18
    with progress_bar("turns") as progress:
        found = bench_storage(str(path), block_bytes, rounds=rounds, seconds=seconds, progress=progress)
    if as_json:
        print_json(found)
        return
    table = Table("method", "lanes", "MB/s", "least to most", "of sequential", box=None, pad_edge=False,
                  title=f"blocks of {block_bytes:,} bytes; sequentially "
                  f"{found[0]['sequential_direct_bytes_per_s'] / 1e6:.0f} MB/s", title_justify="left")  # fmt: skip
    for row in found:
        rates = row["bytes_per_s_rounds"]
        table.add_row(
            row["method"], str(row["lanes"]), f"{row['bytes_per_s'] / 1e6:.0f}",
            f"{min(rates) / 1e6:.0f} to {max(rates) / 1e6:.0f}", f"{row['fraction_of_sequential_direct']:.0%}",
        )  # fmt: skip
    Console(highlight=False, markup=False).print(table)


@bench.command()
@container_argument
@click.option("--strategy", default="full-load", show_default=True, help="See `strategies`.")
@click.option("--expert-budget", type=Budget(), help="Size of the expert buffer.")
@profile_option
@click.option("--text", type=click.Path(path_type=Path), metavar="PATH", help="A prompt; else some token ids.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Turns of each backend.")
@click.option("--tokens", "new_tokens", type=click.IntRange(2), default=32, show_default=True,
              help="Tokens to generate in a turn.")  # fmt: skip
@_threads
@json_option
def decode(
    container: Path,
    strategy: str,
    expert_budget: ExpertBudget | None,
    profile: Path | None,
    text: Path | None,
    rounds: int,
    new_tokens: int,
    threads: int,
    as_json: bool,
) -> None:
    """Compare decoding FILE with native kernels and with numpy.

    \b
    Example:
      edgemoe-farm bench decode model.emoe --text held-out.txt
    """
    from engine.experts.profile import PathProfile
    from engine.offline.benchmarks.kernels import bench_decode
    from engine.offline.tokenizer import Tokenizer

    tokens = (
        tuple(range(3, 35)) if text is None else Tokenizer.from_container(str(container)).encode(read_text(text))[:32]
    )
    with threadpool_limits(threads), progress_bar("turns") as progress:
        found = bench_decode(
            str(container), strategy, tokens, budget=expert_budget,
            profile=None if profile is None else PathProfile.load(str(profile)), rounds=rounds, new_tokens=new_tokens,
            threads=threads, progress=progress,
        )  # fmt: skip
    if as_json:
        print_json(found)
        return
    for backend, row in found["backends"].items():
        rates, stacked = row["tokens_per_s_rounds"], row["stacked_s"]
        click.echo(
            f"{row['variant'] or backend}: {row['tokens_per_s']:.1f} tokens/s ({min(rates):.1f} to {max(rates):.1f}), "
            f"a token: {stacked['arithmetic_and_interpreter'] * 1e3:.2f} ms of arithmetic and interpreter, "
            f"{stacked['stall'] * 1e3:.2f} ms of waiting for experts"
        )
    click.echo(f"native over numpy: {found['ratio']:.2f}")


@bench.command()
@container_argument
@click.option(
    "--strategy", default="naive-swap", show_default=True, help="One that needs no profile: see `strategies`."
)
@backend_option
@click.option("--warm", is_flag=True, help="Leave the container in the page cache.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Processes to start.")
@_threads
@json_option
def start(container: Path, strategy: str, backend: str, warm: bool, rounds: int, threads: int, as_json: bool) -> None:
    """Show where the time to the first token goes.

    \b
    Example:
      edgemoe-farm bench start model.emoe
    """
    from engine.container import Container
    from engine.offline.benchmarks.start import bench_start

    Container.open(str(container))
    strategy_named(strategy)
    with progress_bar("starts") as progress:
        found = bench_start(
            str(container), strategy, backend=backend, threads=threads, cold=not warm, rounds=rounds, progress=progress
        )
    if as_json:
        print_json(found)
        return
    table = Table("phase", "ms", "least to most", "share", box=None, pad_edge=False, title_justify="left",
                  title=f"{found['total_s'] * 1e3:.0f} ms to the first token, page cache {found['page_cache']}, "
                  f"{found['non_expert_bytes'] / 1e6:.1f} MB of non-experts")  # fmt: skip
    for name, row in found["phases"].items():
        table.add_row(name.replace("_", " "), f"{row['s'] * 1e3:.1f}",
                      f"{row['s_least'] * 1e3:.1f} to {row['s_most'] * 1e3:.1f}",
                      f"{row['s'] / found['total_s']:.0%}")  # fmt: skip
    Console(highlight=False, markup=False).print(table)


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
    from engine.offline.benchmarks.strategies import Candidate, compare, summarise
    from engine.offline.tokenizer import Tokenizer

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
    with threadpool_limits(1), progress_bar("turns") as progress:
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
