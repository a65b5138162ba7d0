import fcntl
import json
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from harness.errors import LockedError, UsageError
from harness.night.config import read_nightly
from harness.night.state import NightState, finish, locked, night_folder, prune_reports, unfinished

NOW = datetime(2026, 11, 25, 2, tzinfo=UTC)
SMALLEST = 'name = "farm"\nmatrix = "m.toml"\nbaseline = "main"\n'


@pytest.fixture
def config(tmp_path):
    (tmp_path / "nightly.toml").write_text(SMALLEST)
    return read_nightly(tmp_path / "nightly.toml")


def test_the_smallest_configuration(config, tmp_path) -> None:
    assert config.matrix == tmp_path / "m.toml"
    assert config.reports == tmp_path / "nightly"
    assert config.limits == {"tpot_s": 0.03, "ttft_s": 0.05, "peak_resident_bytes": 0.03, "perplexity": 0.02}
    assert (config.pairs, config.rounds, config.deadline_s, config.webhook_env) == (10, 3, 43200.0, "")


def test_the_example_has_the_defaults(config) -> None:
    example = read_nightly(Path(__file__).parents[3] / "ci" / "nightly.toml")
    assert (example.limits, example.pairs, example.rounds) == (config.limits, config.pairs, config.rounds)
    assert (example.keep_reports, example.keep_engines_days) == (config.keep_reports, config.keep_engines_days)
    assert example.webhook_env == ""


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        ("baselin = 1", "unknown key 'baselin'"),
        ("deadline = 'soon'", "deadline 'soon' is no duration"),
        ("[thresholds]\ntpot = 0.1", "unknown key 'tpot'"),
        ("[thresholds]\ntpot_s = -1", "tpot_s is -1"),
        ("[accuracy]\nperplexity = 'x'", "perplexity must be a number"),
        ("[webhook]\nurl = 'https://secret'", "unknown key 'url'"),
        ("[confirmation]\npairs = 1", "pairs is 1"),
        ("[confirmation]\npairs = 2\nrounds = 3", "so few pairs could never confirm anything"),
        ("[retention]\nreports = 0", "reports is 0"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(tmp_path, more, complaint) -> None:
    path = tmp_path / "n.toml"
    path.write_text(SMALLEST + more)
    with pytest.raises(UsageError, match=complaint) as error:
        read_nightly(path)
    assert str(path) in str(error.value)


def test_two_at_once_are_refused_and_the_holder_is_named(config) -> None:
    refused = pytest.raises(LockedError, match=rf"at work already: .*process {os.getpid()}")
    with locked(config), refused as error, locked(config):
        pass
    assert error.value.exit_code == 4
    with locked(config):  # given back
        pass


def test_the_lock_of_a_process_that_was_killed_is_free(config) -> None:
    with locked(config):
        pass
    path = config.reports / ".farm.lock"
    assert path.read_text()  # what the last holder wrote says nothing
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_night_goes_on_until_its_deadline_has_passed(config) -> None:
    assert unfinished(config, NOW) is None
    with locked(config):
        progress = NightState(NOW.isoformat(), "20261125-020000-abcd").with_round("20261125-040000-abcd")
        progress.save(config)
    assert unfinished(config, NOW + timedelta(hours=11)) == progress
    assert unfinished(config, NOW + timedelta(hours=13)) is None
    assert unfinished(config, NOW - timedelta(hours=1)) == progress, "a clock that was set back a little"
    assert unfinished(config, NOW - timedelta(days=4000)) is None, "a clock that was years ahead"
    finish(config)
    assert unfinished(config, NOW) is None


@pytest.mark.parametrize("text", ["", "[]", '{"v": 2}', '{"v": 1, "began": "x", "sweep_id": "s"}', '{"v": 1}'])
def test_a_damaged_state_is_put_aside_and_a_new_night_begins(config, text, caplog) -> None:
    config.reports.mkdir()
    (config.reports / ".farm.state.json").write_text(text)
    assert unfinished(config, NOW) is None
    assert (config.reports / ".farm.state.json.damaged").read_text() == text
    assert ".farm.state.json: the state of a night cannot be read" in caplog.text
    assert unfinished(config, NOW) is None


def test_a_lock_of_any_bytes_is_one(config) -> None:
    config.reports.mkdir()
    (config.reports / ".farm.lock").write_bytes(b"\xff\x00\xfe" * 90)
    with locked(config), pytest.raises(LockedError), locked(config):
        pass


def test_old_reports_go_and_what_no_night_wrote_stays(config, tmp_path) -> None:
    (tmp_path / "nightly.toml").write_text(SMALLEST + "[retention]\nreports = 2")
    config = read_nightly(tmp_path / "nightly.toml")
    config.reports.mkdir()
    for day in range(4):
        folder = night_folder(config, f"2026112{day}-020000-abcd")
        (folder / "night.json").write_text(json.dumps({"name": "farm", "sweep": folder.name}))
    (config.reports / "0-mine").mkdir()
    for number, content in enumerate(("{}", "", "[1]", '{"name": "other", "sweep": "1-theirs-3"}')):
        theirs = config.reports / f"1-theirs-{number}"
        theirs.mkdir()
        (theirs / "night.json").write_text(content)
    assert prune_reports(config) == 2
    assert sorted(p.name for p in config.reports.iterdir()) == [
        "0-mine", *(f"1-theirs-{number}" for number in range(4)), "20261122-020000-abcd", "20261123-020000-abcd",
    ]  # fmt: skip
