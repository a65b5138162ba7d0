"""The soak, small: ci/soak is this with 200 devices. And that its verdict can be bad."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.programs.scale.openssh import measure_real
from tests.programs.scale.soak import broken_promises, soak

GOOD = {
    "cells": 48, "final": 48, "lost": 0, "doubled": 0, "locks_left": 0,
    "rss_bytes": {"start": 100 << 20, "middle": 100 << 20, "end": 101 << 20},
}  # fmt: skip


def test_every_cell_ends_once_however_often_the_controller_is_killed(tmp_path: Path) -> None:
    result = soak(tmp_path, devices=12, cells=4, kills=2, seed=1)
    assert broken_promises(result) == []
    assert result["cells"] == 48
    assert result["kills"] == 2
    assert set(result["statuses"]) > {"ok"}, "there were faults"


def test_a_good_result_breaks_no_promise() -> None:
    assert broken_promises(GOOD) == []


@pytest.mark.parametrize(
    ("changed", "promise"),
    [
        ({"final": 47}, "did not end"),
        ({"lost": 1}, "lost"),
        ({"doubled": 1}, "doubled"),
        ({"locks_left": 1}, "lock"),
        ({"rss_bytes": {"start": 100 << 20, "middle": 150 << 20, "end": 200 << 20}}, "memory"),
    ],
)
def test_a_broken_promise_is_named(changed, promise) -> None:
    (broken,) = broken_promises({**GOOD, **changed})
    assert promise in broken


@pytest.mark.heavy
def test_32_real_servers_run_the_real_engine_under_one_controller(tmp_path: Path) -> None:
    result = measure_real(tmp_path, devices=32)
    assert result["ok"] == result["cells"] == 64
