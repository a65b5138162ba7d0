"""Compares strategies on this machine under emulated storage: the same tokens, in turns, against their floor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from statistics import mean, median

from engine.container import Container
from engine.errors import EngineError, RequestError
from engine.experts.profile import PathProfile
from engine.generate import Engine
from engine.protocol import ExpertBudget, Sampling, Steps
from engine.strategies import Strategy, strategy_named

PROMPT_TOKENS = 32

# The paper's ablation on switch-base-8 and a Jetson TX2: seconds per token 0.789, 0.392, 0.305, 0.245.
ABLATION = {
    "naive-swap": 1.0,
    "edgemoe-bitwidths": 0.789 / 0.392,
    "edgemoe-preload": 0.789 / 0.305,
    "edgemoe": 0.789 / 0.245,
}


@dataclass(frozen=True)
class Candidate:
    """Names a strategy on a container."""

    strategy: Strategy
    container: str

    @classmethod
    def parse(cls, text: str) -> Candidate:
        """Returns the candidate of STRATEGY=CONTAINER. Raises RequestError."""
        name, separator, container = text.partition("=")
        if not separator or not container:
            raise RequestError(f"{text!r}: write a strategy and its container, such as edgemoe=model.emoe")
        return cls(strategy_named(name), container)

    @property
    def exact(self) -> tuple[str, ...] | None:
        """Returns what candidates with the same tokens share; None if accuracy may be lost on the way."""
        return (
            None if self.strategy.relief is not None else (self.container, self.strategy.precision, self.strategy.form)
        )


@dataclass
class CandidateTimes:
    """Holds one candidate at one rate; a value per round in each list. Prompts are not counted."""

    candidate: Candidate
    budget_bytes: int | None
    expert_bytes: int  # of the container, primary records
    backend: str  # that computed
    tpot_s: list[float] = field(default_factory=list)  # mean time per output token
    stall_share: list[float] = field(default_factory=list)
    hit_rate: list[float] = field(default_factory=list)
    read_bytes: list[float] = field(default_factory=list)  # a token
    wasted_bytes: list[float] = field(default_factory=list)  # a token: read ahead and not used
    compute_s: list[float] = field(default_factory=list)  # a token: the same container with all experts in memory
    recall: list[float] = field(default_factory=list)  # of the first k predictions; empty without a predictor
    tokens: list[tuple[int, ...]] = field(default_factory=list)

    def floor_s(self, bytes_per_s: float) -> list[float]:
        """Returns what no pipeline could beat: the missing bytes at the storage's rate, or the arithmetic."""
        return [
            max((read - wasted) / bytes_per_s, compute)
            for read, wasted, compute in zip(self.read_bytes, self.wasted_bytes, self.compute_s, strict=True)
        ]


def compare(
    candidates: Sequence[Candidate],
    text: Sequence[int],
    bytes_per_s: float,
    *,
    budget: ExpertBudget | None = None,
    profile: PathProfile | None = None,
    rounds: int = 5,
    new_tokens: int = 48,
    progress: Callable[[], None] = lambda: None,
) -> list[CandidateTimes]:
    """Measures every candidate on the same prompt out of `text` in each round, in turns that rotate.

    A round more comes first and is not counted: it fills buffers. Storage is emulated: reads are slowed down to
    `bytes_per_s`. Raises RequestError for a text that is too short, EngineError where lossless candidates disagree.
    """
    if len(text) < PROMPT_TOKENS + rounds:
        raise RequestError(f"the text has {len(text)} tokens: at least {PROMPT_TOKENS + rounds} are needed")
    stride = (len(text) - PROMPT_TOKENS) // max(1, rounds)
    with ExitStack() as stack:

        def opened(strategy: Strategy, container: Container) -> Engine:
            engine = Engine(
                container,
                strategy,
                expert_budget=budget if strategy.has_budget else None,
                profile=profile,
                emulated_read_bytes_per_s=None if strategy.residency == "all" else bytes_per_s,
            )
            stack.callback(engine.close)
            return engine

        containers = {c.container: Container.open(c.container) for c in candidates}
        resident = strategy_named("full-load")
        compute = {path: opened(resident, container) for path, container in containers.items()}
        engines, measured = [], []
        for candidate in candidates:
            container = containers[candidate.container]
            engines.append(opened(candidate.strategy, container))
            expert_bytes = sum(record.slot_bytes for record in container.primary.values())
            measured.append(CandidateTimes(candidate, engines[-1].budget_bytes, expert_bytes, engines[-1].backend))
        for nth in range(rounds + 1):
            start = max(0, nth - 1) * stride
            prompt, sampling = tuple(text[start : start + PROMPT_TOKENS]), Sampling(temperature=1.0, seed=nth)
            compute_s = {p: e.generate(prompt, new_tokens, sampling)[1].time_s[1:] for p, e in compute.items()}
            turns = [(nth + i) % len(candidates) for i in range(len(candidates))]
            for turn in turns:
                progress()
                tokens, steps = engines[turn].generate(prompt, new_tokens, sampling)
                recall = engines[turn].supply.take_recall()
                if nth > 0:
                    _add(measured[turn], tokens, steps, mean(compute_s[candidates[turn].container]))
                    if recall is not None:
                        measured[turn].recall.append(recall.first_k / recall.activated)
    _check_tokens(measured)
    return measured


