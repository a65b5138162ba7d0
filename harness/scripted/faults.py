"""Decides what goes wrong on a scripted device: a pure function of its name and the number of the run.

No memory of its own: whoever asks again, after the controller was killed for instance, gets the same answer.
"""

from __future__ import annotations

import enum
import random
from dataclasses import dataclass, field


class FaultKind(enum.StrEnum):
    DROP = "drop"
    OFFLINE = "offline"
    STALL = "stall"
    THROTTLE = "throttle"
    REBOOT = "reboot"
    SLOW_DISK = "slow-disk"
    DAMAGE = "damage"
    DISK_FULL = "disk-full"
    OUT_OF_MEMORY = "out-of-memory"


WHAT_HAPPENS = {
    FaultKind.DROP: "the link is lost amid the output; the run goes on",
    FaultKind.OFFLINE: "the link is lost, and not back before the controller gives up",
    FaultKind.STALL: "the engine says nothing more until its deadline",
    FaultKind.THROTTLE: "the processor slows down in the middle of the run",
    FaultKind.REBOOT: "the power is cut: the run is gone, the boot is another",
    FaultKind.SLOW_DISK: "the storage takes eight times as long",
    FaultKind.DAMAGE: "the output is damaged: cut off, binary, HTML, escape codes, an endless line, deep JSON",
    FaultKind.DISK_FULL: "the disk is full",
    FaultKind.OUT_OF_MEMORY: "the kernel kills the engine for want of memory",
}
OF_UPLOADS = (FaultKind.DROP, FaultKind.SLOW_DISK, FaultKind.DISK_FULL)  # the others befall runs only


@dataclass(frozen=True)
class ScriptedFault:
    kind: FaultKind
    at: float = 0.5  # share of the run, or of the upload, that goes well
    variant: int = 0  # which kind of damage


@dataclass(frozen=True)
class FaultScript:
    """Says which fault befalls the n-th run of a device, counted from 1, and its n-th upload.

    `schedule` names runs, (1, "reboot") for instance; 0 is the first upload. What it does not name meets each kind of
    `rates` with that probability.
    """

    seed: int = 0
    rates: dict[str, float] = field(default_factory=dict)
    schedule: tuple[tuple[int, FaultKind], ...] = ()

    def of_run(self, device: str, n: int) -> ScriptedFault | None:
        return self._fault(random.Random(f"{self.seed}/{device}/run/{n}"), n, tuple(FaultKind))  # noqa: S311

    def of_upload(self, device: str, n: int) -> ScriptedFault | None:
        return self._fault(random.Random(f"{self.seed}/{device}/upload/{n}"), 0 if n == 1 else -1, OF_UPLOADS)  # noqa: S311

    def _fault(self, chance: random.Random, n: int, kinds: tuple[FaultKind, ...]) -> ScriptedFault | None:
        at, variant, dice = chance.uniform(0.2, 0.9), chance.randrange(1000), chance.random()
        scheduled = dict(self.schedule).get(n)
        if scheduled is not None:
            return ScriptedFault(scheduled, at, variant)
        for kind in kinds:
            dice -= self.rates.get(kind, 0.0)
            if dice < 0:
                return ScriptedFault(kind, at, variant)
        return None
