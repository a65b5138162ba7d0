"""Termux on Android, as far as this machine can look like it: see userland.py."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.devices.userland import HIDDEN_BY_ANDROID, PREFIX, TERMUX_PORT, show, termux

pytestmark = [pytest.mark.devices, pytest.mark.integration, pytest.mark.timeout(900)]


def test_the_farm_measures_on_it(
    emulation: None, make_sshd: Callable[..., Any], make_farm: Callable[..., Any], tmp_path: Path
) -> None:
    lived_in, home = termux(), tmp_path / "phone"
    environment = {**lived_in.environment, "QEMU_CPU": "cortex-a76"}
    server = make_sshd(
        "phone",
        "SetEnv " + " ".join(f"{name}={value}" for name, value in environment.items()),
        trusted=False,
        host=f"127.{random.randint(1, 254)}.{random.randint(1, 254)}.1",  # 8022 of this machine may be taken
        port=TERMUX_PORT,
        user="u0_a234",
        python=None,
        seen_as=lived_in.home,
        start_s=120,
        inside=lived_in.command(show(tmp_path / "face", "cortex-a76", denied=HIDDEN_BY_ANDROID), home),
        prepare=lived_in.own,
    )
    farm = make_farm(server)
    facts = farm.probe()
    assert (facts["machine"], facts["os"]) == ("aarch64", "Termux 0.118.0")
    assert facts["memory_bytes"] > 0
    for run in farm.measure():
        assert (run.load.backend, run.load.variant) == ("native", "aarch64-dotprod")
        assert f"{PREFIX}/bin/python3" in run.command