def ratios(first: CandidateTimes, other: CandidateTimes) -> list[float]:
    """Returns how many times as fast as the first it is, round by round."""
    return [a / b for a, b in zip(first.tpot_s, other.tpot_s, strict=True)]


def summarise(
    measured: Sequence[CandidateTimes], bytes_per_s: float, paper: dict[str, float] | None = None
) -> list[dict[str, object]]:
    """Returns a row per candidate, for tables and JSON. `paper`: its ratio to the first, by strategy."""
    rows: list[dict[str, object]] = []
    for m in measured:
        floor, speedup = m.floor_s(bytes_per_s), ratios(measured[0], m)
        rows.append(
            {
                "strategy": m.candidate.strategy.name,
                "container": m.candidate.container,
                "storage": "emulated",
                "bytes_per_s": bytes_per_s,
                "budget_bytes": m.budget_bytes,
                "expert_bytes": m.expert_bytes,
                "backend": m.backend,
                "tpot_ms": median(m.tpot_s) * 1e3,
                "tpot_ms_rounds": [t * 1e3 for t in m.tpot_s],
                "ratio": median(speedup),
                "ratio_least": min(speedup),
                "ratio_most": max(speedup),
                "paper_ratio": None if paper is None else paper.get(m.candidate.strategy.name),
                "floor_ms": median(floor) * 1e3,
                "times_floor": median([t / f for t, f in zip(m.tpot_s, floor, strict=True)]),
                "compute_ms": median(m.compute_s) * 1e3,
                "stall_share": mean(m.stall_share),
                "hit_rate": mean(m.hit_rate),
                "read_bytes_per_token": mean(m.read_bytes),
                "wasted_bytes_per_token": mean(m.wasted_bytes),
                "recall_at_k": mean(m.recall) if m.recall else None,
                "lossless": m.candidate.strategy.lossless,
            }
        )
    return rows


def _add(measured: CandidateTimes, tokens: tuple[int, ...], steps: Steps, compute_s: float) -> None:
    decoded = len(steps.time_s) - 1
    time_s = sum(steps.time_s[1:])
    hits = sum(steps.hits[1:])
    measured.tokens.append(tokens)
    measured.tpot_s.append(time_s / decoded)
    measured.stall_share.append(sum(steps.stall_s[1:]) / time_s)
    measured.hit_rate.append(hits / max(1, hits + sum(steps.late[1:]) + sum(steps.misses[1:])))
    measured.read_bytes.append(sum(steps.read_bytes[1:]) / decoded)
    measured.wasted_bytes.append(sum(steps.wasted_bytes[1:]) / decoded)
    measured.compute_s.append(compute_s)


def _check_tokens(measured: Sequence[CandidateTimes]) -> None:
    """Raises EngineError for a candidate that answers differently: it is not fast, it is wrong."""
    expected: dict[tuple[str, ...], CandidateTimes] = {}
    for m in measured:
        if m.candidate.exact is None:
            continue
        first = expected.setdefault(m.candidate.exact, m)
        if first.tokens != m.tokens:
            raise EngineError(
                f"{m.candidate.strategy.name} on {m.candidate.container} gave other tokens than "
                f"{first.candidate.strategy.name}: the comparison is void; run `python3 -m engine selftest`"
            )
