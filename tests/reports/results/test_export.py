import csv
import io
import json
import os
from concurrent.futures import ThreadPoolExecutor

import pyarrow.parquet as pq
import pytest

from engine.codec import to_json
from reports.errors import ReportError
from reports.metrics import METRICS
from reports.records import run_from_json
from reports.results.export import FORMATS, export


@pytest.fixture
def runs(make):
    return [*make.runs(blocks=1), make.failed(device="pi3b", reason="=HYPERLINK(1)", log_tail="\ud800 \0 ü")]


def test_a_json_line_is_the_whole_record(runs, tmp_path) -> None:
    assert export(runs, "jsonl", tmp_path / "runs.jsonl") == len(runs)
    lines = (tmp_path / "runs.jsonl").read_bytes().splitlines()
    assert [run_from_json(json.loads(line)) for line in lines] == runs


def test_a_csv_row_has_facts_metrics_and_the_raw_parts(runs) -> None:
    stream = io.BytesIO()
    assert export(runs, "csv", stream) == len(runs)
    rows = list(csv.DictReader(io.StringIO(stream.getvalue().decode(), newline="")))
    assert [row["id"] for row in rows] == [run.id for run in runs]
    assert rows[0]["facts_model"] == "Raspberry Pi 4 Model B Rev 1.5"
    assert float(rows[0]["tpot_s"]) == METRICS["tpot_s"].of(runs[0])
    assert json.loads(rows[0]["samples"]) == to_json(runs[0].samples)
    assert {"request", "facts", "samples", "status", "verdict"} <= rows[0].keys()
    assert (rows[-1]["status"], rows[-1]["tpot_s"]) == ("failed", "")


def test_no_text_of_a_device_becomes_a_formula(runs) -> None:
    stream = io.BytesIO()
    export(runs, "csv", stream)
    *_, last = csv.DictReader(io.StringIO(stream.getvalue().decode(), newline=""))
    assert last["reasons"] == "'=HYPERLINK(1)"


def test_a_parquet_table_has_types_and_the_raw_parts(runs, tmp_path) -> None:
    assert export(iter(runs), "parquet", tmp_path / "runs.parquet") == len(runs)
    table = pq.read_table(tmp_path / "runs.parquet")
    rows = table.to_pylist()
    assert rows[0]["tpot_s"] == METRICS["tpot_s"].of(runs[0])
    assert rows[0]["facts_memory_bytes"] == 8_189_000_000
    assert json.loads(rows[0]["request"]) == to_json(runs[0].request)
    assert (rows[-1]["tpot_s"], rows[-1]["facts_cores"], rows[-1]["log_tail"]) == (None, None, "\\ud800 \0 ü")


@pytest.mark.parametrize("name", FORMATS)
def test_nothing_to_export_is_a_valid_file(name, tmp_path) -> None:
    assert export([], name, tmp_path / "none") == 0
    if name == "parquet":
        assert pq.read_table(tmp_path / "none").num_rows == 0
    else:
        assert (tmp_path / "none").read_text().count("\n") == (name == "csv")


@pytest.mark.parametrize("name", FORMATS)
def test_a_pipe_is_a_target_and_stays_open(name, make) -> None:
    read_end, write_end = os.pipe()
    with ThreadPoolExecutor(1) as pool, open(read_end, "rb") as reading:
        received = pool.submit(reading.read)
        with open(write_end, "wb") as pipe:
            export([make.run()], name, pipe)
            assert not pipe.closed
        expected = io.BytesIO()
        export([make.run()], name, expected)
        assert received.result(30) == expected.getvalue()


@pytest.mark.parametrize("name", FORMATS)
def test_a_broken_off_export_leaves_the_old_file(name, tmp_path, make) -> None:
    def runs():
        yield make.run()
        raise RuntimeError("the database went away")

    target = tmp_path / "runs"
    target.write_text("old")
    with pytest.raises(RuntimeError):
        export(runs(), name, target)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_errors_name_the_remedy(tmp_path) -> None:
    with pytest.raises(ReportError, match="choose one of jsonl, csv, parquet"):
        export([], "xml", tmp_path / "x")
    with pytest.raises(ReportError, match=r"cannot write .*nowhere.*name another place$"):
        export([], "csv", tmp_path / "nowhere" / "x")
