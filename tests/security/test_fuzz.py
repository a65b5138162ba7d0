"""A part of ci/fuzz, always the same: wrong packets and damaged files cost their own device, and little memory."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("kind", "seed", "cases"),
    [("packets", 0, 70), ("packets", 5000, 70), ("packets", 9000, 70), ("known_hosts", 0, 300), ("ssh_config", 0, 150)],
)
def test_what_is_wrong_costs_its_own_device(kind: str, seed: int, cases: int) -> None:
    command = [sys.executable, "-m", "tests.programs.fuzz", "--cases", str(cases), "--seed", str(seed), kind]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{kind}: {cases} cases from seed {seed}: " in done.stdout
    assert "0 failures" in done.stdout
