"""Debian's arm64 userland with its own sshd, shown to be a Raspberry Pi 4; see userland.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.devices.userland import debian, show

pytestmark = [pytest.mark.devices, pytest.mark.integration, pytest.mark.timeout(900)]
MODEL = "Raspberry Pi 4 Model B Rev 1.4"


def test_the_farm_measures_on_it(
    emulation: None, make_sshd: Callable[..., Any], make_farm: Callable[..., Any], tmp_path: Path
) -> None:
    lived_in, home = debian("arm64"), tmp_path / "pi"
    server = make_sshd(
        "pi",
        "SetEnv QEMU_CPU=cortex-a72",
        trusted=False,
        user="pi",
        python=None,
        seen_as=lived_in.home,
        start_s=120,
        inside=lived_in.command(show(tmp_path / "face", "cortex-a72", MODEL), home, as_root=True),
        prepare=lived_in.own,
    )
    farm = make_farm(server)
    facts = farm.probe()
    assert (facts["machine"], facts["cpu"]) == ("aarch64", MODEL)
    assert facts["os"].startswith("Debian GNU/Linux 12")
    assert "blas" in facts["blas"]
    for run in farm.measure():
        assert (run.load.backend, run.load.variant) == ("native", "aarch64-neon")
        assert run.facts.machine == "aarch64"
