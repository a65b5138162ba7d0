"""Generates on the controller: a RunRequest in an engine process of its own, exactly as a device would run it.

Its own process, because threads of numpy's BLAS are fixed when it starts and peak memory must be the engine's alone.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass

from engine import errors
from engine.codec import to_json
from engine.errors import DeadlineError, EngineError
from engine.protocol import DeviceFacts, Load, RunRequest, Sample, Totals, decode_event

_GRACE_S = 60.0  # beyond the deadline that the engine itself holds


@dataclass(frozen=True)
class Generation:
    """Holds all that an engine process said."""

    facts: DeviceFacts
    load: Load
    samples: tuple[Sample, ...]
    totals: Totals


def generate(request: RunRequest) -> Generation:
    """Runs the request; its own deadline holds in that process. Raises the EngineError that the process reported."""
    # -P: a folder called `engine` where the user happens to stand is not ours.
    try:
        process = subprocess.run(
            [sys.executable, "-P", "-m", "engine", "run", "--request", "-"],
            input=json.dumps(to_json(request)).encode(),
            capture_output=True,
            timeout=request.deadline_s + _GRACE_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise DeadlineError(
            f"the engine did not end within {request.deadline_s + _GRACE_S:.0f} s; it was killed"
        ) from None
    content: dict[str, object] = {}
    samples: list[Sample] = []
    for line in process.stdout.splitlines():
        event, fields = decode_event(line)
        if event == "failed":
            raise _error(fields["kind"], fields["message"])
        if event == "sample":
            samples.append(fields["sample"])
        else:
            content.update(fields)
    facts, load, totals = content.get("facts"), content.get("load"), content.get("totals")
    if not (isinstance(facts, DeviceFacts) and isinstance(load, Load) and isinstance(totals, Totals)):
        last = "".join(process.stderr.decode(errors="replace").strip().splitlines()[-1:])[:300]
        raise EngineError(
            f"the engine ended with status {process.returncode} before it had finished: {last or 'silent'}; "
            "try a smaller expert budget, or `python3 -m engine selftest`"
        )
    return Generation(facts, load, tuple(samples), totals)


def _error(kind: str, message: str) -> EngineError:
    """Returns the error of that kind, as if it had been raised here."""
    kinds = {e.kind: e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, EngineError)}
    return kinds.get(kind, EngineError)(message)
