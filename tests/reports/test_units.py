import pytest

from reports import units

THIN = units.SPACE


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.0123, "s", f"12.3{THIN}ms"),
        (1.5, "s", f"1.50{THIN}s"),
        (4.2e-7, "s", f"0.420{THIN}µs"),
        (0.0, "s", f"0{THIN}s"),
        (3 << 20, "bytes", f"3{THIN}MiB"),
        (1536, "bytes", f"1.50{THIN}KiB"),
        (0.7284, "share", "72.8%"),
        (1.0, "share", "100%"),
        (3.14159, "ratio", "3.1×"),
        (1.2345, "ratio", "1.23×"),
        (12.34, "tokens/s", f"12.3{THIN}tokens/s"),
        (None, "s", "–"),
    ],
)
def test_values_read_as_people_write_them(value, unit, text) -> None:
    assert units.text(value, unit) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1234.5, f"1{THIN}234"),
        (999.6, f"1{THIN}000"),
        (9.996, "10.0"),
        (0.00123, "0.00123"),
        (7, "7"),
        (-12.34, "-12.3"),
    ],
)
def test_three_digits_are_significant(value, text) -> None:
    assert units.number(value) == text


def test_a_column_has_one_scale() -> None:
    column = units.scale("s", [0.003, 0.180, 1.21, None])
    assert [column.number(v) for v in (0.003, 0.180, 1.21, None)] == ["3", "180", f"1{THIN}210", "–"]


def test_an_interval_that_reads_as_one_number_is_one() -> None:
    assert units.interval(2.91, 3.28) == "2.9–3.3"
    assert units.interval(2.01, 2.02) == "2.0"


def test_a_moment_is_short() -> None:
    assert units.moment("2026-11-23T22:15:00.123456+00:00") == "2026-11-23 22:15:00 UTC"
    assert units.moment("") == "–"
