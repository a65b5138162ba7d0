"""Several controllers on one results database, and a server that comes and goes."""

import gc
import multiprocessing
import os
import socket
import sqlite3
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa

from reports.errors import DatabaseError, OutageError
from reports.results.connection import Patience, Place
from reports.results.controllers import Controller
from reports.results.database import ResultsDatabase
from tests.postgresql import PASSWORD

FORK = multiprocessing.get_context("fork")
PATIENT = Patience(outage_s=120)


def many(make, n):
    return [make.run(device=f"device-{i}", tokens=2, prompts=1, repetitions=1) for i in range(n)]


def stored(place):
    with ResultsDatabase.open(place, create=False) as database:
        return sorted(run.id for run in database.runs())


# --- a server that is restarted -------------------------------------------------------------------------------------


def _write(place, sweep, runs, stored_so_far) -> None:
    with ResultsDatabase.open(place, patience=PATIENT) as database:
        database.add_sweep(sweep)
        for run in runs:
            database.add_run(run)
            with stored_so_far.get_lock():
                stored_so_far.value += 1


def test_a_server_that_restarts_while_two_controllers_write_costs_no_record(postgresql, make) -> None:
    """Once shut down as an administrator does, once all of its processes killed; the writers have to wait each time."""
    place = postgresql.emptied()
    runs = many(make, 400)
    so_far = FORK.Value("i", 0)
    writers = [
        FORK.Process(target=_write, args=(place, make.sweep(runs), runs[i::2], so_far), daemon=True) for i in (0, 1)
    ]
    for writer in writers:
        writer.start()
    for end, share in ((postgresql.stop, 0.2), (postgresql.crash, 0.5)):
        wait_until(lambda share=share: so_far.value >= share * len(runs))
        end()
        before = so_far.value
        assert before < len(runs)
        time.sleep(0.5)
        assert so_far.value <= before + len(writers)  # what is not there takes nothing
        postgresql.start()
    for writer in writers:
        writer.join(120)
        assert writer.exitcode == 0
    assert stored(place) == sorted(run.id for run in runs)


def wait_until(condition, limit_s=60) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


class Relay:
    """Passes everything on to a server, but for the answers to the first few COMMITs: there it hangs up."""

    def __init__(self, port, lost_answers):
        self._server_port = port
        self.lost_answers = lost_answers
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._pass_on, args=(client,), daemon=True).start()

    def _pass_on(self, client) -> None:
        server = socket.create_connection(("127.0.0.1", self._server_port))
        threading.Thread(target=self._answer, args=(server, client), daemon=True).start()
        with server, client:
            while piece := _received(client):
                if b"COMMIT" in piece and self.lost_answers:
                    self.lost_answers -= 1
                    client.shutdown(socket.SHUT_RDWR)
                    server.sendall(piece)
                    time.sleep(0.3)  # for the server to do it
                    return
                server.sendall(piece)

    def _answer(self, server, client) -> None:
        while piece := _received(server):
            try:
                client.sendall(piece)
            except OSError:
                return


def _received(end):
    try:
        return end.recv(1 << 16)
    except OSError:
        return b""


def test_a_commit_whose_answer_was_lost_is_not_done_twice(postgresql, make) -> None:
    direct = postgresql.emptied()
    runs = many(make, 3)
    with ResultsDatabase.open(direct) as database:
        database.add_sweep(make.sweep(runs))
    with closing(Relay(postgresql.port, lost_answers=0)) as relay:
        told = []
        patience = Patience(outage_s=60, pause=lambda why, seconds: bool(told.append(why) or True))
        relayed = direct.replace(f":{postgresql.port}/", f":{relay.port}/") + "?sslmode=disable"
        with ResultsDatabase.open(relayed, patience=patience) as database:
            relay.lost_answers = 2
            for run in runs:
                database.add_run(run)
            me = Controller("me", "a@b", 1, "", runs[0].sweep_id)
            relay.lost_answers = 1
            assert database.enter(me)
            relay.lost_answers = 1
            assert not database.enter(Controller("other", "a@b", 1, "", runs[0].sweep_id))
        assert len(told) >= 3
    assert stored(direct) == sorted(run.id for run in runs)


