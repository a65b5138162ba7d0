"""What fails is tried again or not, by its kind; who keeps failing is quarantined, and brought back by a canary run."""

from __future__ import annotations

import pytest

from harness.device.retry import RETRIES, Backoff, fault_of_error
from harness.device.session import Outcome
from harness.errors import DiskFullError, RemoteCommandError, RemoteTimeoutError, UnfitError, UnreachableError
from harness.sweep.health import HealthBook
from harness.sweep.runner import tally
from harness.sweep.worker import CANARY_PAUSES_S
from reports.records import Fault, RunStatus, last_attempts
from reports.results.health import QUARANTINE, Health, Mark
from tests.harness.conftest import ok, samples_of

LOST = Outcome(RunStatus.UNREACHABLE, ("pi: the connection was lost; not back within 120 s",), Fault.LINK_LOST)
REBOOTED = Outcome(RunStatus.UNREACHABLE, ("the device restarted during the run: check power",), Fault.REBOOTED)
DAMAGED = Outcome(RunStatus.FAILED, ("the device sent damaged output: not JSON",), Fault.DAMAGED_OUTPUT)
STALLED = Outcome(RunStatus.TIMED_OUT, ("pi: `python3` gave no end within 60 s",), Fault.STALLED)
FULL = Outcome(RunStatus.FAILED, ("the device's disk is full",), Fault.DISK_FULL)
KILLED = Outcome(RunStatus.FAILED, ("the engine was killed by signal 9",), Fault.KILLED)
ENDED = [RunStatus.UNREACHABLE, RunStatus.SKIPPED]  # what a resumed sweep tries again


def health(bench, device="pi") -> Health:
    return bench.database.health(device).health


def fail_cell(bench, number: int, outcome: Outcome, times: int = 1) -> None:
    """The first `times` attempts at the cell that comes as number `number` end with `outcome`, all others well."""
    cells: list[tuple[str, str]] = []
    failures = 0

    def answer(request):
        nonlocal failures
        cell = (request.strategy, str(request.expert_budget))
        if not cells or cells[-1] != cell:
            cells.append(cell)
        if len(cells) - 1 != number or failures == times:
            return ok(request)
        failures += 1
        return outcome

    bench.farm.answer = answer


# --- damage -----------------------------------------------------------------------------------------------------------

BROKEN = Outcome(RunStatus.FAILED, ("the engine exited with status 1: bad magic",), Fault.ENGINE)
NO_MEMORY = Outcome(RunStatus.OUT_OF_MEMORY, ("the engine was killed by signal 9",), Fault.OUT_OF_MEMORY)


@pytest.mark.parametrize(("outcome", "thorough"), [(BROKEN, True), (NO_MEMORY, False)])
def test_what_a_device_does_with_damaged_files_is_no_result_and_is_tried_again(bench, outcome, thorough) -> None:
    looked = []

    def damage(how):
        looked.append(how)
        return "the engine in /f/engines/e was damaged: engine/__main__.py has changed"

    bench.farm.damage = damage
    fail_cell(bench, 1, outcome)
    runs = bench.measure(bench.plan())
    (failed,) = [run for run in runs if run.status is not RunStatus.OK]
    assert (failed.status, failed.fault) == (RunStatus.FAILED, Fault.STORAGE)
    assert failed.reasons[0].startswith("pi: the device's storage lost or changed what was sent: the engine in /f")
    assert failed.reasons[1:] == outcome.reasons
    assert {r.status for r in last_attempts(runs)} == {RunStatus.OK}
    assert looked == [thorough]


def test_a_wrong_answer_of_a_damaged_container_is_no_result(bench) -> None:
    bench.farm.damage = lambda thorough: "blobs/c was missing or damaged"
    bench.farm.answer = lambda request: (
        ok(request, samples=samples_of(request, shift=1)) if request.strategy == "naive-swap" else ok(request)
    )
    assert {run.fault for run in bench.measure(bench.plan())} == {None, Fault.STORAGE}


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (UnfitError("pi: /f is not empty"), Fault.STORAGE),
        (UnreachableError("pi: the connection was lost"), Fault.UNREACHABLE),
        (RemoteCommandError("pi: `python3` failed: Input/output error"), Fault.STORAGE),
    ],
)
def test_a_failure_of_a_device_that_cannot_be_looked_at_is_no_result(bench, error, fault) -> None:
    bench.farm.damage = lambda thorough: error
    fail_cell(bench, 1, BROKEN)
    runs = bench.measure(bench.plan())
    assert [run.fault for run in runs if run.fault] == [fault]
    assert {r.status for r in last_attempts(runs)} == {RunStatus.OK}


