"""Carries out the agent's verbs: see harness/agent/__init__.py."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from typing import Any, Callable, Dict, List, Optional

from harness.agent import lease, runs
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


def install(folder: str, source: Optional[str] = None, sha256: Optional[str] = None) -> int:
    """Unpacks an archive, of a file or standard input. Returns 1 for an archive of another hash, and leaves nothing."""
    import hashlib
    import io
    import zipfile  # here only: `attend` should start quickly

    if os.path.isdir(folder):
        return 0
    unfinished = f"{folder}.{os.getpid()}.part"
    with open(source, "rb") if source else io.BytesIO(sys.stdin.buffer.read()) as file:
        if sha256 is not None:
            digest = hashlib.sha256()
            for part in iter(lambda: file.read(1 << 20), b""):
                digest.update(part)
            if digest.hexdigest() != sha256:
                sys.stderr.write(f"{source}: its content is not that of its hash\n")
                return 1
        os.makedirs(unfinished)
        with zipfile.ZipFile(file) as archive:
            archive.extractall(unfinished)
    try:
        os.rename(unfinished, folder)
    except OSError:  # another controller was faster
        shutil.rmtree(unfinished, ignore_errors=True)
        return 0 if os.path.isdir(folder) else 1
    return 0


VERBS: Dict[str, Callable[..., int]] = {
    "attend": runs.attend,
    "kill": runs.kill,
    "discard": runs.discard,
    "acquire": acquire,
    "renew": renew,
    "release": release,
    "unlock": unlock,
    "look": look,
    "install": install,
}


def main(arguments: List[str]) -> int:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a lost link must not end what has been started
    return VERBS[arguments[0]](*arguments[1:])
