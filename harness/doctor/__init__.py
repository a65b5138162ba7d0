"""What may be wrong with the controller or a device, each finding with the line that fixes it.

A check is a function that takes what is known and yields findings; controller.py and device.py have them. `edgemoe-farm
doctor` runs them all; opening a session runs the cheap ones of a device, and refuses one with an error.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

CONTROLLER = "controller"


class Severity(enum.StrEnum):
    ERROR = "error"  # nothing can be measured like this
    WARNING = "warning"  # it can, but numbers or results may suffer
    NOTE = "note"  # good to know


@dataclass(frozen=True)
class Finding:
    where: str  # a device's name, or CONTROLLER
    check: str  # a word by which a program knows it
    severity: Severity
    finding: str
    remedy: str  # the line that fixes it

    def __str__(self) -> str:
        return f"{self.where}: {self.finding}: {self.remedy}"
