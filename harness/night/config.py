"""Reads the configuration of a nightly run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from harness.deadlines import parse_duration
from harness.errors import UsageError
from harness.tables import Table, read_toml
from reports.judging.judgement import ACCURACY, GATED
from reports.nights.confirmation import ALARM
from reports.nights.gate import Limits

_MOST_WORSE = 10.0


@dataclass(frozen=True)
class NightlyConfig:
    """Holds a configuration file; MANUAL.md has every key, ci/nightly.toml an example."""

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
    """Returns the configuration of a file. Raises UsageError, which names file, key and what is known."""
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
