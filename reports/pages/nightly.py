"""A night."""

from __future__ import annotations
from reports.gate import Measured
from reports.night import Night


def nightly_page(night: Night, candidate: Measured, baseline: Measured | None) -> str:
    raise NotImplementedError
