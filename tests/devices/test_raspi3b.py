"""A Raspberry Pi 3 Model B, as qemu emulates one: its SD card, its network over USB; see machine.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.devices.machine import HOME, RASPI3B
from tests.integration.conftest import free_port

pytestmark = [pytest.mark.devices, pytest.mark.integration, pytest.mark.timeout(900)]


def test_the_farm_measures_on_it(make_sshd: Callable[..., Any], make_farm: Callable[..., Any], tmp_path: Path) -> None:
    port = free_port()
    server = make_sshd(
        "pi3",
        "ListenAddress 10.0.2.15",
        trusted=False,
        port=port,
        user="pi",
        python=None,
        seen_as=HOME,
        inside=RASPI3B.within(port, tmp_path / "pi3"),
        prepare=RASPI3B.prepare,
        start_s=400,
    )
    farm = make_farm(server)
    facts = farm.probe()
    assert facts["model"].startswith("Raspberry Pi 3 Model B")
    assert (facts["machine"], facts["cores"]) == ("aarch64", 4)
    assert 800 << 20 < facts["memory_bytes"] < 1 << 30
    for run in farm.measure():
        assert (run.load.backend, run.load.variant) == ("native", "aarch64-neon")
