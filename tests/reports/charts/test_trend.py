from types import SimpleNamespace

import pytest

from reports.charts.plot import BOTTOM, LEFT, RIGHT, TOP
from reports.charts.trend import sparkline, trend_chart
from reports.nights.night import ChangePoint, Trend, TrendPoint
from tests.reports.charts.rows import positions

HEIGHT = BOTTOM - TOP


def point(day: int, median: float, spread: float = 0.0) -> TrendPoint:
    at = f"2026-11-{day:02d}T04:00:00+00:00"
    return TrendPoint(f"s{day}", at, median, median - spread, median + spread, f"{day:02d}" * 32)


def trend(make: SimpleNamespace, medians: list[float], **changes: object) -> Trend:
    spread = float(changes.pop("spread", 0.0))  # type: ignore[arg-type]
    points = tuple(point(1 + i, median, spread) for i, median in enumerate(medians))
    return Trend(make.cell(), "tpot_s", points, **changes)  # type: ignore[arg-type]


def x(index: float, nights: int) -> float:
    """Nights are even, with 0.4 of one free on both sides."""
    return LEFT + (RIGHT - LEFT) * (index + 0.4) / (nights - 0.2)


def test_medians_are_a_line_within_a_band(make: SimpleNamespace) -> None:
    chart = trend_chart(trend(make, [0.11, 0.12, 0.14], spread=0.01), "title")
    assert chart is not None
    assert [tick.label for tick in chart.y_ticks] == ["100", "120", "140", "160"]
    assert [tick.at for tick in chart.y_ticks] == pytest.approx([BOTTOM - HEIGHT * i / 3 for i in range(4)])

    def at(index: int, ms: float) -> object:
        return pytest.approx((x(index, 3), BOTTOM - HEIGHT * (ms - 100) / 60), abs=0.06)

    band, line = chart.strokes
    assert (band.kind, line.kind) == ("band", "line")
    assert positions(line.d) == [at(0, 110), at(1, 120), at(2, 140)]
    assert positions(band.d) == [at(0, 120), at(1, 130), at(2, 150), at(2, 130), at(1, 110), at(0, 100)]
    (last,) = chart.dots  # the only news
    assert (last.x, last.y) == at(2, 140)
    assert [(label.text, label.anchor, label.x) for label in chart.labels] == [
        ("2026-11-01", "start", pytest.approx(x(0, 3))), ("2026-11-03", "end", pytest.approx(x(2, 3)))
    ]  # fmt: skip
    assert chart.note == ""


def test_a_change_is_a_rule_between_two_nights_with_its_size(make: SimpleNamespace) -> None:
    changes = (ChangePoint(2, 0.1, 0.12, 0.005),)
    chart = trend_chart(trend(make, [0.1, 0.1, 0.12, 0.12], changes=changes), "title")
    assert chart is not None
    rule = next(stroke for stroke in chart.strokes if stroke.kind == "rule change")
    at = x(1.5, 4)
    assert rule.d == f"M{at:.1f} {TOP:.1f}V{BOTTOM:.1f}"
    label = chart.labels[0]
    assert (label.text, label.kind, label.y) == ("+20.0%", "change", TOP + 8)
    assert (label.x, label.anchor) == (pytest.approx(at + 4), "start")
    assert [dot.x for dot in chart.dots] == pytest.approx([x(2, 4), x(3, 4)])
    assert chart.note == "2026-11-03: from 100\u202fms to 120\u202fms, p = 0.005, engine 030303030303"


def test_far_right_a_change_is_named_to_the_left(make: SimpleNamespace) -> None:
    chart = trend_chart(trend(make, [0.1] * 4, changes=(ChangePoint(3, 0.1, 0.05, 0.01),)), "title")
    assert chart is not None
    assert (chart.labels[0].x, chart.labels[0].anchor) == (pytest.approx(x(2.5, 4) - 4), "end")
    assert chart.labels[0].text == "-50.0%"


def test_a_change_of_the_device_is_a_rule_of_its_own(make: SimpleNamespace) -> None:
    chart = trend_chart(trend(make, [0.1] * 3, environment=((1, "kernel 6.1 → 6.6"), (0, "os"))), "title")
    assert chart is not None
    rules = [stroke.d for stroke in chart.strokes if stroke.kind == "rule environment"]
    assert rules == [f"M{at:.1f} {TOP:.1f}V{BOTTOM:.1f}" for at in (x(0.5, 3), x(0, 3))]
    assert chart.note == "2026-11-02: kernel 6.1 → 6.6; 2026-11-01: os"
    assert [dot.x for dot in chart.dots] == pytest.approx([x(0, 3), x(1, 3), x(2, 3)])


def test_one_night_is_a_dash_and_none_is_no_chart(make: SimpleNamespace) -> None:
    chart = trend_chart(trend(make, [0.1]), "title")
    assert chart is not None
    (left, y), (right, same) = positions(chart.strokes[1].d)
    assert (right - left, y) == (pytest.approx(6.0), same) and len(chart.labels) == 1
    assert trend_chart(trend(make, []), "title") is None


@pytest.mark.parametrize(
    ("medians", "path"),
    [
        ([1.0, 3.0, 2.0], "M0 20L50 0L100 10"),
        ([5.0, 5.0], "M0 10L100 10"),
        ([5.0], "M0 10"),
    ],
)
def test_a_sparkline_runs_from_the_least_to_the_most(make: SimpleNamespace, medians: list[float], path: str) -> None:
    assert sparkline(trend(make, medians)) == path
