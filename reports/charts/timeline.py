"""The pipeline of a few decode steps: what the computing thread did, and which experts were read meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.spans import COMPUTED, LOADED, Timeline
from reports import units
from reports.charts.axes import Tick, nice_ticks, tick_label
from reports.judging.groups import Row

TRACK, GAP = 22.0, 8.0  # heights
STEPS_HEIGHT = 14.0
_MOST_TRACKS = 3  # of loads
_MOST_SPANS = 1500  # of both kinds together

_NAMES = {
    "attention": "attention and router", "experts": "experts", "stall": "waiting for an expert", "head": "head",
    "demanded": "read when asked for", "preloaded": "preloaded", "late": "preloaded, late", "broken-off": "broken off",
}  # fmt: skip


@dataclass(frozen=True)
class Spans:
    """All spans of one kind, drawn as one path."""

    kind: str  # a class of page.css
    name: str
    d: str


@dataclass(frozen=True)
class Pipeline:
    """Times are microseconds across, from the beginning of the first step; heights are of the canvas."""

    title: str
    series: int
    description: str
    time_us: int
    height: float
    spans: tuple[Spans, ...]
    steps: tuple[Tick, ...]  # where each begins, and its number
    ticks: tuple[Tick, ...]
    values: str  # a line for each span: track, kind, layer, expert, start and time in ms
    note: str


def pipelines(rows: Sequence[Row], series: dict[str, int], place: str) -> list[Pipeline]:
    """Draws one pipeline for each row of which a run kept a timeline."""
    found = [(row, timeline) for row in rows if (timeline := _timeline(row)) is not None]
    return [_pipeline(row.name, series[row.strategy], timeline, place) for row, timeline in found]


def _timeline(row: Row) -> Timeline | None:
    kept = [s.timeline for run in row.runs for s in run.samples if s.timeline is not None and s.timeline.step_time_us]
    return kept[0] if kept else None


def _pipeline(name: str, series: int, timeline: Timeline, place: str) -> Pipeline:
    compute, loads = timeline.compute, timeline.loads
    shown, time_us = _shown(timeline)
    end = time_us
    tracks: list[int] = []  # when each is free again
    paths: dict[str, list[str]] = {}
    lines: list[str] = []
    for kind, layer, start, time in sorted(
        zip(compute.kind, compute.layer, compute.start_us, compute.time_us, strict=True), key=lambda span: span[2]
    ):
        if start < end:
            paths.setdefault(COMPUTED[kind], []).append(_box(start, time, STEPS_HEIGHT, end))
            lines.append(_line("compute", COMPUTED[kind], layer, None, start, time))
    loads_top = STEPS_HEIGHT + TRACK + GAP
    for kind, layer, expert, start, time in sorted(
        zip(loads.kind, loads.layer, loads.expert, loads.start_us, loads.time_us, strict=True), key=lambda s: s[3]
    ):
        if start < end:
            track = next((i for i, free in enumerate(tracks) if free <= start), len(tracks))
            track = min(track, _MOST_TRACKS - 1)
            tracks[track : track + 1] = [start + time]
            paths.setdefault(LOADED[kind], []).append(_box(start, time, loads_top + track * (TRACK + 2), end))
            lines.append(_line("load", LOADED[kind], layer, expert, start, time))
    height = loads_top + max(1, len(tracks)) * (TRACK + 2)
    scale = units.scale("s", [time_us / 1e6])
    ticks = [t for t in nice_ticks(time_us / 1e6 / scale.divisor, most=8) if t * scale.divisor * 1e6 <= time_us]
    stall = sum(t for k, s, t in zip(compute.kind, compute.start_us, compute.time_us, strict=True)
                if COMPUTED[k] == "stall" and s < end)  # fmt: skip
    return Pipeline(
        title=name,
        series=series,
        description=(
            f"{shown} decode steps of {name} on {place}, {scale.text(time_us / 1e6)} in all: the computing thread "
            f"waited {scale.text(stall / 1e6)} for experts, {sum(line.startswith('load') for line in lines)} experts "
            "were read."
        ),
        time_us=time_us,
        height=height,
        spans=tuple(Spans(kind, _NAMES[kind], "".join(paths[kind])) for kind in (*COMPUTED, *LOADED) if kind in paths),
        steps=tuple(
            Tick(float(start), str(timeline.first_step + i)) for i, start in enumerate(timeline.step_start_us[:shown])
        ),
        ticks=tuple(Tick(t * scale.divisor * 1e6, f"{tick_label(t)} {scale.symbol}") for t in ticks),
        values="\n".join(lines),
        note=""
        if shown == len(timeline.step_start_us)
        else f"The first {shown} of {len(timeline.step_start_us)} steps.",
    )


def _shown(timeline: Timeline) -> tuple[int, int]:
    """Returns how many steps can be drawn, at least one, and their time in microseconds."""
    starts = sorted((*timeline.compute.start_us, *timeline.loads.start_us))
    ends = [s + t for s, t in zip(timeline.step_start_us, timeline.step_time_us, strict=True)]
    fit = [end for end in ends if sum(start < end for start in starts) <= _MOST_SPANS]
    shown = max(1, len(fit))
    return shown, max(1, ends[shown - 1])


def _box(start: int, time: int, top: float, end: int) -> str:
    begin = max(0, start)
    return f"M{begin} {top:g}h{max(1, min(start + time, end) - begin)}v{TRACK:g}H{begin}z"


def _line(track: str, kind: str, layer: int, expert: int | None, start: int, time: int) -> str:
    which = "" if expert is None else f" expert {expert}"
    return f"{track} {kind}: layer {layer}{which}, at {start / 1e3:.3f} ms, {time / 1e3:.3f} ms"
