"""Turns dataclasses into JSON and back, checked: the form of every message and record. Standard library only.

An unknown key, a missing key or a wrong type is a ProtocolError that names the place.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import json
import sys
from typing import Any, Dict, FrozenSet, Tuple, Type, TypeVar, Union, get_type_hints

from engine.errors import ProtocolError

MAX_LINE_BYTES = 16 << 20  # of one event: anything longer is damage or malice, never a sample
MOST_S = 1e9  # longer than anything that is measured: sums of such times are still numbers

T = TypeVar("T")
_PLAIN = (int, float, str, bool, type(None))


def to_json(value: Any) -> Any:
    """Returns what json.dumps takes, of dataclasses, tuples, dictionaries and enums."""
    if type(value) in _PLAIN:  # by far the most
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, (list, tuple)):
        return [to_json(v) for v in value]
    if isinstance(value, dict):
        return {str(k): to_json(v) for k, v in value.items()}
    return value.value if isinstance(value, enum.Enum) else value


def to_sparse_json(value: Any) -> Any:
    """Returns to_json without the fields that have their defaults: an older engine does not know them all."""
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return to_json(value)
    said = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    return {f.name: to_sparse_json(said[f.name]) for f in dataclasses.fields(value) if said[f.name] != _default(f)}


def _default(field_: Any) -> Any:
    return field_.default if field_.default_factory is dataclasses.MISSING else field_.default_factory()


def from_json(cls: Type[T], value: Any, where: str = "") -> T:
    """Returns an instance of the dataclass `cls` from what json.loads gave. Raises ProtocolError."""
    result: T = decode(cls, value, where or cls.__name__)
    return result


def loads(line: Union[str, bytes]) -> Dict[str, Any]:
    """Reads one JSON object from text that a stranger may have written. Raises ProtocolError."""
    if len(line) > MAX_LINE_BYTES:
        raise ProtocolError(f"a message of {len(line)} bytes is over the limit of {MAX_LINE_BYTES}")
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ProtocolError(f"expected a JSON object, got {type(value).__name__}")
    return value


def decode(kind: Any, value: Any, where: str) -> Any:
    """Returns `value` as the type `kind`. Raises ProtocolError, which names the place `where`."""
    if kind is str and type(value) is str:
        return value  # by far the most
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise ProtocolError(f"{where}: expected an object, got {type(value).__name__}")
        hints, needed = _fields(kind)  # type: ignore[arg-type]
        if not needed <= value.keys() <= hints.keys():
            same_keys(value, needed, hints.keys(), where)
        return kind(**{name: decode(hints[name], item, f"{where}.{name}") for name, item in value.items()})  # type: ignore[operator]
    origin: Any = getattr(kind, "__origin__", None)
    arguments: Tuple[Any, ...] = getattr(kind, "__args__", ())
    if type(None) in arguments:  # Optional[T] or T | None: the only unions that messages and records use
        return None if value is None else decode(arguments[0], value, where)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ProtocolError(f"{where}: expected a list, got {type(value).__name__}")
        if arguments[-1] is not Ellipsis:
            if len(value) != len(arguments):
                raise ProtocolError(f"{where}: expected {len(arguments)} entries, got {len(value)}")
            return tuple(decode(a, item, f"{where}[{i}]") for i, (a, item) in enumerate(zip(arguments, value)))
        if arguments[0] is int and all(type(item) is int and -(1 << 63) < item < 1 << 63 for item in value):
            return tuple(value)  # columns of steps
        if arguments[0] is float and all(type(item) is float and abs(item) <= sys.float_info.max for item in value):
            return tuple(value)
        return tuple(decode(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise ProtocolError(f"{where}: expected an object, got {type(value).__name__}")
        return {key: decode(arguments[1], item, f"{where}.{key[:40]!r}") for key, item in value.items()}
    if kind is float:
        # Of whole numbers JSON knows larger ones than a float can be.
        if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max:
            return float(value)
    elif kind is int:
        if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63:
            return value
    elif issubclass(kind, enum.Enum):
        if value in [member.value for member in kind]:
            return kind(value)
    elif isinstance(value, kind):
        return value
    raise ProtocolError(f"{where}: expected {kind.__name__}, got {shown(value)}")


def shown(value: Any) -> str:
    """Returns the value as a message shows it: short, and a list or an object by its type alone."""
    if isinstance(value, (list, dict)):
        return type(value).__name__
    return repr(value[:40]) if isinstance(value, str) else str(value)[:40]


@functools.lru_cache(maxsize=None)
def _fields(kind: Any) -> Tuple[Dict[str, Any], FrozenSet[str]]:
    """Returns the type of each field, and the names of those that must be given."""
    hints, fields = get_type_hints(kind), dataclasses.fields(kind)
    needed = [f for f in fields if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]
    return {f.name: hints[f.name] for f in fields}, frozenset(f.name for f in needed)


def same_keys(value: Dict[str, Any], needed: Any, known: Any, where: str) -> None:
    """Raises ProtocolError for a key that is missing or unknown."""
    missing, unknown = sorted(set(needed) - set(value)), sorted(set(value) - set(known))
    if missing:
        raise ProtocolError(f"{where}: {missing[0]!r} is missing")
    if unknown:
        raise ProtocolError(f"{where}: unknown key {unknown[0][:40]!r} (known: {', '.join(sorted(known))})")


def require(condition: bool, message: str) -> None:
    """Raises ProtocolError unless the condition holds."""
    if not condition:
        raise ProtocolError(message)


def one_of(value: str, allowed: Tuple[str, ...], name: str) -> None:
    """Raises ProtocolError unless the value is one of those."""
    require(value in allowed, f"{name} {value!r} is not one of {', '.join(allowed)}")
