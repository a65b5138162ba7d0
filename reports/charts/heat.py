"""The geometry of what is drawn of experts: maps of layers by experts, and shares that grow to the whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from reports import units
from reports.charts.axes import Tick, nice_ticks

WIDTH = 720.0  # of a map's canvas
LEVELS = 8  # of shade in page.css, from 0; what is unknown has none
_LEFT, _TOP = 30.0, 4.0
_LOWEST_ROW, _HIGHEST_ROW = 6.0, 18.0

PLOT_WIDTH = 340.0
_PLOT_LEFT, _PLOT_RIGHT, _PLOT_TOP, _PLOT_BOTTOM = 38.0, PLOT_WIDTH - 10.0, 18.0, 150.0
_MOST_POINTS = 160

Grid = tuple[tuple[float | None, ...], ...]  # [layer][expert]; None where nothing is known


@dataclass(frozen=True)
class Shade:
    level: int
    label: str
    d: str  # SVG path of all cells of this shade


@dataclass(frozen=True)
class HeatMap:
    title: str
    description: str
    note: str
    height: float
    shades: tuple[Shade, ...]
    unknown: str  # SVG path
    rows: tuple[Tick, ...]
    columns: tuple[Tick, ...]
    values: str  # all of them as text, a line for each layer


@dataclass(frozen=True)
class Curve:
    """Shares (0 to 1) that are reached at x."""

    name: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Line:
    series: int
    name: str
    d: str


@dataclass(frozen=True)
class ShareChart:
    title: str
    description: str
    note: str
    x_label: str
    lines: tuple[Line, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]


def category_map(
    title: str, note: str, grid: Grid, categories: Sequence[tuple[int, str]], text: Callable[[float], str]
) -> HeatMap:
    """Draws a map of categories; a cell's value is an index into `categories`: (shade, label), the palest first."""
    counts = [sum(value == i for row in grid for value in row) for i in range(len(categories))]
    parts = [f"{label}: {n} experts" for (_, label), n in zip(categories, counts, strict=True)]
    labels = [(level, f"{label} ({n})") for (level, label), n in zip(categories, counts, strict=True)]
    return _map(title, ", ".join(parts), note, grid, labels, lambda value: int(value), text)


def value_map(title: str, note: str, grid: Grid, text: Callable[[float], str]) -> HeatMap | None:
    """Draws a map whose shades have equally many cells, so that one large value hides nothing; None without values."""
    known = sorted(value for row in grid for value in row if value is not None)
    if not known:
        return None
    bounds = [known[len(known) * i // LEVELS] for i in range(1, LEVELS)]
    labels = [(level, f"from {text(bound)}") for level, bound in enumerate([known[0], *bounds])]
    middle = known[len(known) // 2]
    description = f"from {text(known[0])} to {text(known[-1])}, median {text(middle)}, of {len(known)} experts"
    note = f"{note} Each shade has as many experts as any other."
    return _map(title, description, note, grid, labels, lambda v: sum(v >= bound for bound in bounds), text)


def _map(
    title: str,
    description: str,
    note: str,
    grid: Grid,
    labels: Sequence[tuple[int, str]],
    shade_of: Callable[[float], int],
    text: Callable[[float], str],
) -> HeatMap:
    layers, experts = len(grid), max(map(len, grid))
    row_height = min(_HIGHEST_ROW, max(_LOWEST_ROW, 400.0 / layers))
    width = (WIDTH - _LEFT) / experts
    paths: list[list[str]] = [[] for _ in labels]
    unknown: list[str] = []
    for layer, row in enumerate(grid):
        for expert, value in enumerate(row):
            cell = f"M{_LEFT + expert * width:.1f} {_TOP + layer * row_height:.1f}h{width - 1:.1f}v{row_height - 1:.1f}"
            (unknown if value is None else paths[shade_of(value)]).append(f"{cell}h{1 - width:.1f}z")
    every = [n for n in map(int, nice_ticks(layers - 1, most=8)) if n < layers]
    across = [n for n in map(int, nice_ticks(experts - 1, most=12)) if n < experts]
    return HeatMap(
        title=title,
        description=f"{title}, {layers} layers by {experts} experts: {description}.",
        note=note,
        height=_TOP + layers * row_height + 32.0,
        shades=tuple(Shade(level, label, "".join(paths[i])) for i, (level, label) in enumerate(labels) if paths[i]),
        unknown="".join(unknown),
        rows=tuple(Tick(_TOP + (n + 0.5) * row_height, str(n)) for n in dict.fromkeys(every)),
        columns=tuple(Tick(_LEFT + (n + 0.5) * width, str(n)) for n in dict.fromkeys(across)),
        values="\n".join(
            f"layer {layer}\t" + "\t".join(units.ABSENT if v is None else text(v) for v in row)
            for layer, row in enumerate(grid)
        ),
    )


def share_chart(title: str, note: str, curves: Sequence[Curve], x_label: str, x_top: float) -> ShareChart:
    """Draws curves over x from 0 to `x_top`, which is written as a share if it is 1."""
    as_share = x_top == 1
    x_ticks = [0.0, 0.25, 0.5, 0.75, 1.0] if as_share else [t for t in nice_ticks(x_top) if t <= x_top]

    def x(value: float) -> float:
        return _PLOT_LEFT + (_PLOT_RIGHT - _PLOT_LEFT) * value / x_top

    def y(value: float) -> float:
        return _PLOT_BOTTOM - (_PLOT_BOTTOM - _PLOT_TOP) * value

    halves = [
        f"{curve.name} reaches half at {units.text(at, 'share') if as_share else units.number(at)}"
        for curve in curves
        if (at := next((x for x, share in curve.points if share >= 0.5), None)) is not None
    ]
    return ShareChart(
        title=title,
        description=f"{title}: {', '.join(halves) or 'no curve reaches half'}.",
        note=note,
        x_label=x_label,
        lines=tuple(
            Line(1 + i, curve.name, "M" + "L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in _thinned(curve.points)))
            for i, curve in enumerate(curves)
        ),
        x_ticks=tuple(Tick(x(t), units.text(t, "share") if as_share else units.number(t)) for t in x_ticks),
        y_ticks=tuple(Tick(y(t), units.text(t, "share")) for t in (0.0, 0.25, 0.5, 0.75, 1.0)),
    )


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Returns as many points as can be told apart, both ends among them."""
    if len(points) <= _MOST_POINTS:
        return list(points)
    last = len(points) - 1
    # Closer together at the left, where such curves are steep.
    chosen = {round(last * math.expm1(5 * i / _MOST_POINTS) / math.expm1(5)) for i in range(_MOST_POINTS + 1)}
    return [points[i] for i in sorted(chosen)]