def test_waiting_ends_at_the_deadline_with_the_remedy_and_without_the_password(postgresql, make) -> None:
    run = make.run()
    seconds, told = [0.0], []

    def pause(why, wait_s) -> bool:
        told.append(why)
        seconds[0] += wait_s
        return True

    patience = Patience(outage_s=900, pause=pause, clock=lambda: seconds[0])
    with ResultsDatabase.open(postgresql.emptied(), patience=patience) as database:
        database.add_sweep(make.sweep([run]))
        postgresql.stop()
        try:
            with pytest.raises(OutageError, match=rf"^run {run.id} cannot be stored: the database server is away") as e:
                database.add_run(run)
            assert seconds[0] == pytest.approx(900)
            assert "refused" in told[-1]  # the first may tell how the connection ended
            assert PASSWORD not in str(e.value) and "\n" not in str(e.value)
            with pytest.raises(OutageError):
                database.add_run(run, pause=lambda why, seconds: False)  # told to give up
            for read in (database.sweeps, database.controllers, lambda: next(database.stream())):
                with pytest.raises(OutageError, match="cannot be read"):
                    read()
        finally:
            postgresql.start()
        database.add_run(run)
        assert database.runs() == [run]


def open_cursors():
    return [each for each in gc.get_objects() if isinstance(each, psycopg.ServerCursor) and not each.closed]


def test_a_server_that_goes_away_while_it_is_read_leaves_no_cursor_open(postgresql, make) -> None:
    with ResultsDatabase.open(postgresql.emptied()) as database:
        database.add_sweep(make.sweep(runs := many(make, 120)))
        for run in runs:
            database.add_run(run)
        reading = database.stream()
        next(reading)
        postgresql.crash()
        try:
            with pytest.raises(OutageError):
                reading.close()
        finally:
            postgresql.start()
        assert open_cursors() == []


def test_a_server_that_went_away_before_it_is_asked_leaves_no_cursor_open(postgresql) -> None:
    engine = Place.parse(postgresql.emptied()).connect()
    with engine.connect() as connection:
        connection.exec_driver_sql("SELECT 1")
        postgresql.crash()
        try:
            with pytest.raises(sa.exc.OperationalError):
                connection.execution_options(yield_per=50).exec_driver_sql("SELECT 1")
        finally:
            postgresql.start()
        assert open_cursors() == []
    engine.dispose()


def test_a_mistake_is_not_waited_for(place, make) -> None:
    def never(why, seconds) -> None:
        pytest.fail(f"waited because of {why}")

    patience = Patience(900, never)
    with (
        ResultsDatabase.open(place, patience=patience) as database,
        pytest.raises(DatabaseError, match="is not in the results database"),
    ):
        database.add_run(make.run())


def test_a_record_is_durable_on_return_whatever_the_server_thinks(postgresql) -> None:
    postgresql.emptied()
    postgresql.execute("ALTER ROLE farm SET synchronous_commit = off")
    try:
        engine = Place.parse(postgresql.url()).connect()
        with engine.connect() as connection:
            assert connection.exec_driver_sql("SHOW synchronous_commit").scalar() == "on"
            assert connection.exec_driver_sql("SHOW lock_timeout").scalar() == "1min"
        engine.dispose()
    finally:
        postgresql.execute("ALTER ROLE farm RESET synchronous_commit")


# --- controllers ----------------------------------------------------------------------------------------------------


@pytest.fixture
def database(place, make):
    with ResultsDatabase.open(place) as database:
        database.add_sweep(make.sweep([make.run()]))
        yield database


SWEEP = "20261123-221500-3f2a"


def controller(name):
    return Controller(name, f"{name}@lab", 7, "", SWEEP)


def test_a_sweep_has_one_place(database) -> None:
    assert database.controllers() == []
    assert database.enter(controller("a"))
    (seen,) = database.controllers()
    assert (seen.id, seen.owner, seen.pid, seen.sweep_id) == ("a", "a@lab", 7, SWEEP)
    assert 0 <= seen.silent_s < 60
    assert abs(seen.started_at_s - time.time()) < 60  # the server stands on this machine
    assert not database.enter(controller("b"))
    assert not database.enter(controller("b"), instead_of=controller("c"))
    assert database.beat(controller("a"))
    assert not database.beat(controller("b"))
    database.leave(controller("b"))
    assert len(database.controllers()) == 1
    database.leave(controller("a"))
    assert database.controllers() == []


