"""Findings: what may be wrong with the controller or a device, each with the line that fixes it."""

from __future__ import annotations

import enum
import re
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


# How a remedy begins: with a command, or with what is to be done.
_ADVICE = re.compile(
    r"`|(add|ask|build|check|choose|close|compare|connect|convert|cool|copy|correct|create|delete|deploy|download|export"
    r"|find|free|get|give|grant|import|install|leave|log|look|lower|mount|move|name|pin|plan|put|raise|remove|rename|replace"
    r"|restart|restore|run|see|send|set|shorten|start|stop|take|test|try|turn|unlock|update|use|wait|write)\b"
)


def parted(message: str) -> tuple[str, str]:
    """Returns what an error says is wrong, and what helps: the part after its last colon, where that is advice.

    Many a message has a colon and no remedy. Half of it must not be sold as one.
    """
    what, _, last = message.rpartition(": ")
    is_advice = _ADVICE.match(last) is not None or last.endswith("?")
    return (what, last) if what and is_advice else (message, "see the message")
