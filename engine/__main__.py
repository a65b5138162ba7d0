"""python3 -m engine: runs on a device.

Events and results go to stdout as JSON lines, the log to stderr. Exit status: 0 done, 1 a bug, 2 bad request or
arguments, 3 damaged container or profile, 4 memory budget, 5 storage, 6 deadline.

Environment: EDGEMOE_BACKEND (numpy, native) is what backend `auto` stands for; TMPDIR is where `selftest` puts its
small container; EDGEMOE_TEST_DELAY (such as edgemoe=0.10) is a hook for tests that slows a strategy down, see
engine/slowdown.py. The threads of numpy's BLAS (OPENBLAS_NUM_THREADS and the like) follow --threads, whatever they
were.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
import traceback
from typing import Any, Dict, List, Optional

from engine import __version__
from engine.codec import from_json, loads, to_json
from engine.errors import EngineError, RequestError
from engine.options import add_generation_options, generation_request
from engine.protocol import (
    BACKENDS,
    RunRequest,
    Settle,
    encode_event,
)

MAX_REQUEST_BYTES = 64 << 20


def main(arguments: Optional[List[str]] = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        command = {
            "run": _run,
            "generate": _generate,
            "probe": _probe,
            "watch": _watch,
            "strategies": _strategies,
            "selftest": _selftest,
            "arithmetic": _arithmetic,
            "storage": _storage,
        }[options.command]
        return command(options)
    except EngineError as error:
        _log(f"error: {error}")
        return error.exit_code
    except MemoryError:
        _log("error: out of memory; choose a smaller expert budget or container")
        return 4
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # whoever read the results has gone
        return 1
    except OSError as error:
        _log(f"error: {error}")
        return 5
    except KeyboardInterrupt:
        return 130


def _run(options: argparse.Namespace) -> int:
    try:
        if options.request == "-":
            text = sys.stdin.buffer.read(MAX_REQUEST_BYTES)
        else:
            with open(options.request, "rb") as file:
                text = file.read(MAX_REQUEST_BYTES)
    except OSError as error:
        raise RequestError(f"{options.request}: cannot be read: {error.strerror}") from None

    def emit(event: str, **content: Any) -> None:
        sys.stdout.write(encode_event(event, **content) + "\n")
        sys.stdout.flush()

    try:
        request = from_json(RunRequest, loads(text))
        _limit_threads(request.threads)
        from engine.device.facts import device_facts
        from engine.generate import run

        emit("started", facts=device_facts(), request_sha256=hashlib.sha256(text).hexdigest())
        run(request, emit)
        return 0
    except EngineError as error:
        emit("failed", kind=error.kind, message=str(error))
        raise
    except MemoryError:
        emit("failed", kind="memory", message="out of memory; choose a smaller expert budget or container")
        raise
    except OSError as error:
        emit("failed", kind="storage", message=str(error))
        raise
    except Exception as error:  # noqa: BLE001 - the controller must hear of a bug as of anything else
        emit("failed", kind="bug", message=f"{type(error).__name__}: {error}")
        traceback.print_exc()
        return 1


def _generate(options: argparse.Namespace) -> int:
    try:
        prompt = tuple(int(word) for word in options.tokens.split(","))
    except ValueError:
        raise RequestError(f"--tokens {options.tokens!r} is not a list of token ids such as 5,6,7") from None
    _limit_threads(options.threads)
    from engine.generate import run

    samples: List[Dict[str, Any]] = []
    events: Dict[str, Any] = {}

    def emit(event: str, **content: Any) -> None:
        events.update(content)
        if event == "sample":
            samples.append(to_json(content["sample"]))

    request = generation_request("generate", options.container, prompt, vars(options))
    run(request, emit)
    result = {"tokens": samples[0]["tokens"], "sample": samples[0]}
    result.update({name: to_json(events[name]) for name in ("load", "totals")})
    _print(result)
    return 0


def _probe(options: argparse.Namespace) -> int:
    from engine.device.facts import device_facts

    _print(to_json(device_facts(now=True)))
    return 0


def _watch(options: argparse.Namespace) -> int:
    from engine.device.sensors import Sensors
    from engine.device.watch import watch

    end = time.monotonic() + options.seconds

    def pause(seconds: float) -> bool:
        time.sleep(max(0.0, min(seconds, end - time.monotonic())))
        return time.monotonic() >= end

    _print(to_json(watch(Settle(), Sensors(), pause=pause)))
    return 0


def _arithmetic(options: argparse.Namespace) -> int:
    _limit_threads(options.threads)
    from engine.arithmetic import measure_arithmetic
    from engine.container import Container

    _print(
        to_json(measure_arithmetic(Container.open(options.container), backend=options.backend, threads=options.threads))
    )
    return 0


def _storage(options: argparse.Namespace) -> int:
    from engine.container import Container
    from engine.storage import storage_rates

    _print(to_json(storage_rates(Container.open(options.container), again=options.again)))
    return 0


def _strategies(options: argparse.Namespace) -> int:
    from engine.strategies import STRATEGIES

    _print([strategy.describe() for strategy in STRATEGIES.values()])
    return 0


def _selftest(options: argparse.Namespace) -> int:
    _limit_threads(1)
    from engine.selftest import selftest

    return 0 if selftest(options.folder, _print, options.check) else 1


def _limit_threads(threads: int) -> None:
    """Limits numpy's BLAS to `threads`, or to one. Call before numpy is imported.

    More threads would compete with the I/O thread.
    """
    threads = threads or 1
    assert "numpy" not in sys.modules or threads == 1 or "pytest" in sys.modules
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS"):
        os.environ[name] = str(threads)


def _print(value: Any) -> None:
    sys.stdout.write(json.dumps(value, allow_nan=False) + "\n")
    sys.stdout.flush()


def _log(message: str) -> None:
    sys.stderr.write(f"engine: {message}\n")
    sys.stderr.flush()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python3 -m engine", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="do what a request asks, and emit events")
    run.add_argument("--request", required=True, metavar="FILE", help="RunRequest as JSON; - for standard input")

    generate = commands.add_parser("generate", help="generate from token ids, and print tokens and measurements")
    generate.add_argument("container", metavar="CONTAINER")
    generate.add_argument("--tokens", required=True, metavar="IDS", help="the prompt, such as 5,6,7")
    add_generation_options(generate)

    commands.add_parser("probe", help="print facts about this device")
    watch = commands.add_parser("watch", help="print what this device's sensors say while some seconds pass")
    watch.add_argument("--seconds", type=float, default=5.0, help="(default 5)")
    commands.add_parser("strategies", help="print the table of strategies")
    arithmetic = commands.add_parser("arithmetic", help="measure how long a token's arithmetic takes here")
    arithmetic.add_argument("container", metavar="CONTAINER")
    arithmetic.add_argument("--backend", choices=BACKENDS, default="auto", help="kernels (default auto)")
    arithmetic.add_argument("--threads", type=int, default=0, help="of the arithmetic (default: what suits the cores)")
    storage = commands.add_parser("storage", help="measure how experts are read best here, or tell what was measured")
    storage.add_argument("container", metavar="CONTAINER")
    storage.add_argument("--again", action="store_true", help="whatever was measured before")
    selftest = commands.add_parser("selftest", help="prove that everything works on this device, in seconds")
    selftest.add_argument("check", nargs="?", choices=("arithmetic", "strategies", "damage"), help="only this one")
    selftest.add_argument("--folder", metavar="DIR", help="where to put a small container (default: TMPDIR)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
