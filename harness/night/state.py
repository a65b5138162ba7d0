"""Keeps what a nightly run leaves for the next one: a lock, how far it came, and the folders of its reports."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from engine.codec import from_json, loads, to_json
from engine.errors import ProtocolError
from harness.errors import LockedError, UsageError
from harness.night.config import NightlyConfig
from harness.process import owner
from reports.files import put_aside, replacing
from reports.text import harmless

_STATE_VERSION = 1


@contextlib.contextmanager
def locked(config: NightlyConfig) -> Iterator[None]:
    """Holds the lock: one nightly of a name and folder at a time. Raises LockedError that names the holder."""
    try:
        config.reports.mkdir(parents=True, exist_ok=True)
        file = (config.reports / f".{config.name}.lock").open("a+", encoding="utf-8", errors="replace")
    except OSError as error:
        raise UsageError(f"{config.source}: reports {config.reports}: {error.strerror}: name another folder") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = harmless(file.read(200)).strip() or "another process"
            raise LockedError(f"{config.source}: a nightly run is at work already: {holder}: wait for it") from None
        with contextlib.suppress(OSError):  # on a full disk it is held without a name
            file.truncate(0)
            file.write(f"{owner()}, process {os.getpid()}")
            file.flush()
        yield  # the lock ends with the process, however that ends; the file stays


# --- how far it came --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NightState:
    """Holds how far a night is; one that was killed goes on from here."""

    began: str  # UTC
    sweep_id: str
    rounds: tuple[str, ...] = ()  # sweeps of its confirmations

    def save(self, config: NightlyConfig) -> None:
        with replacing(state_file(config)) as file:
            file.write(json.dumps({"v": _STATE_VERSION, **to_json(self)}).encode())

    def with_round(self, sweep_id: str) -> NightState:
        return replace(self, rounds=(*self.rounds, sweep_id))

    def age_s(self, now: datetime) -> float:
        return (now - datetime.fromisoformat(self.began)).total_seconds()


def unfinished(config: NightlyConfig, now: datetime) -> NightState | None:
    """Returns the night to go on with; None where there is none, or its deadline has passed.

    A state that cannot be read is put aside: a new night begins, and what the other measured stays in the results.
    Raises OSError.
    """
    path = state_file(config)
    try:
        content = loads(path.read_bytes())
        if content.pop("v", None) != _STATE_VERSION:
            raise ProtocolError("of another version")
        state = from_json(NightState, content)
        return state if abs(state.age_s(now)) < config.deadline_s else None  # a clock that was ahead is set by now
    except FileNotFoundError:
        return None
    except Exception as error:  # noqa: BLE001 - whatever is wrong with it
        aside = put_aside(path)
        told = harmless(
            f"{path}: the state of a night cannot be read ({error}): put aside as {aside.name}, a new one begins"
        )
        logging.getLogger(__name__).warning("edgemoe-farm: warning: %s", told)
        return None


def finish(config: NightlyConfig) -> None:
    state_file(config).unlink(missing_ok=True)


def state_file(config: NightlyConfig) -> Path:
    return config.reports / f".{config.name}.state.json"


def night_folder(config: NightlyConfig, sweep_id: str) -> Path:
    """Makes and returns the folder of the page and the summaries of a night."""
    folder = config.reports / sweep_id
    folder.mkdir(exist_ok=True)
    return folder


def prune_reports(config: NightlyConfig) -> int:
    """Removes the folders of all but the last nights, only such as a night wrote; returns how many."""
    nights = sorted(path.parent for path in config.reports.glob("*/night.json") if _is_night(path, config.name))
    gone = nights[: -config.keep_reports]
    for folder in gone:
        shutil.rmtree(folder, ignore_errors=True)
    return len(gone)


def _is_night(path: Path, name: str) -> bool:
    """Tells whether a file is the summary of a night of this name, in a folder that the night made for it."""
    folder = path.parent
    if folder.is_symlink() or path.is_symlink():
        return False
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and content.get("name") == name and content.get("sweep") == folder.name
