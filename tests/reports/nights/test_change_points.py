import numpy as np
import pytest

from reports.nights.change_points import LEAST_POINTS, best_split, change_points


def series(*levels, spread=2.0, points=20, seed=7):
    rng = np.random.Generator(np.random.PCG64(seed))
    return np.concatenate([rng.normal(level, spread, points) for level in levels]).tolist()


# PCG64(7): 25 of N(100, 2), 20 of N(110, 2), 30 of N(95, 4), rounded to thousandths. MongoDB's implementation,
# signal-processing-algorithms 2.1.6, e_divisive(series, pvalue=0.01, permutations=199), finds 45 and then 25.
def reference_series():
    rng = np.random.Generator(np.random.PCG64(7))
    pieces = [rng.normal(100, 2, 25), rng.normal(110, 2, 20), rng.normal(95, 4, 30)]
    return np.round(np.concatenate(pieces), 3).tolist()


def test_it_finds_what_the_reference_implementation_finds() -> None:
    found = change_points(reference_series())
    assert [change.index for change in found] == [25, 45]
    assert [round(change.before) for change in found] == [99, 110]
    assert [round(change.after) for change in found] == [110, 95]
    assert best_split(np.array(reference_series()))[0] == 45


def test_the_statistic_is_that_of_its_definition() -> None:
    values = np.array([1.0, 2.0, 4.0, 9.0, 7.0, 8.0, 6.5])
    at, found = best_split(values)
    x, y = values[:at], values[at:]

    def mean_distance(a, b, same=False):
        distances = [abs(p - q) for i, p in enumerate(a) for j, q in enumerate(b) if not same or i < j]
        return sum(distances) / len(distances)

    energy = 2 * mean_distance(x, y) - mean_distance(x, x, True) - mean_distance(y, y, True)
    assert found == pytest.approx(len(x) * len(y) / len(values) * energy)
    assert at == 3


def test_noise_alone_has_no_change() -> None:
    false_alarms = sum(bool(change_points(series(100, points=30, seed=seed))) for seed in range(60))
    assert false_alarms <= 3  # of 60, at a significance of 1 %


def test_a_change_is_known_after_three_points_of_it() -> None:
    values = [*series(100, spread=1.0, points=30), 112.0, 111.0, 113.0]
    assert [change.index for change in change_points(values)] == [30]
    assert change_points(values[:-1]) == [] or change_points(values[:-1])[0].index != 30


@pytest.mark.parametrize("values", [[], [1.0], [1.0] * (2 * LEAST_POINTS - 1), [5.0] * 40])
def test_nothing_is_found_where_there_is_nothing(values) -> None:
    assert change_points(values) == []


def test_it_says_the_same_each_time() -> None:
    assert change_points(series(100, 103, 100)) == change_points(series(100, 103, 100))
