"""Findings: what may be wrong with the controller or a device, each with the line that fixes it."""

from __future__ import annotations

import enum
from dataclasses import dataclass

CONTROLLER = "controller"


class Severity(enum.StrEnum):
    ERROR = "error"  # nothing can be measured like this
    WARNING = "warning"  # it can, but numbers or results may suffer
    NOTE = "note"  # good to know


Told = tuple[Severity, str, str]  # severity, finding, remedy: what a check yields


@dataclass(frozen=True)
class Finding:
    where: str  # a device's name, or CONTROLLER
    check: str  # a word by which a program knows it
    severity: Severity
    finding: str
    remedy: str  # the line that fixes it

    def __str__(self) -> str:
        return f"{self.where}: {self.finding}: {self.remedy}"
