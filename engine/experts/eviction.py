"""Chooses the expert that leaves the buffer when another one needs its room.

A policy is told what comes in, is used and goes, and keeps its own order of that: no choice looks at every expert.
A new one is a class and a row of POLICIES. `edgemoe-farm model replay` drives the same classes over a recorded trace.
"""

from __future__ import annotations

import heapq
import math
import random
from bisect import bisect_left, insort
from collections import OrderedDict
from typing import Callable, Dict, List, Mapping, NamedTuple, Optional, Tuple

from engine.container import ExpertKey
from engine.errors import RequestError

MayGo = Callable[[ExpertKey], bool]


class EvictionPolicy:
    """Chooses among the experts that it was told are in the buffer."""

    def inserted(self, key: ExpertKey) -> None:
        """Notes that the expert has got a place in the buffer."""
        raise NotImplementedError

    def used(self, key: ExpertKey) -> None:
        """Notes that the arithmetic has used the expert, which is in the buffer."""

    def removed(self, key: ExpertKey) -> None:
        """Notes that the expert has lost its place."""
        raise NotImplementedError

    def victim(self, may_go: MayGo, layer: int) -> Optional[ExpertKey]:
        """Returns the expert that leaves, of those that may, while MoE layer `layer` computes; None if none may."""
        raise NotImplementedError


class FirstInFirstOut(EvictionPolicy):
    def __init__(self) -> None:
        self._order: OrderedDict[ExpertKey, None] = OrderedDict()

    def inserted(self, key: ExpertKey) -> None:
        self._order[key] = None

    def removed(self, key: ExpertKey) -> None:
        del self._order[key]

    def victim(self, may_go: MayGo, layer: int) -> Optional[ExpertKey]:
        return next(filter(may_go, self._order), None)


class LeastRecentlyUsed(FirstInFirstOut):
    def used(self, key: ExpertKey) -> None:
        self._order.move_to_end(key)


class RandomEviction(EvictionPolicy):
    """Evicts any expert, by a seed: the baseline that a policy must beat."""

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(seed)  # noqa: S311 - no secret depends on it
        self._keys: List[ExpertKey] = []
        self._places: Dict[ExpertKey, int] = {}

    def inserted(self, key: ExpertKey) -> None:
        self._places[key] = len(self._keys)
        self._keys.append(key)

    def removed(self, key: ExpertKey) -> None:
        place, last = self._places.pop(key), self._keys.pop()
        if last != key:  # the last one takes its place
            self._keys[place] = last
            self._places[last] = place

    def victim(self, may_go: MayGo, layer: int) -> Optional[ExpertKey]:
        for _ in range(4):  # few are pinned: a guess or two is enough
            if not self._keys:
                return None
            key = self._keys[self._random.randrange(len(self._keys))]
            if may_go(key):
                return key
        candidates = [key for key in self._keys if may_go(key)]
        return self._random.choice(candidates) if candidates else None


class LeastFrequentlyUsed(EvictionPolicy):
    """Evicts the expert with the fewest uses since the engine started, earlier stays included; ties by recency."""

    def __init__(self) -> None:
        self._worth: Dict[ExpertKey, float] = {}  # of every expert ever used
        self._stamps: Dict[ExpertKey, int] = {}  # of those in the buffer: their valid entry in the heap
        self._heap: List[Tuple[float, int, ExpertKey]] = []  # with outdated entries in between
        self._clock = 0

    def inserted(self, key: ExpertKey) -> None:
        self._push(key)

    def used(self, key: ExpertKey) -> None:
        self._worth[key] = self._worth_after_use(key, self._worth.get(key))
        self._push(key)

    def removed(self, key: ExpertKey) -> None:
        del self._stamps[key]

    def victim(self, may_go: MayGo, layer: int) -> Optional[ExpertKey]:
        passed = []
        found = None
        while self._heap and found is None:
            item = self._heap[0]
            if self._stamps.get(item[2]) != item[1]:
                heapq.heappop(self._heap)
            elif may_go(item[2]):
                found = item[2]
            else:
                passed.append(heapq.heappop(self._heap))
        for item in passed:
            heapq.heappush(self._heap, item)
        return found

    def _worth_after_use(self, key: ExpertKey, before: Optional[float]) -> float:
        return (before or 0.0) + 1.0

    def _push(self, key: ExpertKey) -> None:
        self._clock += 1
        self._stamps[key] = self._clock
        heapq.heappush(self._heap, (self._worth.get(key, -math.inf), self._clock, key))
        if len(self._heap) > 64 + 4 * len(self._stamps):  # mostly outdated
            self._heap = [item for item in self._heap if self._stamps.get(item[2]) == item[1]]
            heapq.heapify(self._heap)


