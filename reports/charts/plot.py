"""A plot: two axes, and lines, areas, dots and words between them. Most charts are one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from reports.charts.axes import WIDTH, Axis, Tick

LEFT, RIGHT, TOP, BOTTOM = 44.0, WIDTH - 10.0, 20.0, 150.0
HEIGHT = BOTTOM + 42.0


@dataclass(frozen=True)
class Stroke:
    """A path; `kind` is a class of page.css: line, area, band, sample, floor, roof, rule ..."""

    kind: str
    d: str  # SVG path
    series: int | None = None


@dataclass(frozen=True)
class Dot:
    x: float
    y: float
    title: str
    series: int | None = None
    kind: str = "dot"


@dataclass(frozen=True)
class Label:
    x: float
    y: float
    text: str
    anchor: str = "start"
    kind: str = "name"


@dataclass(frozen=True)
class Key:
    """An entry of the legend."""

    series: int
    name: str


@dataclass(frozen=True)
class Plot:
    title: str
    description: str
    x_label: str
    y_label: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    strokes: tuple[Stroke, ...] = ()
    dots: tuple[Dot, ...] = ()
    labels: tuple[Label, ...] = ()
    keys: tuple[Key, ...] = ()
    note: str = ""
    series: int | None = None  # where all of it is about one strategy
    height: float = HEIGHT
    left: float = LEFT
    right: float = RIGHT
    top: float = TOP
    bottom: float = field(default=BOTTOM)


def x_axis(low: float, high: float, *, is_log: bool = False) -> Axis:
    return Axis(low, high, LEFT, RIGHT, is_log)


def y_axis(low: float, high: float, *, is_log: bool = False) -> Axis:
    return Axis(low, high, BOTTOM, TOP, is_log)


def placed(labels: Sequence[Label], *, gap: float = 12.0, low: float = TOP - 4, high: float = BOTTOM) -> list[Label]:
    """Moves labels up or down, as little as their order allows, until no two are closer than `gap`."""
    ordered = sorted(labels, key=lambda label: label.y)
    ys: list[float] = []
    for label in ordered:
        ys.append(max(label.y, ys[-1] + gap if ys else low))
    limit = high
    for i in reversed(range(len(ys))):
        ys[i] = min(ys[i], limit)
        limit = ys[i] - gap
    return [Label(o.x, y, o.text, o.anchor, o.kind) for o, y in zip(ordered, ys, strict=True)]
