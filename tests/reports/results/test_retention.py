"""What is old goes, and what somebody needs stays."""

from dataclasses import replace
from pathlib import Path

import pytest

from reports.errors import DatabaseError
from reports.results.baselines import Baseline, NightRecord
from reports.results.controllers import Controller
from reports.results.database import ResultsDatabase
from reports.results.retention import Retention, outdated, remove, vacuum


def at(day) -> str:
    return f"2026-11-{day:02d}T02:00:00+00:00"


@pytest.fixture
def database(place, make):
    """A sweep a day, from the first to the tenth, of one run each: "demo", but on odd days "other"."""
    with ResultsDatabase.open(place) as database:
        for day in range(1, 11):
            run = replace(make.run(seed=day, tokens=64), sweep_id=f"s{day}", started_at=at(day))
            name = "other" if day % 2 else "demo"
            database.add_sweep(make.sweep([run], id=f"s{day}", name=name, started_at=at(day)))
            database.add_run(run)
        yield database


def test_old_sweeps_go_but_for_those_that_are_needed(database) -> None:
    database.pin(Baseline("release", "s2", at(3), "me@lab"))
    doomed = outdated(database, Retention(at(8), keep=2), running={"s1"})
    assert [sweep.id for sweep in doomed.sweeps] == ["s3", "s4", "s5", "s6"]
    assert [(sweep.id, why) for sweep, why in doomed.kept] == [
        ("s1", "is being measured"),
        ("s2", "is baseline release"),
        ("s7", "is one of the last 2 of other"),
    ]


def test_a_sweep_goes_with_its_runs_and_a_lost_controller_but_not_its_night(database) -> None:
    database.add_night(NightRecord("s3", "other", None, at(3), 0, "{}"))
    database.enter(Controller("lost", "me@lab", 1, "", "s3"))
    (sweep,) = (sweep for sweep in database.sweeps() if sweep.id == "s3")
    assert remove(database, sweep, dead={"lost"}) == 1
    assert remove(database, sweep) == 0
    assert (database.runs(sweep_id="s3"), database.controllers()) == ([], [])
    assert len(database.sweeps()) == len(database.runs()) == 9
    assert [night.sweep_id for night in database.nights()] == ["s3"]


def test_a_sweep_that_is_measured_by_now_stays_whole(database) -> None:
    """Somebody resumed it while the person who prunes was asked."""
    database.enter(Controller("lost", "me@lab", 1, "", "s3"))
    (sweep,) = (sweep for sweep in database.sweeps() if sweep.id == "s3")
    assert remove(database, sweep) is None
    assert len(database.runs(sweep_id="s3")) == 1
    assert remove(database, sweep, dead={"another"}) is None
    assert remove(database, sweep, dead={"lost"}) == 1


def test_what_was_pinned_meanwhile_stays_whole(database) -> None:
    (sweep, *_) = database.sweeps()
    database.pin(Baseline("release", sweep.id, at(1), "me@lab"))
    with pytest.raises(DatabaseError, match="sweep s1 cannot be removed"):
        remove(database, sweep)
    assert len(database.runs(sweep_id="s1")) == 1


def test_the_room_is_given_back_and_the_database_goes_on(database, place, make) -> None:
    vacuum(database)
    before = size(place)
    for sweep in database.sweeps()[:9]:
        remove(database, sweep)
    vacuum(database)
    assert size(place) <= before / 2
    database.add_run(replace(make.run(seed=77), sweep_id="s10"))
    assert len(database.runs()) == 2


def size(place):
    """Returns the size of a file; a server's is its own matter."""
    return 0 if "://" in place else Path(place).stat().st_size
