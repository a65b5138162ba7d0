"""Demonstrates faults on scripted devices, each of which meets one kind, and tells what that cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from device_inventory import Inventory
from engine.container import Container
from engine.quantize import Format
from engine.selftest import selftest_profile, write_random_model
from harness.scripted import WHAT_HAPPENS, FaultKind, FaultScript, declare
from harness.sweep.matrix import Matrix, parse_matrix
from reports.metrics import METRICS
from reports.records import Run, RunStatus, last_attempts

HEALTHY = "healthy"
SPEED = 60.0  # of the devices' time: a minute of waiting for a link takes a second
FAULTY_RUN = 2  # of each device; its deployment and its other runs go well
MATRIX = """\
# What the demonstration of faults asks for. Nothing is measured: every number is made up.
name = "faults"
baseline = "naive-swap"
strategies = ["full-load", "naive-swap", "edgemoe"]
expert_budgets = ["4-experts"]
warmups = 0
repetitions = 2
blocks = 2
deadline_s = 60.0

[[containers]]
name = "tiny"
path = "tiny.emoe"
profile = "tiny.profile.json"

[[workloads]]
name = "ids"
tokens = [[1, 17, 5, 80, 33], [2, 3]]
max_new_tokens = 8
"""


@dataclass(frozen=True)
class FaultCost:
    """Says what happened to one device, how many of its cells ended well, and what the fault cost."""

    device: str
    what_happens: str
    ok: int
    cells: int
    cost: str


def matrix_of_faults(folder: Path) -> Matrix:
    """Writes the small model that nobody computes with to `folder`, and returns the matrix that names it."""
    write_model(folder)
    return parse_matrix(MATRIX, source="the matrix of the demonstration", folder=folder)


def faulty_devices(folder: Path) -> Inventory:
    """Makes a scripted device for each kind of fault, and a healthy one."""
    schedules = {HEALTHY: FaultScript()} | {
        kind.value: FaultScript(schedule=((FAULTY_RUN, kind),)) for kind in FaultKind
    }
    return Inventory(
        {name: declare(folder / name, name, faults=faults, speed=SPEED) for name, faults in schedules.items()}
    )


def write_model(folder: Path) -> None:
    """Writes tiny.emoe and tiny.profile.json, which a matrix needs even if nobody computes with them."""
    container = folder / "tiny.emoe"
    write_random_model(str(container), [Format("int8", 32)])
    selftest_profile(Container.open(str(container))).save(str(folder / "tiny.profile.json"))


def costs(attempts: Sequence[Run]) -> Iterator[FaultCost]:
    """Yields what the fault of each device cost, from all attempts of the demonstration."""
    last = last_attempts(attempts)
    for name in dict.fromkeys(run.cell.device for run in last):
        runs = [run for run in last if run.cell.device == name]
        failed = [run for run in attempts if run.cell.device == name and run.status is not RunStatus.OK]
        happens = "nothing" if name == HEALTHY else WHAT_HAPPENS[FaultKind(name)]
        yield FaultCost(name, happens, sum(run.status is RunStatus.OK for run in runs), len(runs), _cost(runs, failed))


def _cost(runs: list[Run], failed: list[Run]) -> str:
    """Returns the cost in words; `runs` are the last attempts at a device's cells, `failed` those not ok."""
    if failed:
        lost = sum(run in failed for run in runs)
        how = "its cell" if lost == 1 else f"{lost} cells" if lost else "one more attempt"
        return f"{how}: {failed[0].status.value.replace('_', ' ')} ({failed[0].reasons[0]})"
    slowest = max(_slowness(run, runs) for run in runs)
    return "nothing" if slowest < 1.2 else f"no run; one took {slowest:.1f} times as long"


def _slowness(run: Run, runs: list[Run]) -> float:
    """Returns the time of a token over that of the same cell in the other blocks."""
    tpot = METRICS["tpot_s"].of
    others = [value for other in runs if other.cell == run.cell and other is not run and (value := tpot(other))]
    own = tpot(run)
    return own / median(others) if own and others else 1.0
