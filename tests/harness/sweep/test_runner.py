"""The scheduler, on scripted devices and a real database: nothing lost, nothing doubled, nobody stopped by another."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest

from engine.protocol import Course, Sampling
from harness.device.deploy import EngineBundle
from harness.device.session import Outcome
from harness.errors import (
    DeviceBusyError,
    DeviceError,
    DiskFullError,
    HostKeyError,
    PythonMissingError,
    UnfitError,
    UnreachableError,
    UsageError,
)
from harness.sweep.runner import tally
from reports.errors import DatabaseError
from reports.records import Conditions, Fault, RunStatus, Verdict, last_attempts
from reports.results.health import QUARANTINE, Health
from tests.harness.conftest import load_of, ok, samples_of


def statuses(runs) -> set[RunStatus]:
    return {run.status for run in runs}


def test_engines_take_turns_on_one_device(bench) -> None:
    plan, old = bench.plan(), EngineBundle("0" * 64, b"old")
    key = plan.measurements[0].cell.key
    turns = plan.in_turns([(key, 0), (key, 1), (key, 2), (key, 3)], ["0" * 64, "1" * 64, "1" * 64, "0" * 64])
    bench.engines = {bundle.sha256: bundle for bundle in (old, EngineBundle("1" * 64, b"new"))}
    runs = bench.measure(turns)
    assert [(run.cell.key, run.block, run.engine_sha256[0]) for run in runs] == [
        (key, 0, "0"), (key, 1, "1"), (key, 2, "1"), (key, 3, "0"),
    ]  # fmt: skip
    assert bench.sweep.engines == ("0" * 64, "1" * 64, "1" * 64, "0" * 64)


def test_a_cell_that_the_matrix_does_not_have_cannot_be_measured_again(bench) -> None:
    with pytest.raises(UsageError, match="pi/none is not in the matrix scripted any more"):
        bench.plan().in_turns([("pi/none", 0)], ["0" * 64])


def test_a_canary_run_comes_first_where_it_is_asked_for(bench) -> None:
    bench.canary = True
    plan = bench.plan(devices=("pi", "jet"))
    bench.farm.canary_error = lambda device: DeviceError("jet: arithmetic differs") if device == "jet" else None
    runs = bench.measure(plan)
    assert sorted(bench.farm.canaries) == ["jet", "pi"]
    assert {run.status for run in runs if run.cell.device == "pi"} == {RunStatus.OK}
    (reason,) = {run.reasons[0] for run in runs if run.cell.device == "jet"}
    assert "jet: the canary run failed (jet: arithmetic differs): see `edgemoe-farm doctor jet`" in reason


def test_everything_planned_is_measured_once(bench) -> None:
    plan = bench.plan(devices=("pi4", "pi5", "orin"))
    runs = bench.measure(plan)
    assert sorted((r.cell.key, r.block) for r in runs) == sorted(m.key for m in plan.measurements)
    assert statuses(runs) == {RunStatus.OK}
    assert {r.verdict for r in runs} == {Verdict.VALID}
    assert tally(bench.sweep, runs).exit_code == 0
    assert bench.farm.most_busy == 1, "a device measures one run at a time"
    assert sorted(bench.farm.opened) == sorted(bench.farm.closed) == ["orin", "pi4", "pi5"]
    for device in ("pi4", "pi5", "orin"):
        order = [request.run_id for name, request in bench.farm.requests if name == device]
        assert [r.id for r in bench.witness.ended if r.cell.device == device] == order


def test_a_record_has_all_that_was_asked_and_seen(bench) -> None:
    run = bench.measure(bench.plan())[0]
    assert run.request is not None
    assert run.request.container == "store/c.emoe"
    assert run.request.profile == "store/c.profile"
    assert run.engine_sha256 == "e" * 64
    assert run.started_at < run.ended_at
    assert run.command
    assert run.id.startswith(bench.sweep.id)


def test_devices_measure_side_by_side(bench) -> None:
    together = threading.Barrier(3)
    bench.farm.before = lambda device, request: together.wait(timeout=30)
    plan = bench.plan(devices=("pi4", "pi5", "orin"))
    assert statuses(bench.measure(plan)) == {RunStatus.OK}


def test_a_record_is_stored_before_the_next_cell_starts(bench) -> None:
    stored = []
    bench.farm.before = lambda device, request: stored.append(len(bench.runs()))
    bench.measure(bench.plan())
    assert stored == list(range(8))


def test_a_device_keeps_a_run_until_its_record_is_stored(bench) -> None:
    runs = bench.measure(bench.plan())
    assert bench.farm.forgotten == [(run.id, True) for run in runs]


def test_a_device_is_rid_of_the_run_that_a_killed_controller_stored_last(bench) -> None:
    plan = bench.plan()
    (first,) = bench.measure(plan.without(m.key for m in plan.measurements[1:]))
    bench.farm.forgotten.clear()
    bench.measure(plan.without([plan.measurements[0].key]))
    assert bench.farm.forgotten[0] == (first.id, True)


def test_a_run_that_was_cut_off_by_stop_is_not_kept(bench) -> None:
    plan = bench.plan()
    runner = bench.runner(plan)

    def answer(request):
        runner.stop()
        return Outcome(RunStatus.FAILED, ("cancelled",))

    bench.farm.answer = answer
    runner.measure()
    ((forgotten, stored),) = bench.farm.forgotten
    assert forgotten == bench.farm.requests[0][1].run_id
    assert not stored


def test_hundreds_of_devices_measure_side_by_side(bench) -> None:
    names = tuple(f"d{n:03}" for n in range(200))
    together = threading.Barrier(len(names))
    bench.farm.before = lambda device, request: together.wait(timeout=60)
    plan = bench.plan(devices=names)
    plan = plan.without(m.key for m in plan.measurements if m is not plan.of_device(m.cell.device)[0])
    assert len(bench.measure(plan)) == 200


def test_a_failing_cell_stops_no_other(bench) -> None:
    failure = Outcome(RunStatus.OUT_OF_MEMORY, ("killed by the kernel: give it a smaller expert budget",))
    bench.farm.answer = lambda request: failure if request.strategy == "full-load" else ok(request)
    runs = bench.measure(bench.plan())
    assert {r.status for r in runs if r.cell.strategy == "full-load"} == {RunStatus.OUT_OF_MEMORY}
    assert {r.status for r in runs if r.cell.strategy != "full-load"} == {RunStatus.OK}
    assert tally(bench.sweep, runs).exit_code == 3


def test_an_unreachable_device_costs_few_attempts_and_no_other_device(bench, unreachable) -> None:
    bench.farm.open_error = lambda device: unreachable if device.name == "pi" else None
    plan = bench.plan(devices=("pi", "orin"))
    runs = last_attempts(bench.measure(plan))
    assert bench.farm.opened.count("pi") == QUARANTINE
    assert {r.status for r in runs if r.cell.device == "pi"} == {RunStatus.UNREACHABLE}
    assert {r.status for r in runs if r.cell.device == "orin"} == {RunStatus.OK}
    assert len(runs) == len(plan.measurements)
    assert all("is it switched on" in r.reasons[0] for r in runs if r.cell.device == "pi")
    assert tally(bench.sweep, runs).exit_code == 3


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (HostKeyError("pi: the host key has changed"), RunStatus.UNREACHABLE),
        (PythonMissingError("pi: no python3 with numpy"), RunStatus.SKIPPED),
        (UnfitError("pi: /root is read-only: remount it"), RunStatus.SKIPPED),
    ],
)
def test_a_device_that_is_not_fit_is_asked_once(bench, error, status) -> None:
    bench.farm.open_error = lambda device: error
    runs = bench.measure(bench.plan())
    assert bench.farm.opened == ["pi"]
    assert statuses(runs) == {status}
    assert [r.fault for r in runs] == [Fault.UNFIT] + [Fault.UNTRIED] * 7
    assert {r.reasons for r in runs} == {(str(error),)}
    assert tally(bench.sweep, runs).exit_code == 4
    assert bench.database.health("pi").health is Health.GOOD, "what is not there yet is not broken"


def test_a_device_that_others_use_is_skipped_with_its_holder_and_stops_no_other(bench) -> None:
    busy = DeviceBusyError("pi: held by alice@box for sweep s since 02:14 (waited 3600 s)")
    bench.farm.hold_error = lambda device: busy if device == "pi" else None
    runs = bench.measure(bench.plan(devices=("pi", "orin")))
    assert {r.status for r in runs if r.cell.device == "pi"} == {RunStatus.SKIPPED}
    assert {r.reasons for r in runs if r.cell.device == "pi"} == {(str(busy),)}
    assert {(r.status, r.lease_token) for r in runs if r.cell.device == "orin"} == {(RunStatus.OK, 7)}
    assert [r.fault for r in runs if r.cell.device == "pi"] == [Fault.BUSY] + [Fault.UNTRIED] * 7
    assert bench.farm.asked.count("pi") == 1, "it is not waited for again for each cell"


def test_waiting_for_a_device_is_shown_and_ends_with_the_sweep(bench) -> None:
    runner = bench.runner(bench.plan())
    bench.farm.waits = "waiting: 2nd in the queue, held by alice@box for sweep s since 02:14"
    bench.farm.on_wait = runner.stop
    runner.measure()
    assert ("pi", bench.farm.waits) in bench.witness.states
    assert bench.runs() == []
    assert bench.farm.requests == []
    assert bench.farm.closed == ["pi"]


def test_a_device_that_was_lost_to_another_controller_is_waited_for_again(bench) -> None:
    words = ("the lease on the device was lost, bob@box has taken the device",)
    lost = Outcome(RunStatus.UNREACHABLE, words, fault=Fault.LEASE_LOST)
    bench.farm.answer = lambda request: lost if len(bench.farm.requests) in (3, 4, 5) else ok(request)
    runs = bench.measure(bench.plan())
    assert [r.status for r in runs] == [RunStatus.OK] * 2 + [RunStatus.UNREACHABLE] * 3 + [RunStatus.OK] * 5
    assert bench.database.health("pi").health is Health.GOOD, "that says nothing about the device"


def test_a_container_that_does_not_fit_is_tried_once(bench) -> None:
    puts: list[Path] = []

    def refuse(path: Path) -> Exception:
        puts.append(path)
        return DiskFullError("pi: 9 GB are needed for c.emoe, 1 GB is free: delete something")

    bench.farm.put_error = refuse
    runs = bench.measure(bench.plan())
    assert len(puts) == 1
    assert statuses(runs) == {RunStatus.SKIPPED}
    assert all("9 GB are needed" in r.reasons[0] for r in runs)


def test_a_link_lost_while_deploying_is_unreachable(bench) -> None:
    bench.farm.put_error = lambda path: UnreachableError("pi: the connection was lost")
    bench.farm.canary_error = lambda device: UnreachableError("pi: the connection was lost")
    assert statuses(bench.measure(bench.plan())) == {RunStatus.UNREACHABLE}


def test_a_wrong_answer_is_a_failure_that_names_the_other_run(bench) -> None:
    bench.farm.answer = lambda request: (
        ok(request, samples=samples_of(request, shift=1)) if request.strategy == "naive-swap" else ok(request)
    )
    runs = bench.measure(bench.plan())
    first = runs[0]
    odd = first.cell.strategy == "naive-swap"  # the first answer is the measure, whosever it is
    wrong = [r for r in runs if (r.cell.strategy == "naive-swap") != odd]
    assert statuses(wrong) == {RunStatus.FAILED}
    assert all(first.id in r.reasons[0] for r in wrong)
    assert statuses(r for r in runs if r not in wrong) == {RunStatus.OK}


def test_sampled_repetitions_may_differ(bench) -> None:
    def answer(request):
        assert request.sampling == Sampling(temperature=1.0)
        return ok(request, samples=tuple(replace(s, tokens=(s.repetition,) * 3) for s in samples_of(request)))

    bench.farm.answer = answer
    runs = bench.measure(bench.plan(bench.plan().matrix.toml + "temperature = 1.0\n"))
    assert statuses(runs) == {RunStatus.OK}


def test_conditions_that_did_not_hold_make_a_run_suspect(bench) -> None:
    bench.farm.answer = lambda request: ok(request, load=load_of(request, page_cache_resident_fraction=0.5))
    runs = bench.measure(bench.plan())
    assert statuses(runs) == {RunStatus.OK}
    assert {r.verdict for r in runs} == {Verdict.SUSPECT}
    assert tally(bench.sweep, runs).suspect == 8


def test_a_device_is_asked_to_be_as_cool_as_at_the_first_run(bench) -> None:
    celsius = iter([41.5, 55.0, 48.0] + [45.0] * 13)

    def answer(request):
        return ok(request, conditions=Conditions(readings=3, temperature_c=Course(before=next(celsius), after=60.0)))

    bench.farm.answer = answer
    plan = bench.plan(bench.plan().matrix.toml + "[conditions]\ntemperature_margin_c = 4\nmax_wait_s = 30\n")
    first = plan.without(m.key for m in plan.measurements[3:])
    bench.measure(first)
    settles = [request.settle for _, request in bench.farm.requests]
    assert [settle.temperature_c for settle in settles] == [None, 45.5, 45.5]
    assert {settle.max_wait_s for settle in settles} == {30}
    # A resumed sweep keeps the baseline, and finds an engine that survived by the very same request.
    bench.measure(plan.without(bench.database.done(bench.sweep.id)))
    assert {request.settle.temperature_c for _, request in bench.farm.requests[3:]} == {45.5}


def test_a_run_that_was_throttled_is_suspect_and_keeps_its_conditions(bench) -> None:
    seen = Conditions(readings=3, throttled=True, throttle_causes=("soft temperature limit",))
    bench.farm.answer = lambda request: ok(request, conditions=seen)
    run = bench.measure(bench.plan())[0]
    assert (run.status, run.verdict, run.conditions) == (RunStatus.OK, Verdict.SUSPECT, seen)
    assert "throttled during the run (soft temperature limit)" in run.reasons[0]


def test_what_does_not_fit_the_limit_that_was_asked_for_is_an_answer(bench) -> None:
    def answer(request, method):
        assert request.memory_limit_bytes == 64 << 20
        seen = Conditions(readings=2, memory_limit_bytes=64 << 20, memory_limit_method=method)
        if request.strategy == "full-load":
            return Outcome(RunStatus.OUT_OF_MEMORY, ("killed",), conditions=seen)
        return ok(request, conditions=seen)

    plan = bench.plan('memory_limit = "64 MiB"\n' + bench.plan().matrix.toml)
    bench.farm.answer = lambda request: answer(request, "cgroup-v1")
    runs = bench.measure(plan)
    assert {r.status for r in runs if r.cell.strategy == "full-load"} == {RunStatus.OUT_OF_MEMORY}
    assert tally(bench.sweep, runs).exit_code == 0
    unheld = [replace(r, conditions=replace(r.conditions, memory_limit_method="none")) for r in runs]
    assert tally(bench.sweep, unheld).exit_code == 3


def test_damaged_samples_are_a_failure_and_not_an_exception(bench) -> None:
    bench.farm.answer = lambda request: ok(request, samples=samples_of(request)[:1] * 2)
    runs = bench.measure(bench.plan())
    assert statuses(runs) == {RunStatus.FAILED}
    assert all(not r.samples and "twice" in r.reasons[0] for r in runs)


def test_an_incomplete_run_is_a_failure(bench) -> None:
    bench.farm.answer = lambda request: ok(request, totals=None)
    assert statuses(bench.measure(bench.plan())) == {RunStatus.FAILED}


def test_a_failing_database_ends_the_sweep(bench, monkeypatch) -> None:
    def refuse(run, **_) -> None:
        raise DatabaseError("the disk is full")

    monkeypatch.setattr(bench.database, "add_run", refuse)
    with pytest.raises(DatabaseError, match="disk is full"):
        bench.measure(bench.plan(devices=("pi4", "pi5")))
    assert len(bench.farm.requests) <= 2
    assert sorted(bench.farm.closed) == sorted(bench.farm.opened)


def test_stop_kills_what_is_in_flight_and_keeps_the_rest(bench) -> None:
    plan = bench.plan()
    runner = bench.runner(plan)
    killed = threading.Event()

    def answer(request):
        if len(bench.farm.requests) < 4:
            return ok(request)
        runner.stop()
        assert killed.wait(timeout=30), "the engine in flight was not cancelled"
        return Outcome(RunStatus.FAILED, ("cancelled",))

    bench.farm.answer = answer
    bench.farm.before = lambda device, request: None
    watcher = threading.Thread(target=lambda: wait_for(bench.farm.cancelled, killed))
    watcher.start()
    runner.measure()
    watcher.join()
    assert runner.stopped
    runs = bench.runs()
    assert len(runs) == 3
    assert tally(bench.sweep, runs).missing == 5
    assert bench.farm.closed == ["pi"]


def wait_for(cancelled: list[str], killed: threading.Event) -> None:
    pause = threading.Event()
    for _ in range(3000):
        if cancelled:
            break
        pause.wait(0.01)
    killed.set()


def test_a_run_that_ended_well_before_the_stop_is_kept(bench) -> None:
    plan = bench.plan()
    runner = bench.runner(plan)

    def answer(request):
        runner.stop()
        return ok(request)

    bench.farm.answer = answer
    runner.measure()
    assert [r.status for r in bench.runs()] == [RunStatus.OK]


def test_a_resumed_sweep_measures_what_is_missing_under_the_same_ids(bench) -> None:
    plan = bench.plan()
    runner = bench.runner(plan)

    def die(request):
        if len(bench.farm.requests) == 4:
            runner.stop()
            return Outcome(RunStatus.FAILED, ("cancelled",))
        return ok(request)

    bench.farm.answer = die
    runner.measure()
    in_flight = bench.farm.requests[-1][1]
    bench.farm.answer = ok
    runs = bench.measure(plan.without(bench.database.done(bench.sweep.id)))
    assert len(runs) == len({(r.cell.key, r.block) for r in runs}) == 8
    assert tally(bench.sweep, runs).exit_code == 0
    # The engine that survived its controller is asked for by the id that it runs under.
    assert bench.farm.requests[4][1] == in_flight


def test_a_resumed_sweep_tries_an_unreachable_device_again(bench, unreachable) -> None:
    plan = bench.plan()
    bench.farm.open_error = lambda device: unreachable
    bench.measure(plan)
    bench.farm.open_error = lambda device: None
    runs = bench.measure(plan.without(bench.database.done(bench.sweep.id)))
    assert len({r.id for r in runs}) == len(runs)
    assert {r.status for r in last_attempts(runs)} == {RunStatus.OK}
    assert bench.farm.canaries == ["pi"], "it was quarantined, and had to prove itself first"
    assert tally(bench.sweep, runs).exit_code == 0


def test_a_resumed_sweep_compares_its_answers_with_the_earlier_ones(bench) -> None:
    plan = bench.plan()
    bench.measure(plan.without(m.key for m in plan.measurements[1:]))
    bench.farm.answer = lambda request: ok(request, samples=samples_of(request, shift=5))
    runs = bench.measure(plan.without([plan.measurements[0].key]))
    assert [r.status for r in runs] == [RunStatus.OK] + [RunStatus.FAILED] * 7
    assert all(runs[0].id in r.reasons[0] for r in runs[1:])


def test_no_cell_starts_after_the_deadline_and_the_one_in_flight_ends(bench) -> None:
    now = 1000.0

    def answer(request):
        nonlocal now
        now += 10.0
        return ok(request)

    bench.farm.answer = answer
    plan = bench.plan()
    bench.runner(plan, deadline_s=25.0, clock=lambda: now).measure()
    assert len(bench.runs()) == 3
    assert bench.witness.states[-1] == ("pi", "out of time")
    assert tally(bench.sweep, bench.runs()).exit_code == 3
    assert len(bench.measure(plan.without(bench.database.done(bench.sweep.id)))) == 8
