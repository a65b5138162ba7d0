import pytest

from reports.charts.axes import Axis, Tick, line, log_ticks, nice_ticks, steps, thinned, tick_label, ticks_between


@pytest.mark.parametrize(
    ("top", "ticks"),
    [
        (100, [0, 20, 40, 60, 80, 100]),
        (7.3, [0, 2, 4, 6, 8]),
        (0.031, [0, 0.01, 0.02, 0.03, 0.04]),
        (1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
    ],
)
def test_ticks_are_round_and_hold_the_top(top, ticks) -> None:
    assert nice_ticks(top) == pytest.approx(ticks)


@pytest.mark.parametrize("nothing", [0.0, float("nan"), float("inf")])
def test_an_axis_without_values_still_exists(nothing) -> None:
    assert nice_ticks(nothing) == [0.0, 1.0]


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (1.0, 1.12, [1.0, 1.05, 1.1, 1.15]),
        (181, 199, [180, 185, 190, 195, 200]),
        (7.0, 7.0, [6, 6.5, 7, 7.5, 8]),
        (0.0, 0.0, [-1, -0.5, 0, 0.5, 1]),
    ],
)
def test_an_axis_that_does_not_start_at_nought_lies_closely_around_its_values(low, high, ticks) -> None:
    assert ticks_between(low, high) == pytest.approx(ticks)


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(1.0, 6.3, [1, 2, 5, 10]), (0.7, 1.0, [0.5, 1]), (3.0, 40000.0, [1, 10, 100, 1000, 10000, 100000])],
)
def test_a_logarithmic_axis_holds_its_values(low, high, ticks) -> None:
    assert log_ticks(low, high) == pytest.approx(ticks)


def test_a_linear_axis_places_by_the_value_and_stops_at_its_ends() -> None:
    axis = Axis(10.0, 30.0, 100.0, 300.0)
    assert [axis.at(value) for value in (10, 15, 30)] == pytest.approx([100, 150, 300])
    assert [axis.at(value) for value in (-5, 31)] == pytest.approx([100, 300])
    down = Axis(0.0, 1.0, 150.0, 20.0)
    assert [down.at(value) for value in (0, 0.5, 1)] == pytest.approx([150, 85, 20])


def test_a_logarithmic_axis_places_by_the_ratio() -> None:
    axis = Axis(1.0, 100.0, 0.0, 200.0, is_log=True)
    assert [axis.at(value) for value in (1, 10, 100, 1000, 0.1)] == pytest.approx([0, 100, 200, 200, 0])
    assert axis.at(20) - axis.at(10) == pytest.approx(axis.at(2) - axis.at(1))


def test_an_axis_of_one_value_has_it_in_the_middle() -> None:
    assert Axis(4.0, 4.0, 0.0, 10.0).at(4.0) == 5.0


def test_ticks_stand_where_their_values_do_in_the_unit_that_is_shown() -> None:
    axis = Axis(0.0, 0.004, 0.0, 400.0)
    assert axis.ticks([0, 2, 4], 0.001) == (Tick(0.0, "0"), Tick(200.0, "2"), Tick(400.0, "4"))


@pytest.mark.parametrize(
    ("value", "label"), [(0.1 + 0.2, "0.3"), (5.0, "5"), (999.5, "999.5"), (1000, "1\u202f000"), (-2000, "-2\u202f000")]
)
def test_a_tick_has_no_more_digits_than_it_needs(value: float, label: str) -> None:
    assert tick_label(value) == label


def test_lines_and_steps_are_paths() -> None:
    assert line([(0, 1), (2.04, 3.06), (4, 5)]) == "M0.0 1.0L2.0 3.1L4.0 5.0"
    assert line([(10, 20)]) == "M10.0 20.0L16.0 20.0"
    assert steps([(0, 1), (2, 3), (4, 5)]) == "M0.0 1.0H2.0V3.0H4.0V5.0"


def test_many_values_are_thinned_to_medians_of_neighbours() -> None:
    assert thinned([3, 1, 2], most=3) == [(0, 3), (1, 1), (2, 2)]
    assert thinned([1, 9, 5, 7, 100, 3, 4], most=3) == [(1, 5), (4, 7), (6, 4)]
    assert len(thinned(list(range(1000)))) <= 320
