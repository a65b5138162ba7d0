"""How experts are activated, in numbers that can be drawn: how few paths most tokens take, and how far they tell what
comes next (paper, figures 4 and 8).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from engine.errors import RequestError
from engine.experts.profile import Counts, Path, PathCounter, PathProfile
from engine.offline.routing.trace import Trace

KNOWN = (0, 1, 2)  # previous MoE layers that a prediction knows
MOST_TOKENS = 4096  # of a trace that are ranked: more change no digit that is shown


def path_counts(trace: Trace, layers: int) -> list[int]:
    """Returns how many tokens took each path through so many consecutive layers, from any layer on; the most first."""
    sets = np.sort(trace.chosen, axis=2)  # (n, decoder layers, k)
    counts: list[int] = []
    for first in range(sets.shape[1] - layers + 1):
        rows = sets[:, first : first + layers].reshape(len(sets), -1)
        counts += np.unique(rows, axis=0, return_counts=True)[1].tolist()
    return sorted(counts, reverse=True)


def coverage(profile: PathProfile, trace: Trace | None = None) -> tuple[list[float], ...]:
    """Returns, for each of KNOWN, the share of activations among the 1, 2 ... `experts` likeliest by the profile.

    Of the trace's activations, or else of those that were counted into the profile, which flatters it.
    Raises RequestError for a trace of another model.
    """
    if trace is not None and (trace.layers, trace.experts) != (profile.layers, profile.experts):
        raise RequestError("the profile and the trace are of different models: make both from one container")
    return tuple(_coverage(profile, known, trace) for known in KNOWN)


def _coverage(profile: PathProfile, known: int, trace: Trace | None) -> list[float]:
    hits = np.zeros(profile.experts, np.int64)  # by place in the ranking
    total = 0
    for layer, path, counts in _counted(profile, known) if trace is None else _traced(trace, known):
        total += sum(counts.values())
        for place, expert in enumerate(profile.ranking(layer, path)):
            hits[place] += counts.get(expert, 0)
    shares: list[float] = (np.cumsum(hits) / max(1, total)).tolist()
    return shares


def _counted(profile: PathProfile, known: int) -> Iterator[tuple[int, Path, Mapping[int, int]]]:
    """Yields (layer, path of the layers before, how often each expert came then)."""
    for layer in range(profile.layers):
        tables: tuple[Mapping[Path, Counts], ...] = (
            {(): profile.marginal[layer]}, profile.one[layer], profile.two[layer]
        )  # fmt: skip
        for path, counts in tables[known].items():
            yield layer, path, counts


def _traced(trace: Trace, known: int) -> Iterator[tuple[int, Path, Mapping[int, int]]]:
    before: Path = ()
    for routing in _sets(trace.chosen[:MOST_TOKENS]):
        for layer, chosen in enumerate(routing, trace.first_layer):
            if len(before) == max(KNOWN):  # the same activations for each of them
                yield layer, before[len(before) - known :], dict.fromkeys(chosen, 1)
            before = (*before, chosen)[-max(KNOWN) :]


def selftest_profile(trace: Trace) -> PathProfile:
    """Returns the profile as counted on the trace itself."""
    counter = PathCounter(trace.layers, trace.experts, trace.first_layer)
    counter.observe(_sets(trace.chosen))
    return counter.finish()


def _sets(chosen: np.ndarray) -> Sequence[Sequence[tuple[int, ...]]]:
    """Returns the sets of (n, layers, k) by token and layer, each sorted."""
    return [[tuple(layer) for layer in token] for token in np.sort(chosen, axis=2).tolist()]
