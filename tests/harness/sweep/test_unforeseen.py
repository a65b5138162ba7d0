"""What nobody foresaw becomes a record of the device on which it happened, and the sweep goes on."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from harness.errors import UsageError
from harness.sweep.runner import tally
from reports.records import Fault, RunStatus, last_attempts
from tests.harness.conftest import Bench, ok

UNFORESEEN = [
    struct.error("unpack requires a buffer of 4 bytes"),
    UnicodeError("label empty"),
    MemoryError(),
    KeyError(7),
]


@pytest.mark.parametrize("error", UNFORESEEN, ids=lambda error: type(error).__name__)
def test_a_device_that_cannot_be_opened_for_an_unknown_reason_costs_itself(bench: Bench, error: Exception) -> None:
    opened = bench.farm.open_session

    def open_session(device: Any) -> Any:
        if device.name == "odd":
            raise error
        return opened(device)

    bench.farm.open_session = open_session  # type: ignore[method-assign]
    runs = bench.measure(bench.plan(devices=("pi", "odd")))
    last = last_attempts(runs)
    assert {r.status for r in last if r.cell.device == "pi"} == {RunStatus.OK}
    odd = [r for r in last if r.cell.device == "odd"]
    assert len(odd) == 8
    assert {r.status for r in odd} <= {RunStatus.SKIPPED, RunStatus.UNREACHABLE}
    assert odd[0].fault is Fault.COMMAND_FAILED
    assert f"odd: the farm itself failed of {type(error).__name__}" in odd[0].reasons[0]
    assert "Traceback (most recent call last)" in odd[0].log_tail
    assert "open_session" in odd[0].log_tail
    assert tally(bench.sweep, runs).exit_code == 3


def test_an_unknown_failure_during_a_run_opens_the_device_anew_and_is_tried_again(bench: Bench) -> None:
    failures = [ZeroDivisionError("in the collector")]

    def answer(request: Any) -> Any:
        if failures:
            raise failures.pop()
        return ok(request)

    bench.farm.answer = answer
    runs = bench.measure(bench.plan())
    assert [r.status for r in runs] == [RunStatus.SKIPPED] + [RunStatus.OK] * 8
    assert "ZeroDivisionError: in the collector" in runs[0].log_tail
    assert bench.farm.closed == ["pi", "pi"]
    assert runs[0].id in {run for run, _ in bench.farm.forgotten}, "what it may have left there is removed"


def test_what_a_device_does_not_take_for_an_error_of_usage_costs_its_cells_alone(bench: Bench) -> None:
    bench.farm.put_error = lambda source: UsageError(f"{source} cannot be read: it was removed")
    runs = bench.measure(bench.plan())
    assert {r.status for r in runs} == {RunStatus.SKIPPED}
    assert len(runs) == 8
    assert "it was removed" in runs[0].reasons[0]
    assert runs[0].log_tail == ""


@pytest.mark.parametrize("where", ["forget", "close", "cancel"])
def test_what_follows_a_stored_record_may_fail_of_anything(bench: Bench, monkeypatch: Any, where: str) -> None:
    def fail(*arguments: object) -> None:
        raise ValueError(where)

    monkeypatch.setattr(f"tests.harness.conftest.ScriptedSession.{where}", fail)
    runs = bench.measure(bench.plan())
    assert [r.status for r in runs] == [RunStatus.OK] * 8


def test_a_canary_that_fails_of_anything_is_a_canary_that_failed(bench: Bench) -> None:
    bench.canary = True
    bench.farm.canary_error = lambda device: ZeroDivisionError("odd")
    runs = bench.measure(bench.plan())
    assert {r.fault for r in runs} == {Fault.UNTRIED}
    assert "the farm itself failed of ZeroDivisionError (odd): report it" in runs[0].reasons[0]


def test_a_display_that_fails_is_dropped(bench: Bench, monkeypatch: Any) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    for name in ("device_is", "cell_started", "engine_said", "cell_ended"):
        monkeypatch.setattr(bench.witness, name, fail)
    assert [r.status for r in bench.measure(bench.plan())] == [RunStatus.OK] * 8


def test_an_estimate_that_fails_of_anything_is_none(bench: Bench) -> None:
    from harness.sweep.estimator import CellEstimator

    bench.estimate = CellEstimator()
    bench.farm.time_error = lambda container: ZeroDivisionError()
    runs = bench.measure(bench.plan())
    assert {(r.status, r.estimate) for r in runs} == {(RunStatus.OK, None)}
