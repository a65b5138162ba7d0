"""Devices side by side."""

from __future__ import annotations
from collections.abc import Sequence
from reports.gate import Measured


def devices_page(sides: Sequence[Measured]) -> str:
    raise NotImplementedError
