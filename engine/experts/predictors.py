"""Predicts which experts a layer will activate, before its router is asked."""

from __future__ import annotations

from collections import deque
from typing import Callable, Deque, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from engine.errors import RequestError
from engine.experts.profile import ExpertSet, PathProfile

Routing = Mapping[int, ExpertSet]  # by MoE layer
PreviewRouter = Callable[[int, np.ndarray], np.ndarray]  # (layer, hidden (hidden,)) -> logits (experts,)


class Predictor:
    """Predicts the next MoE layer's experts from what each layer did for one token, in order of layers."""

    def begin(self, token: int) -> None:
        """Announces the next token to be decoded; its first layer has not run yet."""

    def observe(self, layer: int, chosen: ExpertSet, hidden: np.ndarray) -> None:
        """Notes that the router of `layer` chose `chosen`.

        `hidden` (hidden,) is the residual stream before its experts.
        """

    def predict(self, layer: int) -> List[int]:
        """Returns experts of `layer`, the next to run, the likeliest first; empty if nothing is known."""
        raise NotImplementedError


class PathPredictor(Predictor):
    """Predicts the experts that followed most often on those of the two previous MoE layers, as EdgeMoE does."""

    def __init__(self, profile: PathProfile) -> None:
        self._profile = profile
        self._previous: Deque[ExpertSet] = deque(maxlen=2)
        self._known: Dict[Tuple[int, Tuple[ExpertSet, ...]], List[int]] = {}

    def observe(self, layer: int, chosen: ExpertSet, hidden: np.ndarray) -> None:
        self._previous.append(chosen)

    def predict(self, layer: int) -> List[int]:
        key = (layer, tuple(self._previous))
        if key not in self._known:
            self._known[key] = self._profile.ranking(layer, key[1])
        return self._known[key]


class LookAheadPredictor(Predictor):
    """Asks the next layer's router ahead of time, with this layer's hidden state (HOBBIT, Fate and others).

    The residual stream changes little from layer to layer, so most of the answer is right; needs no profile. It is
    blind for the first layer of a token, whose input is not known before the token is.
    """

    def __init__(self, preview_router: PreviewRouter) -> None:
        """Takes `preview_router(layer, hidden)`: logits (experts,) of that layer's router for a state (hidden,)."""
        self._preview_router = preview_router
        self._last: Optional[Tuple[int, np.ndarray]] = None  # layer, hidden

    def observe(self, layer: int, chosen: ExpertSet, hidden: np.ndarray) -> None:
        self._last = (layer, hidden)

    def predict(self, layer: int) -> List[int]:
        if self._last is None or layer <= self._last[0]:
            return []
        ranked: List[int] = np.argsort(-self._preview_router(layer, self._last[1]), kind="stable").tolist()
        return ranked


class FrequencyPredictor(Predictor):
    """Predicts the experts that the profile's tokens activated most often: the baseline to beat."""

    def __init__(self, profile: PathProfile) -> None:
        self._rankings = [profile.ranking(layer, ()) for layer in range(profile.layers)]

    def predict(self, layer: int) -> List[int]:
        return self._rankings[layer]


class TokenPredictor(Predictor):
    """Predicts the experts that the profile saw most often for this token id, even in its first layer."""

    def __init__(self, profile: PathProfile) -> None:
        self._profile = profile
        self._token: Optional[int] = None
        self._layer = -1  # observed last
        self._known: Dict[Tuple[int, Optional[int]], List[int]] = {}

    def begin(self, token: int) -> None:
        self._token, self._layer = token, -1

    def observe(self, layer: int, chosen: ExpertSet, hidden: np.ndarray) -> None:
        self._layer = layer

    def predict(self, layer: int) -> List[int]:
        key = (layer, self._token if layer > self._layer else None)  # the next token is not known yet
        if key not in self._known:
            self._known[key] = self._profile.ranking_of_token(*key)
        return self._known[key]


class PreviousTokenPredictor(Predictor):
    """Predicts the experts that the layer activated for the previous token, then its most frequent ones."""

    def __init__(self, profile: PathProfile) -> None:
        self._rankings = [profile.ranking(layer, ()) for layer in range(profile.layers)]
        self._last: Dict[int, ExpertSet] = {}

    def observe(self, layer: int, chosen: ExpertSet, hidden: np.ndarray) -> None:
        self._last[layer] = chosen

    def predict(self, layer: int) -> List[int]:
        last, ranking = self._last.get(layer, ()), self._rankings[layer]
        # The likelier of them first; one that the profile never saw comes behind the others.
        return [e for e in ranking if e in last] + [e for e in last if e not in ranking] + [
            e for e in ranking if e not in last
        ]  # fmt: skip


