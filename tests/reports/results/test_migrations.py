"""A database of any release becomes one of this, and loses nothing; one of a later release is left alone."""

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

import reports.results.migrations
from reports.errors import DatabaseError
from reports.results import schema
from reports.results.connection import Place
from reports.results.database import ResultsDatabase
from reports.results.migrations import migrate

FIRST_RELEASE = (Path(__file__).parent / "before_controllers.sql").read_text()
SWEEP, RUN = "20261123-221500-3f2a", "pi4b-emulated-edgemoe-0-0"


@pytest.fixture
def old(place):
    """The database of the first release, with a sweep and a run."""
    if "://" not in place:
        with closing(sqlite3.connect(place)) as connection:
            connection.executescript(FIRST_RELEASE)
        return place
    statements = [statement.strip() for statement in FIRST_RELEASE.split(";\n")]
    order = (
        "CREATE TABLE farm",
        "CREATE TABLE sweeps",
        "CREATE TABLE runs",
        'INSERT INTO "farm',
        'INSERT INTO "sweeps',
    )
    order = (*order, 'INSERT INTO "runs', "CREATE INDEX")  # what is referred to is there before
    change(place, *(each for beginning in order for each in statements if each.startswith(beginning)))
    return place


def change(place, *statements) -> None:
    engine = Place.parse(place).connect()
    with engine.begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement.replace("%", "%%") if "://" in place else statement)
    engine.dispose()


def look(place, act):
    engine = Place.parse(place).connect()
    with engine.connect() as connection:
        found = act(connection)
    engine.dispose()
    return found


def content(place):
    """Returns the content of all tables that the first release had."""

    def act(connection):
        names = ("sweeps", "runs")
        return {name: connection.exec_driver_sql(f"SELECT * FROM {name} ORDER BY id").fetchall() for name in names}

    return look(place, act)


def differences(place):
    """Between what is there and what schema.py says, indexes and types included."""

    def act(connection):
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        return compare_metadata(context, schema.metadata)

    return look(place, act)


def test_the_first_release_migrates_to_the_newest_without_loss(old) -> None:
    before = content(old)
    done = migrate(old)
    assert (done.before, done.after) == (1, schema.REVISION)
    assert content(old) == before
    assert differences(old) == []
    with ResultsDatabase.open(old, create=False) as database:
        assert [run.id for run in database.runs(sweep_id=SWEEP)] == [RUN]
        assert database.baselines() == []
    again = migrate(old)
    assert (again.before, again.after, again.backup) == (schema.REVISION, schema.REVISION, None)


def test_what_later_farms_of_the_first_revision_had_made_is_kept(old) -> None:
    engine = Place.parse(old).connect()
    schema.marks.create(engine)
    schema.controllers.create(engine)
    engine.dispose()
    change(old, "INSERT INTO health_marks VALUES (1, 'pi4', 'maintenance', '2026-11-23T22:15:00+00:00', 'a new fan')")
    with ResultsDatabase.open(old, create=False) as database:
        assert "a new fan" in database.health("pi4").reason
    assert differences(old) == []


def test_a_file_is_copied_before_it_is_migrated(tmp_path) -> None:
    file = tmp_path / "farm.db"
    with closing(sqlite3.connect(file)) as connection:
        connection.executescript(FIRST_RELEASE)
    before = content(str(file))
    backup = migrate(file).backup
    assert backup == tmp_path / "farm.db.revision-1.bak"
    assert content(str(backup)) == before
    assert "baselines" not in look(str(backup), lambda connection: sa.inspect(connection).get_table_names())
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("DELETE FROM alembic_version")
        connection.execute("INSERT INTO alembic_version VALUES ('1')")
        connection.commit()
    with pytest.raises(DatabaseError, match=r"revision-1\.bak is there already: move it away"):
        migrate(file)


def test_opening_takes_the_steps_that_harm_nobody(old) -> None:
    before = content(old)
    with ResultsDatabase.open(old, create=False) as database:
        assert database.nights() == []
    assert content(old) == before
    assert differences(old) == []
    version = look(old, lambda connection: connection.exec_driver_sql("SELECT version FROM farm_schema").scalar())
    assert version == 1, "the first release still opens it"


def step_up(place, revision):
    """Alembic's own way, step by step."""
    engine = Place.parse(place).connect()
    config = Config()
    config.set_main_option("script_location", str(Path(reports.results.migrations.__file__).parent))
    with engine.execution_options(writes=True).begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, revision)
    engine.dispose()
    return config


def test_a_night_of_the_second_revision_is_kept_and_outlives_its_sweep(place) -> None:
    step_up(place, "2")
    change(
        place,
        "INSERT INTO farm_schema VALUES (1)",
        "INSERT INTO sweeps VALUES ('s1', 'nightly', '2026-11-23T22:15:00+00:00', '{}')",
        "INSERT INTO nights VALUES ('s1', 'nightly', 's0', '2026-11-23T23:15:00+00:00', 1, '{}')",
    )
    with ResultsDatabase.open(place, create=False) as database:
        (night,) = database.nights()
    assert (night.sweep_id, night.name, night.baseline_sweep_id, night.exit_code) == ("s1", "nightly", "s0", 1)
    assert differences(place) == []
    change(place, "DELETE FROM sweeps")
    with ResultsDatabase.open(place, create=False) as database:
        assert database.nights() == [night]


def test_all_steps_from_nothing_lead_to_the_tables_of_a_new_database(place) -> None:
    config = step_up(place, "head")
    assert differences(place) == []
    assert ScriptDirectory.from_config(config).get_heads() == [str(schema.REVISION)]


def test_a_new_database_is_at_the_newest_revision(place) -> None:
    ResultsDatabase.open(place).close()
    assert differences(place) == []
    assert migrate(place).before == schema.REVISION


def test_a_step_that_fails_changes_nothing(old) -> None:
    change(old, "CREATE TABLE nights (cat TEXT)")  # in the way, after tables were made
    with pytest.raises(DatabaseError, match=r"cannot be migrated, and is what it was: .*nights.* already exists"):
        migrate(old)
    tables = look(old, lambda connection: set(sa.inspect(connection).get_table_names()))
    assert tables == {"farm_schema", "sweeps", "runs", "nights"}


def test_a_later_release_is_refused_where_it_must_be_and_else_used(old) -> None:
    migrate(old)
    change(old, "UPDATE alembic_version SET version_num = '99'")
    with ResultsDatabase.open(old, create=False) as database:
        assert len(database.runs()) == 1
    assert migrate(old).after == 99
    change(old, "UPDATE farm_schema SET version = 99")
    for act in (ResultsDatabase.open, migrate):
        with pytest.raises(DatabaseError, match="schema version 99 where 1 is known: use the farm that wrote it"):
            act(old)
    change(old, "UPDATE alembic_version SET version_num = 'f00'")
    with pytest.raises(DatabaseError, match="unknown revision 'f00': use the farm that wrote it"):
        migrate(old)


def test_an_older_version_is_migrated_only_when_somebody_says_so(old) -> None:
    change(old, "UPDATE farm_schema SET version = 0")
    with pytest.raises(DatabaseError, match=r"schema version 0, of an older farm, .* `edgemoe-farm results migrate`"):
        ResultsDatabase.open(old)


def test_there_is_nothing_to_migrate_where_there_is_nothing(place, tmp_path) -> None:
    with pytest.raises(DatabaseError, match="no results"):
        migrate(place)
    assert list(tmp_path.iterdir()) == []
