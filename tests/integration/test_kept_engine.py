"""An engine that a baseline was pinned with before is still measured: watched, and with its memory limited.

kept_engine.zip is the engine of revision 9e9fd29, packed as for a baseline, without its native kernels. Its modules
about the device stand in `engine`; later engines have them in `engine.device`.
"""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.device.limits import best_method
from engine.protocol import RunRequest, Settle
from engine.quantize import Format
from engine.selftest import write_random_model
from harness.device.deploy import EngineBundle
from harness.device.remote import RemoteSession
from harness.transport.local import LocalTransport
from harness.transport.ssh import SshTransport
from reports.records import RunStatus

KEPT = Path(__file__).with_name("kept_engine.zip")
LIMIT_BYTES = 512 << 20


@pytest.fixture(params=["local", pytest.param("ssh", marks=pytest.mark.integration)])
def connect(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], LocalTransport | SshTransport]:
    if request.param == "local":
        return lambda: LocalTransport("pi", tmp_path / "pi")
    server = request.getfixturevalue("sshd")
    return lambda: SshTransport(server.device, server.known_hosts)


def test_a_kept_engine_of_the_former_layout_is_watched_and_limited(
    connect: Callable[[], LocalTransport | SshTransport], tmp_path: Path
) -> None:
    with zipfile.ZipFile(KEPT) as kept:
        names = kept.namelist()
    assert "engine/watch.py" in names
    assert "engine/limits.py" in names
    assert not any(name.startswith("engine/device/") for name in names)
    session = RemoteSession(
        connect, root=str(tmp_path / "pi/root"), cache_dir=tmp_path / "cache", python=sys.executable
    )
    try:
        kept_bundle = EngineBundle.packed(KEPT.read_bytes())
        session.use(kept_bundle)
        assert session.engine_sha256 == kept_bundle.sha256
        write_random_model(str(tmp_path / "tiny.emoe"), [Format("int8")])
        container = session.put(tmp_path / "tiny.emoe")
        limit = LIMIT_BYTES if best_method() != "none" else None
        request = RunRequest(
            "run-1", container, "naive-swap", prompts=((5, 6, 7, 8),), max_new_tokens=4, deadline_s=120.0,
            settle=Settle(), memory_limit_bytes=limit,
        )  # fmt: skip
        outcome = session.execute(request)
    finally:
        session.close()
    assert outcome.status is RunStatus.OK, (outcome.reasons, outcome.log_tail)
    assert "not watched" not in outcome.log_tail
    assert "not limited" not in outcome.log_tail
    seen = outcome.conditions
    assert seen is not None
    assert seen.readings >= 2
    assert seen.memory_limit_bytes == limit
    assert (seen.memory_limit_method != "none") is (limit is not None)
