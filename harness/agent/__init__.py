"""Acts for the farm on a device: standard library only, Python >= 3.8. Nothing is installed there.

The controller sends the modules of this package over standard input, followed by the verb's own input, and runs

    python3 -I -S -c BOOT VERB ARGUMENT...      (-S: site-packages would take longer than all the rest)

attend  RUN OFFSET HOLDER TOKEN TTL
            starts the engine unless the run's folder exists, then follows it: the bytes of its events from OFFSET on
            stdout; blank lines as a sign of life, and at the end one JSON object, on stderr. Renews the lease while
            somebody listens; under a lease that is lost it does nothing. Input: JSON {"arguments": [...], "cwd": ...,
            "request": ..., "deadline_s": ..., "settle": ..., "memory_limit_bytes": ...}; without input it never starts
            anything
kill        RUN HOLDER: ends the engine's process group, if it is the holder's
discard     RUN HOLDER: the same, and removes the folder
acquire     ROOT: asks for the lease, and waits in the queue until there is news or `wait_s` have passed. Input: JSON
            {"holder", "owner", "ttl_s", "wait_s", "queue", "instead_of"}, see lease.request
renew       ROOT HOLDER TOKEN TTL: a sign of life
release     ROOT HOLDER: gives up the lease, or the place in the queue
unlock      ROOT TOKEN: takes the lease away, if it is still the one with this token
look        ROOT: shows it
prepare     ROOT: makes the farm's folder, or makes sure that it is; answers {"root": PATH} or {"refused": REASON}
check       FOLDER KIND: compares a folder of engines or sites with {NAME: SHA256} from its input; answers {"differs":
            WHAT}, null where it is what was sent
install     FOLDER [ZIP]: unpacks a zip from its input, or a file there; the folder appears when it is complete, and
            takes the place of one that differs
blob        FILE SHA256 BYTES HOW: looks at a container or profile, see stores.look_at_blob; answers {"state": ...}

What is seen of the lease is one JSON object on stdout. Every verb but `prepare` fails where ROOT is not the farm's
folder (any more), and touches nothing then: see place.py. Here is the controller's end; the rest runs there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from harness.transport import Completed, Transport

DEADLINE_S = 60.0
_MODULES = ("place", "files", "stores", "lease", "runs", "main")  # in the order of their imports
_BOOT = 'import sys; exec(compile(sys.stdin.buffer.read(int(sys.argv.pop(1))), "agent", "exec"))'
_UNPACK = """\
import sys, types
for name, source in [("harness", ""), ("harness.agent", ""), *{modules!r}]:
    sys.modules[name] = module = types.ModuleType(name)
    exec(compile(source, name, "exec"), module.__dict__)
sys.exit(module.main(sys.argv[1:]))
"""
_SOURCES = [(f"harness.agent.{name}", (Path(__file__).parent / f"{name}.py").read_text("utf-8")) for name in _MODULES]
AGENT = _UNPACK.format(modules=_SOURCES).encode()


def call(transport: Transport, python: str, verb: str, *arguments: str, **options: Any) -> Completed:
    """Runs one verb of the agent on the device. Raises what `Transport.run` does."""
    options = {"deadline_s": DEADLINE_S, **options, "stdin": AGENT + options.get("stdin", b"")}
    return transport.run([python, "-I", "-S", "-c", _BOOT, str(len(AGENT)), verb, *arguments], **options)
