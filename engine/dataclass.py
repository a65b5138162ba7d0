"""Replaces the standard library's `dataclass(frozen=True)` by one that compiles nothing.

That is a millisecond a class, twenty on a Pi's start of every run for what is never called. Here the functions are
written once and look the fields up. `dataclasses.fields`, `replace` and type checkers see no difference.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Callable, Dict, Tuple, Type, TypeVar

T = TypeVar("T")

if TYPE_CHECKING:
    from dataclasses import dataclass as dataclass
else:

    def dataclass(*, frozen: bool) -> Callable[[Type[T]], Type[T]]:
        """Returns the decorator. What a class defines itself stays."""
        assert frozen, "the standard library has the others"
        return _frozen


def _frozen(cls: Type[T]) -> Type[T]:
    for name, function in _FUNCTIONS.items():
        if name not in cls.__dict__:
            setattr(cls, name, function)
    if cls.__doc__ is None:
        cls.__doc__ = cls.__name__  # else a signature is made up, which is the dearest of all
    cls = dataclasses.dataclass(init=False, repr=False, eq=False)(cls)
    cls.__dataclass_params__.frozen = True  # type: ignore[attr-defined] # the standard library's frozen ones may inherit
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    cls._names = tuple(field.name for field in fields)  # type: ignore[attr-defined]
    cls._defaults = {  # type: ignore[attr-defined]
        field.name: field.default_factory if field.default is dataclasses.MISSING else lambda value=field.default: value
        for field in fields
        if field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
    }
    return cls


def _init(self: Any, *args: Any, **values: Any) -> None:
    names: Tuple[str, ...] = self._names
    if len(args) > len(names):
        raise TypeError(f"{type(self).__name__} has {len(names)} fields, {len(args)} values were given")
    for name, value in zip(names, args):
        if name in values:
            raise TypeError(f"{type(self).__name__}.{name} was given twice")
        values[name] = value
    if len(values) < len(names):
        for name, default in self._defaults.items():
            if name not in values:
                values[name] = default()
    if values.keys() != set(names):
        wrong = sorted(values.keys() ^ set(names))
        raise TypeError(f"{type(self).__name__}: missing or unknown: {', '.join(wrong)}")
    self.__dict__.update(values)
    post_init = getattr(self, "__post_init__", None)
    if post_init is not None:
        post_init()


def _values(self: Any) -> Tuple[Any, ...]:
    return tuple(self.__dict__[name] for name in self._names)


def _eq(self: Any, other: Any) -> bool:
    return _values(self) == _values(other) if type(other) is type(self) else NotImplemented


def _hash(self: Any) -> int:
    return hash(_values(self))


def _repr(self: Any) -> str:
    return f"{type(self).__qualname__}({', '.join(f'{name}={self.__dict__[name]!r}' for name in self._names)})"


def _setattr(self: Any, name: str, value: Any) -> None:
    raise dataclasses.FrozenInstanceError(f"cannot assign to field {name!r}")


def _delattr(self: Any, name: str) -> None:
    raise dataclasses.FrozenInstanceError(f"cannot delete field {name!r}")


_FUNCTIONS: Dict[str, Callable[..., Any]] = {
    "__init__": _init,
    "__eq__": _eq,
    "__hash__": _hash,
    "__repr__": _repr,
    "__setattr__": _setattr,
    "__delattr__": _delattr,
}
