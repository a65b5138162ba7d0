"""Speaks the protocol and measures nothing. `strategy` says what it does; `max_new_tokens` is a count for it.

good          all samples, at once
slow          waits 0.1 s before each of `max_new_tokens` lines on the log, then all is good
sleep         never ends by itself
stubborn      the same, and ignores SIGTERM
restless      the same, until the device has restarted: its boot id begins with 1 before
memory        reports MemoryBudgetError
alone         makes a folder that must not be there yet, and removes it at its end
killed        kills itself with signal 9
garbage       a line that is no JSON, then sleeps
flood         one endless line
fills         fills the disk, and fails of it
escape        writes terminal escapes to its log, then exits with 3
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import signal
import sys
import time

from engine.codec import from_json, to_json
from engine.protocol import DeviceFacts, Load, RunRequest, Sample, Steps, Totals, encode_event

FACTS = DeviceFacts("stub", platform.machine(), "6.1", None, None, None, 1, None, 4096, None, "3", "2", None, "stub")
LOAD = Load(0.1, 1, 1, None, 10, 1, None, {"name": "stub"}, "pread", "numpy")


def emit(event, **content) -> None:
    sys.stdout.write(encode_event(event, **content) + "\n")
    sys.stdout.flush()


def main() -> int:
    if sys.argv[1] == "selftest":
        print(json.dumps({"check": "stub", "ok": True, "detail": ""}))
        return 0
    if sys.argv[1] == "probe":
        print(json.dumps(to_json(FACTS)))
        return 0
    with open(sys.argv[3], "rb") as file:
        text = file.read()
    request = from_json(RunRequest, json.loads(text))
    sys.stderr.write("stub: {}\n".format(os.environ.get("HOME")))
    emit("started", facts=FACTS, request_sha256=hashlib.sha256(text).hexdigest())
    emit("loaded", load=LOAD)
    sys.stderr.flush()
    what = request.strategy
    if what == "slow":
        for i in range(request.max_new_tokens):
            time.sleep(0.1)
            sys.stderr.write(f"step {i}\n")
    if what == "alone":
        os.mkdir(request.container)
        time.sleep(0.05)
        os.rmdir(request.container)
    if what == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with open("/proc/sys/kernel/random/boot_id") as file:
        waits = what == "restless" and file.read(1) == "1"
    if what in ("sleep", "stubborn") or waits:
        time.sleep(3600)
    if what == "memory":
        emit("failed", kind="memory", message="does not fit")
        return 4
    if what == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "garbage":
        sys.stdout.write("{{{ this is no JSON\n")
        sys.stdout.flush()
        time.sleep(3600)
    if what == "fills":
        with open(os.path.join(os.path.dirname(sys.argv[3]), "ballast"), "wb", buffering=0) as file:
            for size in (1 << 20, 4096, 1):
                try:
                    while True:
                        file.write(bytes(size))
                except OSError as error:
                    last = error
        raise last
    if what == "flood":
        while True:
            sys.stdout.write("x" * (1 << 20))
    if what == "escape":
        sys.stderr.write("\x1b[31mred\x1b]0;title\x07 \u202eword\n")
        return 3
    for prompt in range(len(request.prompts)):
        for n in range(request.warmups + request.repetitions):
            zero = (0,)
            steps = Steps(**{**dict.fromkeys(Steps.__dataclass_fields__, zero), "time_s": (0.1,), "stall_s": (0.0,)})
            emit("sample", sample=Sample(prompt, n, n < request.warmups, (7,), steps, None, None))
    emit("finished", totals=Totals(1.0, None, None, None, None))
    return 0


sys.exit(main())
