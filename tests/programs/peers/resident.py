"""Decoding with everything in memory, in turns: ours, and llama.cpp's on the same weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from tests.programs.peers.engines import Decoded, Work, on_cores, ours, theirs, undisturbed
from tests.programs.peers.models import Pair, PeerModel


def compare_resident(
    model: PeerModel,
    pairs: Sequence[Pair],
    prompt: tuple[int, ...],
    *,
    new_tokens: int,
    threads: int,
    rounds: int,
    tries: int,
    numpy: bool,
    progress: Callable[[str], None],
) -> list[dict[str, Any]]:
    """A row a pair. In each round every engine decodes once, in a fresh process on as many cores as it has threads."""
    work, enter = Work(prompt, new_tokens, threads), on_cores(threads)
    short = Work(prompt, max(2, new_tokens // 8), threads)  # for numpy, which takes its time
    turns: dict[str, Callable[[], Decoded]] = {}
    for pair in pairs:
        container, gguf = model.container(pair.ours), model.gguf(pair.theirs)
        turns[pair.ours] = lambda path=container: ours(path, work, enter)
        turns[pair.theirs] = lambda path=gguf: theirs(path, work, enter)
        if numpy:
            turns[f"{pair.ours} numpy"] = lambda path=container: ours(path, short, enter, backend="numpy")
    measured: dict[str, list[Decoded]] = {name: [] for name in turns}
    for nth in range(rounds):
        names = list(turns)[nth % len(turns) :] + list(turns)[: nth % len(turns)]
        for name in names:
            decoded = undisturbed(turns[name], tries)
            measured[name].append(decoded)
            progress(
                f"{model.name} {name}, threads {threads}: {decoded.steady_tokens_per_s:.2f} tokens/s, others had "
                f"{decoded.others_share:.0%}"
            )
    return [_row(model, pair, threads, measured) for pair in pairs]


def _row(model: PeerModel, pair: Pair, threads: int, measured: dict[str, list[Decoded]]) -> dict[str, Any]:
    mine, other = measured[pair.ours], measured[pair.theirs]
    ratios = [m.steady_tokens_per_s / o.steady_tokens_per_s for m, o in zip(mine, other, strict=True)]
    row = {
        "model": model.name,
        "pair": pair.name,
        "threads": threads,
        "ours_tokens_per_s": spread(m.steady_tokens_per_s for m in mine),
        "theirs_tokens_per_s": spread(o.steady_tokens_per_s for o in other),
        "ratio": spread(ratios),
        "backend": mine[0].backend,
        "ours_load_s": median(m.load_s for m in mine),
        "theirs_load_s": median(o.load_s for o in other),
        "others_share": max(d.others_share for d in mine + other),
        "same_tokens": same_tokens(mine[0].tokens, other[0].tokens),
        **model.sizes(pair),
    }
    for name, decoded in measured.items():
        if name == f"{pair.ours} numpy":
            row["numpy_ratio"] = spread(
                m.steady_tokens_per_s / n.steady_tokens_per_s for m, n in zip(mine, decoded, strict=True)
            )
    return row


def spread(values: Any) -> dict[str, float]:
    ordered = sorted(values)
    return {"median": median(ordered), "least": ordered[0], "most": ordered[-1]}


def same_tokens(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens up to the first difference."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))
