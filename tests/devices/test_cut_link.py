"""A device behind a link that is cut in the middle of a transfer, and in the middle of a run."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.protocol import RunRequest
from engine.quantize import Format
from engine.selftest import write_random_model
from harness.device.remote import RemoteSession
from harness.transport.ssh import SshTransport
from reports.records import RunStatus
from tests.devices.conftest import NEW_TOKENS, PROMPT, generated_here
from tests.devices.link import Link

pytestmark = pytest.mark.integration


@pytest.fixture
def link() -> Iterator[Link]:
    made = Link()
    yield made
    made.close()


@pytest.fixture
def session(link: Link, make_sshd: Callable[..., Any], tmp_path: Path) -> Iterator[RemoteSession]:
    """Opens a session that mends its link once the loss has been noticed."""
    server = make_sshd("pi", host=link.there, inside=link.within)

    def mend_and_sleep(seconds: float) -> None:
        link.mend()
        time.sleep(seconds)

    opened = RemoteSession(
        lambda: SshTransport(server.device, server.known_hosts, unanswered_s=2),
        root=server.device.root,
        python=server.device.python,
        cache_dir=tmp_path / "cache",
        sleep=mend_and_sleep,
    )
    yield opened
    opened.close()


def test_a_cut_upload_goes_on_where_it_stopped(session: RemoteSession, link: Link, tmp_path: Path) -> None:
    model, cuts = tmp_path / "model.emoe", []
    model.write_bytes(os.urandom(64 << 20))

    def cut_half_way(sent: int) -> None:
        if sent > 32 << 20 and not cuts:
            cuts.append(sent)
            link.cut()

    before = session.bytes_sent
    path = session.put(model, progress=cut_half_way)
    assert cuts
    assert Path(path).read_bytes() == model.read_bytes()
    # The half that was left passed no link that was cut. What was under way at that moment goes twice, if anything was,
    # and no more: a window of SSH and what the sockets hold.
    assert model.stat().st_size <= session.bytes_sent - before < model.stat().st_size + (16 << 20)


def test_a_cut_run_is_followed_to_its_end(session: RemoteSession, link: Link, tmp_path: Path) -> None:
    container = tmp_path / "tiny.emoe"
    write_random_model(str(container), [Format("int8")])
    request = RunRequest(
        "cut",
        session.put(container),
        "naive-swap",
        prompts=(PROMPT,),
        max_new_tokens=NEW_TOKENS,
        warmups=0,
        repetitions=4,
        emulated_read_bytes_per_s=1e6,  # about a second for each repetition
        deadline_s=100,
    )
    cuts = []

    def cut_at_the_first_sample(event: str, content: dict[str, Any]) -> None:
        if event == "sample" and not cuts:
            cuts.append(content["sample"].repetition)
            link.cut()

    outcome = session.execute(request, on_event=cut_at_the_first_sample)
    assert (outcome.status, outcome.reasons) == (RunStatus.OK, ()), outcome.log_tail
    assert cuts == [0]
    assert [sample.repetition for sample in outcome.samples] == [0, 1, 2, 3]
    assert {sample.tokens for sample in outcome.samples} == {generated_here(container)}
