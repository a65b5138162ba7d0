"""Sweeps in one file that proves itself: for another machine that verifies, imports and renders them.

A bundle is gzip of JSON lines: a manifest, then each sweep, night and run, then the SHA-256 of all lines before.

    {"bundle": 1, "manifest": {...}}
    {"sweep": {...}}    the record, with the matrix as it was read
    {"night": {...}}    how it was judged; and the nights before it, whose points its trends have
    {"run": {...}}      the record
    {"sha256": "..."}

The manifest says what is in it: containers, workloads and engines by their hashes, each device's environment. It
follows from the records and is compared with them. There is nothing in it to unpack, so no path to anywhere; its size
is bounded. The hash finds damage; who must know where a bundle came from compares it with what its author says.

The same records and farm give the same lines (and bytes, but for another zlib). History of VERSION: 1.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from engine.codec import MAX_LINE_BYTES, from_json, loads, to_json
from engine.errors import ProtocolError
from engine.protocol import DeviceFacts
from reports.errors import BundleError, RecordError
from reports.files import replacing
from reports.nights.outcome import sweeps_behind
from reports.records import Run, Sweep, run_from_json, run_to_json, sweep_from_json, sweep_to_json
from reports.results.baselines import NightRecord
from reports.results.database import ResultsDatabase
from reports.results.merging import Entry, merge

VERSION = 1
MAX_BYTES = 1 << 30  # of lines: thousands of runs
EARLIER_NIGHTS = 60
_MAGIC = b"\x1f\x8b"
_PASSING = ("now", "boot_id")  # facts that tell of a moment, not of the device

T = TypeVar("T")


@dataclass(frozen=True)
class Manifest:
    """The contents of a bundle."""

    farm_version: str  # that made it
    sweeps: tuple[str, ...]
    runs: int
    containers: dict[str, str]  # by their SHA-256: names in the matrix
    workloads: dict[str, str]
    engines: tuple[str, ...]  # SHA-256
    environment: dict[str, dict[str, tuple[str, ...]]]  # of each device: facts, and emulated conditions, as they were

    @classmethod
    def of(cls, farm_version: str, sweeps: Iterable[Sweep], runs: Sequence[Run]) -> Manifest:
        return cls(
            farm_version=farm_version,
            sweeps=tuple(sweep.id for sweep in sweeps),
            runs=len(runs),
            containers=dict(sorted({run.cell.container_sha256: run.cell.container for run in runs}.items())),
            workloads=dict(sorted({run.cell.workload_sha256: run.cell.workload for run in runs}.items())),
            engines=tuple(sorted({run.engine_sha256 for run in runs} - {""})),
            environment={
                device: _environment(run for run in runs if run.cell.device == device)
                for device in sorted({run.cell.device for run in runs})
            },
        )


@dataclass(frozen=True)
class Bundle:
    """A bundle as it was read and found whole."""

    manifest: Manifest
    sha256: str  # of its lines
    sweeps: tuple[Sweep, ...]
    nights: tuple[NightRecord, ...]
    runs: tuple[Run, ...]

    @property
    def entries(self) -> Iterator[Entry]:
        yield from self.sweeps
        yield from self.runs
        yield from self.nights

    @property
    def subject(self) -> str:
        """Returns the id of the sweep that its page is about: the last that is no confirmation."""
        return next((sweep.id for sweep in reversed(self.sweeps) if " (" not in sweep.name), self.sweeps[-1].id)

    def database(self) -> ResultsDatabase:
        """Returns its content as a database in memory, for the calling thread."""
        database = ResultsDatabase.open(":memory:")
        merge(database, self.entries)
        return database


def write(database: ResultsDatabase, names: Iterable[str], output: Path, farm_version: str) -> Manifest:
    """Writes the sweeps of those names (see ResultsDatabase.sweep) with all their runs. Raises ReportError.

    A night brings the sweeps of which its page tells: the baseline's, and what was measured again.
    """
    chosen = {sweep.id: sweep for sweep in map(database.sweep, names)}
    judged = [night for night in map(database.night, chosen) if night is not None]
    chosen |= {sweep.id: sweep for night in judged for sweep in sweeps_behind(database, night)}
    sweeps = sorted(chosen.values(), key=lambda sweep: (sweep.started_at, sweep.id))
    runs = [run for sweep in sweeps for run in database.runs(sweep_id=sweep.id)]
    nights: dict[str, NightRecord] = {}
    for night in sorted(judged, key=lambda night: (night.at, night.sweep_id)):
        for each in (*database.nights(name=night.name, before=night, last=EARLIER_NIGHTS), night):
            nights[each.sweep_id] = each
    manifest = Manifest.of(farm_version, sweeps, runs)
    digest = hashlib.sha256()
    with replacing(output) as file, gzip.GzipFile("", "wb", 9, cast(BinaryIO, file), mtime=0) as lines:
        for content in (
            {"bundle": VERSION, "manifest": to_json(manifest)},
            *({"sweep": sweep_to_json(sweep)} for sweep in sweeps),
            *({"night": to_json(night)} for night in nights.values()),
            *({"run": run_to_json(run)} for run in runs),
        ):
            line = _line(content)
            digest.update(line)
            lines.write(line)
        lines.write(_line({"sha256": digest.hexdigest()}))
    return manifest


def is_bundle(path: Path) -> bool:
    """Returns whether a file is a bundle, by its first bytes."""
    try:
        with path.open("rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except OSError:
        return False


def read(path: Path) -> Bundle:
    """Reads a bundle. Raises BundleError where it is damaged, no bundle, or its parts contradict one another."""
    digest = hashlib.sha256()
    sweeps: list[Sweep] = []
    nights: list[NightRecord] = []
    runs: list[Run] = []
    manifest: Manifest | None = None
    said = ""
    for number, line in enumerate(_lines(path), start=1):
        where = f"{path}, line {number}"
        if said:
            raise BundleError(f"{where}: something follows the end of the bundle: get it again")
        try:
            content = loads(line)
            if manifest is None:
                manifest = _manifest(content)
            elif content.keys() == {"sweep"}:
                sweeps.append(sweep_from_json(_object(content["sweep"])))
            elif content.keys() == {"night"}:
                nights.append(from_json(NightRecord, content["night"]))
            elif content.keys() == {"run"}:
                runs.append(run_from_json(_object(content["run"])))
            elif content.keys() == {"sha256"}:
                said = str(content["sha256"])
                continue
            else:
                raise RecordError(f"neither sweep, night, run nor sha256: {', '.join(content)[:80]!r}")
        except (ProtocolError, RecordError) as error:
            raise BundleError(f"{where}: {error}: get it again, or a newer farm") from None
        digest.update(line)
    if manifest is None or not said:
        raise BundleError(f"{path} is cut off: get it again")
    if said != digest.hexdigest():
        raise BundleError(f"{path} is damaged: its lines hash to {digest.hexdigest()}, not {said[:64]!r}: get it again")
    if manifest != Manifest.of(manifest.farm_version, sweeps, runs):
        raise BundleError(f"{path} contradicts itself: its manifest tells of other records: get it again")
    orphans = [run.id for run in runs if run.sweep_id not in manifest.sweeps]
    if orphans or len({run.id for run in runs}) < len(runs) or len(set(manifest.sweeps)) < len(sweeps):
        raise BundleError(f"{path} contradicts itself: a run without its sweep, or one twice: get it again")
    return Bundle(manifest, said, tuple(sweeps), tuple(nights), tuple(runs))


def _manifest(content: dict[str, Any]) -> Manifest:
    if "bundle" not in content:
        raise RecordError("not a bundle of the farm")
    if content["bundle"] != VERSION:
        raise RecordError(f"bundle version {str(content['bundle'])[:20]} where {VERSION} is known")
    return from_json(Manifest, content.get("manifest"))


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RecordError("not an object")
    return value


def _lines(path: Path) -> Iterator[bytes]:
    left = MAX_BYTES
    try:
        with gzip.open(path) as lines:
            while line := lines.readline(min(left, MAX_LINE_BYTES) + 1):
                left -= len(line)
                if left < 0 or len(line) > MAX_LINE_BYTES:
                    raise BundleError(f"{path} is larger than any bundle: over {MAX_BYTES} bytes, or such a line")
                yield line
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise BundleError(f"{path} is damaged or no bundle: {error}: get it again") from None
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror or error}: name another file") from None


def _line(content: dict[str, Any]) -> bytes:
    return json.dumps(content, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def _environment(runs: Iterable[Run]) -> dict[str, tuple[str, ...]]:
    seen: dict[str, dict[str, None]] = {}
    for run in runs:
        facts = {} if run.facts is None else {f.name: getattr(run.facts, f.name) for f in fields(DeviceFacts)}
        said = [(name, value) for name, value in facts.items() if name not in _PASSING and value is not None]
        for name, value in (*said, *(("emulated", condition) for condition in run.emulated)):
            seen.setdefault(name, {})[value if isinstance(value, str) else json.dumps(to_json(value))] = None
    return {name: tuple(values) for name, values in seen.items()}
