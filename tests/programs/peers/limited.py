"""Decoding where half of the model fits: real limits on memory and storage, from a cold start, in turns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from engine.device import meters
from tests.programs.peers.card import Card
from tests.programs.peers.engines import Decoded, Work, ours, theirs
from tests.programs.peers.limits import Limits
from tests.programs.peers.models import Pair, PeerModel
from tests.programs.peers.resident import spread

STRATEGIES = ("edgemoe", "edgemoe-lookahead", "edgemoe-combined", "edgemoe-adaptive")
Run = tuple[Decoded, dict[str, int]]  # and what its limits saw

MIB = 1 << 20
PROBE_BUDGET_BYTES, PROBES = 16 * MIB, 3
MARGIN_BYTES = 4 * MIB


class Bench:
    """One pair of files on a card, under limits that every process has anew."""

    def __init__(self, card: Card, container: str, gguf: str, limit_bytes: int) -> None:
        self._card, self._limit_bytes = card, limit_bytes
        self._container, self._gguf = card.put(container), card.put(gguf)

    def ours(self, work: Work, rate: int | None, strategy: str, profile: str, budget_bytes: int) -> Run:
        return self._under(
            self._container, rate,
            lambda path, enter: ours(path, work, enter, strategy, budget_bytes=budget_bytes, profile=profile,
                                      reader="direct", page_cache="cold"),
        )  # fmt: skip

    def theirs(self, work: Work, rate: int) -> Run:
        return self._under(self._gguf, rate, lambda path, enter: theirs(path, work, enter, repack=False))

    def budget_bytes(self, work: Work, strategy: str, profile: str) -> int:
        """What the limit leaves for experts: a prompt fills the buffer, so what is unused then can still be had."""
        budget_bytes = PROBE_BUDGET_BYTES
        for _ in range(PROBES):
            most_used_bytes = self.ours(work, None, strategy, profile, budget_bytes)[1]["most_used_bytes"]
            budget_bytes += self._limit_bytes - MARGIN_BYTES - most_used_bytes
        return budget_bytes

    def _under(self, path: str, rate: int | None, decode: Callable[..., Decoded]) -> Run:
        meters.evict_from_page_cache(path)
        limits = Limits(self._limit_bytes, self._card.device, rate)
        try:
            before = self._card.read_bytes
            decoded = decode(path, limits.enter)
            seen = {
                "limit_bytes": self._limit_bytes,
                "most_used_bytes": limits.most_used_bytes,
                "storage_read_bytes": self._card.read_bytes - before,
            }
        finally:
            limits.close()
        return decoded, seen


def compare_limited(
    model: PeerModel,
    pair: Pair,
    profile: str,
    prompts: Sequence[tuple[int, ...]],
    *,
    new_tokens: int,
    rates: Sequence[int],
    strategies: Sequence[str],
    read_ahead_kib: int,
    folder: Path,
    progress: Callable[[str], None],
) -> Iterator[dict[str, Any]]:
    """A row a rate (bytes per second); a round a prompt, in which every contender decodes once."""
    container, gguf = model.container(pair.ours), model.gguf(pair.theirs)
    sizes = model.sizes(pair)
    limit_bytes = sizes["ours_file_bytes"] // 2
    card_bytes = (sizes["ours_file_bytes"] + sizes["theirs_file_bytes"]) * 21 // 20 + 64 * MIB
    with Card(folder, card_bytes, read_ahead_kib) as card:
        bench = Bench(card, container, gguf, limit_bytes)
        budgets = {s: bench.budget_bytes(Work(prompts[0], 8, 1), s, profile) for s in strategies}
        for rate in rates:

            def with_strategy(name: str, prompt: tuple[int, ...], rate: int = rate) -> Run:
                return bench.ours(Work(prompt, new_tokens, 1), rate, name, profile, budgets[name])

            def with_threads(threads: int, prompt: tuple[int, ...], rate: int = rate) -> Run:
                return bench.theirs(Work(prompt, new_tokens, threads), rate)

            turns = {name: partial(with_strategy, name) for name in strategies}
            turns.update({f"llama.cpp, threads {n}": partial(with_threads, n) for n in (1, 2)})
            measured: dict[str, list[Run]] = {name: [] for name in turns}
            for nth, prompt in enumerate(prompts):
                names = list(turns)[nth % len(turns) :] + list(turns)[: nth % len(turns)]
                for name in names:
                    measured[name].append(turns[name](prompt))
                    decoded = measured[name][-1][0]
                    progress(f"{rate / 1e6:.0f} MB/s, {name}: {decoded.tokens_per_s:.2f} tokens/s")
            yield {
                "model": model.name,
                "pair": pair.name,
                "storage_bytes_per_s": rate,
                "read_ahead_kib": card.read_ahead_kib,
                "limit_bytes": limit_bytes,
                "new_tokens": new_tokens,
                **_verdict(measured, strategies),
                "contenders": {name: _contender(runs, budgets.get(name)) for name, runs in measured.items()},
                **sizes,
            }


def _verdict(measured: dict[str, list[Run]], strategies: Sequence[str]) -> dict[str, Any]:
    """The best of each side by its median, and their ratio, round by round."""

    def middle(name: str) -> float:
        return median(decoded.tokens_per_s for decoded, _ in measured[name])

    best = max(strategies, key=middle)
    peer = max((name for name in measured if name not in strategies), key=middle)
    pairs = zip(measured[best], measured[peer], strict=True)
    return {"best": best, "peer": peer, "ratio": spread(m.tokens_per_s / o.tokens_per_s for (m, _), (o, _) in pairs)}


def _contender(runs: list[Run], budget_bytes: int | None) -> dict[str, Any]:
    first = runs[0][0]
    return {
        "tokens_per_s": spread(d.tokens_per_s for d, _ in runs),
        "load_s": median(d.load_s for d, _ in runs),
        "ttft_s": median(d.time_s[0] for d, _ in runs),
        "limit_held": all(seen["most_used_bytes"] <= seen["limit_bytes"] for _, seen in runs),
        "most_used_bytes": max(seen["most_used_bytes"] for _, seen in runs),
        "storage_read_bytes": median(seen["storage_read_bytes"] for _, seen in runs),
        "others_share": max(d.others_share for d, _ in runs),
        "expert_budget_bytes": budget_bytes,
        "hit_rate": None if first.hit_rate is None else median(d.hit_rate for d, _ in runs),
        "stall_share": None if first.stall_share is None else median(d.stall_share for d, _ in runs),
        "read_bytes_per_token": None
        if first.read_bytes_per_token is None
        else median(d.read_bytes_per_token for d, _ in runs),
        "tokens": [list(d.tokens) for d, _ in runs],
    }
