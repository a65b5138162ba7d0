"""Which experts a layer will activate, before its router is asked."""

from __future__ import annotations

from collections import deque
from typing import Deque, Dict, List, Tuple

from engine.experts.profile import ExpertSet, PathProfile


class PathPredictor:
    """EdgeMoE's predictor: the experts that followed most often on those of the two previous MoE layers."""

    def __init__(self, profile: PathProfile) -> None:
        self._profile = profile
        self._previous: Deque[ExpertSet] = deque(maxlen=2)
        self._known: Dict[Tuple[int, Tuple[ExpertSet, ...]], List[int]] = {}

    def observe(self, chosen: ExpertSet) -> None:
        """The router of one MoE layer has answered for one token; layers come in their order."""
        self._previous.append(chosen)

    def predict(self, layer: int) -> List[int]:
        """Experts of `layer`, which follows the last one observed, the likeliest first."""
        key = (layer, tuple(self._previous))
        if key not in self._known:
            self._known[key] = self._profile.ranking(layer, key[1])
        return self._known[key]
