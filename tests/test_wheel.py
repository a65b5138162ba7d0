"""What `pip install` brings is what the checkout has."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from engine.offline.benchmarks.kernels import available_kernels
from harness.device.deploy import ENGINE_SOURCE, EngineBundle

ROOT = Path(__file__).parent.parent
PACKAGES = ("engine", "harness", "device_inventory", "reports")

LOOK = """
import json
from engine.offline.benchmarks.kernels import available_kernels
from harness.device.deploy import ENGINE_SOURCE, EngineBundle
from pathlib import Path
from reports.results.database import ResultsDatabase
ResultsDatabase.open(Path("farm.db")).close()
found = [kernels.backend for kernels in available_kernels()]
print(json.dumps([str(ENGINE_SOURCE), EngineBundle.of(ENGINE_SOURCE).sha256, found]))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The content of the wheel, in a folder of its own."""
    source, into = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", into, source]
    subprocess.run(command, check=True, timeout=120)
    (wheel,) = into.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(into)
    return into


def test_a_wheel_has_every_file_of_the_packages(installed: Path) -> None:
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*"):
            relative = path.relative_to(ROOT)
            if path.is_file() and "__pycache__" not in path.parts and path.suffix not in (".md", ".png"):
                assert (installed / relative).is_file(), f"{relative} is not in the wheel"


def test_what_is_installed_deploys_the_same_engine_and_computes_with_native_kernels(
    installed: Path, tmp_path: Path
) -> None:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, "-P", "-c", LOOK], cwd=tmp_path, env=environment, check=True, capture_output=True, timeout=60
    )
    source, sha256, backends = json.loads(done.stdout)
    assert Path(source) == installed / "engine"
    assert sha256 == EngineBundle.of(ENGINE_SOURCE).sha256
    assert backends == [kernels.backend for kernels in available_kernels()]
