"""Clocks are set back, or are years ahead: what was said and measured later still counts as later."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from harness.sweep.runner import tally
from reports.errors import MovedError
from reports.records import Cell, Fault, Run, RunStatus, Verdict, run_id
from reports.results.baselines import Baseline, NightRecord
from reports.results.database import ResultsDatabase
from reports.results.health import Health, HealthMark, Mark, health_of
from reports.results.merging import entries_of, merge
from reports.results.retention import Retention, outdated, remove
from tests.reports.conftest import run as make_run
from tests.reports.conftest import sweep as make_sweep

NOW = datetime.now(UTC)
YEARS_AHEAD = (NOW + timedelta(days=4000)).isoformat()
CELL = Cell("pi", "c", "0" * 64, "s", "default", "w", "0" * 64, "cold")
ENGINE = "e" * 64


def ago(hours: float) -> str:
    return (NOW - timedelta(hours=hours)).isoformat()


@pytest.fixture
def database(place: str) -> Iterator[ResultsDatabase]:
    """Four sweeps of one matrix; the last but one was measured by a clock that was years ahead."""
    with ResultsDatabase.open(place) as opened:
        for identity, at in (("s1", ago(3)), ("s2", ago(2)), ("ahead", YEARS_AHEAD), ("s3", ago(1))):
            run = replace(make_run(id=f"{identity}-run"), sweep_id=identity, started_at=at, engine_sha256=ENGINE)
            opened.add_sweep(make_sweep([run], id=identity, started_at=at, farm_version="1.0+gabc1234"))
            opened.add_run(run)
        yield opened


def test_a_sweep_from_years_ahead_is_not_the_latest(database: ResultsDatabase) -> None:
    name = database.sweep("ahead").name
    assert [database.sweep(each).id for each in ("latest", name, f"{name}~1")] == ["s3", "s3", "s2"]
    assert database.engines(ENGINE[:8]) == [(ENGINE, "s3")]
    assert database.commits("abc") == [("abc1234", "s3")]


def test_it_takes_no_place_among_the_last_that_stay(database: ResultsDatabase) -> None:
    doomed = outdated(database, Retention(ago(0), keep=1))
    assert [sweep.id for sweep in doomed.sweeps] == ["s1", "s2"]
    assert [sweep.id for sweep, _ in doomed.kept] == ["s3"]


def test_a_night_from_years_ahead_is_not_the_last(database: ResultsDatabase) -> None:
    for identity, at in (("s1", ago(3)), ("ahead", YEARS_AHEAD), ("s3", ago(1))):
        database.add_night(NightRecord(identity, "nightly", None, at, 0, "{}"))
    assert [night.sweep_id for night in database.nights(until=ago(0), last=2)] == ["s1", "s3"]


def test_the_later_attempt_counts_after_the_clock_was_set_back() -> None:
    def tried(nth: int, at: str, status: RunStatus, fault: Fault | None) -> Run:
        identity = run_id("s", CELL.key, 0, nth)
        verdict = Verdict.VALID if status is RunStatus.OK else Verdict.INVALID
        return replace(
            make_run(), id=identity, sweep_id="s", cell=CELL, block=0, status=status, verdict=verdict, fault=fault,
            started_at=at, reasons=() if status is RunStatus.OK else ("lost",),
        )  # fmt: skip

    runs = [
        tried(0, ago(1), RunStatus.UNREACHABLE, Fault.LINK_LOST),
        tried(1, ago(5), RunStatus.OK, None),
    ]
    for order in (runs, runs[::-1]):
        told = tally(make_sweep(runs, id="s"), order)
        assert (told.counts, told.to_repeat, told.exit_code) == ({RunStatus.OK: 1}, 0, 0)


# --- health -----------------------------------------------------------------------------------------------------------


def failed(at: str, n: int) -> Run:
    return Run(
        f"f{n}-{at}", "s", CELL, 0, RunStatus.FAILED, Verdict.INVALID, ("lost",), fault=Fault.LINK_LOST,
        started_at=at, ended_at=at,
    )  # fmt: skip


def mark(at: str, kind: Mark) -> HealthMark:
    return HealthMark("pi", kind, at)


FAILED_AHEAD = [failed(YEARS_AHEAD, n) for n in range(3)]
FAILED = [failed(ago(2), n) for n in range(3)]


@pytest.mark.parametrize(
    ("runs", "marks", "health"),
    [
        pytest.param([], [mark(YEARS_AHEAD, Mark.MAINTENANCE)], Health.MAINTENANCE, id="it still counts"),
        pytest.param(
            [], [mark(YEARS_AHEAD, Mark.MAINTENANCE), mark(ago(1), Mark.GOOD)], Health.GOOD, id="a person ends it"
        ),
        pytest.param(
            [], [mark(ago(1), Mark.MAINTENANCE), mark(ago(3), Mark.GOOD)], Health.GOOD, id="with a clock set back"
        ),
        pytest.param(FAILED_AHEAD, [mark(ago(1), Mark.GOOD)], Health.GOOD, id="a person forgives what failed ahead"),
        pytest.param(
            [],
            [mark(YEARS_AHEAD, Mark.CANARY_FAILED), mark(ago(1), Mark.CANARY_OK)],
            Health.GOOD,
            id="so does a canary",
        ),
        pytest.param(
            [], [mark(ago(1), Mark.CANARY_FAILED), mark(ago(3), Mark.CANARY_OK)], Health.GOOD, id="set back, too"
        ),
        pytest.param(FAILED, [mark(YEARS_AHEAD, Mark.GOOD)], Health.QUARANTINED, id="what fails later is not forgiven"),
        pytest.param(
            FAILED, [mark(YEARS_AHEAD, Mark.GOOD), mark(ago(1), Mark.GOOD)], Health.GOOD, id="until somebody does"
        ),
    ],
)
def test_health(runs: list[Run], marks: list[HealthMark], health: Health) -> None:
    assert health_of(runs, marks, ago(0)).health is health


def test_runs_from_years_ahead_do_not_hide_those_of_late(database: ResultsDatabase) -> None:
    database.add_sweep(make_sweep([failed(ago(1), 0)], id="s"))
    for n in range(12):
        database.add_run(failed(YEARS_AHEAD, n))
    for n in range(12):
        fine = replace(failed(ago(1 - n / 100), n), id=f"fine-{n}", fault=Fault.OUT_OF_MEMORY)
        database.add_run(fine)
    assert database.health("pi").health is Health.GOOD


# --- looked at again in the transaction that acts ---------------------------------------------------------------------


def test_a_sweep_that_got_runs_since_it_was_chosen_stays_whole(database: ResultsDatabase) -> None:
    """Somebody resumed it, and had ended by the time the person who prunes said yes."""
    sweep = database.sweep("s1")
    before = database.recorded()["s1"].runs
    database.add_run(replace(make_run(id="later"), sweep_id="s1"))
    assert remove(database, sweep, runs=before) is None
    assert len(database.runs(sweep_id="s1")) == 2
    assert remove(database, sweep, runs=2) == 2


def test_a_baseline_is_moved_only_from_where_it_was_seen(database: ResultsDatabase) -> None:
    first, second, third = (Baseline("main", f"s{n}", ago(1), "me@lab") for n in (1, 2, 3))
    database.pin(first, seen=None)
    with pytest.raises(MovedError, match="baseline main: was pinned to s1 by me@lab a moment ago"):
        database.pin(second, seen=None)
    database.pin(second, seen=first)
    database.pin(second, seen=first)  # asked again, as the first answer got lost
    with pytest.raises(MovedError, match="was pinned to s2"):
        database.pin(third, seen=first)
    with pytest.raises(MovedError, match="was pinned to s2"):
        database.unpin("main", seen=first)
    database.unpin("main", seen=second)
    with pytest.raises(MovedError, match="baseline main: was removed a moment ago"):
        database.pin(third, seen=second)


def test_a_night_that_was_stored_meanwhile_is_not_replaced_by_an_import(database: ResultsDatabase) -> None:
    ours, theirs = (NightRecord("s1", "nightly", None, ago(1), code, "{}") for code in (0, 1))
    assert database.add_night(ours) == ours
    assert database.add_night(theirs, anew=False) == ours
    assert database.nights() == [ours]


# --- imported ---------------------------------------------------------------------------------------------------------


def test_what_was_imported_is_known_as_such(database: ResultsDatabase, tmp_path: str) -> None:
    with ResultsDatabase.open(f"{tmp_path}/other.db") as other:
        own = make_sweep([make_run()], id="own", started_at=ago(9))
        other.add_sweep(own)
        merge(other, entries_of(database))
        assert [other.is_imported(each) for each in ("own", "s1", "s3")] == [False, True, True]
        assert (other.sweep("latest").id, other.sweep("latest", own=True).id) == ("s3", "own")
        merge(database, entries_of(other))
        assert [database.is_imported(each) for each in ("own", "s1")] == [True, False]
        assert remove(other, other.sweep("s1")) == 1
        assert not other.is_imported("s1")
