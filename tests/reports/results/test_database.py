import multiprocessing
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from reports.errors import DatabaseError, RecordError, UnknownSweepError
from reports.records import Fault, RunStatus
from reports.results.connection import Place
from reports.results.database import ResultsDatabase
from reports.results.health import RECENT, Health, HealthMark, Mark


@pytest.fixture
def database(place):
    with ResultsDatabase.open(place) as database:
        yield database


def change(place, statement) -> None:
    """By somebody else than the farm."""
    engine = Place.parse(place).connect()
    with engine.begin() as connection:
        connection.exec_driver_sql(statement)
    engine.dispose()


def test_what_was_stored_comes_back_in_order(database, make) -> None:
    runs = make.runs()
    database.add_sweep(make.sweep(runs))
    for run in reversed(runs):
        database.add_run(run)
    assert database.sweeps() == [make.sweep(runs)]
    stored = database.runs(sweep_id=runs[0].sweep_id)
    assert stored == sorted(runs, key=lambda run: (run.started_at, run.id))


def test_runs_are_found_by_what_they_measured(database, make) -> None:
    runs = [*make.runs(blocks=1), make.failed(device="pi3b")]
    database.add_sweep(make.sweep(runs))
    for run in runs:
        database.add_run(run)
    assert {run.cell.device for run in database.runs(strategy="full-load")} == {"pi4b-emulated", "jetson-tx2-emulated"}
    assert [run.cell.device for run in database.runs(status=RunStatus.FAILED)] == ["pi3b"]
    assert len(database.runs(device="pi4b-emulated", container="tiny-mixtral-int4", workload="dialogue")) == 3
    assert database.runs(sweep_id="another") == []


def test_adding_twice_is_harmless_and_contradicting_is_refused(database, make) -> None:
    run = make.run()
    sweep = make.sweep([run])
    for _ in range(2):
        database.add_sweep(sweep)
        database.add_run(run)
    assert database.runs() == [run]
    with pytest.raises(DatabaseError, match=f"run {run.id} is in the results database already"):
        database.add_run(replace(run, block=7))
    with pytest.raises(DatabaseError, match=f"sweep {sweep.id} is in the results database already"):
        database.add_sweep(replace(sweep, name="other"))
    assert database.runs() == [run]


def test_a_run_needs_its_sweep(database, make) -> None:
    with pytest.raises(DatabaseError, match="sweep 20261123-221500-3f2a is not in the results database"):
        database.add_run(make.run())


def test_a_resumed_sweep_measures_what_is_missing_or_was_unreachable(database, make) -> None:
    done, lost = make.run(), make.failed(RunStatus.UNREACHABLE, "no answer", block=1)
    failed, missing = make.failed(strategy="full-load"), make.run(block=2)
    sweep = make.sweep([done, lost, failed, missing])
    database.add_sweep(sweep)
    for run in (done, lost, failed):
        database.add_run(run)
    assert set(sweep.planned) - database.done(sweep.id) == {(lost.cell.key, 1), (missing.cell.key, 2)}
    assert (lost.cell.key, 1) in database.done(sweep.id, again=())


def test_what_was_measured_again_of_a_sweep_is_not_the_latest(database, make) -> None:
    sweep = make.sweep(make.runs())
    database.add_sweep(sweep)
    again = replace(sweep, id="20261124", name="demo (confirmation)", started_at="2026-11-24T22:15:00+00:00")
    database.add_sweep(again)
    assert database.sweep("latest") == sweep
    assert database.sweep("20261124") == again


def test_a_sweep_from_a_clock_years_ahead_is_not_the_latest_for_ever(database, make) -> None:
    ahead = make.sweep([make.run()], id="20350101-000000-aaaa", started_at="2035-01-01T00:00:00+00:00")
    database.add_sweep(ahead)
    assert database.sweep("latest") == database.sweep(ahead.name) == ahead, "where there is nothing else"
    now = make.sweep([make.run()], id="20261123-221500-3f2a", started_at="2026-11-23T22:15:00+00:00")
    database.add_sweep(now)
    assert database.sweep("latest") == database.sweep(now.name) == now


def test_a_sweep_is_found_by_its_beginning_or_as_the_latest(database, make) -> None:
    with pytest.raises(UnknownSweepError, match="run a matrix first"):
        database.sweep("latest")
    old = make.sweep([make.run()])
    new = replace(old, id="20261124-020000-aa00", started_at="2026-11-24T02:00:00+00:00")
    for sweep in (new, old):
        database.add_sweep(sweep)
    assert database.sweep("latest") == new
    assert database.sweep("20261123") == old
    assert database.sweep(new.id) == new
    with pytest.raises(UnknownSweepError, match="more than one"):
        database.sweep("202611")
    for nonsense in ("%", "2026112_", "nightly"):
        with pytest.raises(UnknownSweepError, match="no sweep"):
            database.sweep(nonsense)


def test_hostile_text_is_stored_as_it_is(database, make) -> None:
    run = make.failed(log_tail="'; DROP TABLE runs; --\0 \ud800 \x1b]0;", reason="<b>&\u202e")
    database.add_sweep(make.sweep([run]))
    database.add_run(run)
    assert database.runs() == [run]


