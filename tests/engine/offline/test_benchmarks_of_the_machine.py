"""What `bench kernels`, `bench decode` and `bench storage` report: the fields that others rely on, and no timing."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from engine.kernels import Kernels
from engine.offline.benchmarks.kernels import FORMATS, available_kernels, decoded, relative_error
from engine.offline.benchmarks.start import PHASES
from engine.quantize import Format, MatrixShape, RecordLayout
from engine.selftest import all_formats, write_random_model
from tests.command_line import farm

bench = partial(farm, "bench")


@pytest.mark.parametrize("fmt", all_formats(), ids=lambda f: f.label)
def test_the_weights_that_errors_are_measured_against(fmt: Format) -> None:
    weight = np.random.default_rng(1).standard_normal((40, 100)).astype(np.float32)
    layout = RecordLayout.of(fmt, [MatrixShape("w", 40, 100)])
    packed = layout.unpack(layout.pack({"w": weight}))["w"]
    through = Kernels().product(packed, np.eye(100, dtype=np.float32)).T
    assert np.abs(decoded(packed) - through).max() < 1e-5
    assert relative_error(Kernels(), fmt, 100) < 2e-6


def test_kernels_side_by_side() -> None:
    rows = json.loads(bench("kernels", "--rows", 64, "--columns", 96, "--rounds", 2, "--json").stdout)
    backends = [kernels.backend for kernels in available_kernels()]
    assert [(r["precision"], r["group"], r["backend"]) for r in rows] == [
        (fmt.precision, fmt.group, backend) for fmt in FORMATS for backend in backends
    ]
    for row in rows:
        assert (row["rows"], row["columns"], row["batch"], row["threads"]) == (64, 96, 1, 1)
        assert row["ms_least"] <= row["ms_median"] <= row["ms_most"]
        assert row["relative_error"] < (1e-5 if row["backend"] == "numpy" else 1e-4)
        assert row["dram_fraction"] > 0
        assert (row["variant"] is None) == (row["backend"] == "numpy")
        if row["backend"] == "numpy":
            assert row["numpy_ratio"] == 1
    assert "over numpy" in bench("kernels", "--rows", 64, "--columns", 96, "--rounds", 2).stdout


def test_decoding_with_each_backend(tmp_path: Path) -> None:
    write_random_model(str(tmp_path / "m.emoe"), [Format("int4", 32)])
    arguments = ("decode", tmp_path / "m.emoe", "--tokens", 4, "--rounds", 2, "--strategy", "naive-swap")
    found = json.loads(bench(*arguments, "--json").stdout)
    assert list(found["backends"]) == [kernels.backend for kernels in available_kernels()]
    for row in found["backends"].values():
        assert len(row["tokens_per_s_rounds"]) == 2
        assert sum(row["stacked_s"].values()) == pytest.approx(1 / row["tokens_per_s"])
    rates = [row["tokens_per_s"] for row in found["backends"].values()]
    assert found["ratio"] == pytest.approx(rates[-1] / rates[0])
    assert "native over numpy" in bench(*arguments).stdout


def test_ways_of_reading(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * (16 << 20))
    arguments = ("storage", path, "--block-bytes", 1 << 20, "--rounds", 1, "--seconds", 0.1)
    rows = json.loads(bench(*arguments, "--json").stdout)
    assert {(row["method"], row["lanes"]) for row in rows} == {
        (method, lanes) for method in ("direct", "pread", "mmap") for lanes in (1, 2)
    }
    for row in rows:
        assert row["block_bytes"] == 1 << 20
        assert row["bytes_per_s"] > 0
        ratio = row["bytes_per_s"] / row["sequential_direct_bytes_per_s"]
        assert row["fraction_of_sequential_direct"] == pytest.approx(ratio)
    assert "of sequential" in bench(*arguments).stdout
    assert "a multiple of 4096" in bench("storage", path, "--block-bytes", 5000, code=2).stderr
    (tmp_path / "small").write_bytes(b"x" * 4096)
    assert "at least 8 blocks" in bench("storage", tmp_path / "small", code=2).stderr
    assert "No such file" in bench("storage", tmp_path / "none", code=2).stderr


@pytest.mark.parametrize("warm", [False, True])
def test_starting_the_engine(tmp_path: Path, warm: bool) -> None:
    write_random_model(str(tmp_path / "m.emoe"), [Format("int4", 32)])
    arguments = ("start", tmp_path / "m.emoe", "--rounds", 1, *(["--warm"] if warm else []))
    found = json.loads(bench(*arguments, "--json").stdout)
    assert tuple(found["phases"]) == PHASES
    assert all(0 <= row["s_least"] <= row["s"] <= row["s_most"] for row in found["phases"].values())
    assert sum(row["s"] for row in found["phases"].values()) == pytest.approx(found["total_s"])
    assert 0 < found["numpy_and_non_experts_share"] < 1
    assert found["non_expert_bytes"] > 0
    assert warm == (found["page_cache_resident_fraction"] == 1)
    assert "to the first token" in bench(*arguments).stdout


def test_an_engine_that_does_not_start_says_why(tmp_path: Path) -> None:
    write_random_model(str(tmp_path / "m.emoe"), [Format("int4", 32)])
    assert "needs a profile" in bench("start", tmp_path / "m.emoe", "--strategy", "edgemoe", code=2).stderr
    assert "cannot be opened" in bench("start", tmp_path / "nothing.emoe", code=2).stderr
