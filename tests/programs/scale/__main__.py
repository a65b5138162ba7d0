"""The command line of ci/soak."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from tests.programs.scale.openssh import measure_real
from tests.programs.scale.soak import broken_promises, soak


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="ci/soak",
        description="Many scripted devices with random faults under a controller that is killed and resumed. Exits "
        "with 1 when a cell does not end exactly once, a record is lost or doubled, a lock is left, or the memory of "
        "the controller grows. With --real: real OpenSSH servers and the real engine instead.",
        epilog="examples: ci/soak --devices 200 --cells 20 --kills 10 --seed 1 --json    ci/soak --real 32",
    )
    parser.add_argument("--devices", type=int, default=200, help="scripted devices (default 200)")
    parser.add_argument("--cells", type=int, default=20, help="on each device, in whole blocks of 4 (default 20)")
    parser.add_argument("--kills", type=int, default=10, help="of the controller, with SIGKILL (default 10)")
    parser.add_argument("--seed", type=int, default=1, help="of faults and kills (default 1)")
    parser.add_argument(
        "--real", type=int, metavar="N", help="real servers on 127.0.0.1, with the real engine, instead"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, and nothing else")
    options = parser.parse_args()

    def say(line: str) -> None:
        print(f"ci/soak: {line}", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        if options.real:
            result = measure_real(Path(folder), devices=options.real, say=say)
            broken = [] if result["ok"] == result["cells"] else ["a cell did not end well"]
        else:
            result = soak(
                Path(folder),
                devices=options.devices,
                cells=options.cells,
                kills=options.kills,
                seed=options.seed,
                say=say,
            )
            broken = broken_promises(result)
    if options.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name:15} {value}")
    for promise in broken:
        print(f"ci/soak: broken promise: {promise}", file=sys.stderr)
    return 1 if broken else 0


sys.exit(main())
