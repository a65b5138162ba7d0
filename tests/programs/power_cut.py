"""The command line of ci/power-cut: cuts the power of a device with an ext4 card at any moment, again and again.

The device is this machine with its farm folder on ext4, on a loop device. While a controller deploys, brings numpy,
takes the lease, runs and collects, the card's image is copied at random moments, each between two writes to it: that
is what a card holds after a power cut. Each copy is then mounted in the card's place, under a new boot id, and the next
run has to work by itself.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import engine.protocol
from engine.protocol import RunRequest
from harness.device.bootstrap import WheelCache, _interpreter
from harness.device.lease import Holder, Owner
from harness.device.remote import RemoteSession
from harness.transport.local import LocalTransport
from reports.records import RunStatus

CARD_BYTES = 48 << 20
CONTAINER_BYTES = 3 << 20
NUMPY_FILES = 40
ATTEMPTS = 3  # as a sweep has for what the infrastructure costs
COPIES_TRIED = 200  # until nothing was written to the card meanwhile
_STUB = Path(__file__).parents[1] / "integration" / "stub_engine"


class CannotCutError(Exception):
    """Says why this machine cannot be used for it."""


@dataclass(frozen=True)
class Result:
    """Holds what came of one power cut; `broken` is empty where the next run worked by itself."""

    at_s: float
    broken: str


class Card:
    """Is an image with ext4 in it, and where it is mounted."""

    def __init__(self, folder: Path) -> None:
        self.image, self.mounted_at = folder / "card.img", folder / "card"
        self.mounted_at.mkdir()
        with self.image.open("wb") as file:
            file.truncate(CARD_BYTES)
        _do(
            "mkfs.ext4",
            "-q",
            "-F",
            "-O",
            "has_journal",
            "-E",
            "lazy_itable_init=0,lazy_journal_init=0",
            str(self.image),
        )

    @contextlib.contextmanager
    def mounted(self, image: Path) -> Iterator[str]:
        """Mounts an image in the card's place; yields its loop device."""
        _do("mount", "-t", "ext4", "-o", "loop", str(image), str(self.mounted_at))
        try:
            yield _do("findmnt", "-n", "-o", "SOURCE", str(self.mounted_at)).strip()
        finally:
            _do("umount", str(self.mounted_at))

    def copy(self, loop: str, target: Path) -> None:
        """Copies the image as it is at one moment: between two writes to it, however long that takes."""
        for _ in range(COPIES_TRIED):
            before = _written(loop)
            _do("cp", "--sparse=always", str(self.image), str(target))
            if _written(loop) == before:
                return
        raise CannotCutError("the card is written to without a pause: try again on an idle machine")


def cut_power(folder: Path, *, cuts: int, seed: int) -> list[Result]:
    """Returns the result of each of `cuts` power cuts, at moments drawn by `seed`. Raises CannotCutError."""
    if os.geteuid() != 0:
        raise CannotCutError("mounting a loop device needs root")
    card, chance = Card(folder), random.Random(seed)
    _lay_out(folder)
    empty = folder / "empty.img"
    with card.mounted(card.image):
        pass
    shutil.copyfile(card.image, empty)
    with card.mounted(card.image):  # how long does it take?
        began = time.monotonic()
        broken = _ended(_start(folder, "1", "boot-0"))
        whole_s = time.monotonic() - began
    if broken:
        return [Result(math.inf, broken)]
    results = []
    for number in range(cuts):
        shutil.copyfile(empty, card.image)
        at_s, copy = chance.uniform(0.0, 1.2 * whole_s), folder / "copy.img"
        with card.mounted(card.image) as loop:
            process = _start(folder, "1", f"boot-{number}")
            time.sleep(at_s)
            card.copy(loop, copy)
            process.kill()  # and with it the namespace, and all that runs there
            process.communicate()
        with card.mounted(copy):
            results.append(Result(at_s, _ended(_start(folder, "1", f"boot-{number}-again"))))
        copy.unlink()
    return results


def _lay_out(folder: Path) -> None:
    """Writes what the controller needs: an engine, a container, a Python without numpy and a wheel for it."""
    left_out = shutil.ignore_patterns("__pycache__", "experts", "kernels", "models", "offline", "py.typed")
    shutil.copytree(Path(engine.protocol.__file__).parent, folder / "stub" / "engine", ignore=left_out)
    shutil.copytree(_STUB, folder / "stub" / "engine", ignore=left_out, dirs_exist_ok=True)
    (folder / "model.emoe").write_bytes(random.Random(1).randbytes(CONTAINER_BYTES))
    _do(sys.executable, "-m", "venv", "--without-pip", str(folder / "bare"))
    python = _interpreter(LocalTransport("card", folder), str(folder / "bare/bin/python3"))
    abi, platform = python.abi, python.platforms[0]
    init = "__version__ = '9.9'\n" + "".join(f"from numpy import m{n}\n" for n in range(NUMPY_FILES))
    files = {"numpy/__init__.py": init, **{f"numpy/m{n}.py": f"x = {n}\n" * 50 for n in range(NUMPY_FILES)}}
    record = "numpy-9.9.dist-info/RECORD,,\n"
    for name, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("=")
        record += f"{name},sha256={digest},{len(text)}\n"
    (folder / "wheels").mkdir()
    with zipfile.ZipFile(folder / "wheels" / f"numpy-9.9-{abi}-{abi}-{platform}.whl", "w") as wheel:
        for name, text in {**files, "numpy-9.9.dist-info/RECORD": record}.items():
            wheel.writestr(name, text)


