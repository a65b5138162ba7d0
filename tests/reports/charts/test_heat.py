import re

import pytest

from reports import units
from reports.charts.heat import LEVELS, PLOT_WIDTH, WIDTH, Curve, category_map, share_chart, value_map

LEFT, TOP = 30.0, 4.0
CELL = re.compile(r"M([\d.]+) ([\d.]+)h([\d.]+)v([\d.]+)h-([\d.]+)z")


def cells(path: str) -> list[tuple[float, ...]]:
    """(x, y, width, height) of each cell of a path."""
    found = [tuple(map(float, cell)) for cell in CELL.findall(path)]
    assert CELL.sub("", path) == "" and all(width == back for _, _, width, _, back in found)
    return [cell[:4] for cell in found]


def test_a_category_colours_its_cells_where_layer_and_expert_say() -> None:
    grid = ((0.0, 1.0, 0.0), (1.0, None, 1.0))
    chart = category_map("Bits", "note", grid, [(1, "int2"), (5, "int8")], lambda value: f"category {value:g}")
    assert chart.description == "Bits, 2 layers by 3 experts: int2: 2 experts, int8: 3 experts."
    assert [(shade.level, shade.label) for shade in chart.shades] == [(1, "int2 (2)"), (5, "int8 (3)")]
    width, height = (WIDTH - LEFT) / 3, 18.0  # a few rows are no higher than that
    int2, int8 = (cells(shade.d) for shade in chart.shades)
    assert int2 == [(LEFT, TOP, width - 1, height - 1), (LEFT + 2 * width, TOP, width - 1, height - 1)]
    assert [(x, y) for x, y, _, _ in int8] == [
        (LEFT + width, TOP), (LEFT, TOP + height), (LEFT + 2 * width, TOP + height)
    ]  # fmt: skip
    assert [(x, y) for x, y, _, _ in cells(chart.unknown)] == [(LEFT + width, TOP + height)]
    assert chart.height == TOP + 2 * height + 32.0
    assert [(tick.at, tick.label) for tick in chart.rows] == [(TOP + 9, "0"), (TOP + 27, "1")]
    assert [(tick.at, tick.label) for tick in chart.columns] == [
        (LEFT + (n + 0.5) * width, str(n)) for n in range(3)
    ]  # fmt: skip
    assert chart.values.splitlines() == [
        "layer 0\tcategory 0\tcategory 1\tcategory 0", f"layer 1\tcategory 1\t{units.ABSENT}\tcategory 1"
    ]  # fmt: skip


@pytest.mark.parametrize(("layers", "height"), [(1, 18.0), (40, 10.0), (200, 6.0)])
def test_many_layers_have_lower_rows(layers: int, height: float) -> None:
    chart = value_map("Use", "note.", ((1.0, 2.0),) * layers, str)
    assert chart is not None and chart.height == TOP + layers * height + 32.0
    assert {cell[3] for shade in chart.shades for cell in cells(shade.d)} == {height - 1}


def test_each_shade_has_as_many_experts_as_any_other() -> None:
    grid = tuple(tuple(float(10**column + row) for column in range(8)) for row in range(4))
    chart = value_map("Use", "Share.", grid, lambda value: f"{value:g}")
    assert chart is not None
    assert [shade.level for shade in chart.shades] == list(range(LEVELS))
    assert [len(cells(shade.d)) for shade in chart.shades] == [4] * 8
    assert [shade.label for shade in chart.shades] == [f"from {10**i:g}" for i in range(8)]
    # A column of the grid has one order of magnitude, so one shade.
    for column, shade in enumerate(chart.shades):
        assert [x for x, *_ in cells(shade.d)] == pytest.approx([LEFT + column * (WIDTH - LEFT) / 8] * 4, abs=0.06)
    assert chart.note == "Share. Each shade has as many experts as any other."
    assert chart.description.startswith("Use, 4 layers by 8 experts: from 1 to 1e+07, median 10000, of 32 experts")


def test_where_nothing_is_known_there_is_no_map() -> None:
    assert value_map("Use", "Share.", ((None, None),), str) is None
    chart = value_map("Use", "Share.", ((None, 3.0),), str)
    assert chart is not None and len(cells(chart.unknown)) == 1
    assert [shade.level for shade in chart.shades] == [LEVELS - 1]


def test_shares_grow_from_the_lower_left_to_the_upper_right() -> None:
    curve = Curve("knowing nothing", ((0.0, 0.0), (2.0, 0.5), (8.0, 1.0)))
    chart = share_chart("Coverage", "note", [curve], "experts", 8.0)
    (line,) = chart.lines
    left, right, top, bottom = 38.0, PLOT_WIDTH - 10.0, 18.0, 150.0
    quarter = left + (right - left) / 4
    assert line.d == f"M{left:.1f} {bottom:.1f}L{quarter:.1f} {(top + bottom) / 2:.1f}L{right:.1f} {top:.1f}"
    assert (line.series, line.name) == (1, "knowing nothing")
    assert [tick.label for tick in chart.x_ticks] == ["0", "2", "4", "6", "8"]
    assert [tick.at for tick in chart.x_ticks] == pytest.approx([left + (right - left) * i / 4 for i in range(5)])
    assert [(tick.at, tick.label) for tick in chart.y_ticks] == [
        (pytest.approx(bottom - (bottom - top) * i / 4), f"{25 * i}%") for i in range(5)
    ]  # fmt: skip
    assert chart.description == "Coverage: knowing nothing reaches half at 2."


def test_an_axis_of_shares_is_written_as_shares() -> None:
    curves = [Curve("a", ((0.0, 0.0), (0.25, 0.6), (1.0, 1.0))), Curve("b", ((0.0, 0.0), (1.0, 0.4)))]
    chart = share_chart("Paths", "note", curves, "paths", 1.0)
    assert [tick.label for tick in chart.x_ticks] == ["0%", "25%", "50%", "75%", "100%"]
    assert chart.description == "Paths: a reaches half at 25%."
    assert [line.series for line in chart.lines] == [1, 2]
    assert share_chart("Paths", "", curves[1:], "", 1.0).description == "Paths: no curve reaches half."


def test_long_curves_are_thinned_and_keep_both_ends() -> None:
    points = tuple((float(i), i / 4000) for i in range(4001))
    (line,) = share_chart("Paths", "", [Curve("a", points)], "", 4000.0).lines
    drawn = [tuple(map(float, point.split())) for point in line.d.removeprefix("M").split("L")]
    assert 100 < len(drawn) <= 161
    assert (drawn[0], drawn[-1]) == ((38.0, 150.0), (330.0, 18.0))
    across = [x for x, _ in drawn]
    assert across == sorted(across) and sum(x < 184 for x in across) > 120  # closer where curves are steep
