"""Pages about sweeps: one self-contained file for each use.

strategies    strategies side by side on each device
devices       devices side by side: what runs where, how fast and in how much memory
nightly       what changed against the baseline, where, and since when
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

from reports.database import ResultsDatabase
from reports.errors import SelectionError
from reports.files import replacing
from reports.gate import Measured
from reports.nightly import load_night
from reports.pages.devices import devices_page
from reports.pages.nightly import nightly_page
from reports.pages.strategies import strategies_page

Kind = Literal["auto", "nightly", "devices", "strategies"]
KINDS: tuple[Kind, ...] = get_args(Kind)


def render(database: ResultsDatabase, sweep_ids: Sequence[str], output: Path, kind: Kind = "auto") -> Path:
    """Writes the page of sweeps, each given by id, by the beginning of one or as `latest`; returns `output`."""
    html = page(database, sweep_ids, kind)
    with replacing(output) as file:
        file.write(html.encode())
    return output


def page(database: ResultsDatabase, sweep_ids: Sequence[str], kind: Kind = "auto") -> str:
    """HTML. `auto` is nightly for a sweep that was judged as a night, devices where those outnumber strategies.

    Raises SelectionError where there is no night to show.
    """
    sweeps = list({sweep.id: sweep for sweep in map(database.sweep, sweep_ids)}.values())
    night = load_night(database, sweeps[0].id) if len(sweeps) == 1 and kind in ("auto", "nightly") else None
    if kind == "nightly" and night is None:
        what = f"sweep {sweeps[0].id} was" if len(sweeps) == 1 else "several sweeps were"
        raise SelectionError(f"{what} not judged as a night: name one that `nightly` measured, or --kind strategies")
    runs = [database.runs(sweep_id=sweep.id) for sweep in sweeps]
    sides = [Measured.of(sweep, found) for sweep, found in zip(sweeps, runs, strict=True)]
    if night is not None:
        record = next(record for record in database.nights(name=night.name) if record.sweep_id == night.sweep_id)
        before = record.baseline_sweep_id
        known = before is not None and before != night.sweep_id and any(s.id == before for s in database.sweeps())
        against = Measured.of(database.sweep(before), database.runs(sweep_id=before)) if before and known else None
        return nightly_page(night, sides[0], against)
    cells = [run.cell for side in sides for run in side.runs]
    outnumbered = len({cell.device for cell in cells}) > len({cell.strategy for cell in cells})
    if kind == "devices" or (kind == "auto" and outnumbered):
        return devices_page(sides)
    return strategies_page(sides, sum(map(len, runs)) - sum(len(side.runs) for side in sides))
