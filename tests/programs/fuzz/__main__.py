"""Puts wrong packets, known_hosts and ssh_config to the farm; exits with 1 where one gets further than it may."""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from pathlib import Path

from tests.programs.fuzz.files import known_hosts_case, ssh_config_case
from tests.programs.fuzz.ssh import Fuzz

MOST_MEMORY_MB = 200
SETTLE_S = 20.0  # within which threads of closed connections end


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="ci/fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=3000, help="of each kind")
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    parser.add_argument("kinds", nargs="*", default=["packets", "known_hosts", "ssh_config"])
    arguments = parser.parse_args()
    failures = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fuzz = Fuzz(folder)
        cases = {
            "packets": lambda seed: fuzz.case(seed)[2],
            "known_hosts": lambda seed: known_hosts_case(folder / "files", seed),
            "ssh_config": lambda seed: ssh_config_case(folder / "files", seed),
        }
        (folder / "files").mkdir()
        before = _open()
        for kind in arguments.kinds:
            ended: Counter[str] = Counter()
            for seed in range(arguments.seed, arguments.seed + arguments.cases):
                try:
                    ended[cases[kind](seed)] += 1
                except Exception:  # noqa: BLE001 - that is what is looked for
                    failures += 1
                    _say(f"{kind}: seed {seed} failed:\n{traceback.format_exc()}")
            _say(f"{kind}: {arguments.cases} cases from seed {arguments.seed}: {dict(sorted(ended.items()))}")
        fuzz.server.hang_up()
        end = time.monotonic() + SETTLE_S
        while (after := _open()) > before and time.monotonic() < end:
            time.sleep(0.1)
        if after > before:
            failures += 1
            _say(f"left open: {after} threads and files, {before} at the start")
    memory_mb = _peak_mb()
    failures += memory_mb > MOST_MEMORY_MB
    _say(f"peak memory {memory_mb:.0f} MB, {MOST_MEMORY_MB} are allowed; {failures} failures")
    return 1 if failures else 0


def _open() -> int:
    """Returns how many threads and files of this process are open."""
    return threading.active_count() + len(os.listdir("/proc/self/fd"))


def _peak_mb() -> float:
    """Returns the peak of this program's memory; what getrusage says may be that of the process that started it."""
    found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"), re.MULTILINE)
    assert found is not None
    return int(found[1]) / 1024


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
