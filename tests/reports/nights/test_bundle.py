"""A bundle proves itself, renders as its database does, and can do no harm."""

import gzip
import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from reports.errors import BundleError, UnknownSweepError
from reports.nights import bundle
from reports.nights.night import Confirmation, Night
from reports.pages import page, render
from reports.results.baselines import NightRecord
from reports.results.database import ResultsDatabase
from reports.results.merging import merge

ROOT = Path(__file__).parents[3]
AT = "2026-11-{day:02d}T03:00:00+00:00"


@pytest.fixture
def database(make, tmp_path):
    runs = [*make.runs(blocks=2, tokens=8), make.failed(block=2, reason="<script>", log_tail="\ud800\0")]
    with ResultsDatabase.open(tmp_path / "farm.db") as database:
        database.add_sweep(make.sweep(runs))
        for run in runs:
            database.add_run(run)
        yield database


def night_record(sweep_id, name, at, baseline=None, **changes):
    night = Night(sweep_id, name, at, 0, **changes)
    return NightRecord(sweep_id, name, baseline, at, 0, night.to_json())


@pytest.fixture
def path(database, tmp_path):
    bundle.write(database, ["latest"], tmp_path / "night.bundle", "0.1.0")
    return tmp_path / "night.bundle"


def test_a_bundle_holds_all_that_its_manifest_says(database, path) -> None:
    found = bundle.read(path)
    assert list(found.runs) == database.runs()
    assert list(found.sweeps) == database.sweeps()
    manifest = found.manifest
    assert (manifest.sweeps, manifest.runs, manifest.farm_version) == ((found.sweeps[0].id,), 13, "0.1.0")
    assert manifest.containers == {"c0" * 32: "tiny-mixtral-int4"}
    assert manifest.workloads == {"d0" * 32: "dialogue"}
    assert manifest.engines == ("e1" * 32,)
    assert set(manifest.environment) == {"pi4b-emulated", "jetson-tx2-emulated"}
    environment = manifest.environment["pi4b-emulated"]
    assert environment["kernel"] == ("6.6.31+rpt-rpi-v8",)
    assert environment["emulated"] == ("expert reads limited to 43 MB/s by the engine",)
    assert "boot_id" not in environment


def test_a_night_comes_with_those_before_it(database, path, make, tmp_path) -> None:
    sweep = database.sweep("latest")
    for day, sweep_id, name in (
        (21, "first", "demo"),
        (22, "foreign", "x"),
        (23, sweep.id, "demo"),
        (24, "later", "demo"),
    ):
        database.add_night(night_record(sweep_id, name, AT.format(day=day)))
    bundle.write(database, [sweep.id], path, "0.1.0")
    assert [night.sweep_id for night in bundle.read(path).nights] == ["first", sweep.id]


def test_a_night_brings_the_sweeps_of_which_its_page_tells(database, path, make, tmp_path) -> None:
    """So that its page is the same elsewhere: baseline, and what was measured again."""
    sweep = database.sweep("latest")
    for at, sweep_id, name in ((20, "before", "demo"), (24, "again", "demo (confirmation)"), (25, "other", "demo")):
        runs = [replace(run, id=f"{sweep_id}-{run.id}", sweep_id=sweep_id) for run in make.runs(blocks=1, tokens=8)]
        database.add_sweep(make.sweep(runs, id=sweep_id, name=name, started_at=AT.format(day=at)))
        for run in runs:
            database.add_run(run)
    again = Confirmation(make.cell(), "tpot_s", 1.1, 1.05, 1.15, True, "again", "confirmed")
    database.add_night(night_record(sweep.id, "demo", AT.format(day=25), "before", confirmations=(again,)))
    bundle.write(database, [sweep.id], path, "0.1.0")
    found = bundle.read(path)
    assert found.manifest.sweeps == ("before", sweep.id, "again")
    assert found.subject == sweep.id
    with found.database() as elsewhere:
        assert page(elsewhere, [found.subject]) == page(database, [sweep.id])
    assert 'href="#raw-17"' in page(database, [sweep.id])  # the samples of what was measured again


def test_the_same_records_are_the_same_bytes(database, path, tmp_path) -> None:
    first = path.read_bytes()
    with ResultsDatabase.open(tmp_path / "other.db") as other:
        merge(other, [*database.sweeps(), *reversed(database.runs())])
        bundle.write(other, ["latest"], tmp_path / "other.bundle", "0.1.0")
    assert (tmp_path / "other.bundle").read_bytes() == first


def test_an_unknown_sweep_leaves_no_file(database, tmp_path) -> None:
    with pytest.raises(UnknownSweepError):
        bundle.write(database, ["latest", "nonsense"], tmp_path / "x.bundle", "0.1.0")
    assert not (tmp_path / "x.bundle").exists()


_RENDER = """
import sys
from pathlib import Path
from reports.nights import bundle
from reports.pages import render
with bundle.read(Path(sys.argv[1])).database() as database:
    render(database, ["latest"], Path(sys.argv[2]))
import reports
print(reports.__file__)
"""


