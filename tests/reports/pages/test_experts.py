from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from reports.charts.heat import LEVELS, Curve, share_chart, value_map
from reports.errors import ReportError
from reports.pages.experts import ExpertFacts, render, render_html
from tests.reports.seen import HOSTILE, Page

FACTS = ExpertFacts(
    name="m.emoe",
    facts=(("architecture", "mixtral"),),
    formats=(("int4-g32", "int2-channel"), ("int4-g64", "fp16")),
    top_k=1,
    frequency=((0.9, 0.1), (None, 0.5)),
    frequency_source="in the profiled text of 10 tokens",
    importance=((0.25, 0.001), (0.5, -0.1)),
    importance_meaning="Loss.",
    coverage={0: (0.5, 1.0), 1: (0.75, 1.0)},
    coverage_source="in the traced text",
    paths={1: (6, 3, 1), 2: (2, 2, 1)},
)


def test_the_page_says_what_is_known() -> None:
    page = Page(render_html(FACTS))
    words = page.words
    assert "4 experts in 2 layers." in words
    assert "knowing the layer before finds 75% of what is activated, and knowing nothing 50%" in words.replace(
        "\u202f", " "
    )
    assert [h for h in ("Bits", "Importance", "How often", "What the path tells") if h not in words] == []
    assert "int4 (2)" in words and "int2 (1)" in words and "fp16 (1)" in words
    assert "layer 1 – 50%" in words  # the values, for whoever sees no shades
    assert "not known" in words
    cells = [path["d"].count("M") for path in page.all("path") if "level-" in path.get("class", "")]
    assert sum(cells) == 4 + 4 + 3
    assert render_html(FACTS) == render_html(FACTS)


def test_what_is_not_known_is_left_out() -> None:
    page = Page(render_html(ExpertFacts("m.emoe", (), (("fp16",),), 1)))
    assert "Bits of each expert" in page.words
    assert "Importance" not in page.words and "Activation paths" not in page.words


def test_hostile_names_stay_text() -> None:
    hostile = replace(
        FACTS, name=HOSTILE, facts=((HOSTILE, HOSTILE),), formats=((HOSTILE,),), frequency_source=HOSTILE,
        importance_meaning=HOSTILE, coverage_source=HOSTILE, frequency=((0.1,),), importance=((0.1,),),
    )  # fmt: skip
    page = Page(render_html(hostile))
    assert not {tag for tag, _ in page.elements} & {"script", "img", "a"}
    assert "{{ 7 * 7 }}" in page.words and "\u202e" not in page.words


def test_shades_have_equally_many_experts_and_do_not_mind_outliers() -> None:
    grid = ((*map(float, range(63)), 1e9),)
    found = value_map("t", "n", grid, str)
    assert found is not None
    assert [shade.d.count("M") for shade in found.shades] == [8] * LEVELS
    assert value_map("t", "n", ((None,),), str) is None
    flat = value_map("t", "n", ((1.0, 1.0),), str)
    assert flat is not None and sum(shade.d.count("M") for shade in flat.shades) == 2


def test_a_large_model_stays_a_small_page() -> None:
    grid = tuple(tuple(((layer * 7 + expert) % 31) / 31 for expert in range(256)) for layer in range(61))
    big = replace(
        FACTS, formats=(("int4-g32",) * 256,) * 61, frequency=grid, importance=grid,
        paths={1: range(200_000, 0, -1)}, coverage={0: [n / 256 for n in range(1, 257)]},
    )  # fmt: skip
    assert len(render_html(big)) < 2_000_000


def test_a_curve_reaches_both_ends_and_says_where_half_is() -> None:
    curve = Curve("c", tuple((i / 1000, min(1.0, i / 500)) for i in range(1001)))
    chart = share_chart("t", "n", [curve], "x", 1.0)
    points = [tuple(map(float, p.split())) for p in chart.lines[0].d[1:].split("L")]
    assert len(points) < 200
    assert points[0] == (38.0, 150.0) and points[-1] == (330.0, 18.0)
    assert re.search("c reaches half at 25%", chart.description.replace("\u202f", " "))


def test_a_page_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    assert render(FACTS, tmp_path / "p.html").read_text() == render_html(FACTS)
    with pytest.raises(ReportError, match="name another place"):
        render(FACTS, tmp_path / "no" / "p.html")