def test_a_whole_device_keeps_its_failure_as_a_result(bench) -> None:
    fail_cell(bench, 1, BROKEN)
    assert [run.fault for run in bench.measure(bench.plan()) if run.fault] == [Fault.ENGINE]


def test_storage_that_fails_while_a_container_is_put_is_mended_and_tried_again(bench) -> None:
    errors = [RemoteCommandError("pi: `python3` failed: /f is not the farm's folder any more (No such file)")]
    bench.farm.put_error = lambda source: errors.pop() if errors else None
    bench.farm.damage = lambda thorough: "the engine in /f was damaged: it is missing"
    runs = bench.measure(bench.plan())
    assert [run.fault for run in runs if run.fault] == [Fault.STORAGE]
    assert {r.status for r in last_attempts(runs)} == {RunStatus.OK}


def test_the_planned_hash_goes_to_the_device(bench) -> None:
    bench.measure(bench.plan())
    assert "c" * 64 in bench.farm.planned.values()


# --- what is tried again ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outcome", [LOST, REBOOTED, DAMAGED, STALLED, FULL, KILLED])
def test_a_fault_of_the_infrastructure_is_tried_again_and_costs_no_cell(bench, outcome) -> None:
    fail_cell(bench, 1, outcome)
    runs = bench.measure(bench.plan())
    assert len(runs) == 9
    assert [r.fault for r in runs if r.status is not RunStatus.OK] == [outcome.fault]
    assert {r.status for r in last_attempts(runs)} == {RunStatus.OK}
    assert len({r.id for r in runs}) == 9, "each attempt has an identity of its own"
    assert bench.pauses == [RETRIES[outcome.fault].first_pause_s]
    assert tally(bench.sweep, runs).exit_code == 0
    assert len(bench.witness.ended) == 8, "a cell ends once"
    assert health(bench) is Health.SUSPECT


@pytest.mark.parametrize(
    "outcome",
    [
        Outcome(RunStatus.OUT_OF_MEMORY, ("does not fit",)),
        Outcome(RunStatus.TIMED_OUT, ("no end within 60 s",)),
        Outcome(RunStatus.FAILED, ("ValueError: a bug",)),
    ],
)
def test_a_result_is_never_tried_again(bench, outcome) -> None:
    bench.farm.answer = lambda request: outcome
    runs = bench.measure(bench.plan())
    assert len(runs) == 8
    assert bench.pauses == []
    assert not any(r.fault.is_infrastructure for r in runs)
    assert health(bench) is Health.GOOD


def test_a_cell_that_always_fails_costs_itself_and_nothing_else(bench) -> None:
    """Such as one that makes the device restart each time."""
    fail_cell(bench, 3, REBOOTED, times=99)
    runs = bench.measure(bench.plan())
    last = last_attempts(runs)
    assert [r.status for r in last].count(RunStatus.OK) == 7
    assert [r.fault for r in last if r.fault] == [Fault.REBOOTED]
    assert len(runs) == 7 + RETRIES[Fault.REBOOTED].attempts
    assert bench.farm.canaries == ["pi"], "three in a row: it had to prove itself, and did"
    assert tally(bench.sweep, runs).exit_code == 3


