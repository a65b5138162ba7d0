"""Whatever stands in a lease's files, the device can be had, and nobody who held it before still has it."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest

from harness.agent import lease, place
from harness.device.lease import LeaseState

OWNER = {"who": "ann@box", "sweep": "s", "pid": 7, "process": "1 2"}
TTL_S = 100.0
ODD: list[Any] = [
    None, True, -1, 0, 3.5, 2**60, 10**400, 1e300, float("nan"), float("inf"), "", "7", "x" * 5000, "\x00\x1b", [],
    [[]], {}, {"who": 1}, [None], [{}], [{"holder": 1, "owner": OWNER, "since": 0, "heartbeat": 0}],
]  # fmt: skip


@pytest.fixture
def root(tmp_path: Path) -> str:
    return place.prepare(str(tmp_path / "farm"))


def ask(root: str, name: str, now: float, **options: Any) -> dict[str, Any]:
    owner = {**OWNER, "who": f"{name}@box"}
    return lease.request(root, name, owner, TTL_S, lambda: now, "boot-1", **options)


def told(seen: dict[str, Any]) -> LeaseState:
    """What a controller makes of it: it refuses what it does not understand."""
    return LeaseState.parse(json.dumps(seen).encode(), "pi")


def can_be_had(root: str, former_token: int) -> None:
    """Somebody else gets the device at once or when the time of whoever holds it is over, and unlocking works."""
    seen = told(lease.look(root, lambda: 20.0, "boot-1"))
    if seen.state == "held":
        assert seen.expires_in_s is not None
        assert seen.expires_in_s <= lease.MOST_TTL_S
        assert told(lease.unlock(root, seen.token, lambda: 20.0, "boot-1")).state == "free"
    for later in (21.0, 400.0):  # a ticket in the queue lives for a minute
        got = told(ask(root, "ben", later))
        if got.granted:
            break
    assert got.granted
    assert got.token > 0
    assert not lease.renew(root, "ann", former_token, TTL_S, lambda: later + 1, "boot-1")["granted"]
    lease.release(root, "ben", lambda: later + 2, "boot-1")
    assert told(ask(root, "cas", later + 3)).granted


@pytest.mark.parametrize("file", ["lease.json", "alive.json"])
@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"7", b'"x"', b"\xff\xfe", b"[" * 100_000, b"{}", b'{"token": 1e999}']
)
def test_a_file_that_holds_something_else(root: str, file: str, content: bytes) -> None:
    token = ask(root, "ann", 10.0)["token"]
    (Path(root) / "lease" / file).write_bytes(content)
    can_be_had(root, token)


@pytest.mark.parametrize("file", ["lease.json", "alive.json"])
def test_a_folder_by_the_name_of_a_file(root: str, file: str) -> None:
    token = ask(root, "ann", 10.0)["token"]
    (Path(root) / "lease" / file).unlink()
    (Path(root) / "lease" / file / "x").mkdir(parents=True)
    can_be_had(root, token)


@pytest.mark.parametrize("seed", range(300))
def test_valid_json_of_wrong_content(root: str, seed: int) -> None:
    """Values are exchanged for odd ones, left out, and added, anywhere."""
    chooser = random.Random(seed)
    token = ask(root, "ann", 10.0)["token"]
    ask(root, "cas", 11.0)
    for name in chooser.choice([["lease.json"], ["alive.json"], ["lease.json", "alive.json"]]):
        path = Path(root) / "lease" / name
        content = json.loads(path.read_text())
        for _ in range(chooser.choice([1, 1, 2, 5])):
            place_of = content
            while chooser.random() < 0.4:
                inner = [v for v in (place_of.values() if isinstance(place_of, dict) else place_of) if v]
                inner = [v for v in inner if isinstance(v, (dict, list))]
                if not inner:
                    break
                place_of = chooser.choice(inner)
            keys = list(place_of) if isinstance(place_of, dict) else list(range(len(place_of)))
            act, key = chooser.choice(["put", "put", "put", "drop", "add"]), chooser.choice(keys or [0])
            if act == "put" and keys:
                place_of[key] = copy.deepcopy(chooser.choice(ODD))
            elif act == "drop" and keys:
                del place_of[key]
            elif isinstance(place_of, dict):
                place_of[f"new-{seed}"] = copy.deepcopy(chooser.choice(ODD))
        path.write_text(json.dumps(content))
    can_be_had(root, token)


def test_what_a_newer_farm_added_changes_nothing(root: str) -> None:
    token = ask(root, "ann", 10.0)["token"]
    for name in ("lease.json", "alive.json"):
        path = Path(root) / "lease" / name
        content = {**json.loads(path.read_text()), "added": {"x": 1}, "v": 2}
        if content.get("owner"):
            content["owner"]["site"] = "lab-2"
        path.write_text(json.dumps(content))
    seen = told(lease.look(root, lambda: 11.0, "boot-1"))
    assert (seen.state, seen.token, seen.holder, str(seen.owner)) == ("held", token, "ann", "ann@box for sweep s")
    assert told(ask(root, "ben", 12.0)).granted is False
    assert lease.renew(root, "ann", token, TTL_S, lambda: 13.0, "boot-1")["granted"]


def test_a_damaged_token_is_followed_by_one_above_all_before(root: str) -> None:
    for name in ("ann", "ben", "cas"):
        token = ask(root, name, 10.0)["token"]
        lease.release(root, name, lambda: 10.0, "boot-1")
    (Path(root) / "lease" / "lease.json").write_text('{"v": 1, "token": "7", "holder": null, "owner": null}')
    assert ask(root, "ann", 11.0)["token"] > token
