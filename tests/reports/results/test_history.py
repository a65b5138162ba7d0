"""What is asked of years of sweeps."""

from dataclasses import replace

import pytest

from reports.records import RunStatus, Verdict, run_id
from reports.results.database import ResultsDatabase


@pytest.fixture
def nights(place, make):
    """Three sweeps of one matrix and one of another, in which edgemoe was measured in two blocks; and their ids."""
    with ResultsDatabase.open(place) as database:
        for night in range(4):
            sweep_id, at = f"2026112{night}-020000-aa00", f"2026-11-2{night}T02:00:00+00:00"
            runs = [replace(make.run(block=b, seed=night, tokens=4), sweep_id=sweep_id, started_at=at) for b in (0, 1)]
            name = "other" if night == 1 else "nightly"
            database.add_sweep(make.sweep(runs, id=sweep_id, name=name, started_at=at))
            for run in runs:
                database.add_run(run)
        yield database, [f"2026112{night}-020000-aa00" for night in range(4)]


def test_sweeps_of_a_name_in_their_order(nights) -> None:
    database, ids = nights
    assert [sweep.id for sweep in database.sweeps()] == ids
    assert [sweep.id for sweep in database.sweeps(name="nightly")] == [ids[0], ids[2], ids[3]]
    assert [sweep.id for sweep in database.sweeps(name="nightly", last=2)] == ids[2:]
    assert database.sweeps(name="none") == []


def test_a_clock_that_was_set_back_does_not_make_an_older_attempt_the_last(nights, make) -> None:
    database, ids = nights
    for n, status, day in ((0, RunStatus.UNREACHABLE, 23), (1, RunStatus.OK, 20)):
        run = (
            make.run(strategy="full-load")
            if status is RunStatus.OK
            else make.failed(status, "no answer", strategy="full-load")
        )
        identity = run_id(ids[0], run.cell.key, 5, n)
        changes = {"id": identity, "sweep_id": ids[0], "block": 5, "started_at": f"2026-11-{day}T03:00:00+00:00"}
        database.add_run(replace(run, **changes))
    assert database.endings()[ids[0]] == {(RunStatus.OK, Verdict.VALID): 3}


def test_how_sweeps_ended_by_the_last_attempt_at_each_cell_and_block(nights, make) -> None:
    database, ids = nights
    again = make.failed(RunStatus.UNREACHABLE, "no answer", block=1, seed=9)
    for run in (again, replace(again, id="last", status=RunStatus.TIMED_OUT, verdict=Verdict.SUSPECT)):
        database.add_run(replace(run, sweep_id=ids[0], started_at="2026-11-20T03:00:00+00:00"))
    endings = database.endings()
    ok = (RunStatus.OK, Verdict.VALID)
    assert endings[ids[0]] == {ok: 1, (RunStatus.UNREACHABLE, Verdict.INVALID): 1}, "of one second, the later id"
    assert endings[ids[1]] == {ok: 2}
