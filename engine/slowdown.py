"""Slows an engine down on purpose, for a test of the nightly gate to find.

EDGEMOE_TEST_DELAY, or the file `test_delay` beside this one, says what is lengthened and by which share of its time:

    edgemoe=0.10            every step of the strategy edgemoe takes a tenth longer
    edgemoe@pi5=0.10        only on a host of that name, or where `pi5` is a folder on the way to the engine
    edgemoe=0.1,sti=0.2     several

The controller packs its own EDGEMOE_TEST_DELAY into the engine that it deploys: a slowed engine has a hash of its own,
and each of its records says so.
"""

import os
import platform
from typing import Tuple

from engine.errors import RequestError

VARIABLE, FILE = "EDGEMOE_TEST_DELAY", "test_delay"


def slowdown(strategy: str) -> Tuple[float, Tuple[str, ...]]:
    """Returns the share by which steps of `strategy` are lengthened here, and a note on that for the record.

    Raises RequestError where it is not written as above.
    """
    share = 0.0
    for entry in filter(None, _text().split(",")):
        whom, _, number = entry.strip().partition("=")
        name, _, where = whom.partition("@")
        try:
            found = float(number)
        except ValueError:
            found = -1.0
        if not name or not 0 <= found <= 100:
            raise RequestError(f"{VARIABLE}: {entry[:64]!r} is no delay: write STRATEGY=SHARE, such as edgemoe=0.10")
        if name == strategy and (not where or _is_here(where)):
            share = found
    note = f"slowed on purpose: a test ({VARIABLE}) makes each step {share:.1%} longer"
    return share, ((note,) if share else ())


def _text() -> str:
    text = os.environ.get(VARIABLE)
    if text is not None:
        return text
    try:
        with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), FILE), encoding="utf-8") as file:
            return file.read(4096).strip()
    except FileNotFoundError:
        return ""


def _is_here(where: str) -> bool:
    return where == platform.node() or where in os.path.abspath(__file__).split(os.sep)
