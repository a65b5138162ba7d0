"""Lets controllers that share a results database see one another, so that no two measure one sweep.

Each has a row there while it measures, and says every quarter of a minute that it lives, by the database's clock. One
that died without a word is known by its process on the machine on which it ran, and by its silence everywhere else.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Callable, Iterator

from harness.errors import TakenOverError, UsageError
from harness.process import identity, lives, owner
from reports.errors import DatabaseError
from reports.results.controllers import Controller
from reports.results.database import ResultsDatabase

HEARTBEAT_S = 15.0
SILENCE_S = 60.0  # after which a controller elsewhere counts as dead


def myself(sweep_id: str) -> Controller:
    """Returns this process as the controller that is about to measure a sweep."""
    pid = os.getpid()
    return Controller(secrets.token_hex(8), owner(), pid, identity(pid), sweep_id)


def is_alive(controller: Controller) -> bool:
    """Returns whether a controller is at work, as far as one can tell from here."""
    found = lives(controller.pid, controller.process)
    return controller.silent_s < SILENCE_S if found is None else found


class Presence:
    """Holds a controller's place at its sweep, from `at_work`; used by one thread."""

    def __init__(self, database: ResultsDatabase, controller: Controller, clock: Callable[[], float]) -> None:
        self.controller = controller
        self._database = database
        self._clock = clock
        self._next_s = clock() + HEARTBEAT_S

    def others(self) -> list[Controller]:
        """Returns the other controllers that are at work on this database."""
        return [c for c in self._database.controllers() if c.id != self.controller.id and is_alive(c)]

    def beat(self) -> None:
        """Tells the database that this controller lives, when it is time; must be called often.

        Raises TakenOverError where another has the sweep now. A server that is away is for the records to wait for.
        """
        if self._clock() < self._next_s:
            return
        with contextlib.suppress(DatabaseError):
            if not self._database.beat(self.controller):
                raise TakenOverError(
                    f"sweep {self.controller.sweep_id}: another controller took it over while this one was not heard "
                    f"of for {SILENCE_S:g} s: see `edgemoe-farm results list`"
                )
        self._next_s = self._clock() + HEARTBEAT_S


@contextlib.contextmanager
def at_work(
    database: ResultsDatabase, sweep_id: str, *, clock: Callable[[], float] = time.monotonic
) -> Iterator[Presence]:
    """Takes the one place at a sweep, and leaves it at the end. Raises UsageError where a living controller has it."""
    me = myself(sweep_id)
    holder = next((c for c in database.controllers() if c.sweep_id == sweep_id), None)
    if (holder is not None and is_alive(holder)) or not database.enter(me, instead_of=holder):
        raise UsageError(
            f"sweep {sweep_id} is being measured by {holder or 'another controller, since this moment'}: wait for it, "
            "or end it there with Ctrl-C, and resume then"
        )
    try:
        yield Presence(database, me, clock)
    finally:
        with contextlib.suppress(DatabaseError):  # then it is missed by its process or its silence
            database.leave(me)