class CombinedPredictor(Predictor):
    """Asks for each layer the predictor whose answers were best there of late, among those that have one.

    Where nothing was measured yet, the order in which they are given decides. A token's first layer is asked about
    twice: when its number is not known, and when it is; these count as two.
    """

    MEMORY = 0.98  # weight of the past in a running recall, by answer

    def __init__(self, members: Sequence[Predictor]) -> None:
        self._members = tuple(members)
        self._layer = -1  # observed last
        self._token_known = False
        self._recall: Dict[Tuple[int, int, bool], float] = {}  # by member, layer, whether the token was known
        self._asked: Dict[int, Tuple[bool, List[List[int]]]] = {}  # layer -> what the members said last

    def begin(self, token: int) -> None:
        self._token_known, self._layer = True, -1
        for member in self._members:
            member.begin(token)

    def observe(self, layer: int, chosen: ExpertSet, hidden: np.ndarray) -> None:
        if layer in self._asked:
            known, answers = self._asked.pop(layer)
            for member, answer in enumerate(answers):
                if answer:
                    recall = len(set(chosen).intersection(answer[: len(chosen)])) / len(chosen)
                    key = (member, layer, known)
                    self._recall[key] = recall + self.MEMORY * (self._recall.get(key, recall) - recall)
        self._layer = layer
        for predictor in self._members:
            predictor.observe(layer, chosen, hidden)

    def predict(self, layer: int) -> List[int]:
        known = self._token_known and layer > self._layer
        answers = [member.predict(layer) for member in self._members]
        self._asked[layer] = (known, answers)
        able = [member for member, answer in enumerate(answers) if answer]
        if not able:
            return []
        measured = all((member, layer, known) in self._recall for member in able)
        best = max(able, key=lambda m: (self._recall[m, layer, known], -m)) if measured else able[0]
        ranked = dict.fromkeys(answers[best])
        for member in able:
            ranked.update(dict.fromkeys(answers[member]))
        return list(ranked)


class OraclePredictor(Predictor):
    """Knows the answers in advance, for one sequence of forward passes: the limit of what prediction brings."""

    def __init__(self, routing: Sequence[Routing] = ()) -> None:
        self.learn(routing)

    def learn(self, routing: Sequence[Routing]) -> None:
        """Begins a sequence with the experts that the last token of each forward pass will activate."""
        self._routing = routing
        self._pass = 0
        self._layer = -1  # observed last

    def observe(self, layer: int, chosen: ExpertSet, hidden: np.ndarray) -> None:
        if layer <= self._layer:
            self._pass += 1
        self._layer = layer

    def predict(self, layer: int) -> List[int]:
        at = self._pass if layer > self._layer else self._pass + 1
        return list(self._routing[at][layer]) if at < len(self._routing) else []


class PredictorInputs(NamedTuple):
    """Holds what a predictor may be made from; None is what is not at hand."""

    profile: Optional[PathProfile] = None
    preview_router: Optional[PreviewRouter] = None
    routing: Optional[Sequence[Routing]] = None  # in advance

    def taught(self) -> PathProfile:
        assert self.profile is not None, "predictor_named has looked"
        return self.profile

    def router(self) -> PreviewRouter:
        assert self.preview_router is not None, "the same"
        return self.preview_router


class PredictorRow(NamedTuple):
    """Describes a row of PREDICTORS. The inputs have all that it needs."""

    make: Callable[[PredictorInputs], Predictor]
    needs_profile: bool = False
    needs_routers: bool = False
    needs_routing: bool = False


PREDICTORS: Dict[str, PredictorRow] = {
    "path": PredictorRow(lambda s: PathPredictor(s.taught()), needs_profile=True),
    "look-ahead": PredictorRow(lambda s: LookAheadPredictor(s.router()), needs_routers=True),
    "token-id": PredictorRow(lambda s: TokenPredictor(s.taught()), needs_profile=True),
    "previous-token": PredictorRow(lambda s: PreviousTokenPredictor(s.taught()), needs_profile=True),
    "static": PredictorRow(lambda s: FrequencyPredictor(s.taught()), needs_profile=True),
    "combined": PredictorRow(
        lambda s: CombinedPredictor(
            [LookAheadPredictor(s.router()), TokenPredictor(s.taught()), PathPredictor(s.taught())]
        ),
        needs_profile=True,
        needs_routers=True,
    ),
    "oracle": PredictorRow(lambda s: OraclePredictor(s.routing or ()), needs_routing=True),
}


def predictor_named(name: str, sources: PredictorInputs) -> Predictor:
    """Returns a new predictor. Raises RequestError for a name that is none of PREDICTORS, or lacks an input."""
    row = PREDICTORS.get(name)
    if row is None:
        raise RequestError(f"predictor {name!r} is not one of {', '.join(PREDICTORS)}")
    if row.needs_routing and sources.routing is None:
        raise RequestError(f"predictor {name} needs to be told the routing in advance")
    if row.needs_routers and sources.preview_router is None:
        raise RequestError(f"predictor {name} needs the model's routers")
    if row.needs_profile and sources.profile is None:
        raise RequestError(f"predictor {name} needs a profile: make one with `edgemoe-farm model profile`")
    return row.make(sources)
