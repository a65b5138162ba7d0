"""A whole emulated arm64 machine: its own kernel, control groups of version 2, its own storage; see machine.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.offline.importing.importer import import_checkpoint
from engine.protocol import ExpertBudget, RunRequest
from engine.quantize import Format
from engine.selftest import selftest_profile
from harness.device.opening import open_session
from harness.transport.ssh import SshTransport
from reports.records import RunStatus
from tests.devices.machine import HOME, VIRT
from tests.golden.checkpoints import SHIPPED
from tests.integration.conftest import free_port

pytestmark = [pytest.mark.devices, pytest.mark.integration, pytest.mark.timeout(900)]


@pytest.fixture
def server(make_sshd: Callable[..., Any], tmp_path: Path) -> Any:
    port = free_port()
    return make_sshd(
        "machine",
        "ListenAddress 10.0.2.15",
        trusted=False,
        port=port,
        user="pi",
        python=None,
        seen_as=HOME,
        inside=VIRT.within(port, tmp_path / "machine"),
        prepare=VIRT.prepare,
        start_s=400,
    )


def test_the_farm_measures_on_it(server: Any, make_farm: Callable[..., Any]) -> None:
    farm = make_farm(server)
    facts = farm.probe()
    assert (facts["machine"], facts["hostname"], facts["cores"]) == ("aarch64", "stand-in", 2)
    assert facts["model"] == "linux,dummy-virt"
    assert facts["memory_bytes"] < 1 << 30
    for run in farm.measure():
        assert (run.load.backend, run.load.variant) == ("native", "aarch64-neon")


def test_a_control_group_of_version_2_holds(server: Any, tmp_path: Path) -> None:
    """All sessions together have 96 MiB, which is what all experts want."""
    server.trust()
    device = SshTransport(server.device, server.known_hosts)
    seen = device.run(["cat", "/proc/self/cgroup", "/sys/fs/cgroup/sessions/memory.max"], deadline_s=30)
    device.close()
    assert seen.stdout.split() == [b"0::/sessions", str(VIRT.memory_limit_bytes).encode()]
    wide = tmp_path / "mix16.emoe"
    selftest_profile(import_checkpoint(SHIPPED, wide, [Format("fp32")])).save(f"{wide}.profile")
    session = open_session(server.device, known_hosts=server.known_hosts, cache_dir=tmp_path / "cache")
    try:
        path, profile = session.put(wide), session.put(Path(f"{wide}.profile"))
        request = {"prompts": ((5, 6, 7),), "max_new_tokens": 4, "warmups": 0, "repetitions": 1, "deadline_s": 200}
        whole = session.execute(RunRequest("whole", path, "full-load", **request))
        part = RunRequest(
            "part", path, "edgemoe-buffer", profile=profile, expert_budget=ExpertBudget(bytes=16 << 20), **request
        )
        buffered = session.execute(part)
    finally:
        session.close()
    assert whole.status is RunStatus.OUT_OF_MEMORY, (whole.reasons, whole.log_tail)
    assert buffered.status is RunStatus.OK, (buffered.reasons, buffered.log_tail)
