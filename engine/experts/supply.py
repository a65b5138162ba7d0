"""Supplies experts to the arithmetic: the one thing of this folder that a model sees."""

from __future__ import annotations

from typing import Callable, Dict, Iterable, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Set

import numpy as np

from engine.container import ExpertKey, Record
from engine.experts.buffer import BufferEntry, ExpertBuffer
from engine.experts.governor import PreloadGovernor
from engine.experts.loader import Loader
from engine.experts.predictors import Predictor
from engine.experts.relief import ExactRelief, Relief
from engine.experts.slabs import Slabs
from engine.experts.timeline import ATTENTION, EXPERTS, STALL, TimelineRecorder
from engine.models.interface import ExpertGroup
from engine.protocol import LayerCounts, Recall, Steps
from engine.quantize import Packed

NO_RECALL = Recall(0, 0, 0, 0)


class Counters(NamedTuple):
    """Counts what happened since the last time; see engine.protocol.Steps."""

    stall_s: float
    hits: int
    late: int
    misses: int
    read_bytes: int
    prefetched_bytes: int
    wasted_bytes: int


def steps_of(time_s: Sequence[float], counters: Sequence[Counters]) -> Steps:
    """Returns the columns of steps that took so long and counted so much."""
    columns = {name: tuple(getattr(each, name) for each in counters) for name in Counters._fields}
    return Steps(time_s=tuple(time_s), **columns)


