"""Pages about sweeps: one self-contained file for each use.

strategies    strategies side by side on each device
devices       devices side by side: what runs where, how fast and in how much memory
nightly       what changed against the baseline, where, and since when
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

from reports.errors import SelectionError
from reports.files import replacing
from reports.nights.gate import Measured
from reports.nights.outcome import load_night, sweeps_behind
from reports.pages.devices import devices_page
from reports.pages.night_page import night_page
from reports.pages.strategies import strategies_page
from reports.records import Sweep
from reports.results.baselines import NightRecord
from reports.results.database import ResultsDatabase

PageKind = Literal["auto", "nightly", "devices", "strategies"]
KINDS: tuple[PageKind, ...] = get_args(PageKind)


def render(database: ResultsDatabase, sweep_ids: Sequence[str], output: Path, kind: PageKind = "auto") -> Path:
    """Writes the page of sweeps, each given by id, by the beginning of one or as `latest`; returns `output`."""
    html = page(database, sweep_ids, kind)
    with replacing(output) as file:
        file.write(html.encode())
    return output


def page(database: ResultsDatabase, sweep_ids: Sequence[str], kind: PageKind = "auto") -> str:
    """HTML. `auto` is nightly for a sweep that was judged as a night, devices where those outnumber strategies.

    Raises SelectionError where there is no night to show.
    """
    sweeps = list({sweep.id: sweep for sweep in map(database.sweep, sweep_ids)}.values())
    if kind in ("auto", "nightly"):
        record = database.night(sweeps[0].id) if len(sweeps) == 1 else None
        if record is not None:
            return _night(database, record, sweeps[0])
        if kind == "nightly":
            what = f"sweep {sweeps[0].id} was" if len(sweeps) == 1 else "several sweeps were"
            raise SelectionError(f"{what} not judged as a night: name one that `nightly` measured, or another --kind")
    runs = [database.runs(sweep_id=sweep.id) for sweep in sweeps]
    sides = [Measured.of(sweep, found) for sweep, found in zip(sweeps, runs, strict=True)]
    cells = [run.cell for side in sides for run in side.runs]
    outnumber = len({cell.device for cell in cells}) > len({cell.strategy for cell in cells})
    shown = devices_page if kind == "devices" or (kind == "auto" and outnumber) else strategies_page
    return shown(sides, sum(map(len, runs)) - sum(len(side.runs) for side in sides))


def _night(database: ResultsDatabase, record: NightRecord, sweep: Sweep) -> str:
    night = load_night(database, record)
    tonight, *behind = (Measured.read(database, each) for each in (sweep, *sweeps_behind(database, record)))
    return night_page(night, tonight, behind, record.baseline_sweep_id)
