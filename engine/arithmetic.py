"""Measures how long the arithmetic of a token takes on this device without waiting: the basis of an estimate."""

from __future__ import annotations

import time
from statistics import median
from typing import Callable, Dict, Iterator, List, Optional, Sequence

import numpy as np

from engine.container import Container, Record
from engine.device import meters
from engine.experts.buffer import ExpertBuffer
from engine.experts.eviction import LeastRecentlyUsed
from engine.experts.loader import Loader
from engine.experts.slabs import PackedSlabs
from engine.experts.store import ExpertStore
from engine.experts.supply import ExpertSupply
from engine.kernels import Kernels, make_kernels
from engine.models import load_model
from engine.models.interface import ExpertGroup
from engine.protocol import ArithmeticTimes

HELD_BYTES = 64 << 20  # of experts, used in turn, so that none is in a small cache because the last token left it there
MOST_TOKENS, LEAST_TOKENS = 48, 6
MOST_S = 2.0  # of decoding, for each format: what a slow device gets done in that time will do
_TOKEN = 3


def measure_arithmetic(
    container: Container, *, backend: str = "auto", threads: int = 0, clock: Callable[[], float] = time.perf_counter
) -> ArithmeticTimes:
    """Decodes some tokens with the non-experts and a few experts of each format in memory. Raises EngineError."""
    base_bytes = meters.peak_resident_bytes()
    kernels, _ = make_kernels(backend, threads)
    try:
        return _measure(container, kernels, base_bytes, clock)
    finally:
        kernels.close()


def _measure(
    container: Container, kernels: Kernels, base_bytes: Optional[int], clock: Callable[[], float]
) -> ArithmeticTimes:
    model = load_model(container, kernels)
    layer_s: List[float] = []
    head_s: List[float] = []
    expert_s: Dict[str, float] = {}
    for number, fmt in enumerate(container.formats):
        records = [record for record in container.records if record.format == number]
        if len(records) < model.config.top_k:
            continue  # no token can be made of them alone
        times: List[float] = []
        held = _HeldExperts(container, records, model.config.top_k, clock)
        try:
            state = model.start(1, MOST_TOKENS)
            model.prefill(np.array([_TOKEN]), state, held)
            stop_s = clock() + MOST_S
            for nth in range(MOST_TOKENS):
                held.begin()
                model.forward(np.array([_TOKEN]), state, held)
                end_s = clock()
                if nth:  # what is made once is made for the first
                    head_s.append(end_s - held.left_s)
                    layer_s.append(sum(held.between_s) / len(held.between_s))
                    times += held.expert_s
                if nth + 1 >= LEAST_TOKENS and end_s > stop_s:
                    break
        finally:
            held.close()
        expert_s[fmt.label] = median(times)
    return ArithmeticTimes(
        layer_s=median(layer_s),
        head_s=median(head_s),
        expert_s=expert_s,
        non_expert_bytes=model.weight_bytes,
        base_bytes=base_bytes,
        backend=kernels.backend,
        variant=kernels.variant,
    )


class _HeldExperts:
    """Answers every router with the next of the experts in memory, and takes the time."""

    def __init__(self, container: Container, records: Sequence[Record], top_k: int, clock: Callable[[], float]) -> None:
        count = max(top_k, min(len(records), HELD_BYTES // records[0].slot_bytes))
        held = {(0, place): record._replace(layer=0, expert=place) for place, record in enumerate(records[:count])}
        slabs = PackedSlabs(container.layouts)
        buffer = ExpertBuffer(None, records[0].slot_bytes, LeastRecentlyUsed())
        self._store = ExpertStore(
            container, reader="pread", keep_cached=True, bytes_per_s=None, clock=clock, sleep=time.sleep
        )
        self._supply = ExpertSupply(
            Loader(self._store, buffer, held, slabs, threaded=False), buffer, held, slabs,
            layers=1, keep=True, predictor=None, depth=0, clock=clock,
        )  # fmt: skip
        self._held, self._turn, self._clock = count, 0, clock
        try:
            self._supply.load(list(held))
        except BaseException:
            self.close()
            raise
        self.begin()

    def begin(self) -> None:
        """Begins a token."""
        self.between_s: List[float] = []  # from the experts of one layer to those of the next
        self.expert_s: List[float] = []  # an expert, by layer
        self.left_s = self._clock()  # when the last expert was done with

    def prefer(self, layer: int, logits: np.ndarray) -> np.ndarray:
        return logits

    def fetch(self, layer: int, chosen: np.ndarray, shares: np.ndarray, hidden: np.ndarray) -> Iterator[ExpertGroup]:
        asked_s = self._clock()
        self.between_s.append(asked_s - self.left_s)
        experts = np.unique(chosen).tolist()
        places = [(self._turn + i) % self._held for i in range(len(experts))]
        self._turn += len(experts)
        stands_for = dict(zip(places, experts))
        for group in self._supply.fetch(0, np.array([places]), shares, hidden):
            yield [(stands_for[place], matrices) for place, matrices in group]
        self.left_s = self._clock()
        self.expert_s.append((self.left_s - asked_s) / len(experts))

    def close(self) -> None:
        self._supply.close()
        self._store.close()
