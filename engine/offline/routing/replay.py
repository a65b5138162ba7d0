"""Replays a trace under each policy and predictor, in seconds, with Belady's optimum as the limit.

The policies and predictors are the engine's own classes. `simulate` repeats the order of engine.experts.supply with
its reads on the computing thread: a layer's resident experts are used first, by number, then the missing ones are
loaded and used one after another, by number. A test holds the two against each other, expert by expert.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from engine.container import ExpertKey
from engine.errors import RequestError
from engine.experts.eviction import POLICIES, EvictionPolicy, PolicyInputs, policy_named
from engine.experts.predictors import PREDICTORS, Predictor, PredictorInputs, Routing, predictor_named
from engine.experts.profile import PathProfile
from engine.offline.routing.trace import Trace

BELADY = "belady"
RECALL_AT = (1, 2, 4)
DEFAULT_SHARES = (1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4)  # of all experts

Step = tuple[int, tuple[int, ...]]  # MoE layer, the experts that it activates, sorted


@dataclass(frozen=True)
class Hits:
    hits: int
    misses: int

    @property
    def hit_rate(self) -> float:
        return self.hits / max(1, self.hits + self.misses)


def default_sizes(trace: Trace) -> tuple[int, ...]:
    """Returns buffer sizes, in experts."""
    return tuple(
        sorted({max(1, round(share * (trace.layers - trace.first_layer) * trace.experts)) for share in DEFAULT_SHARES})
    )


def steps(trace: Trace) -> list[Step]:
    return [
        (layer, tuple(chosen))
        for token in np.sort(trace.chosen, axis=2).tolist()
        for layer, chosen in enumerate(token, trace.first_layer)
    ]


def count_hits(demands: Sequence[Step], policy: EvictionPolicy, size: int) -> Hits:
    """Returns the hits of a buffer of `size` equal experts, empty at first, under demand alone."""
    resident: set[ExpertKey] = set()
    hits = misses = 0
    for layer, chosen in demands:
        keys = [(layer, expert) for expert in chosen]
        missing = [key for key in keys if key not in resident]
        hits += len(keys) - len(missing)
        misses += len(missing)
        for key in keys:
            if key in resident:
                policy.used(key)
        for key in missing:
            if len(resident) >= size:
                victim = policy.victim(_anything, layer)
                assert victim is not None
                resident.remove(victim)
                policy.removed(victim)
            resident.add(key)
            policy.inserted(key)
            policy.used(key)
    return Hits(hits, misses)


def belady(demands: Sequence[Step], size: int) -> Hits:
    """Returns the most hits that any policy can have: it knows the future, and keeps what is needed soonest (1966).

    A layer's experts are demanded together; of them and of what was there, any `size` may stay.
    """
    next_use = _next_uses(demands)
    resident: dict[ExpertKey, int] = {}  # -> the step of its next use
    heap: list[tuple[int, ExpertKey]] = []  # by -next use, with outdated entries in between
    hits = misses = 0
    for at, (layer, chosen) in enumerate(demands):
        for expert, following in zip(chosen, next_use[at], strict=True):
            key = (layer, expert)
            hits += key in resident
            misses += key not in resident
            resident[key] = following
            heapq.heappush(heap, (-following, key))
        while len(resident) > size:
            negative, key = heapq.heappop(heap)
            if resident.get(key) == -negative:
                del resident[key]
    return Hits(hits, misses)


def replay_policies(
    trace: Trace,
    profile: PathProfile | None,
    sizes: Sequence[int] = (),
    names: Sequence[str] = (*POLICIES, BELADY),
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> dict[str, dict[int, Hits]]:
    """Returns hits by policy and buffer size in experts. Without a profile all experts count as equally frequent."""
    check_profile(trace, profile)
    if any(size < 1 for size in sizes):
        raise RequestError(f"a buffer of {min(sizes)} experts holds nothing: use 1 or more")
    demands = steps(trace)
    frequency = {} if profile is None else profile.frequency()
    sizes = sizes or default_sizes(trace)
    results: dict[str, dict[int, Hits]] = {}
    for done, name in enumerate(names):
        results[name] = {}
        for nth, size in enumerate(sizes):
            progress(done * len(sizes) + nth, len(names) * len(sizes))
            if name == BELADY:
                results[name][size] = belady(demands, size)
            else:
                policy = policy_named(name, PolicyInputs(trace.layers, trace.first_layer, frequency, seed))
                results[name][size] = count_hits(demands, policy, size)
    return results


def replay_predictors(
    trace: Trace, profile: PathProfile, names: Sequence[str] = tuple(PREDICTORS)
) -> dict[str, dict[int, tuple[float, ...]]]:
    """Returns the share of activated experts among the first n predictions, by predictor, n and MoE layer.

    Each layer is asked about when the one before it has answered, the first one when the token is known.
    """
    check_profile(trace, profile)
    routing = [
        {layer: tuple(sorted(chosen)) for layer, chosen in enumerate(token, trace.first_layer)}
        for token in trace.chosen.tolist()
    ]
    return {
        name: _recall(
            trace, predictor_named(name, PredictorInputs(profile, lambda layer, hidden: hidden, routing)), routing
        )
        for name in names
    }


def check_profile(trace: Trace, profile: PathProfile | None) -> None:
    """Raises RequestError for a profile of another model."""
    if profile is not None and (profile.layers, profile.experts) != (trace.layers, trace.experts):
        raise RequestError(
            f"the profile is of {profile.layers} MoE layers of {profile.experts} experts, the trace of {trace.layers}"
            f" of {trace.experts}; make one from the same model with `edgemoe-farm model profile`"
        )


def _recall(trace: Trace, predictor: Predictor, routing: Sequence[Routing]) -> dict[int, tuple[float, ...]]:
    first = trace.first_layer
    right = {n: [0] * (trace.layers - first) for n in RECALL_AT}
    scores = -np.arange(trace.ahead.shape[2], dtype=np.float32)
    for token, chosen_by_layer, ahead in zip(trace.tokens.tolist(), routing, trace.ahead, strict=True):
        predictor.begin(token)
        for layer, chosen in chosen_by_layer.items():
            predicted = predictor.predict(layer)
            for n in RECALL_AT:
                right[n][layer - first] += len(set(predicted[:n]).intersection(chosen))
            # The recorded ranking takes the place of the hidden state that it was made from.
            preview = np.full(trace.experts, -np.inf, np.float32)
            if layer + 1 < trace.layers:
                preview[ahead[layer - first]] = scores
            predictor.observe(layer, chosen, preview)
    activated = max(1, len(routing) * trace.top_k)
    return {n: tuple(count / activated for count in right[n]) for n in RECALL_AT}


def _next_uses(demands: Sequence[Step]) -> list[list[int]]:
    """Returns for each step and expert the step at which it is demanded again; past the end if never."""
    following: dict[ExpertKey, int] = {}
    result: list[list[int]] = [[]] * len(demands)
    for at in range(len(demands) - 1, -1, -1):
        layer, chosen = demands[at]
        result[at] = [following.get((layer, expert), len(demands)) for expert in chosen]
        for expert in chosen:
            following[layer, expert] = at
    return result


def _anything(key: ExpertKey) -> bool:
    return True
