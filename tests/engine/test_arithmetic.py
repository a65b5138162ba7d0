"""The times of a token's parts, on a clock that ticks whenever somebody looks at it."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from engine.arithmetic import measure_arithmetic
from engine.codec import from_json
from engine.container import Container
from engine.errors import ContainerError
from engine.protocol import ArithmeticTimes
from engine.quantize import Format
from engine.selftest import all_formats, write_random_model


@pytest.mark.parametrize(("model", "top_k"), [("container", 2), ("switch", 1)])
def test_each_part_is_timed_for_each_format(model: str, top_k: int, request: pytest.FixtureRequest) -> None:
    container: Container = request.getfixturevalue(model)
    ticks = itertools.count()
    times = measure_arithmetic(container, backend="numpy", clock=lambda: float(next(ticks)))
    # One tick from an expert to the next layer's, one for a layer's experts together, one from the last to the end.
    assert (times.layer_s, times.head_s) == (1.0, 1.0)
    assert times.expert_s == {fmt.label: 1 / top_k for fmt in container.formats}
    assert times.non_expert_bytes > 0
    assert (times.backend, times.variant) == ("numpy", None)


def test_formats_of_adapted_experts_are_timed_where_there_are_enough_of_them(tmp_path: Path) -> None:
    path = str(tmp_path / "mixed.emoe")
    write_random_model(path, all_formats(), mixed=True)
    container = Container.open(path)
    counts = [sum(record.format == n for record in container.records) for n in range(len(container.formats))]
    times = measure_arithmetic(container, backend="numpy")
    assert set(times.expert_s) == {fmt.label for fmt, n in zip(container.formats, counts, strict=True) if n >= 2}


def test_a_device_says_it_in_one_line(tmp_path: Path) -> None:
    path = str(tmp_path / "m.emoe")
    write_random_model(path, [Format("fp16")])
    command = [sys.executable, "-m", "engine", "arithmetic"]
    done = subprocess.run([*command, path, "--backend", "numpy"], capture_output=True, text=True, check=True)
    times = from_json(ArithmeticTimes, json.loads(done.stdout))
    assert set(times.expert_s) == {"fp16"}
    refused = subprocess.run([*command, str(tmp_path / "absent")], capture_output=True, text=True, check=False)
    assert refused.returncode == ContainerError.exit_code
