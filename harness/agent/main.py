"""Carries out the agent's verbs: see harness/agent/__init__.py."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from typing import Any, Callable, Dict, List, Optional

from harness.agent import lease, place, runs, stores
from harness.agent.files import boot_id, since_boot_s

WAIT_POLL_S = 1.0  # a glance at two small files: what is being measured there does not notice


def acquire(root: str) -> int:
    wish, began, first = json.loads(sys.stdin.buffer.read()), since_boot_s(), None
    while True:
        answer = lease.request(
            root,
            wish["holder"],
            wish["owner"],
            wish["ttl_s"],
            since_boot_s,
            boot_id(),
            queue=wish["queue"],
            instead_of=wish["instead_of"],
        )
        news = (answer["holder"], answer["position"])
        if answer["granted"] or news != (first or news) or since_boot_s() - began >= wish["wait_s"]:
            break
        first = news
        sys.stdout.write("\n")  # fails when nobody listens any more, and so ends this process
        sys.stdout.flush()
        time.sleep(WAIT_POLL_S)
    if answer["granted"]:
        runs.inherit(root, wish["holder"], wish["owner"]["sweep"])
        answer["occupied"] = runs.end_others(root, owned_by=wish["holder"])
    return say(answer)


def renew(root: str, holder: str, token: str, ttl_s: str) -> int:
    return say(lease.renew(root, holder, int(token), float(ttl_s), since_boot_s, boot_id()))


def release(root: str, holder: str) -> int:
    lease.release(root, holder, since_boot_s, boot_id())
    return 0


def unlock(root: str, token: str) -> int:
    return say(lease.unlock(root, int(token), since_boot_s, boot_id()))


def look(root: str) -> int:
    return say(lease.look(root, since_boot_s, boot_id()))


def say(answer: Dict[str, Any]) -> int:
    sys.stdout.write(json.dumps(answer) + "\n")
    return 0


def prepare(root: str) -> int:
    try:
        return say({"root": place.prepare(root)})
    except place.NotOursError as error:
        return say({"refused": str(error)})
    except OSError as error:
        sys.stderr.write(f"{error.filename or root}: {error.strerror}\n")
        return 1


def check(folder: str) -> int:
    wanted = json.loads(sys.stdin.buffer.read())
    return say({"differs": stores.difference(folder, wanted)})


def install(folder: str, source: Optional[str] = None) -> int:
    stores.install(folder, source or sys.stdin.buffer.read())
    return 0


def blob(path: str, sha256: str, size_bytes: str, how: str) -> int:
    return say({"state": stores.look_at_blob(path, sha256, int(size_bytes), how)})


VERBS: Dict[str, Callable[..., int]] = {
    "attend": runs.attend,
    "kill": runs.kill,
    "discard": runs.discard,
    "acquire": acquire,
    "renew": renew,
    "release": release,
    "unlock": unlock,
    "look": look,
    "prepare": prepare,
    "check": check,
    "install": install,
    "blob": blob,
}
DEPTH = {"attend": 2, "kill": 2, "discard": 2, "check": 2, "install": 2, "blob": 3}  # of the first argument, below ROOT


def main(arguments: List[str]) -> int:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a lost link must not end what has been started
    os.umask(0o077)
    verb, root = arguments[0], arguments[1]
    for _ in range(DEPTH.get(verb, 0)):
        root = os.path.dirname(root)
    try:
        if verb != "prepare":
            place.verify(root)
        return VERBS[verb](*arguments[1:])
    except place.NotOursError as error:
        sys.stderr.write(f"{error}\n")
        return 1
