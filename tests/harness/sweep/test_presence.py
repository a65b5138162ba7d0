"""Two controllers, one results database: who is at work, who is dead, and who may measure a sweep."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from harness.errors import TakenOverError, UsageError
from harness.sweep.presence import HEARTBEAT_S, SILENCE_S, at_work, is_alive, myself
from reports.results.connection import Patience
from reports.results.controllers import Controller
from reports.results.database import ResultsDatabase
from tests.command_line import farm
from tests.postgresql import Server


@pytest.fixture
def sweep(bench) -> str:
    bench.runner(bench.plan())
    return bench.sweep.id


@pytest.fixture
def lost(sweep) -> Iterator[Controller]:
    """A controller of this machine whose process has ended."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        script = f"from harness.process import identity; print(identity({process.pid}))"
        seen = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
        process.kill()
    yield dataclasses.replace(myself(sweep), id="lost", pid=process.pid, process=seen.strip())


def elsewhere(sweep: str, **changes) -> Controller:
    return dataclasses.replace(myself(sweep), id="elsewhere", owner="bob@lab", process="boot pid:[1] 5", **changes)


def test_a_controller_knows_itself_and_its_machine(sweep) -> None:
    me = myself(sweep)
    assert is_alive(me)
    assert is_alive(dataclasses.replace(me, silent_s=1e6)), "a process that is there needs no heartbeat"
    assert not is_alive(dataclasses.replace(me, process=me.process + "1")), "another process has its number now"
    assert me.owner.count("@") == 1
    assert me.pid == os.getpid()


def test_a_killed_controller_of_this_machine_is_known_at_once(lost) -> None:
    assert lost.process
    assert not is_alive(lost)


def test_a_process_that_nobody_has_waited_for_is_dead(sweep) -> None:
    with subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.read()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert not is_alive(dataclasses.replace(myself(sweep), pid=process.pid))


@pytest.mark.parametrize(("silent_s", "alive"), [(0.0, True), (SILENCE_S - 1, True), (SILENCE_S + 1, False)])
def test_one_elsewhere_is_known_by_its_silence(sweep, silent_s, alive) -> None:
    assert is_alive(elsewhere(sweep, silent_s=silent_s)) is alive


def test_a_sweep_is_refused_while_its_controller_lives_and_free_when_it_ends(bench, sweep) -> None:
    with at_work(bench.database, sweep) as presence:
        assert presence.others() == []
        message = rf"sweep {sweep} is being measured by \S+@\S+ \(process {os.getpid()}\): wait for it"
        with pytest.raises(UsageError, match=message), at_work(bench.database, sweep):
            pytest.fail("two at one sweep")
    with pytest.raises(KeyError), at_work(bench.database, sweep):
        raise KeyError
    assert bench.database.controllers() == []


def test_the_place_of_a_lost_controller_is_taken(bench, sweep, lost) -> None:
    bench.database.enter(lost)
    with at_work(bench.database, sweep) as presence:
        assert [c.id for c in bench.database.controllers()] == [presence.controller.id]


def test_a_heartbeat_comes_in_time_and_not_more_often(bench, sweep, monkeypatch) -> None:
    seconds, beats = [0.0], []
    monkeypatch.setattr(bench.database, "beat", lambda controller: bool(beats.append(seconds[0]) or True))
    with at_work(bench.database, sweep, clock=lambda: seconds[0]) as presence:
        for _ in range(100):
            seconds[0] += 1.0
            presence.beat()
    assert beats == [HEARTBEAT_S * i for i in range(1, 7)]


def test_who_was_taken_over_stops_and_leaves_the_other_alone(bench) -> None:
    plan = bench.plan()
    runner = bench.runner(plan)
    sweep = bench.sweep.id
    seconds, other = [0.0], elsewhere(sweep)
    with at_work(bench.database, sweep, clock=lambda: seconds[0]) as presence:
        (seen,) = bench.database.controllers()
        runner._tick = presence.beat

        def before(device, request) -> None:
            if len(bench.farm.requests) == 2:
                assert bench.database.enter(other, instead_of=seen)
                seconds[0] = HEARTBEAT_S
                assert runner._surroundings.stopping.wait(60), "it went on"

        bench.farm.before = before
        with pytest.raises(TakenOverError, match="another controller took it over"):
            runner.measure()
    assert len(bench.runs()) <= 2
    assert [c.id for c in bench.database.controllers()] == ["elsewhere"]


def test_a_server_that_restarts_during_a_sweep_is_waited_for_and_the_user_told(bench, postgresql: Server) -> None:
    bench.database.close()
    bench.database = ResultsDatabase.open(postgresql.emptied(), patience=Patience(outage_s=120))
    plan = bench.plan(devices=("pi4", "pi5"))
    stopped = threading.Lock()
    with ExitStack() as back:

        def before(device, request) -> None:
            if len(bench.farm.requests) == 5 and stopped.acquire(blocking=False):
                postgresql.stop()
                restart = threading.Timer(1.0, postgresql.start)
                restart.start()
                back.callback(restart.join)

        bench.farm.before = before
        runs = bench.measure(plan)
    assert len({run.id for run in runs}) == len(runs) == len(plan.measurements)
    told = [state for _, state in bench.witness.states if state.startswith("waiting for the results database: ")]
    assert told and all("\n" not in state for state in told)


def test_a_stopped_sweep_does_not_wait_for_a_server(bench, postgresql: Server) -> None:
    from reports.errors import OutageError

    bench.database.close()
    bench.database = ResultsDatabase.open(postgresql.emptied(), patience=Patience(outage_s=3600))
    runner = bench.runner(bench.plan())
    bench.farm.before = lambda device, request: postgresql.stop()
    bench.witness.device_is = lambda device, state: runner.stop() if "database" in state else None
    try:
        with pytest.raises(OutageError, match="the database server is away"):
            runner.measure()
    finally:
        postgresql.start()


def listed(place: str) -> tuple[str, dict]:
    def call(*arguments: str) -> str:
        return farm("results", "list", "--results", place, *arguments).stdout

    (sweep,) = json.loads(call("--json"))
    return call(), sweep


def test_the_list_of_sweeps_says_who_is_at_work(bench, sweep, lost) -> None:
    place = str(bench.folder / "farm.db")
    assert listed(place)[1]["state"] == "incomplete"
    with at_work(bench.database, sweep) as presence:
        text, row = listed(place)
        assert row["state"] == "running"
        assert row["controller"]["owner"] == presence.controller.owner
        assert "running:" in text
    bench.database.enter(lost)
    text, row = listed(place)
    assert row["state"] == "stale"
    assert "stale:" in text
    bench.database.leave(lost)
    bench.measure(bench.plan())
    assert listed(place)[1]["state"] == "complete"
