"""The supply of experts: the one thing of this folder that a model sees."""

from __future__ import annotations

from typing import Callable, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Set, Tuple

import numpy as np

from engine.container import ExpertKey, Record
from engine.experts.buffer import Entry, ExpertBuffer
from engine.experts.loader import Loader
from engine.experts.predictors import Predictor
from engine.experts.store import ExpertStore
from engine.quantize import Packed, RecordLayout


class Counters(NamedTuple):
    """What happened since the last time; see engine.protocol.Steps."""

    stall_s: float
    hits: int
    late: int
    misses: int
    read_bytes: int
    prefetched_bytes: int
    wasted_bytes: int


class ExpertSupply:
    """Hands the experts that a router chose to the arithmetic, the resident ones first, the others as they arrive.

    keep:       experts stay in the buffer after use, until the policy evicts them; else they leave at once
    threaded:   a thread of its own reads, while this one computes
    predictor:  what to preload for the next MoE layer, at most `depth` experts
    """

    def __init__(
        self,
        store: ExpertStore,
        buffer: ExpertBuffer,
        records: Mapping[ExpertKey, Record],
        layouts: Sequence[RecordLayout],
        *,
        layers: int,
        keep: bool,
        threaded: bool,
        predictor: Optional[Predictor],
        depth: int,
        clock: Callable[[], float],
    ) -> None:
        self.buffer = buffer
        self._loader = Loader(store, buffer, records, threaded=threaded)
        self._layouts = layouts
        self._layers = layers
        self._keep = keep
        self._predictor = predictor
        self._depth = depth
        self._clock = clock
        self._stall_s = 0.0
        self._hits = self._late = self._misses = 0

    def load(self, keys: Sequence[ExpertKey]) -> None:
        """Makes experts resident before the first token. The budget must hold them."""
        for key in keys:
            with self._loader.lock:
                self._loader.demand([key])
                self._loader.wait_for({key}, self._clock).pins -= 1

    def fetch(self, layer: int, chosen: np.ndarray, hidden: np.ndarray) -> Iterator[Tuple[int, Dict[str, Packed]]]:
        """The router of MoE layer `layer` chose experts (tokens, k) int: yields each of them once, with its weights.

        `hidden` (tokens, hidden) is the residual stream before these experts, for predictors.

        The weights are valid until the next one is asked for. While the caller computes, the loader reads on.
        Raises StorageError.
        """
        needed = [(layer, int(expert)) for expert in np.unique(chosen)]
        loader, entries = self._loader, self.buffer.entries
        with loader.lock:
            loader.layer = layer
            ready: List[Entry] = []
            coming: Set[ExpertKey] = set()
            missing = []
            for key in needed:
                entry = entries.get(key)
                if entry is None:
                    missing.append(key)
                    coming.add(key)
                    continue
                entry.wanted = True
                if entry.ready:
                    entry.pins += 1
                    ready.append(entry)
                else:
                    coming.add(key)
            self._hits += len(ready)
            self._misses += len(missing)
            self._late += len(coming) - len(missing)
            loader.demand(missing)
            loader.predict(self._likely_next(layer, chosen, hidden))
        for entry in ready:
            yield entry.key[1], self._weights(entry)
            self._release(entry)
        while coming:
            with loader.lock:
                start = self._clock()
                entry = loader.wait_for(coming, self._clock)
                self._stall_s += self._clock() - start
            coming.remove(entry.key)
            yield entry.key[1], self._weights(entry)
            self._release(entry)

    def take_counters(self) -> Counters:
        loader = self._loader
        with loader.lock:
            counters = Counters(
                self._stall_s, self._hits, self._late, self._misses,
                loader.read_bytes, loader.prefetched_bytes, loader.wasted_bytes + self.buffer.wasted_bytes,
            )  # fmt: skip
            self._stall_s = 0.0
            self._hits = self._late = self._misses = 0
            loader.read_bytes = loader.prefetched_bytes = loader.wasted_bytes = self.buffer.wasted_bytes = 0
        return counters

    def resident_bytes(self) -> int:
        with self._loader.lock:
            return sum(entry.record.slot_bytes for entry in self.buffer.entries.values() if entry.ready)

    def close(self) -> None:
        self._loader.close()

    def _weights(self, entry: Entry) -> Dict[str, Packed]:
        return self._layouts[entry.record.format].unpack(entry.slab)

    def _release(self, entry: Entry) -> None:
        """The arithmetic is done with this expert."""
        with self._loader.lock:
            entry.pins -= 1
            if self._keep:
                self.buffer.touch(entry)
            else:
                self.buffer.drop(entry)
            self._loader.lock.notify_all()  # the loader may be waiting for a place

    def _likely_next(self, layer: int, chosen: np.ndarray, hidden: np.ndarray) -> List[ExpertKey]:
        """What to preload for the MoE layer after `layer`; nothing within a prefill, which uses most experts anyway."""
        if self._predictor is None:
            return []
        self._predictor.observe(layer, tuple(sorted(set(chosen[-1].tolist()))), hidden[-1])
        if len(chosen) > 1 and layer < self._layers - 1:
            return []
        following = (layer + 1) % self._layers
        return [(following, expert) for expert in self._predictor.predict(following)[: self._depth]]