def test_who_was_heard_of_since_is_not_replaced(database) -> None:
    database.enter(controller("a"))
    (seen,) = database.controllers()
    time.sleep(0.01)
    database.beat(controller("a"))
    assert not database.enter(controller("b"), instead_of=seen)
    (seen,) = database.controllers()
    assert database.enter(controller("b"), instead_of=seen)
    assert not database.beat(controller("a"))


def _race(place, name, together, won) -> None:
    with ResultsDatabase.open(place) as database:
        for i in range(20):
            together.wait()
            if database.enter(controller(f"{name}{i}")):
                won.put(i)
            together.wait()
            database.leave(controller(f"{name}{i}"))


def test_two_that_enter_at_once_never_both_get_in(place, database) -> None:
    together, won = FORK.Barrier(2), FORK.Queue()
    racers = [FORK.Process(target=_race, args=(place, name, together, won), daemon=True) for name in "ab"]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join(60)
        assert racer.exitcode == 0
    assert sorted(won.get(timeout=10) for _ in range(20)) == list(range(20))
    assert won.empty()


def test_a_database_from_before_there_were_controllers_is_used_as_it_is(tmp_path) -> None:
    old = tmp_path / "old.db"
    with closing(sqlite3.connect(old)) as connection:
        connection.executescript((Path(__file__).parent / "before_controllers.sql").read_text())
    with ResultsDatabase.open(old, create=False) as database:
        assert [run.id for run in database.runs(sweep_id=SWEEP)] == ["pi4b-emulated-edgemoe-0-0"]
        assert database.controllers() == []
        assert database.enter(controller("a"))


# --- passwords ------------------------------------------------------------------------------------------------------


def test_the_password_may_stand_in_the_environment_or_in_pgpass(postgresql, tmp_path, monkeypatch) -> None:
    postgresql.emptied()
    bare = postgresql.url(password=None)
    monkeypatch.setenv("PGPASSFILE", str(tmp_path / "pgpass"))
    with pytest.raises(DatabaseError, match="no password supplied"):
        ResultsDatabase.open(bare)
    (tmp_path / "pgpass").write_text(f"127.0.0.1:{postgresql.port}:*:farm:{PASSWORD}\n")
    (tmp_path / "pgpass").chmod(0o600)
    ResultsDatabase.open(bare).close()
    monkeypatch.delenv("PGPASSFILE")
    monkeypatch.setenv("PGPASSWORD", PASSWORD)
    ResultsDatabase.open(bare).close()


def test_without_the_driver_the_remedy_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(DatabaseError) as refused:
        ResultsDatabase.open("postgresql://me:hunter2@h/farm")
    remedy = "pip install 'psycopg[binary]>=3.2'"
    assert str(refused.value) == f"postgresql://me@h/farm needs the driver of PostgreSQL: {remedy}"


@pytest.mark.parametrize(
    "url",
    [
        "postgresql+nodriver://me:{}@host/farm",
        "mysql://me:{}@host/farm",
        "not a url://{}",
        "://{}",
        "postgresql://me:p@{}@host/farm",
        "postgresql://me:p@{}/x@host/farm",
        "postgresql://me:p@host:{}@host/farm",
        "postgresql:/me:{}@host/farm",
        "host=h user=me password={}",
        "postgresql://me:{}@127.0.0.1:1/farm",
        "postgresql://127.0.0.1:1/farm?user=me&password={}",
        "postgresql://127.0.0.1:1/farm?sslpassword={}&connect_timeout=1",
        "postgres://me:{}@127.0.0.1:1/farm?host=/nowhere",
        "postgresql://me:{}@name.invalid/farm",
    ],
)
def test_a_bad_url_is_one_line_without_the_password(url, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DatabaseError) as refused:
        ResultsDatabase.open(url.format("hunter2"))
    assert "hunter2" not in f"{refused.value} {refused.value!r}"
    assert "\n" not in str(refused.value)
    assert os.listdir() == []


def test_a_wrong_password_is_told_without_it(postgresql) -> None:
    with pytest.raises(DatabaseError, match=r'^cannot open .*: .*password authentication failed for user "farm"') as e:
        ResultsDatabase.open(postgresql.url(password="hunter3"))
    assert "hunter3" not in str(e.value)
    assert "hunter3" not in repr(Place.parse(postgresql.url(password="hunter3")))
