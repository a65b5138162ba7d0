"""Ours behaves as the standard library's frozen dataclass does."""

import dataclasses
import typing

import pytest

import engine.dataclass


def define(dataclass):
    @dataclass(frozen=True)
    class Point:
        x: int
        y: int = 2
        names: tuple[str, ...] = dataclasses.field(default_factory=tuple)
        kinds: typing.ClassVar[int] = 7

        def __post_init__(self):
            if self.x < 0:
                raise ValueError("x is negative")

        def __str__(self):
            return "its own"

    return Point


BOTH = [define(dataclasses.dataclass), define(engine.dataclass.dataclass)]


@pytest.mark.parametrize("point", BOTH)
def test_values_compare_hash_and_print(point) -> None:
    assert point(1) == point(1, 2, ()) == point(y=2, x=1)
    assert point(1) != point(1, 3)
    assert point(1) != (1, 2, ())
    assert hash(point(1)) == hash(point(1, 2)) != hash(point(2))
    assert repr(point(1, names=("a",))) == "define.<locals>.Point(x=1, y=2, names=('a',))"
    assert str(point(1)) == "its own"
    assert point.kinds == 7


@pytest.mark.parametrize("point", BOTH)
@pytest.mark.parametrize(
    ("args", "values"), [((), {}), ((1, 2, (), 4), {}), ((1,), {"x": 1}), ((1,), {"z": 1}), ((), {"y": 1})]
)
def test_wrong_arguments_are_refused(point, args, values) -> None:
    with pytest.raises(TypeError):
        point(*args, **values)


@pytest.mark.parametrize("point", BOTH)
def test_nothing_is_assigned_or_deleted(point) -> None:
    one = point(1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.x = 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.other = 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        del one.x
    assert one.x == 1


@pytest.mark.parametrize("point", BOTH)
def test_the_standard_librarys_functions_work_on_it(point) -> None:
    one = point(1)
    assert dataclasses.replace(one, y=5) == point(1, 5)
    assert dataclasses.asdict(one) == {"x": 1, "y": 2, "names": ()}
    assert [field.name for field in dataclasses.fields(point)] == ["x", "y", "names"]
    with pytest.raises(ValueError, match="x is negative"):
        dataclasses.replace(one, x=-1)


def test_the_standard_librarys_may_inherit_from_ours() -> None:
    @dataclasses.dataclass(frozen=True)
    class Named(BOTH[1]):
        name: str = ""

    assert Named(1, name="a") == Named(1, 2, (), "a") != Named(1)
    with pytest.raises(ValueError, match="x is negative"):
        Named(-1)


def test_a_mutable_default_is_refused() -> None:
    with pytest.raises(ValueError, match="mutable default"):

        @engine.dataclass.dataclass(frozen=True)
        class _:
            found: list = []  # noqa: RUF012 - what is refused
