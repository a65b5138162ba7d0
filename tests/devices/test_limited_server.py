"""An sshd whose sessions together have little memory and slow storage: real limits, set by the kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.offline.importing.importer import import_checkpoint
from engine.protocol import ExpertBudget, RunRequest
from engine.quantize import Format
from engine.selftest import selftest_profile
from harness.device.opening import open_session
from harness.device.session import Session
from reports.records import RunStatus
from tests.devices.limits import Card, ControlGroup, card
from tests.devices.userland import need
from tests.golden.checkpoints import SHIPPED

pytestmark = pytest.mark.integration
MIB = 1 << 20
LIMIT_BYTES = 128 * MIB
READ_BYTES_PER_S = 100 * MIB


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model with its experts in FP32: 96 MiB of them."""
    path = tmp_path_factory.mktemp("wide") / "mix16.emoe"
    selftest_profile(import_checkpoint(SHIPPED, path, [Format("fp32")])).save(f"{path}.profile")
    return path


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[Card]:
    need()
    with card(tmp_path / "card.img", tmp_path / "card", 512 * MIB) as made:
        yield made


@pytest.fixture
def limited(storage: Card) -> Iterator[ControlGroup]:
    group = ControlGroup(LIMIT_BYTES, storage, READ_BYTES_PER_S)
    yield group
    group.close()


@pytest.fixture
def session(limited: ControlGroup, storage: Card, make_sshd: Callable[..., Any], tmp_path: Path) -> Iterator[Session]:
    server = make_sshd("pi", inside=limited.within)
    device = replace(server.device, root=str(storage.folder))
    opened = open_session(device, known_hosts=server.known_hosts, cache_dir=tmp_path / "cache")
    yield opened
    opened.close()


def test_experts_are_read_again_where_memory_does_not_hold_them(
    session: Session, limited: ControlGroup, storage: Card, wide: Path
) -> None:
    """All of them at once: an out-of-memory ending, which is a result. With a buffer: the same tokens, from storage."""
    path, profile = session.put(wide), session.put(Path(f"{wide}.profile"))
    request = {"prompts": ((5, 6, 7, 8),), "max_new_tokens": 16, "warmups": 0, "repetitions": 1, "page_cache": "cold"}

    def run(strategy: str, **changes: Any) -> Any:
        return session.execute(RunRequest(strategy, path, strategy, **{**request, "deadline_s": 120, **changes}))

    whole = run("full-load")
    assert whole.status is RunStatus.OUT_OF_MEMORY, (whole.reasons, whole.log_tail)
    assert "killed by signal 9" in whole.reasons[0]
    before = limited.bytes_read(storage)
    buffered = run("edgemoe-buffer", profile=profile, expert_budget=ExpertBudget(bytes=24 * MIB))
    swapped = run("naive-swap")
    for outcome in (buffered, swapped):
        assert outcome.status is RunStatus.OK, (outcome.reasons, outcome.log_tail)
        assert outcome.load.page_cache_resident_fraction < 0.01
        assert outcome.totals.peak_resident_bytes < LIMIT_BYTES
    assert buffered.samples[0].tokens == swapped.samples[0].tokens
    # What the engine read came from the card, but for a library's pages; and it is more where nothing is kept.
    read = [outcome.totals.storage_read_bytes for outcome in (buffered, swapped)]
    assert 16 * MIB < read[0] < read[1]
    assert limited.bytes_read(storage) - before > 0.99 * sum(read)
    assert limited.peak_bytes() <= LIMIT_BYTES
