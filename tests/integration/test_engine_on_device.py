"""The real engine, deployed over real SSH and run there."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from engine.protocol import RunRequest
from engine.quantize import Format
from engine.selftest import write_random_model
from harness.agent.stores import RECORD, _record
from harness.device.opening import open_session
from reports.records import Fault, RunStatus

pytestmark = pytest.mark.integration


@pytest.fixture
def session(sshd, tmp_path):
    opened = open_session(sshd.device, known_hosts=sshd.known_hosts, cache_dir=tmp_path / "cache")
    yield opened
    opened.close()


@pytest.fixture
def container(tmp_path):
    path = tmp_path / "tiny.emoe"
    write_random_model(str(path), [Format("int8")])
    return path


def request(container, strategy):
    return RunRequest(
        run_id=strategy,
        container=container,
        strategy=strategy,
        prompts=((1, 2, 3), (4, 5)),
        max_new_tokens=4,
        warmups=1,
        repetitions=2,
        deadline_s=120,
    )


def test_strategies_on_a_device_give_the_same_tokens(session, container) -> None:
    path = session.put(container)
    outcomes = [session.execute(request(path, strategy)) for strategy in ("full-load", "naive-swap")]
    assert [(o.status, o.reasons) for o in outcomes] == [(RunStatus.OK, ())] * 2, outcomes[0].log_tail
    tokens = [[sample.tokens for sample in outcome.samples] for outcome in outcomes]
    assert len(tokens[0]) == 2 * 3
    assert tokens[0] == tokens[1]
    told_by_the_probe_alone = {"now": None, "memory_limit_method": None}
    assert outcomes[0].facts == replace(session.facts, **told_by_the_probe_alone)
    assert session.facts.python.startswith("3.")


def test_a_damaged_container_is_the_engines_own_word(session, container, tmp_path) -> None:
    damaged = tmp_path / "damaged.emoe"
    damaged.write_bytes(container.read_bytes()[:-100])
    outcome = session.execute(request(session.put(damaged), "full-load"))
    assert outcome.status is RunStatus.FAILED
    assert "damaged.emoe" in outcome.reasons[0]


@pytest.mark.parametrize("at", [3, 40, 300, -5000])
def test_a_bit_that_the_medium_flipped_is_found_and_the_container_sent_again(session, container, at) -> None:
    path = Path(session.put(container))
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)
    # A medium that forgets changes no time: the record of the file is as it would be then.
    record = json.loads((path.parent / RECORD).read_text())
    (path.parent / RECORD).write_text(json.dumps(_record(path.lstat(), record["sha256"])))
    outcome = session.execute(request(str(path), "full-load"))
    assert outcome.fault is not Fault.STORAGE, "the engine does not know better"
    assert session.damage(thorough=True) == f"{path} was missing or damaged"
    again = session.execute(replace(request(session.put(container), "full-load"), run_id="again"))
    assert again.status is RunStatus.OK, again.reasons
