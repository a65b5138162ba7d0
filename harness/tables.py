"""Reads TOML files that people write; every mistake becomes one line: unknown keys, wrong types, wrong values."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.errors import ProtocolError
from engine.files import read_bounded
from engine.protocol import ExpertBudget
from engine.sizes import size_of
from harness.errors import UsageError

MOST_TOML_BYTES = 16 << 20
DEFAULT_BUDGET = "default"  # the strategy's own
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def read_toml(path: Path, what: str) -> str:
    """Returns the text of a file. Raises UsageError."""
    try:
        return read_bounded(str(path), MOST_TOML_BYTES).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: the {what} cannot be read: {cause(error)}") from None


def cause(error: OSError | UnicodeDecodeError) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else f"not UTF-8 at byte {error.start}"


def distinct(names: list[str], source: str, key: str) -> None:
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"{source}: {key}: the name {name!r} is given twice: rename one")


class Table:
    """Reads a TOML table key by key, each by its type; a key that nobody took is an error."""

    def __init__(self, content: dict[str, Any], where: str) -> None:
        self.where = where
        self._content = content
        self._taken: set[str] = set()

    @classmethod
    def parse(cls, text: str, source: str) -> Table:
        """Returns the uppermost table of a file; `source` is its name in messages. Raises UsageError."""
        try:
            return cls(tomllib.loads(text), source)
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            raise UsageError(f"{source}: not TOML: {error}") from None

    def __contains__(self, key: str) -> bool:
        return key in self._content

    def __iter__(self) -> Iterator[str]:
        return iter(self._content)

    def finish(self) -> None:
        for key in self._content:
            if key not in self._taken:
                raise UsageError(f"{self.where}: unknown key {key[:64]!r} (known: {', '.join(sorted(self._taken))})")

    def _take(self, key: str, kind: type | tuple[type, ...], expected: str, default: Any = None) -> Any:
        self._taken.add(key)
        value = self._content.get(key, default)
        if value is None:
            raise UsageError(f"{self.where}: {key} is missing: it must be {expected}")
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise UsageError(f"{self.where}: {key} must be {expected}, not {str(value)[:64]!r}")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value: str = self._take(key, str, "a text", default)
        return value

    def name(self, key: str) -> str:
        value = self.text(key)
        if not _NAME.fullmatch(value):
            raise UsageError(
                f"{self.where}: {key} {value[:64]!r} must be 1-64 of letters, digits, dot, dash, underscore"
            )
        return value

    def flag(self, key: str, default: bool) -> bool:
        value: bool = self._take(key, bool, "true or false", default)
        return value

    def integer(self, key: str, default: int, low: int, high: int) -> int:
        value: int = self._take(key, int, f"a whole number from {low} to {high}", default)
        self._within(key, value, low, high)
        return value

    def number(self, key: str, default: float, low: float, high: float) -> float:
        value = float(self._take(key, (int, float), f"a number from {low:g} to {high:g}", default))
        self._within(key, value, low, high)
        return value

    def _within(self, key: str, value: float, low: float, high: float) -> None:
        if not low <= value <= high:  # also refuses nan
            raise UsageError(f"{self.where}: {key} is {value}: it must be from {low:g} to {high:g}")

    def size(self, key: str) -> int:
        text = self.text(key)
        size = size_of(text)
        if size is None or size < 1 << 20:
            raise UsageError(f'{self.where}: {key} {text[:64]!r} must be a size of at least 1 MiB, such as "512MiB"')
        return size

    def texts(self, key: str, default: tuple[str, ...] | None = None, *, any_text: bool = False) -> tuple[str, ...]:
        expected = "a list of texts, not empty"
        values = self._take(key, (list, tuple), expected, default)
        if not values or not all(isinstance(v, str) and v for v in values):
            raise UsageError(f"{self.where}: {key} must be {expected}")
        if not any_text:
            distinct(list(values), self.where, key)
        return tuple(values)

    def choices(self, key: str, known: tuple[str, ...], default: tuple[str, ...] | None = None) -> tuple[str, ...]:
        values = self.texts(key, default)
        for value in values:
            if value not in known:
                raise UsageError(f"{self.where}: {key}: unknown {value[:64]!r} (known: {', '.join(known)})")
        return values

    def choice(self, key: str, known: tuple[str, ...], default: str) -> str:
        value = self.text(key, default)
        if value not in known:
            raise UsageError(f"{self.where}: {key}: unknown {value[:64]!r} (known: {', '.join(known)})")
        return value

    def budgets(self, key: str, default: tuple[str, ...] | None = None) -> tuple[str, ...]:
        """Returns budgets in their one spelling, so that a budget written in two ways is one cell."""
        budgets = []
        for value in self.texts(key, default):
            try:
                budgets.append(DEFAULT_BUDGET if value == DEFAULT_BUDGET else str(ExpertBudget.parse(value)))
            except ProtocolError as error:
                raise UsageError(f"{self.where}: {key}: {error}, or default") from None
        distinct(budgets, self.where, key)
        return tuple(budgets)

    def token_lists(self, key: str) -> tuple[tuple[int, ...], ...]:
        expected = "a list of lists of token ids"
        values = self._take(key, list, expected)
        for prompt in values:
            if not isinstance(prompt, list) or not prompt:
                raise UsageError(f"{self.where}: {key} must be {expected}, none of them empty")
            for token in prompt:
                if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < 1 << 31:
                    raise UsageError(f"{self.where}: {key}: {str(token)[:32]!r} is not a token id (0 to 2**31 - 1)")
        if not values:
            raise UsageError(f"{self.where}: {key} must be {expected}, not empty")
        return tuple(tuple(prompt) for prompt in values)

    def table(self, key: str) -> Table:
        return Table(self._take(key, dict, "a table", {}), f"{self.where}: {key}")

    def tables(self, key: str) -> list[Table]:
        values = self._take(key, list, f"tables, written [[{key}]]")
        if not values or not all(isinstance(v, dict) for v in values):
            raise UsageError(f"{self.where}: {key} must be tables, written [[{key}]]")
        return [Table(v, f"{self.where}: {key}[{i}]") for i, v in enumerate(values)]
