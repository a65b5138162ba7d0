"""Simulates decoding on a clock of its own: a lane that computes, one that reads, and the engine's own supply.

Supply, buffer, eviction, predictors and the order of the reads are engine.experts; two things are made up. Arithmetic
takes the seconds that `Arithmetic` says, layer by layer: what comes before a layer's experts, then each expert once it
is there, then the head. A read takes its bytes over the storage's rate, one at a time; a speculative one gives way at
its next chunk. What the routers ask for comes from a trace. Nothing here reads a file, or sleeps.

Left out: the time to wake a thread, a processor that both lanes share, and what else happens on a device.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from engine.container import Container, ExpertKey, Record
from engine.errors import RequestError
from engine.experts.buffer import BufferEntry, ExpertBuffer
from engine.experts.lanes import BrokenOff, chunk_bytes_at
from engine.experts.loader import Loader
from engine.experts.predictors import OraclePredictor, PredictorInputs, predictor_named
from engine.experts.profile import ExpertSet, PathProfile
from engine.experts.provision import Provision
from engine.experts.slabs import Slabs
from engine.experts.store import ExpertStore
from engine.experts.supply import Counters, steps_of
from engine.offline.routing.trace import Trace
from engine.protocol import Steps
from engine.quantize import Packed


@dataclass(frozen=True)
class Arithmetic:
    """Holds the seconds that one token takes on one device, with the interpreter and without waiting for experts."""

    layer_s: float  # a MoE layer but for its experts, and whatever layers without experts stand before it
    head_s: float  # all that comes after the last layer
    expert_s: Mapping[int, float]  # one expert, by the number of its format in the container


@dataclass(frozen=True)
class Storage:
    """Reads one record after another."""

    bytes_per_s: float


@dataclass(frozen=True)
class Stretch:
    """Delimits rows of a trace: `start` to `first_decoded` are a prompt, from there to `stop` is decoded."""

    start: int
    first_decoded: int
    stop: int


def stretches(trace: Trace, prompt_tokens: int, new_tokens: int) -> list[Stretch]:
    """Returns as many as the trace's windows hold. Raises RequestError if no window holds one.

    An encoder's prompt is not in a trace: there a sequence begins with the decoder's start token, as every window does.
    """
    prompt = 1 if trace.first_layer else prompt_tokens
    ends = [*trace.starts.tolist()[1:], len(trace.tokens)]
    found = []
    for begin, end in zip(trace.starts.tolist(), ends, strict=True):
        starts = [begin] if trace.first_layer else range(begin, end, prompt + new_tokens)
        for start in starts:
            stop = min(end, start + prompt + new_tokens)
            if stop - start > prompt:
                found.append(Stretch(start, start + prompt, stop))
    if not found:
        raise RequestError(
            f"the trace has no window of more than {prompt} tokens: make a longer one, or shorten the prompt"
        )
    return found


@dataclass(frozen=True)
class Simulated:
    """Holds what a strategy did; `steps` has an entry for each sequence, of which step 0 is the prompt."""

    steps: tuple[Steps, ...]
    held_bytes: int  # of experts in memory, at the end: slabs are kept, so that it is the most


def simulate(
    provision: Provision,
    trace: Trace,
    arithmetic: Arithmetic,
    storage: Storage,
    cut: Sequence[Stretch],
    *,
    profile: PathProfile | None = None,
) -> Simulated:
    """Simulates one sequence of `cut` after another, with a buffer that is empty at first. Raises RequestError."""
    provision.check_profile(profile)
    strategy, first = provision.strategy, trace.first_layer
    chosen = trace.chosen.astype(np.int64)  # (n, decoder layers, k)
    previews = _previews(trace)  # (n, decoder layers, experts)
    # Where the engine hands a layer's hidden state to a predictor, which asks the next router, it is the answer here.
    predictor = None if strategy.predictor is None else predictor_named(
        strategy.predictor, PredictorInputs(profile, lambda layer, hidden: hidden, ())
    )  # fmt: skip
    loaders: list[SimulatedLoader] = []

    def make_loader(buffer: ExpertBuffer) -> Loader:
        loaders.append(
            SimulatedLoader(
                provision.container, buffer, provision.records, provision.slabs, storage, threaded=strategy.threaded
            )
        )
        return loaders[0]

    supply = replace(provision, slabs=_Empty(provision.slabs)).supply(
        make_loader, predictor, profile=profile, first_layer=first, top_k=trace.top_k, clock=lambda: loaders[0].now_s
    )
    (loader,) = loaders
    if strategy.residency == "all":
        supply.load(list(provision.records))

    def forward(rows: slice) -> None:
        shares = np.ones((rows.stop - rows.start, trace.top_k), np.float32)
        for i in range(trace.layers - first):
            loader.compute(arithmetic.layer_s)
            layer = first + i
            for group in supply.fetch(layer, chosen[rows, i], shares, previews[rows, i]):
                formats = [provision.records[layer, expert].format for expert, _ in group]
                loader.compute(sum(arithmetic.expert_s[number] for number in formats))
        loader.compute(arithmetic.head_s)

    done = []
    for sequence in cut:
        if isinstance(predictor, OraclePredictor):
            passes = range(sequence.first_decoded - 1, sequence.stop)
            predictor.learn([_routing(chosen[row], first) for row in passes])
        times: list[float] = []
        counters: list[Counters] = []
        supply.take_counters()
        for row in range(sequence.first_decoded - 1, sequence.stop):
            start_s = loader.now_s
            if row < sequence.first_decoded:
                forward(slice(sequence.start, sequence.first_decoded))
            else:
                supply.begin(int(trace.tokens[row]))
                forward(slice(row, row + 1))
            times.append(loader.now_s - start_s)
            if row >= sequence.first_decoded:
                supply.decoded(times[-1])
            counters.append(supply.take_counters())
        done.append(steps_of(times, counters))
    return Simulated(tuple(done), supply.buffer.held_bytes)


class SimulatedLoader(Loader):
    """Simulates the engine's queues of reads, on a clock that `compute` and `wait_for` move on."""

    def __init__(
        self,
        container: Container,
        buffer: ExpertBuffer,
        records: Mapping[ExpertKey, Record],
        slabs: Slabs,
        storage: Storage,
        *,
        threaded: bool,
    ) -> None:
        """Makes the loader. If not `threaded`, it reads only while somebody waits."""
        super().__init__(_NoStore(container), buffer, records, slabs, threaded=False)
        self.now_s = 0.0
        self._ahead = threaded
        self._storage = storage
        self._chunk_bytes = chunk_bytes_at(storage.bytes_per_s)
        self._reading: BufferEntry | None = None
        self._began_s = self._ends_s = 0.0
        self._reads_bytes = 0

    def compute(self, seconds: float) -> None:
        """Lets the arithmetic go on for so long, and the reads with it."""
        until = self.now_s + seconds
        with self.lock:
            while self._reading is not None and self._ends_s <= until:
                self._finish()
        self.now_s = until

    def demand(self, records: Iterable[Record]) -> None:
        super().demand(records)
        entry = self._reading
        if entry is not None and entry.speculative and self._gives_way(entry):
            chunks = max(1, math.ceil((self.now_s - self._began_s) * self._storage.bytes_per_s / self._chunk_bytes))
            self._reads_bytes = min(self._reads_bytes, chunks * self._chunk_bytes)
            self._ends_s = self._began_s + self._reads_bytes / self._storage.bytes_per_s
        self._read_ahead()

    def predict(self, keys: Sequence[ExpertKey], *, read: bool = True) -> None:
        super().predict(keys, read=read)
        self._read_ahead()

    def freed(self) -> None:
        super().freed()
        self._read_ahead()

    def _load_next(self) -> bool:
        """Reads the next expert at once: time passes until it is there."""
        if self._reading is None:
            self._begin()
        if self._reading is None:
            return False
        self.now_s = max(self.now_s, self._ends_s)
        self._finish()
        return True

    def _read_ahead(self) -> None:
        if self._ahead and self._reading is None:
            self._begin()

    def _begin(self) -> None:
        self._reading = self._next()
        if self._reading is not None:
            self._began_s = self.now_s
            self._reads_bytes = self._reading.record.slot_bytes
            self._ends_s = self._began_s + self._reads_bytes / self._storage.bytes_per_s

    def _finish(self) -> None:
        entry, self._reading = self._reading, None
        assert entry is not None
        # What begins now began when this one ended, in the midst of what is computed.
        now_s, self.now_s = self.now_s, self._ends_s
        self._arrived(entry, self._reads_bytes)
        self._read_ahead()
        self.now_s = max(now_s, self.now_s)


