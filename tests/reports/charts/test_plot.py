import pytest

from reports.charts.plot import BOTTOM, LEFT, RIGHT, TOP, Label, placed, x_axis, y_axis


def heights(*ys: float, **room: float) -> list[float]:
    return [label.y for label in placed([Label(5.0, y, str(y)) for y in ys], **room)]


@pytest.mark.parametrize(
    ("ys", "found"),
    [
        ((50, 80), [50, 80]),  # far enough apart
        ((50, 50, 50), [50, 62, 74]),
        ((50, 55, 90), [50, 62, 90]),
        ((80, 50), [50, 80]),  # from top to bottom
        ((0,), [16]),  # not above the plot
        ((200,), [150]),  # nor below it
        ((149, 149), [138, 150]),  # what does not fit below is pushed up
        ((120, 140, 148, 149), [114, 126, 138, 150]),
        ((), []),
    ],
)
def test_labels_are_moved_until_none_covers_another(ys: tuple[float, ...], found: list[float]) -> None:
    assert heights(*ys) == found


def test_the_room_of_labels_may_be_given() -> None:
    assert heights(10, 12, gap=5.0, low=0.0, high=100.0) == [10, 15]
    assert heights(99, 99, gap=5.0, low=0.0, high=100.0) == [95, 100]
    assert heights(-3, gap=5.0, low=0.0, high=100.0) == [0]


def test_a_moved_label_keeps_all_but_its_height() -> None:
    first, second = placed([Label(5.0, 50.0, "a"), Label(7.0, 51.0, "b", "end", "change")])
    assert (first, second) == (Label(5.0, 50.0, "a"), Label(7.0, 62.0, "b", "end", "change"))


def test_the_axes_span_the_plot_upwards_and_to_the_right() -> None:
    x, y = x_axis(0.0, 10.0), y_axis(1.0, 100.0, is_log=True)
    assert [x.at(value) for value in (0, 5, 10)] == [LEFT, (LEFT + RIGHT) / 2, RIGHT]
    assert [y.at(value) for value in (1, 10, 100)] == pytest.approx([BOTTOM, (BOTTOM + TOP) / 2, TOP])
