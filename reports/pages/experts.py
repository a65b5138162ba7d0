"""A page of one container's experts: their bits, their importance, how often they are activated, and along which paths.

What is known of them comes from the command line as plain numbers: nothing here opens a container.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from reports import units
from reports.charts.heat import (
    PLOT_WIDTH,
    WIDTH,
    Curve,
    Grid,
    HeatMap,
    ShareChart,
    category_map,
    share_chart,
    value_map,
)
from reports.files import replacing
from reports.pages.layout import self_contained

_SHADES = {"int2": 0, "int3": 1, "int4": 3, "int8": 5, "fp16": 6, "bf16": 6, "fp32": 7}  # fewer bits, paler
_ORDER = tuple(_SHADES)


@dataclass(frozen=True)
class ExpertFacts:
    """Facts about every MoE layer and expert; None or empty where they are not known."""

    name: str  # of the container
    facts: tuple[tuple[str, str], ...]  # label, text
    formats: tuple[tuple[str, ...], ...]  # [layer][expert]: a label that begins with the precision, "int4-g32"
    top_k: int  # experts that a token activates in a layer
    frequency: Grid = ()  # share of tokens
    frequency_source: str = ""  # in words
    importance: Grid = ()
    importance_meaning: str = ""  # what its number is
    coverage: Mapping[int, Sequence[float]] | None = None  # known layers -> share covered by 1, 2 ... experts
    coverage_source: str = ""
    paths: Mapping[int, Sequence[int]] | None = None  # layers of a path -> tokens that took each, the most first


def render(facts: ExpertFacts, output: Path) -> Path:
    """Writes the page; returns `output`. Raises ReportError."""
    with replacing(output) as file:
        file.write(render_html(facts).encode())
    return output


def render_html(facts: ExpertFacts) -> str:
    return self_contained(
        "experts.html.j2",
        name=facts.name,
        facts=facts.facts,
        lede=_lede(facts),
        maps=_maps(facts),
        charts=_charts(facts),
        width=WIDTH,
        plot_width=PLOT_WIDTH,
    )


def _maps(facts: ExpertFacts) -> list[HeatMap]:
    precisions = sorted({_precision(label) for row in facts.formats for label in row}, key=_bits)
    numbers = {precision: i for i, precision in enumerate(precisions)}
    found: list[HeatMap | None] = [
        category_map(
            "Bits of each expert",
            "The format in which it is read, where a strategy asks for no other.",
            tuple(tuple(float(numbers[_precision(label)]) for label in row) for row in facts.formats),
            [(_SHADES.get(precision, 7), precision) for precision in precisions],
            lambda value: precisions[int(value)],
        )
    ]
    if facts.importance:
        found.append(
            value_map(
                "Importance of each expert",
                facts.importance_meaning,
                facts.importance,
                lambda value: f"{value:.3g}",
            )
        )
    if facts.frequency:
        experts = max(map(len, facts.formats))
        found.append(
            value_map(
                "How often each expert is activated",
                f"Share of tokens, {facts.frequency_source}. If all were alike it would be "
                f"{units.text(facts.top_k / experts, 'share')}.",
                facts.frequency,
                lambda value: units.text(value, "share"),
            )
        )
    return [each for each in found if each is not None]


def _charts(facts: ExpertFacts) -> list[ShareChart]:
    charts = []
    experts = max(map(len, facts.formats))
    if facts.coverage:
        curves = [
            Curve(_knowing(known), ((0.0, 0.0), *((float(n), share) for n, share in enumerate(shares, 1))))
            for known, shares in facts.coverage.items()
        ]
        note = f"Share of activations among the likeliest experts of a layer, {facts.coverage_source}."
        charts.append(
            share_chart("What the path tells of the next layer", note, curves, "likeliest experts", float(experts))
        )
    if facts.paths:
        curves = [
            Curve(f"{layers} {'layer' if layers == 1 else 'layers'}", _concentration(counts))
            for layers, counts in facts.paths.items()
        ]
        note = "Paths are counted by the sets of experts of so many consecutive layers, the commonest first."
        charts.append(share_chart("Tokens by activation path", note, curves, "distinct paths that occurred", 1.0))
    return charts


def _concentration(counts: Sequence[int]) -> tuple[tuple[float, float], ...]:
    total, n = sum(counts), len(counts)
    sums = itertools.accumulate(counts)
    return ((0.0, 0.0), *((i / n, reached / total) for i, reached in enumerate(sums, 1)))


def _lede(facts: ExpertFacts) -> str:
    """Returns the findings in words."""
    count = sum(map(len, facts.formats))
    parts = [f"{count} experts in {len(facts.formats)} layers."]
    used = sorted((value for row in facts.frequency for value in row if value is not None), reverse=True)
    if sum(used):
        tenth = max(1, len(used) // 10)
        share = units.text(sum(used[:tenth]) / sum(used), "share")
        parts.append(f"The {tenth} busiest of {len(used)} take {share} of all activations.")
    if facts.coverage:
        known, shares = list(facts.coverage.items())[-1]
        covered, blind = shares[facts.top_k - 1], facts.coverage[min(facts.coverage)][facts.top_k - 1]
        parts.append(
            f"Preloading {facts.top_k} an expert layer, {_knowing(known)} finds {units.text(covered, 'share')} of what "
            f"is activated, and {_knowing(min(facts.coverage))} {units.text(blind, 'share')}."
        )
    return " ".join(parts)


def _knowing(layers: int) -> str:
    return ("knowing nothing", "knowing the layer before", "knowing the two layers before")[layers]


def _precision(label: str) -> str:
    return label.split("-")[0]


def _bits(precision: str) -> tuple[int, str]:
    return (_ORDER.index(precision) if precision in _ORDER else len(_ORDER), precision)