def _start(folder: Path, sweep: str, boot: str) -> subprocess.Popen[str]:
    """Starts a controller and its device in namespaces of their own, under the boot id `boot`."""
    (folder / "boot_id").write_text(boot + "\n")
    mount = f"mount --bind {folder}/boot_id /proc/sys/kernel/random/boot_id"
    controller = [sys.executable, "-m", "tests.programs.power_cut", "--controller", str(folder), "--sweep", sweep]
    namespaces = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    return subprocess.Popen(
        [*namespaces, "sh", "-c", f'{mount} && "$0" "$@"', *controller],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _ended(process: subprocess.Popen[str]) -> str:
    """Waits for a controller; returns why it did not do all of its work, or nothing."""
    output, errors = process.communicate()
    if process.returncode == 0 and output.strip() == "done":
        return ""
    return (errors.strip().splitlines() or output.strip().splitlines() or [f"exit status {process.returncode}"])[-1]


def _control(folder: Path, sweep: str) -> None:
    """Does what a controller does for two cells of a sweep, the same each time."""
    model, (wheel,) = folder / "model.emoe", (folder / "wheels").glob("*.whl")
    session = RemoteSession(
        lambda: LocalTransport("card", folder / "card"),
        root="farm",
        cache_dir=folder / "cache",
        python=str(folder / "bare/bin/python3"),
        engine_source=folder / "stub" / "engine",
        wheels=WheelCache(folder / "wheels", offline=True, locked={wheel.name: _sha256(wheel)}),
        holder=Holder(os.urandom(8).hex(), Owner.this_process(sweep)),
        wait_s=5.0,
    )
    with contextlib.closing(session):
        planned = _sha256(model)
        for cell in range(2):
            for attempt in range(ATTEMPTS):
                path = session.put(model, sha256=planned)
                request = RunRequest(
                    run_id=f"{sweep}-{cell}-{attempt}", container=path, strategy="good", prompts=((1, 2),),
                    max_new_tokens=1, repetitions=2, deadline_s=60.0,
                )  # fmt: skip
                outcome = session.execute(request, keep=True)
                session.forget(request.run_id)
                if outcome.status is RunStatus.OK:
                    break
                if outcome.fault is None or not outcome.fault.is_infrastructure:
                    raise SystemExit(f"told as a result: {outcome.fault}: {outcome.reasons}")
                if attempt == ATTEMPTS - 1:
                    raise SystemExit(f"it does not work by itself: {outcome.fault}: {outcome.reasons}")
                session.damage(thorough=True)
        if Path(path).read_bytes() != model.read_bytes():
            raise SystemExit("the container on the card is not what was sent")
    print("done")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _written(loop: str) -> str:
    """Returns how many sectors were written to a block device, and how many writes are under way."""
    fields = Path(f"/sys/block/{Path(loop).name}/stat").read_text().split()
    return f"{fields[4]} {fields[6]} {fields[8]}"


def _do(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise CannotCutError(f"{command[0]}: {error.strerror}") from None
    if done.returncode != 0:
        raise CannotCutError(f"{command[0]} cannot be used here: {done.stderr.strip()[-300:]}")
    return done.stdout


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="ci/power-cut",
        description="Cuts the power of a device with an ext4 card at random moments of a session. Exits with 1 where "
        "the next run does not work by itself, with 77 where it cannot be tried: it needs root and a loop device.",
        epilog="example: ci/power-cut --cuts 100 --seed 7",
    )
    parser.add_argument("--cuts", type=int, default=60, help="how many (default 60, about six minutes)")
    parser.add_argument("--seed", type=int, default=1, help="of their moments (default 1)")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, and nothing else")
    parser.add_argument("--controller", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--sweep", default="1", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.controller:
        _control(options.controller, options.sweep)
        return 0
    with tempfile.TemporaryDirectory(prefix="power-cut-") as folder:
        try:
            results = cut_power(Path(folder), cuts=options.cuts, seed=options.seed)
        except CannotCutError as error:
            print(f"ci/power-cut: skipped: {error}", file=sys.stderr)
            return 77
    broken = [result for result in results if result.broken]
    if options.json:
        print(json.dumps({"cuts": len(results), "broken": [vars(result) for result in broken]}))
    else:
        for result in broken:
            print(f"after {result.at_s:.2f} s: {result.broken}")
        print(f"{len(results)} power cuts, {len(broken)} after which the next run did not work by itself")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
