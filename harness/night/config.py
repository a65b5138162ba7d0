"""What a nightly run is told (its configuration), and what it leaves for its like: a lock, and how far it came."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from engine.codec import from_json, loads, to_json
from engine.errors import ProtocolError
from harness.deadlines import parse_duration
from harness.errors import LockedError, UsageError
from harness.process import owner
from harness.tables import Table, read_toml
from reports.files import replacing
from reports.judging.judgement import ACCURACY, GATED
from reports.nights.confirmation import ALARM
from reports.nights.gate import Limits

_MOST_WORSE = 10.0
_STATE_VERSION = 1


@dataclass(frozen=True)
class NightlyConfig:
    """A configuration file: README.md and ci/nightly.toml have an example."""

    name: str
    source: Path
    matrix: Path
    baseline: str  # by the name under which it is pinned
    reports: Path  # the folder of pages, summaries, lock and state
    limits: Limits
    pairs: int  # of old and new engine, in each round of a confirmation
    rounds: int
    deadline_s: float  # of the whole night
    keep_reports: int  # nights whose folders stay
    keep_engines_days: float
    webhook_env: str  # the variable of the environment that has the URL; empty: nobody is told
    webhook_deadline_s: float


def read_nightly(path: Path) -> NightlyConfig:
    """Raises UsageError, which names file, key and what is known."""
    top = Table.parse(read_toml(path, "nightly configuration"), str(path))
    folder = path.resolve().parent
    thresholds, accuracy = top.table("thresholds"), top.table("accuracy")
    confirmation, retention, webhook = top.table("confirmation"), top.table("retention"), top.table("webhook")
    worse = {
        name: thresholds.number(name, share, 0.0, _MOST_WORSE) for name, share in GATED.items() if name != ACCURACY
    }
    worse[ACCURACY] = accuracy.number(ACCURACY, GATED[ACCURACY], 0.0, _MOST_WORSE)
    deadline = top.text("deadline", "12h")
    config = NightlyConfig(
        name=top.name("name"),
        source=path,
        matrix=folder / top.text("matrix"),
        baseline=top.name("baseline"),
        reports=folder / top.text("reports", "nightly"),
        limits=worse,
        pairs=confirmation.integer("pairs", 10, 2, 1000),
        rounds=confirmation.integer("rounds", 3, 1, 20),
        deadline_s=parse_duration(deadline) or _refuse_deadline(path, deadline),
        keep_reports=retention.integer("reports", 60, 1, 100_000),
        keep_engines_days=retention.number("engines_days", 90.0, 1.0, 36500.0),
        webhook_env=webhook.name("url_env") if "url_env" in webhook else "",
        webhook_deadline_s=webhook.number("deadline_s", 10.0, 0.1, 300.0),
    )
    if 0.5 ** (config.pairs * config.rounds) > ALARM / config.rounds:
        raise UsageError(f"{path}: confirmation: so few pairs could never confirm anything: raise pairs or rounds")
    for table in (thresholds, accuracy, confirmation, retention, webhook, top):
        table.finish()
    return config


def _refuse_deadline(path: Path, text: str) -> float:
    raise UsageError(f"{path}: deadline {text[:40]!r} is no duration: write 90m, 6h or 1h30m")


# --- one at a time ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(config: NightlyConfig) -> Iterator[None]:
    """One nightly of a name and folder at a time, on this machine. Raises LockedError that names the holder."""
    try:
        config.reports.mkdir(parents=True, exist_ok=True)
        file = (config.reports / f".{config.name}.lock").open("a+", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{config.source}: reports {config.reports}: {error.strerror}: name another folder") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = "".join(c for c in file.read(200) if c.isprintable()) or "another process"
            raise LockedError(f"{config.source}: a nightly run is at work already: {holder}: wait for it") from None
        file.truncate(0)
        file.write(f"{owner()}, process {os.getpid()}")
        file.flush()
        yield  # the lock ends with the process, however that ends; the file stays


# --- how far it came --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Progress:
    """Of the night that is under way: one that was killed goes on from here."""

    began: str  # UTC
    sweep_id: str
    rounds: tuple[str, ...] = ()  # sweeps of its confirmations

    def save(self, config: NightlyConfig) -> None:
        with replacing(state_file(config)) as file:
            file.write(json.dumps({"v": _STATE_VERSION, **to_json(self)}).encode())

    def with_round(self, sweep_id: str) -> Progress:
        return replace(self, rounds=(*self.rounds, sweep_id))

    def age_s(self, now: datetime) -> float:
        return (now - datetime.fromisoformat(self.began)).total_seconds()


def unfinished(config: NightlyConfig, now: datetime) -> Progress | None:
    """The night to go on with; None where there is none, or its deadline has passed. Raises UsageError."""
    path = state_file(config)
    try:
        content = loads(path.read_bytes())
        if content.pop("v", None) != _STATE_VERSION:
            raise ProtocolError("of another version")
        progress = from_json(Progress, content)
        return progress if progress.age_s(now) < config.deadline_s else None
    except FileNotFoundError:
        return None
    except (OSError, ProtocolError, ValueError, TypeError) as error:
        raise UsageError(f"{path}: the state of a night cannot be read: {error}: remove the file") from None


def finish(config: NightlyConfig) -> None:
    state_file(config).unlink(missing_ok=True)


def state_file(config: NightlyConfig) -> Path:
    return config.reports / f".{config.name}.state.json"


def night_folder(config: NightlyConfig, sweep_id: str) -> Path:
    """Where the page and the summaries of a night go."""
    folder = config.reports / sweep_id
    folder.mkdir(exist_ok=True)
    return folder


def prune_reports(config: NightlyConfig) -> int:
    """Removes the folders of all but the last nights; how many. Only what a night wrote is one of its folders."""
    nights = sorted(path.parent for path in config.reports.glob("*/night.json"))
    gone = nights[: -config.keep_reports]
    for folder in gone:
        shutil.rmtree(folder, ignore_errors=True)
    return len(gone)