class ExpertSupply:
    """Hands the experts that a router chose to the arithmetic, the resident ones first, the others as they arrive.

    loader:     fills `buffer`
    keep:       experts stay in the buffer after use, until the policy evicts them; else they leave at once
    predictor:  what to preload for the next MoE layer, at most `depth` experts
    governor:   whether it is worth it; without one, always
    relief:     how a strategy that may lose accuracy avoids reading; without one, exact
    whole_layers: every expert of a layer is read, whatever the router chose
    first_layer: the first MoE layer of the decoder, with which each token begins
    """

    def __init__(
        self,
        loader: Loader,
        buffer: ExpertBuffer,
        records: Mapping[ExpertKey, Record],
        slabs: Slabs,
        *,
        layers: int,
        keep: bool,
        predictor: Optional[Predictor],
        depth: int,
        clock: Callable[[], float],
        governor: Optional[PreloadGovernor] = None,
        relief: Optional[Relief] = None,
        whole_layers: bool = False,
        first_layer: int = 0,
    ) -> None:
        self.buffer = buffer
        self._loader = loader
        self._records, self._slabs = records, slabs
        self._relief = relief or ExactRelief()
        self._layers, self._first_layer = layers, first_layer
        self._experts_per_layer = len(records) // layers
        self._whole_layers = whole_layers
        self._keep = keep
        self._predictor = predictor
        self._depth = depth
        self._governor = governor
        self._clock = clock
        self._stall_s = 0.0
        self._hits = self._late = self._misses = 0
        self._decode_counts = _no_counts(layers)
        self._recorder: Optional[TimelineRecorder] = None
        self._ranking: List[int] = []  # what the predictor said of the layer that comes next
        self._recall = NO_RECALL

    def load(self, keys: Sequence[ExpertKey]) -> None:
        """Makes experts resident before the first token. The budget must hold them."""
        for key in keys:
            with self._loader.lock:
                self._loader.demand([self._records[key]])
                self._loader.wait_for({key}, self._clock).pins -= 1

    def prefer(self, layer: int, logits: np.ndarray) -> np.ndarray:
        """Returns the scores to choose by, from the router's logits (tokens, experts), of the same shape."""
        if not self._decoding(layer, logits) or not self._relief.reroutes:
            return logits
        with self._loader.lock:
            entries = self.buffer.entries
            resident = [e for e in range(logits.shape[1]) if (layer, e) in entries and entries[layer, e].ready]
        return self._relief.prefer(logits, resident)

    def fetch(self, layer: int, chosen: np.ndarray, shares: np.ndarray, hidden: np.ndarray) -> Iterator[ExpertGroup]:
        """Yields each expert that the router of MoE layer `layer` chose, (tokens, k) int, once, with its weights.

        They come in groups: those of one token that are resident together, and then each as it arrives.

        `shares` (tokens, k) weigh them; `hidden` (tokens, hidden) is the residual stream before them, for predictors.

        The weights are valid until the next group is asked for. While the caller computes, the loader reads on.
        Raises StorageError.
        """
        wanted = [(layer, expert) for expert in sorted(set(chosen.ravel().tolist()))]
        needed = [(layer, expert) for expert in range(self._experts_per_layer)] if self._whole_layers else wanted
        substitutes: Mapping[ExpertKey, Record] = {}
        decoding = self._decoding(layer, chosen)
        recorder = self._recorder if decoding else None
        if recorder is not None:
            recorder.end(ATTENTION, layer)
        if decoding:
            substitutes = self._relief.substitutes(layer, chosen[0], shares[0])
            self._score(chosen[0])
        ranking = self._rank_next(layer, chosen, hidden)
        loader, entries = self._loader, self.buffer.entries
        with loader.lock:
            loader.layer = layer
            if not self._keep:
                self._drop_mispredicted(needed)
            ready: List[BufferEntry] = []
            coming: Set[ExpertKey] = set()
            missing = []
            for key in needed:
                entry = entries.get(key)
                if entry is not None and self._too_coarse(entry, substitutes):
                    self.buffer.drop(entry)
                    entry = None
                if entry is None:
                    missing.append(substitutes.get(key, self._records[key]))
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
            if decoding:
                counts = self._decode_counts[layer]
                counts[0] += len(ready)
                counts[1] += len(coming) - len(missing)
                counts[2] += len(missing)
            loader.demand(missing)
            self._preload(ranking)
        for group in [ready] if len(chosen) == 1 else [[entry] for entry in ready]:
            resident = [(entry.key[1], self._weights(entry)) for entry in group if entry.key in wanted]
            if resident:
                if recorder is not None:
                    recorder.begin()
                yield resident
                if recorder is not None:
                    recorder.end(EXPERTS, layer)
            self._release(group)
        while coming:
            with loader.lock:
                start = self._clock()
                entry = loader.wait_for(coming, self._clock)
                end = self._clock()
                self._stall_s += end - start
            coming.remove(entry.key)
            if recorder is not None:
                recorder.add(STALL, layer, start, end)
                recorder.begin()
            if entry.key in wanted:
                yield [(entry.key[1], self._weights(entry))]
                if recorder is not None:
                    recorder.end(EXPERTS, layer)
            self._release([entry])
        if recorder is not None:
            recorder.begin()

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

    def take_layer_counts(self) -> LayerCounts:
        """Returns the counts of what was decoded since the last time, by MoE layer."""
        counts, self._decode_counts = self._decode_counts, _no_counts(self._layers)
        hits, late, misses = (tuple(column) for column in zip(*counts))
        return LayerCounts(hits=hits, late=late, misses=misses)

    def record(self, recorder: Optional[TimelineRecorder]) -> None:
        """Tells `recorder` from now on what happens while decoding; nobody if it is None."""
        with self._loader.lock:
            self._recorder = self._loader.recorder = recorder

    def begin(self, token: int) -> None:
        """Announces the next token: what its first layers need may follow from that alone."""
        if self._predictor is None:
            return
        self._predictor.begin(token)
        ranking = self._predict(self._first_layer)
        with self._loader.lock:
            self._preload(ranking)

    def decoded(self, time_s: float) -> None:
        """Notes that a token took that long."""
        if self._governor is not None:
            self._governor.decoded(time_s)

    def take_recall(self) -> Optional[Recall]:
        """Returns how good the predictions were since the last time; None if there were none."""
        recall, self._recall = self._recall, NO_RECALL
        return recall if recall.activated else None

    def resident_bytes(self) -> int:
        with self._loader.lock:
            return sum(entry.slab.nbytes for entry in self.buffer.entries.values() if entry.ready)

    def close(self) -> None:
        self._loader.close()

    def _decoding(self, layer: int, rows: np.ndarray) -> bool:
        """Tells whether this is one token in the decoder; an encoder or a prompt has many."""
        return len(rows) == 1 and layer >= self._first_layer

    def _weights(self, entry: BufferEntry) -> Dict[str, Packed]:
        if entry.weights is None:
            entry.weights = self._slabs.weights(entry.record, entry.slab)
        return entry.weights

    def _release(self, group: Sequence[BufferEntry]) -> None:
        """Unpins these experts, with which the arithmetic is done."""
        with self._loader.lock:
            for entry in group:
                entry.pins -= 1
                if self._keep:
                    self.buffer.touch(entry)
                else:
                    self.buffer.drop(entry)
            self._loader.freed()

    def _too_coarse(self, entry: BufferEntry, substitutes: Mapping[ExpertKey, Record]) -> bool:
        """Tells whether a substitute that was good enough once stands for an expert that matters now."""
        return entry.record is not self._records[entry.key] and entry.key not in substitutes and not entry.pins

    def _rank_next(self, layer: int, chosen: np.ndarray, hidden: np.ndarray) -> List[ExpertKey]:
        """Predicts the MoE layer after `layer`; nothing within a prefill, which uses most experts."""
        within_prefill = not self._decoding(layer, chosen) and layer < self._layers - 1
        following = layer + 1 if layer + 1 < self._layers else self._first_layer
        if self._whole_layers and not within_prefill:
            return [(following, expert) for expert in range(self._experts_per_layer)]
        if self._predictor is None or layer < self._first_layer:
            return []
        self._predictor.observe(layer, tuple(sorted(set(chosen[-1].tolist()))), hidden[-1])
        return [] if within_prefill else self._predict(following)

    def _predict(self, layer: int) -> List[ExpertKey]:
        assert self._predictor is not None
        self._ranking = self._predictor.predict(layer)
        return [(layer, expert) for expert in self._ranking[: self._depth]]

    def _preload(self, ranking: Sequence[ExpertKey]) -> None:
        self._loader.predict(ranking, read=self._governor is None or self._governor.preloading)

    def _score(self, chosen: np.ndarray) -> None:
        """Scores the prediction for this layer by the router's answer `chosen` (k,)."""
        if self._ranking:
            right = [expert in chosen for expert in self._ranking[: max(2, len(chosen))]]
            self._recall = Recall(
                self._recall.first + sum(right[:1]),
                self._recall.first_two + sum(right[:2]),
                self._recall.first_k + sum(right[: len(chosen)]),
                self._recall.activated + len(chosen),
            )
        self._ranking = []

    def _drop_mispredicted(self, needed: Iterable[ExpertKey]) -> None:
        """Drops what was preloaded for this layer and is not needed, if nothing is kept."""
        stale = [e for e in self.buffer.entries.values() if e.ready and e.speculative and not e.pins]
        for entry in stale:
            if entry.key not in needed:
                self.buffer.wasted_bytes += entry.record.slot_bytes
                self.buffer.drop(entry)


def _no_counts(layers: int) -> List[List[int]]:
    """Returns zero hits, late ones and misses, by MoE layer."""
    return [[0, 0, 0] for _ in range(layers)]
