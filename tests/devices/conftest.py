"""The farm, driven as a user does, on stand-ins for devices."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from engine.container import Container
from engine.generate import Engine
from engine.protocol import Sampling
from engine.quantize import Format
from engine.selftest import write_random_model
from engine.strategies import STRATEGIES
from reports.records import Run, RunStatus
from reports.results.database import ResultsDatabase
from tests.command_line import finish, start
from tests.devices.userland import emulated
from tests.integration.conftest import Sshd, make_sshd  # noqa: F401 - a fixture

PROMPT, NEW_TOKENS = (1, 17, 5), 6
STRATEGIES_RUN = ("naive-swap", "full-load")


@dataclass(frozen=True)
class Farm:
    """A user's folder: an inventory with one device, a container, a matrix, and a command line."""

    folder: Path
    device: str
    container: Path

    def __call__(self, *arguments: str) -> str:
        code, out, err = finish(start(self.folder, *arguments))
        assert code == 0, f"edgemoe-farm {' '.join(arguments)}: {out}{err}"
        return out

    def probe(self) -> dict[str, Any]:
        """Trusts the device, and returns its facts."""
        self("trust", self.device, "--yes")
        (answer,) = json.loads(self("probe", "--json"))
        facts: dict[str, Any] = answer["facts"]
        return facts

    def run(self) -> list[Run]:
        self("run", "matrix.toml")
        with ResultsDatabase.open(self.folder / "results/farm.db", create=False) as database:
            return list(database.runs(sweep_id=database.sweep("latest").id))

    def measure(self) -> list[Run]:
        """Runs the matrix; every cell must end well, with the tokens that this machine generates."""
        runs = self.run()
        ended_well = sorted(run.cell.strategy for run in runs if run.status is RunStatus.OK)
        assert ended_well == sorted(STRATEGIES_RUN), [(run.status, run.reasons, run.log_tail) for run in runs]
        assert {sample.tokens for run in runs for sample in run.samples} == {generated_here(self.container)}
        return runs


def generated_here(container: Path) -> tuple[int, ...]:
    engine = Engine(Container.open(str(container)), STRATEGIES["full-load"], backend="numpy")
    try:
        return engine.generate(PROMPT, NEW_TOKENS, Sampling())[0]
    finally:
        engine.close()


@pytest.fixture(scope="session", autouse=True)
def ended_means_cleaned_up() -> Iterator[None]:
    """What is mounted, limited or linked goes away also where the tests are told to end."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def make_farm(tmp_path: Path) -> Callable[..., Farm]:
    """make_farm(server) -> Farm for it."""

    def make(server: Sshd) -> Farm:
        folder = tmp_path / "user"
        folder.mkdir()
        container = folder / "tiny.emoe"
        write_random_model(str(container), [Format("int4", 32)])
        device = server.device
        lines = [
            f'host = "{device.host}"',
            f"port = {device.port}",
            f'user = "{device.user}"',
            f'root = "{device.root}"',
        ]
        lines += [f'identity_file = "{device.identity_file}"'] + (
            [f'python = "{device.python}"'] if device.python else []
        )
        (folder / "devices.toml").write_text("\n".join(["version = 1", f"[devices.{device.name}]", *lines, ""]))
        (folder / "matrix.toml").write_text(
            f'name = "stand-in"\nstrategies = {json.dumps(STRATEGIES_RUN)}\nblocks = 1\nwarmups = 0\nrepetitions = 1\n'
            'deadline_s = 120\npage_caches = ["warm"]\n'
            '[[containers]]\nname = "tiny"\npath = "tiny.emoe"\n'
            f'[[workloads]]\nname = "ids"\ntokens = [{list(PROMPT)}]\nmax_new_tokens = {NEW_TOKENS}\n'
        )
        return Farm(folder, device.name, container)

    return make


@pytest.fixture(scope="module")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Programs of other processors run on this machine."""
    with emulated(tmp_path_factory.mktemp("emulation") / "binfmt"):
        yield
