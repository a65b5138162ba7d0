"""Reads durations. Every wait has an end; the layers, from the inside out, who holds each, and where it is set:

connect    TCP, SSH handshake and login         the controller                        inventory: connect_s     15 s
step       one command on the device            `timeout` there, by process group     inventory: step_s        60 s
idle       no byte and no sign of life          the controller: the link is lost      inventory: idle_s        30 s
reconnect  a lost link that nothing regains     the controller: the run is given up   inventory: reconnect_s  120 s
cell       one engine process                   its supervisor there, by its group    matrix: deadline_s     1800 s
run        the whole sweep                      the controller: no cell starts later  run --deadline           none

What holds on the device holds without the controller too. A step that is known to take longer says so itself: a probe
that imports numpy from a slow card, a self-test, the checksum of a large file. Transfers have no length that is too
long; what ends one is `idle` without progress.
"""

from __future__ import annotations

import re

_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


def parse_duration(text: str) -> float | None:
    """Returns the seconds of `90m`, `1h30m`, `6h`, `2d` or a number; None for any other text, and for none."""
    parts = re.findall(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    if not re.fullmatch(r"(\d+(\.\d+)?\s*[a-z]*\s*)+", text.strip().lower()) or any(u not in _UNITS for _, u in parts):
        return None
    return sum(float(number) * _UNITS[unit] for number, unit in parts) or None
