"""Runs for other tools: JSON lines, CSV and Parquet, one line or row a run, written as they are read.

A JSON line is the whole record. A row has the facts that one sorts and filters by, the metrics (medians of the run),
and the raw parts as JSON text: nothing is lost in any format.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from engine.codec import to_json
from engine.protocol import DeviceFacts
from reports.errors import ReportError
from reports.files import replacing
from reports.metrics import METRICS
from reports.records import Run, Sweep, emulation, run_to_json, sweep_to_json
from reports.text import inert

if TYPE_CHECKING:  # pandas and pyarrow take half a second to import, which every command would pay
    import pandas as pd

_ROWS_PER_GROUP = 200
_FACTS = tuple(f.name for f in fields(DeviceFacts) if f.name not in ("core_kinds", "now"))  # the flat ones
_RAW = ("request", "facts", "load", "samples", "totals", "conditions")


def export(
    runs: Iterable[Run], format_name: str, target: Path | IO[bytes], *, sweeps: Iterable[Sweep] | None = None
) -> int:
    """Writes the runs to a file, which appears when it is complete, or to an open stream; returns how many.

    `sweeps`, in JSON lines alone, come first. Raises ReportError for an unknown format, an unwritable file, and
    Parquet without pyarrow.
    """
    write = _FORMATS.get(format_name) if sweeps is None else partial(_jsonl, sweeps=sweeps)
    if write is None:
        raise ReportError(f"unknown export format {format_name!r}: choose one of {', '.join(FORMATS)}")
    if isinstance(target, Path):
        with replacing(target) as file:
            return write(runs, file)
    return write(runs, target)


def _jsonl(runs: Iterable[Run], file: IO[bytes], *, sweeps: Iterable[Sweep] = ()) -> int:
    for sweep in sweeps:
        file.write(_line(sweep_to_json(sweep)))
    n = 0
    for run in runs:
        file.write(_line(run_to_json(run)))
        n += 1
    return n


def _line(record: dict[str, Any]) -> bytes:
    return json.dumps(record, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def _csv(runs: Iterable[Run], file: IO[bytes]) -> int:
    n = 0
    file.write(",".join(_COLUMNS).encode() + b"\n")
    for frame in _frames(runs):
        file.write(frame.map(inert).to_csv(header=False, index=False).encode())
        n += len(frame)
    return n


def _parquet(runs: Iterable[Run], file: IO[bytes]) -> int:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ModuleNotFoundError as error:
        raise ReportError(
            "Parquet needs pyarrow, which is not installed: pip install 'pyarrow>=18', or export as csv or jsonl"
        ) from error

    n = 0
    schema = pa.schema([(name, getattr(pa, _type(name))()) for name in _COLUMNS])
    with pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for frame in _frames(runs):
            writer.write_table(pa.Table.from_pandas(frame, schema=schema, preserve_index=False))
            n += len(frame)
    return n


_FORMATS: dict[str, Callable[[Iterable[Run], IO[bytes]], int]] = {"jsonl": _jsonl, "csv": _csv, "parquet": _parquet}
FORMATS = tuple(_FORMATS)

_INTEGERS = ("block", "facts_cores")
_COLUMNS = (
    "id", "sweep_id", "device", "container", "container_sha256", "strategy", "expert_budget", "workload",
    "workload_sha256", "page_cache", "block", "status", "verdict", "reasons", "emulated", "started_at", "ended_at",
    "farm_version", "engine_sha256", "command", "log_tail", *(f"facts_{name}" for name in _FACTS), *METRICS, *_RAW,
)  # fmt: skip


def _type(column: str) -> str:
    """Returns the name of the column's type in pyarrow."""
    if column in METRICS:
        return "float64"
    return "int64" if column in _INTEGERS or (column.startswith("facts_") and column.endswith("_bytes")) else "string"


def _frames(runs: Iterable[Run]) -> Iterator[pd.DataFrame]:
    """Yields a few hundred rows at a time: an export of years fits any memory."""
    import pandas as pd

    rows = map(_encodable, _rows(runs))
    while group := list(islice(rows, _ROWS_PER_GROUP)):
        yield pd.DataFrame(group, columns=_COLUMNS, dtype=object)


def _rows(runs: Iterable[Run]) -> Iterator[dict[str, Any]]:
    """Yields rows of _COLUMNS, in their order."""
    for run in runs:
        values = {name: getattr(run, name) for name in _COLUMNS if hasattr(run, name)}
        values |= to_json(run.cell)
        values |= {"status": run.status.value, "verdict": run.verdict.value}
        values |= {"reasons": "; ".join(run.reasons), "emulated": emulation(run.emulated)}
        values |= {f"facts_{name}": getattr(run.facts, name, None) for name in _FACTS}
        values |= {name: metric.of(run) for name, metric in METRICS.items()}
        values |= {name: _json_text(getattr(run, name)) for name in _RAW}
        yield {name: values[name] for name in _COLUMNS}


def _json_text(value: Any) -> str:
    """Returns JSON in which nothing separates cells, by whatever a spreadsheet is told to separate them."""
    return json.dumps(to_json(value), allow_nan=False).replace(";", "\\u003b").replace("|", "\\u007c")


def _encodable(row: dict[str, Any]) -> dict[str, Any]:
    """Returns a row in which halves of surrogate pairs, valid in JSON alone, are escaped."""
    return {k: v.encode("utf-8", "backslashreplace").decode() if isinstance(v, str) else v for k, v in row.items()}