def test_another_checkout_renders_the_same_bytes(database, path, tmp_path) -> None:
    """In another place, language and time zone, with another seed of hashes."""
    render(database, ["latest"], tmp_path / "here.html")
    there = tmp_path / "another checkout"
    there.mkdir()
    for package in ("reports", "engine"):
        (there / package).symlink_to(ROOT / package)
    environment = {**os.environ, "PYTHONPATH": str(there), "TZ": "Asia/Kolkata", "LANG": "C", "PYTHONHASHSEED": "7"}
    command = [sys.executable, "-P", "-c", _RENDER, path, tmp_path / "there.html"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True)
    assert done.stdout.startswith(str(there))
    assert (tmp_path / "there.html").read_bytes() == (tmp_path / "here.html").read_bytes()


# --- what others may have made of it --------------------------------------------------------------------------------


def rewritten(path, change) -> None:
    """Changes it as somebody would who knows the format: the hash is right again."""
    lines = gzip.decompress(path.read_bytes()).splitlines()[:-1]
    contents = [json.dumps(each).encode() + b"\n" for each in change([json.loads(line) for line in lines])]
    end = json.dumps({"sha256": hashlib.sha256(b"".join(contents)).hexdigest()}).encode() + b"\n"
    path.write_bytes(gzip.compress(b"".join([*contents, end])))


def test_a_flipped_bit_is_found(path) -> None:
    whole = path.read_bytes()
    for at in range(10, len(whole), len(whole) // 50):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with pytest.raises(BundleError, match=r"night\.bundle"):
            bundle.read(path)


def test_a_cut_off_bundle_is_found(path) -> None:
    whole = path.read_bytes()
    for length in (0, 1, 5, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(BundleError, match=r"damaged|cut off"):
            bundle.read(path)
    lines = gzip.decompress(whole).splitlines(keepends=True)
    path.write_bytes(gzip.compress(b"".join(lines[:-1])))
    with pytest.raises(BundleError, match="is cut off"):
        bundle.read(path)


def test_a_changed_number_is_found_by_the_hash(path) -> None:
    text = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(text.replace(b'"block":1', b'"block":9', 1)))
    with pytest.raises(BundleError, match="its lines hash to"):
        bundle.read(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c[:-1], "its manifest tells of other records"),
        (lambda c: [*c, c[-1]], "its manifest tells of other records"),
        (lambda c: c[1:], "not a bundle of the farm"),
        (lambda c: [{**c[0], "bundle": 2}, *c[1:]], "bundle version 2 where 1 is known"),
        (lambda c: [{**c[0], "bundle": {}}, *c[1:]], "bundle version"),
        (lambda c: [{"bundle": 1}, *c[1:]], "Manifest: expected an object"),
        (lambda c: [{"bundle": 1, "manifest": {}}, *c[1:]], "'containers' is missing|is missing"),
        (lambda c: [*c, {"file": "../../etc/passwd"}], "neither sweep, night, run nor sha256"),
        (lambda c: [*c, {"run": []}], "not an object"),
        (lambda c: [*c, {"night": 7}], "NightRecord: expected an object"),
        (lambda c: [*c, {"sha256": "x"}], "something follows the end"),
    ],
)  # fmt: skip
def test_what_contradicts_itself_is_refused(path, change, message) -> None:
    rewritten(path, change)
    with pytest.raises(BundleError, match=message):
        bundle.read(path)


def test_a_run_twice_or_without_its_sweep_is_refused(database, path) -> None:
    for double in (lambda runs: [*runs, runs[0]], lambda runs: [replace(runs[0], sweep_id="another"), *runs[1:]]):
        runs, sweeps = double(database.runs()), database.sweeps()

        def change(contents, runs=runs, sweeps=sweeps):
            manifest = bundle.to_json(bundle.Manifest.of("0.1.0", sweeps, runs))
            return [{**contents[0], "manifest": manifest}, contents[1], *({"run": bundle.run_to_json(r)} for r in runs)]

        rewritten(path, change)
        with pytest.raises(BundleError, match="a run without its sweep, or one twice"):
            bundle.read(path)


def test_a_bomb_is_not_unpacked(path, monkeypatch) -> None:
    with gzip.open(path, "wb") as lines:
        for _ in range(20):
            lines.write(b"0" * (1 << 20))
    with pytest.raises(BundleError, match="larger than any bundle"):
        bundle.read(path)
    monkeypatch.setattr(bundle, "MAX_BYTES", 1000)
    path.write_bytes(gzip.compress(b'{"bundle": 1}\n' * 100))
    with pytest.raises(BundleError):
        bundle.read(path)


def test_other_files_are_refused(tmp_path) -> None:
    (tmp_path / "text").write_text("dear diary")
    assert not bundle.is_bundle(tmp_path / "text")
    assert not bundle.is_bundle(tmp_path)
    with pytest.raises(BundleError, match="damaged or no bundle"):
        bundle.read(tmp_path / "text")
    with pytest.raises(BundleError, match="cannot read"):
        bundle.read(tmp_path / "none")