def test_many_threads_write_at_once(database, make) -> None:
    runs = [make.run(device=f"device-{i}", tokens=4, prompts=1) for i in range(60)]
    database.add_sweep(make.sweep(runs))
    with ThreadPoolExecutor(30) as pool:
        list(pool.map(database.add_run, runs))
    assert {run.id for run in database.runs()} == {run.id for run in runs}


def _write(path, sweep, runs, together) -> None:
    together.wait()
    with ResultsDatabase.open(path) as database:
        database.add_sweep(sweep)
        for run in runs:
            database.add_run(run)


def test_two_processes_create_and_write_one_database(place, make) -> None:
    runs = [make.run(device=f"device-{i}", tokens=4, prompts=1) for i in range(40)]
    sweep = make.sweep(runs)
    context = multiprocessing.get_context("fork")
    together = context.Barrier(2)
    processes = [context.Process(target=_write, args=(place, sweep, runs[i::2], together)) for i in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    with ResultsDatabase.open(place, create=False) as database:
        assert {run.id for run in database.runs()} == {run.id for run in runs}


def test_a_database_is_not_made_where_one_is_looked_for(place, tmp_path) -> None:
    with pytest.raises(DatabaseError, match="run a matrix first"):
        ResultsDatabase.open(place, create=False)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DatabaseError, match="no folder"):
        ResultsDatabase.open(tmp_path / "nowhere" / "results.sqlite")


def test_what_is_not_ours_is_refused(place) -> None:
    change(place, "CREATE TABLE cats (name TEXT)")
    with pytest.raises(DatabaseError, match="not a results database"):
        ResultsDatabase.open(place)


def test_another_version_is_refused(place) -> None:
    ResultsDatabase.open(place).close()
    change(place, "UPDATE farm_schema SET version = 99")
    with pytest.raises(DatabaseError, match="schema version 99 where 1 is known"):
        ResultsDatabase.open(place)


def test_a_file_that_is_no_database_is_refused(tmp_path) -> None:
    (tmp_path / "text.sqlite").write_text("dear diary, " * 1000)
    with pytest.raises(DatabaseError, match="file is not a database"):
        ResultsDatabase.open(tmp_path / "text.sqlite")


def test_a_devices_health_rests_on_its_marks_and_its_last_runs(database, make) -> None:
    lost = [make.failed(RunStatus.UNREACHABLE, seed=i) for i in range(2 * RECENT)]
    lost = [replace(run, fault=Fault.LINK_LOST) for run in lost]
    database.add_sweep(make.sweep(lost[:1]))
    device = lost[0].cell.device
    assert database.health(device).health is Health.GOOD
    for run in lost:
        database.add_run(run)
    assert database.health(device).health is Health.QUARANTINED
    assert database.health(device).faults == RECENT
    assert database.health("another").health is Health.GOOD
    database.add_mark(HealthMark(device, Mark.MAINTENANCE, "2026-11-24T00:00:00+00:00", "new fan"))
    assert database.health(device).health is Health.MAINTENANCE
    assert database.done(lost[0].sweep_id, again=()) == set(), "a fault of the infrastructure is no result"


def test_a_damaged_record_is_named(database, place, make) -> None:
    run = make.run()
    database.add_sweep(make.sweep([run]))
    database.add_run(run)
    change(place, "UPDATE runs SET record = substr(record, 1, 100)")
    with pytest.raises(RecordError, match="damaged"):
        database.runs()


@pytest.mark.parametrize("column", ["status", "verdict"])
def test_a_damaged_ending_is_named(database, place, make, column) -> None:
    run = make.run()
    database.add_sweep(make.sweep([run]))
    database.add_run(run)
    change(place, f"UPDATE runs SET {column} = '59'")
    with pytest.raises(RecordError, match=f"a run of sweep {run.sweep_id} .* is damaged: '59'"):
        database.endings()


def test_sqlite_survives_a_power_cut_and_keeps_its_promises(tmp_path) -> None:
    with ResultsDatabase.open(tmp_path / "results.sqlite") as database, database._engine.connect() as connection:
        pragmas = ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        state = [connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in pragmas]
    assert state == ["wal", 2, 1, 60_000]  # 2: FULL


def test_times_and_ids_are_ordered_by_code_point_and_in_no_language(database, make) -> None:
    """A second before its first fraction, and "B" before "a"."""
    whole, fraction = "2026-11-23T22:15:00+00:00", "2026-11-23T22:15:00.500000+00:00"
    runs = [make.run(seed=i) for i in range(4)]
    wanted = list(zip(("B", "a", "C", "b"), (whole, whole, fraction, fraction), strict=True))
    runs = [replace(run, id=name, started_at=at) for run, (name, at) in zip(runs, wanted, strict=True)]
    database.add_sweep(make.sweep(runs))
    for run in reversed(runs):
        database.add_run(run)
    assert [run.id for run in database.runs()] == ["B", "a", "C", "b"]
