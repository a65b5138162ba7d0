"""What was decided about results is kept beside them."""

from dataclasses import replace

import pytest

from reports.errors import DatabaseError, RecordError
from reports.results.baselines import Acknowledgement, Baseline, NightRecord
from reports.results.database import ResultsDatabase

AT, LATER, LAST = (f"2026-11-{day}T02:00:00+00:00" for day in (24, 25, 30))
SWEEP, NEXT = "20261123-221500-3f2a", "20261124-020000-aa00"


@pytest.fixture
def database(place, make):
    sweep = make.sweep([make.run()])
    with ResultsDatabase.open(place) as database:
        database.add_sweep(sweep)
        database.add_sweep(replace(sweep, id=NEXT, started_at=AT))
        yield database


def acknowledgement(make, **changes):
    usual = Acknowledgement("pi4b-emulated", "edgemoe", "tpot_s", make.cell().key, "a new fan", "me@lab", AT, LAST)
    return replace(usual, **changes)


def test_a_baseline_is_moved_and_taken_away(database) -> None:
    pinned = Baseline("release", SWEEP, AT, "me@lab", "0.1")
    database.pin(pinned)
    database.pin(Baseline("canary", SWEEP, AT, "me@lab"))
    assert database.baseline("release") == pinned
    database.pin(replace(pinned, sweep_id=NEXT))
    assert [(b.name, b.sweep_id) for b in database.baselines()] == [("canary", SWEEP), ("release", NEXT)]
    database.unpin("release")
    assert database.baseline("release") is None


def test_a_baseline_is_a_sweep_that_is_there(database) -> None:
    with pytest.raises(DatabaseError, match=r"baseline release: sweep 2025 is not in the results database"):
        database.pin(Baseline("release", "2025", AT, "me@lab"))
    for name in ("", "two\nlines"):
        with pytest.raises(RecordError, match="a name is printable and not empty"):
            Baseline(name, SWEEP, AT, "me@lab")


def test_a_regression_is_acknowledged_until_a_day(database, make) -> None:
    known = acknowledgement(make)
    for _ in range(2):
        database.acknowledge(known)
    assert database.acknowledgements() == [known]
    assert database.acknowledgements(at=LATER) == [known]
    assert database.acknowledgements(at=LAST) == []
    assert known.covers(make.cell(), "tpot_s", LATER)
    assert not known.covers(make.cell(), "tpot_s", LAST)
    assert not known.covers(make.cell(), "ttft_s", LATER)
    assert not known.covers(make.cell(workload="other"), "tpot_s", LATER)
    assert acknowledgement(make, cell="").covers(make.cell(workload="other"), "tpot_s", LATER)
    assert not acknowledgement(make, cell="").covers(make.cell(strategy="full-load"), "tpot_s", LATER)
    database.withdraw(known)
    assert database.acknowledgements() == []
    with pytest.raises(RecordError, match="before it begins: give a later day"):
        acknowledgement(make, expires_at=AT)
    with pytest.raises(RecordError, match="reason must not be empty"):
        acknowledgement(make, reason="")


def test_a_night_that_is_judged_again_replaces_what_it_said(database) -> None:
    first = NightRecord(SWEEP, "demo", None, AT, 3, '{"v": 1}')
    second = NightRecord(NEXT, "demo", SWEEP, LATER, 1, "{}")
    for night in (second, first, replace(first, exit_code=0)):
        database.add_night(night)
    assert database.nights() == [replace(first, exit_code=0), second]
    assert database.nights(name="demo", last=1) == [second]
    assert database.nights(name="other") == []
