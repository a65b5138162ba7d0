"""Measures a plan to its end, to a deadline or until a signal."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from harness.device.deploy import DEFAULT_UPLOADS, ENGINE_SOURCE, UploadTurns, cache_folder, engine_bundle
from harness.device.lease import WAIT_S, Holder
from harness.device.opening import open_session
from harness.errors import UsageError
from harness.scripted import speed_of
from harness.sweep.engines import EngineStore
from harness.sweep.estimator import CellEstimator
from harness.sweep.plan import Plan
from harness.sweep.presence import Presence
from harness.sweep.runner import SweepRunner, Tally, tally
from harness.sweep.worker import Listener, Surroundings
from harness.version import farm_version
from reports.records import Sweep
from reports.results.database import ResultsDatabase
from reports.text import harmless

INTERRUPTED = 130
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Ended:
    """Says how measuring ended: what the sweep now has, and whether a signal cut it off."""

    tally: Tally
    interrupted: bool

    @property
    def exit_code(self) -> int:
        return INTERRUPTED if self.interrupted and self.tally.missing else self.tally.exit_code


def measure(
    sweep: Sweep,
    plan: Plan,
    database: ResultsDatabase,
    presence: Presence,
    listener: Listener,
    *,
    known_hosts: Path,
    deadline_s: float = math.inf,
    offline: bool = False,
    cache: Path | None = None,
    wait_s: float = WAIT_S,
    uploads: int = DEFAULT_UPLOADS,
    canary: bool = False,
    kept: EngineStore | None = None,
) -> Ended:
    """Measures `plan` until its end, the deadline or a signal.

    `wait_s`: for a device that another controller uses; `canary`: each device proves itself first; `kept`: where
    engines are kept, the farm's own from now on. Raises UsageError where the plan names one that is not.
    """
    engines = {}
    if kept is not None:
        try:
            kept.keep(engine_bundle(ENGINE_SOURCE))
        except UsageError as error:  # a later night may miss it, this one does not
            logging.getLogger(__name__).warning("edgemoe-farm: warning: %s", harmless(error))
        engines = {name: kept.get(name) for name in {m.engine_sha256 for m in plan.measurements} - {""}}
    holder = Holder.this_process(sweep.id)
    turns, speed = UploadTurns(uploads), speed_of(plan.devices)
    surroundings = Surroundings(
        sweep,
        lambda device: open_session(
            device,
            known_hosts=known_hosts,
            cache_dir=cache or cache_folder(),
            offline=offline,
            holder=holder,
            wait_s=wait_s,
            uploads=turns,
        ),
        pause=lambda stopping, seconds: stopping.wait(seconds / speed),
        farm_version=farm_version(),
        earlier=database.stream(sweep_id=sweep.id),
        estimate=CellEstimator(),
        canary=canary,
        engines=engines,
    )
    runner = SweepRunner(plan, database, listener, surroundings, deadline_s=deadline_s, tick=presence.beat)
    with _stopping(runner.stop) as received:
        runner.measure()
    return Ended(tally(sweep, database.stream(sweep_id=sweep.id)), bool(received))


@contextlib.contextmanager
def _stopping(stop: Callable[[], None]) -> Iterator[list[int]]:
    """Stops cleanly at the first signal and at once at the second; yields the list of those that came."""
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if received:
            os._exit(INTERRUPTED)
        received.append(number)
        stop()

    before = {number: signal.signal(number, handle) for number in _SIGNALS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
