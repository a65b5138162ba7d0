"""Defines the timeline of a sample: what computed, what was read, and when. Part of engine.protocol's messages."""

from __future__ import annotations

import dataclasses
from typing import Dict, Optional, Tuple, Union

from engine.codec import MOST_S, require
from engine.dataclass import dataclass

MOST_TIMELINE_STEPS, MOST_SPANS = 64, 8192  # of one timeline; spans of each of its two tables
COMPUTED = ("attention", "experts", "stall", "head")  # the kinds of ComputeSpans
LOADED = ("demanded", "preloaded", "late", "broken-off")  # the kinds of LoadSpans


@dataclass(frozen=True)
class ComputeSpans:
    """Holds what the computing thread did, one entry per span, in columns. The engine's own work has no span.

    `kind` is an index into COMPUTED: attention is all of a layer up to its router's answer, with whatever layers
    without experts stand before it; head is all after the last layer's experts, sampling included.
    """

    kind: Tuple[int, ...]
    layer: Tuple[int, ...]  # MoE layer; of the head the last one's
    start_us: Tuple[int, ...]
    time_us: Tuple[int, ...]

    def __post_init__(self) -> None:
        _check_spans(self, COMPUTED, "compute")


@dataclass(frozen=True)
class LoadSpans:
    """Holds experts that were read, one entry each, in columns. With two lanes, each reads a part of each expert.

    `kind` is an index into LOADED: demanded by the router, preloaded before it asked, late if it asked meanwhile, or
    broken off for something more urgent.
    """

    kind: Tuple[int, ...]
    layer: Tuple[int, ...]
    expert: Tuple[int, ...]
    start_us: Tuple[int, ...]  # negative for one that was under way when the first step began
    time_us: Tuple[int, ...]
    read_bytes: Tuple[int, ...]

    def __post_init__(self) -> None:
        _check_spans(self, LOADED, "loads")


def _check_spans(spans: Union[ComputeSpans, LoadSpans], kinds: Tuple[str, ...], what: str) -> None:
    columns = {f.name: getattr(spans, f.name) for f in dataclasses.fields(spans)}
    require(len(set(map(len, columns.values()))) == 1, f"timeline: the columns of {what} differ in length")
    require(len(spans.kind) <= MOST_SPANS, f"timeline: {what} has over {MOST_SPANS} spans")
    require(all(kind < len(kinds) for kind in spans.kind), f"timeline: {what} has an unknown kind")
    for name, column in columns.items():
        require(name == "start_us" or all(n >= 0 for n in column), f"timeline: {what} has a negative {name}")
        require(all(abs(n) < MOST_S * 1e6 for n in column), f"timeline: {what} has an absurd {name}")


@dataclass(frozen=True)
class Timeline:
    """Holds loads and compute in a sample's last decode steps, in microseconds since the first of them began.

    `phases_s` is of all the sample's decode steps: by COMPUTED, and under "dequantise" the part of "experts" in which
    weights were expanded, None where that is no step of its own: native kernels do it within their products.
    """

    first_step: int  # of Steps
    step_start_us: Tuple[int, ...]
    step_time_us: Tuple[int, ...]
    compute: ComputeSpans
    loads: LoadSpans
    phases_s: Dict[str, Optional[float]]

    def __post_init__(self) -> None:
        steps = self.step_start_us, self.step_time_us
        require(len(steps[0]) == len(steps[1]) <= MOST_TIMELINE_STEPS, "timeline: its steps are of unequal number")
        valid = all(0 <= n < MOST_S * 1e6 for column in steps for n in column)
        require(valid and self.first_step >= 0, "timeline: a step is negative or absurd")
        times = [seconds for seconds in self.phases_s.values() if seconds is not None]
        require(all(0 <= seconds < MOST_S for seconds in times), "timeline: a phase is negative or absurd")