class FadingUses:
    """Sums an expert's uses, each of which counts half after HALF_LIFE_TOKENS tokens.

    Kept as the logarithm, to base 2, of a sum whose new uses weigh ever more instead of old ones ever less: values
    stand still between uses, and their order and ratios are those of the sums.
    """

    HALF_LIFE_TOKENS = 32

    def __init__(self) -> None:
        self._token = 0
        self._layer = -1

    def after_use(self, key: ExpertKey, before: Optional[float]) -> float:
        """Returns the logarithm after one more use now; `before` is the one of earlier, None without a use."""
        self._token += key[0] < self._layer  # the layers start over with each token
        self._layer = key[0]
        now = self._token / self.HALF_LIFE_TOKENS
        return now if before is None else max(before, now) + math.log2(1 + 2 ** -abs(before - now))


class LeastFrequentRecentlyUsed(LeastFrequentlyUsed):
    """Evicts the lowest sum of uses, each of which counts half after some tokens.

    Between LFU (never forgets) and LRU (only the last use counts), as the weighted mixtures of recency and frequency
    in MoE offloading (HOBBIT, 2024, and others); in this closed form by Lee et al., LRFU, IEEE ToC 2001.
    """

    def __init__(self) -> None:
        super().__init__()
        self._uses = FadingUses()

    def _worth_after_use(self, key: ExpertKey, before: Optional[float]) -> float:
        return self._uses.after_use(key, before)


class ForwardDistance(EvictionPolicy):
    """Evicts what is used seldom and needed late: EdgeMoE's policy as its prose describes it.

    The paper prints L = -f / ((S - i + I) mod S) with f the activation frequency, i the expert's layer, I the current
    layer and S the number of layers. As printed it evicts the experts that are needed next and divides by zero at
    i = I (PaperAsPrinted). The prose asks for the distance forward to the next use, (i - I) mod S, with a whole round
    for the current layer, whose turn comes only with the next token. The highest L leaves; ties by recency.

    MoE layers before `first_layer` are an encoder's: used once for a request, they go first, and S counts the others.
    """

    def __init__(
        self, layers: int, frequency: Mapping[ExpertKey, float], first_layer: int = 0, *, unknown: float = 0.0
    ) -> None:
        """Makes the policy. `frequency` is the share of tokens that activate an expert; `unknown` if it has none."""
        self._first, self._round = first_layer, max(1, layers - first_layer)
        self._frequency, self._unknown = frequency, unknown
        # Within a layer the distance is the same, so frequency alone orders its experts: (frequency, stamp, key).
        self._by_layer: Dict[int, List[Tuple[float, int, ExpertKey]]] = {}
        self._items: Dict[ExpertKey, Tuple[float, int, ExpertKey]] = {}
        self._clock = 0

    def inserted(self, key: ExpertKey) -> None:
        self._clock += 1
        item = self._items[key] = (self._frequency.get(key, self._unknown), self._clock, key)
        insort(self._by_layer.setdefault(key[0], []), item)

    def used(self, key: ExpertKey) -> None:
        self.removed(key)
        self.inserted(key)

    def removed(self, key: ExpertKey) -> None:
        items = self._by_layer[key[0]]
        del items[bisect_left(items, self._items.pop(key))]

    def victim(self, may_go: MayGo, layer: int) -> Optional[ExpertKey]:
        best: Optional[Tuple[float, int, ExpertKey]] = None
        for of, items in self._by_layer.items():
            for frequency, stamp, key in items:
                if may_go(key):
                    item = (self._worth(frequency, of, layer), stamp, key)
                    best = item if best is None else min(best, item)
                    break
        return None if best is None else best[2]

    def _worth(self, frequency: float, of: int, layer: int) -> float:
        """Returns -L of an expert of layer `of` while `layer` computes."""
        if of < self._first:
            return -1.0
        distance = self._distance(of - self._first, max(layer - self._first, -1))
        return math.inf if distance == 0 else frequency / distance

    def _distance(self, of: int, layer: int) -> int:
        return (of - layer - 1) % self._round + 1


