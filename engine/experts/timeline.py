"""Records what the computing and the reading thread do, token by token: see engine.spans.Timeline."""

from __future__ import annotations

from collections import deque
from typing import Callable, Deque, Iterable, NamedTuple, Optional, Tuple

from engine.experts.buffer import BufferEntry
from engine.spans import COMPUTED, LOADED, MOST_SPANS, ComputeSpans, LoadSpans, Timeline

ATTENTION, EXPERTS, STALL, HEAD = range(len(COMPUTED))
_DEMANDED, _PRELOADED, _LATE, _BROKEN_OFF = range(len(LOADED))


class _Step(NamedTuple):
    number: int
    start: float
    end: float


class _Compute(NamedTuple):
    kind: int
    layer: int
    start: float
    end: float


class _Load(NamedTuple):
    kind: int
    layer: int
    expert: int
    start: float
    end: float
    read_bytes: int


class TimelineRecorder:
    """Keeps the last `most_steps` decode steps, fewer if they have more than MOST_SPANS spans.

    `loaded` is called by the thread that reads, with the loader's lock; all else by the one that computes.
    """

    def __init__(self, most_steps: int, clock: Callable[[], float]) -> None:
        self.clock = clock
        self._most_steps = most_steps
        self._steps: Deque[_Step] = deque()
        self._compute: Deque[_Compute] = deque(maxlen=MOST_SPANS)
        self._loads: Deque[_Load] = deque(maxlen=MOST_SPANS)
        self._sums = [0.0] * len(COMPUTED)
        self._number, self._step_began = 0, 0.0
        self._began = 0.0  # the span that goes on
        self._layer = 0

    def begin_step(self, number: int, start: float) -> None:
        self._number, self._step_began, self._began = number, start, start

    def begin(self) -> None:
        """Begins a span."""
        self._began = self.clock()

    def end(self, kind: int, layer: int) -> None:
        """Ends the span, which was of this kind and MoE layer."""
        self.add(kind, layer, self._began, self.clock())

    def add(self, kind: int, layer: int, start: float, end: float) -> None:
        self._layer = layer
        self._sums[kind] += end - start
        self._compute.append(_Compute(kind, layer, start, end))

    def loaded(self, entry: BufferEntry, start: float, read_bytes: int) -> None:
        if read_bytes < entry.record.slot_bytes:
            kind = _BROKEN_OFF
        elif entry.speculative:
            kind = _LATE if entry.wanted else _PRELOADED
        else:
            kind = _DEMANDED
        self._loads.append(_Load(kind, *entry.key, start, self.clock(), read_bytes))

    def end_step(self, end: float) -> None:
        """Ends a step. After the last layer's experts came the head."""
        self.add(HEAD, self._layer, self._began, end)
        steps = self._steps
        steps.append(_Step(self._number, self._step_began, end))
        while len(steps) > 1 and (len(steps) > self._most_steps or self._is_full):
            steps.popleft()
            _forget(self._compute, steps[0].start)
            _forget(self._loads, steps[0].start)

    def timeline(self, expanding_s: Optional[float]) -> Optional[Timeline]:
        """Returns the timeline; None if no step was decoded. Nobody may record now.

        `expanding_s` is of all steps, see Timeline.phases_s.
        """
        if not self._steps:
            return None
        origin = self._steps[0].start

        def spans(times: Iterable[Tuple[float, float]]) -> Tuple[Tuple[int, ...], Tuple[int, ...]]:
            """Returns start_us and time_us. Both ends are rounded, so that spans that met still meet."""
            ends = [(round((start - origin) * 1e6), round((end - origin) * 1e6)) for start, end in times]
            return tuple(start for start, _ in ends), tuple(end - start for start, end in ends)

        compute, loads = list(self._compute), list(self._loads)
        return Timeline(
            self._steps[0].number,
            *spans((step.start, step.end) for step in self._steps),
            ComputeSpans(
                tuple(span.kind for span in compute),
                tuple(span.layer for span in compute),
                *spans((span.start, span.end) for span in compute),
            ),
            LoadSpans(
                tuple(load.kind for load in loads),
                tuple(load.layer for load in loads),
                tuple(load.expert for load in loads),
                *spans((load.start, load.end) for load in loads),
                tuple(load.read_bytes for load in loads),
            ),
            {**dict(zip(COMPUTED, self._sums)), "dequantise": expanding_s},
        )

    @property
    def _is_full(self) -> bool:
        return MOST_SPANS in (len(self._compute), len(self._loads))


def _forget(spans: Deque, until: float) -> None:  # type: ignore[type-arg]
    while spans and spans[0].end <= until:
        spans.popleft()