class _NoStore(ExpertStore):
    """Stands for a store that nobody reads from."""

    def __init__(self, container: Container) -> None:
        self.container = container


class _Empty:
    """Gives slabs as long as those of the engine, with nothing in them."""

    def __init__(self, slabs: Slabs) -> None:
        self.bytes = slabs.bytes

    def fill(self, store: ExpertStore, record: Record, slab: np.ndarray, broken_off: BrokenOff | None) -> int:
        return record.slot_bytes

    def weights(self, record: Record, slab: np.ndarray) -> dict[str, Packed]:
        return {}


def _previews(trace: Trace) -> np.ndarray:
    """Returns scores (n, decoder layers, experts) that rank each next layer as its own router did ahead of time."""
    n, layers, _ = trace.chosen.shape
    scores = np.full((n, layers, trace.experts), -np.inf, np.float32)
    ranks = np.broadcast_to(-np.arange(trace.ahead.shape[2], dtype=np.float32), trace.ahead.shape)
    np.put_along_axis(scores[:, : layers - 1], trace.ahead.astype(np.int64), ranks, axis=2)
    return scores


def _routing(chosen: np.ndarray, first_layer: int) -> dict[int, ExpertSet]:
    """Returns (layers, k) of one token, as predictors know it."""
    return {layer: tuple(sorted(experts)) for layer, experts in enumerate(chosen.tolist(), first_layer)}