class PaperAsPrinted(ForwardDistance):
    """Evicts the highest L = -f / ((S - i + I) mod S): EdgeMoE's policy as its equation is printed.

    At i = I it divides by zero: taken as the limit, minus infinity, so experts of the current layer leave last.
    """

    def _distance(self, of: int, layer: int) -> int:
        return (self._round - of + layer) % self._round


class OnlineDistance(ForwardDistance):
    """Evicts the lowest frequency over distance, as ForwardDistance, by a frequency that is learned while running.

    A profile's frequencies hold for texts like the profile's. Recent uses hold for the text at hand, whatever it is;
    the distance does for layers what recency alone cannot: it tells whose turn comes late.
    """

    def __init__(self, layers: int, first_layer: int = 0) -> None:
        self._learned: Dict[ExpertKey, float] = {}  # logarithms, of every expert ever used
        self._uses = FadingUses()
        super().__init__(layers, self._learned, first_layer, unknown=-math.inf)

    def used(self, key: ExpertKey) -> None:
        self.removed(key)
        self._learned[key] = self._uses.after_use(key, self._learned.get(key))
        self.inserted(key)

    def _worth(self, frequency: float, of: int, layer: int) -> float:
        """Returns the logarithm of frequency over distance."""
        if of < self._first:
            return -math.inf
        return frequency - math.log2(self._distance(of - self._first, max(layer - self._first, -1)))


class PolicyInputs(NamedTuple):
    """Holds what a policy may be made from."""

    layers: int  # MoE layers of the model
    first_layer: int = 0  # the decoder's first
    frequency: Optional[Mapping[ExpertKey, float]] = None  # of a profile, see PathProfile.frequency; None without one
    seed: int = 0  # of chance


class Policy(NamedTuple):
    """Describes a row of POLICIES. If it needs a profile, its inputs have a frequency."""

    make: Callable[[PolicyInputs], EvictionPolicy]
    needs_profile: bool = False


POLICIES: Dict[str, Policy] = {
    "forward-distance": Policy(lambda s: ForwardDistance(s.layers, s.frequency or {}, s.first_layer), True),
    "online-distance": Policy(lambda s: OnlineDistance(s.layers, s.first_layer)),
    "paper-printed": Policy(lambda s: PaperAsPrinted(s.layers, s.frequency or {}, s.first_layer), True),
    "lru": Policy(lambda s: LeastRecentlyUsed()),
    "lfu": Policy(lambda s: LeastFrequentlyUsed()),
    "lfru": Policy(lambda s: LeastFrequentRecentlyUsed()),
    "fifo": Policy(lambda s: FirstInFirstOut()),
    "random": Policy(lambda s: RandomEviction(s.seed)),
}


def policy_named(name: str, setting: PolicyInputs) -> EvictionPolicy:
    """Returns a new policy. Raises RequestError for a name that is none of POLICIES, or lacks what it weighs by."""
    policy = POLICIES.get(name)
    if policy is None:
        raise RequestError(f"eviction policy {name!r} is not one of {', '.join(POLICIES)}")
    if policy.needs_profile and setting.frequency is None:
        raise RequestError(f"eviction policy {name} needs a profile: make one with `edgemoe-farm model profile`")
    return policy.make(setting)