def test_attempts_that_keep_failing_end_in_quarantine(bench) -> None:
    bench.farm.answer = lambda request: LOST if len(bench.farm.requests) > 3 else ok(request)
    bench.farm.canary_error = lambda device: UnreachableError("pi: cannot be reached")
    runs = bench.measure(bench.plan())
    assert len(bench.farm.requests) == 3 + QUARANTINE
    assert len(bench.farm.canaries) == len(CANARY_PAUSES_S)
    assert bench.pauses[-3:] == list(CANARY_PAUSES_S)
    last = last_attempts(runs)
    assert [r.status for r in last] == [RunStatus.OK] * 3 + [RunStatus.UNREACHABLE] * 5
    assert [r.fault for r in last[4:]] == [Fault.UNTRIED] * 4
    assert "edgemoe-farm doctor pi" in last[-1].reasons[0]
    assert health(bench) is Health.QUARANTINED
    # Resumed when the device is well: a canary run brings it back, and what is missing is measured.
    bench.farm.answer, bench.farm.canary_error = ok, lambda device: None
    bench.farm.canaries.clear()
    runs = bench.measure(bench.plan().without(bench.database.done(bench.sweep.id)))
    assert bench.farm.canaries == ["pi"]
    assert {r.status for r in last_attempts(runs)} == {RunStatus.OK}
    assert health(bench) is Health.GOOD


def test_a_device_that_failed_of_something_else_than_its_link_is_skipped(bench) -> None:
    bench.farm.answer = lambda request: DAMAGED
    bench.farm.canary_error = lambda device: RemoteCommandError("pi: the engine's self-test fails there: arithmetic")
    last = last_attempts(bench.measure(bench.plan()))
    assert [r.status for r in last] == [RunStatus.FAILED] * 2 + [RunStatus.SKIPPED] * 6
    assert "self-test fails there: arithmetic" in last[-1].reasons[0]
    assert bench.database.done(bench.sweep.id, again=ENDED) == set(), "a resumed sweep measures all eight"


def test_a_device_in_maintenance_is_left_alone(bench) -> None:
    book = HealthBook(bench.database, bench.now)
    book.note("pi", Mark.MAINTENANCE, "new SD card")
    plan = bench.plan(devices=("pi", "orin"))
    runs = bench.measure(plan)
    assert bench.farm.opened == ["orin"]
    skipped = [r for r in runs if r.cell.device == "pi"]
    assert {(r.status, r.fault) for r in skipped} == {(RunStatus.SKIPPED, Fault.UNTRIED)}
    assert "new SD card" in skipped[0].reasons[0]
    assert "devices health pi --good" in skipped[0].reasons[0]
    book.note("pi", Mark.GOOD)
    runs = bench.measure(plan.without(bench.database.done(bench.sweep.id, again=ENDED)))
    assert {r.status for r in last_attempts(runs)} == {RunStatus.OK}


def test_stop_ends_the_wait_for_a_canary_run(bench) -> None:
    bench.farm.answer = lambda request: DAMAGED
    runner = bench.runner(bench.plan())
    bench.pauses = _StopAt(2, runner.stop)  # the first is between two attempts
    runner.measure()
    assert bench.farm.canaries == []
    assert {r.fault for r in bench.runs()} == {Fault.DAMAGED_OUTPUT}


class _StopAt(list):
    """Stops a runner at the n-th pause."""

    def __init__(self, n, stop) -> None:
        self._n, self._stop = n, stop

    def append(self, seconds) -> None:
        super().append(seconds)
        if len(self) == self._n:
            self._stop()


def test_pauses_double_up_to_a_limit_and_half_is_chance() -> None:
    backoff = Backoff(9, 5.0, last_pause_s=30.0)
    assert [backoff.pause_s(n, lambda: 1.0) for n in (1, 2, 3, 4, 9)] == [5, 10, 20, 30, 30]
    assert [backoff.pause_s(n, lambda: 0.0) for n in (1, 4)] == [2.5, 15]


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (UnreachableError("pi: gone"), Fault.UNREACHABLE),
        (RemoteTimeoutError("pi: late"), Fault.STALLED),
        (DiskFullError("pi: full"), Fault.DISK_FULL),
        (RemoteCommandError("pi: `mkdir` failed: mkdir: x: No space left on device"), Fault.DISK_FULL),
        (RemoteCommandError("pi: `mkdir` failed: mkdir: x: Read-only file system"), Fault.STORAGE),
        (RemoteCommandError("pi: `mkdir` failed"), Fault.COMMAND_FAILED),
    ],
)
def test_errors_of_a_device_have_a_kind(error, fault) -> None:
    assert fault_of_error(error) is fault
