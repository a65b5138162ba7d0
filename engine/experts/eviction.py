"""Which expert leaves the buffer when another needs its place."""

from __future__ import annotations

from typing import Iterable, Mapping, Optional

from engine.container import ExpertKey


class EvictionPolicy:
    """Chooses among the experts that may go, offered from the least to the most recently used."""

    name = ""

    def victim(self, candidates: Iterable[ExpertKey], layer: int) -> Optional[ExpertKey]:
        """`layer` is the MoE layer that computes now. None if there is no candidate."""
        raise NotImplementedError


class LeastRecentlyUsed(EvictionPolicy):
    name = "lru"

    def victim(self, candidates: Iterable[ExpertKey], layer: int) -> Optional[ExpertKey]:
        return next(iter(candidates), None)


class ForwardDistance(EvictionPolicy):
    """EdgeMoE's policy in the reading of its prose: evict what is used seldom and needed late.

    The paper prints L = -f / ((S - i + I) mod S) with f the activation frequency, i the expert's layer, I the current
    layer and S the number of layers. As printed it evicts the experts that are needed next and divides by zero at
    i = I. The prose asks for the distance forward to the next use, (i - I) mod S, with a whole round for the current
    layer, whose turn comes only with the next token. The highest L leaves; ties by recency.
    """

    name = "forward-distance"

    def __init__(self, layers: int, frequency: Mapping[ExpertKey, float]) -> None:
        self._layers = layers
        self._frequency = frequency

    def victim(self, candidates: Iterable[ExpertKey], layer: int) -> Optional[ExpertKey]:
        return min(candidates, key=lambda key: self._worth(key, layer), default=None)

    def _worth(self, key: ExpertKey, layer: int) -> float:
        distance = (key[0] - layer - 1) % self._layers + 1
        return self._frequency.get(key, 0.0) / distance
