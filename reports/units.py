"""Numbers as people read them: one scale for all that stands side by side, three significant digits.

Everywhere else values are in SI base units, bytes and shares; they become text here and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

SPACE = "\u202f"  # narrow and unbreakable: between groups of digits, and between a number and its unit
ABSENT = "–"

_TIMES = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))
_SIZES = ((float(1 << 30), "GiB"), (float(1 << 20), "MiB"), (float(1 << 10), "KiB"), (1.0, "B"))


@dataclass(frozen=True)
class Scale:
    """How the values of one column or one axis are written: `value / divisor` and `symbol`."""

    divisor: float
    symbol: str

    def number(self, value: float | None) -> str:
        if value is None:
            return ABSENT
        return ratio(value) if self.symbol == "×" else number(value / self.divisor)

    def text(self, value: float | None) -> str:
        """Returns the value with its unit, `ABSENT` for None."""
        if value is None:
            return ABSENT
        gap = "" if self.symbol in ("", "%", "×") else SPACE
        return f"{self.number(value)}{gap}{self.symbol}"


def scale(unit: str, values: Iterable[float | None]) -> Scale:
    """Returns the scale in which the median of the values is at least one.

    `unit` is s, bytes, share, ratio or any other name.
    """
    steps = {"s": _TIMES, "bytes": _SIZES}.get(unit)
    if steps is None:
        return {"share": Scale(0.01, "%"), "ratio": Scale(1.0, "×")}.get(unit, Scale(1.0, unit))
    sizes = sorted(abs(v) for v in values if v)
    typical = sizes[(len(sizes) - 1) // 2] if sizes else 1.0
    return next((Scale(d, symbol) for d, symbol in steps if typical >= d), Scale(*steps[-1]))


def text(value: float | None, unit: str) -> str:
    """Returns one value in the scale that suits it."""
    return scale(unit, (value,)).text(value)


def number(value: float) -> str:
    """Returns three significant digits, whole numbers in full: 1 235, 12.3, 0.0123."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else ABSENT
    if value == int(value) and abs(value) < 1e15:
        digits = 0
    else:
        digits = max(0, 2 - math.floor(math.log10(abs(float(f"{value:.3g}")))))
    return f"{value:,.{min(digits, 9)}f}".replace(",", SPACE)


def ratio(value: float) -> str:
    """Returns no more digits than a measurement on a small device has: 1.23, 3.1, 123."""
    return f"{value:.2f}" if value < 1.995 else f"{value:.1f}" if value < 99.95 else number(round(value))


def interval(low: float, high: float) -> str:
    """Returns an interval of ratios such as 2.9–3.3, or one number where both ends read the same."""
    return ratio(low) if ratio(low) == ratio(high) else f"{ratio(low)}–{ratio(high)}"


def moment(iso: str) -> str:
    """Returns 2026-11-23T22:15:00+00:00 as 2026-11-23 22:15:00 UTC."""
    return f"{iso[:10]} {iso[11:19]} UTC" if iso else ABSENT
