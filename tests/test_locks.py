"""What is installed stands in ci/locks, with versions and hashes, for everything that pyproject.toml asks for."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from itertools import product
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.programs.lock_wheels import chosen, wheels

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
REMEDY = "run ci/lock, and commit what it changes"
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
SYSTEMS = (("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "x86_64"), ("darwin", "arm64"))
GROUPS = PROJECT["dependency-groups"]
DEPENDENCIES = PROJECT["project"]["dependencies"]
ASKED = {
    "build": PROJECT["build-system"]["requires"],
    "runtime": DEPENDENCIES,
    "dev": [*DEPENDENCIES, *GROUPS["dev"]],
    "oracle": [*DEPENDENCIES, *GROUPS["dev"], *GROUPS["oracle"]],
    "supply": GROUPS["supply"],
}


def entries(text: str) -> list[tuple[Requirement, list[str]]]:
    """Returns each locked requirement with the hashes of its files."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        if line.strip() and not line.startswith("#"):
            head, *hashes = line.split("--hash=")
            found.append((Requirement(head.strip()), [digest.strip() for digest in hashes]))
    return found


def lock(name: str) -> list[tuple[Requirement, list[str]]]:
    return entries((ROOT / f"ci/locks/{name}.txt").read_text(encoding="utf-8"))


def versions(locked: list[tuple[Requirement, list[str]]], environment: dict[str, str]) -> dict[str, str]:
    """Returns the version of each package that such a Python gets."""
    found: dict[str, str] = {}
    for requirement, _ in locked:
        if requirement.marker is None or requirement.marker.evaluate(environment):
            name = canonicalize_name(requirement.name)
            assert name not in found, f"{name} is locked twice for {environment}"
            found[name] = str(requirement.specifier).removeprefix("==")
    return found


def environments() -> list[dict[str, str]]:
    return [
        {
            "python_version": python, "python_full_version": f"{python}.2", "sys_platform": system,
            "platform_system": system.capitalize(), "platform_machine": machine, "os_name": "posix",
            "implementation_name": "cpython", "platform_python_implementation": "CPython",
        }
        for python, (system, machine) in product(PYTHONS, SYSTEMS)
    ]  # fmt: skip


def missing(asked: list[str], locked: list[tuple[Requirement, list[str]]]) -> list[str]:
    """Returns what is asked for and not locked, in the words of the error message."""
    found = set()
    for environment in environments():
        have = versions(locked, environment)
        for text in asked:
            wanted = Requirement(text)
            if wanted.marker is not None and not wanted.marker.evaluate(environment):
                continue
            version = have.get(canonicalize_name(wanted.name))
            if version is None or not wanted.specifier.contains(version, prereleases=True):
                found.add(f"{text} is asked for, and {version or 'nothing'} is locked: {REMEDY}")
    return sorted(found)


@pytest.mark.parametrize("name", ASKED)
def test_what_the_project_asks_for_is_locked(name: str) -> None:
    assert missing(ASKED[name], lock(name)) == []


@pytest.mark.parametrize("name", ASKED)
def test_everything_has_one_version_and_hashes(name: str) -> None:
    for requirement, hashes in lock(name):
        assert re.fullmatch(r"==[\w.!+]+", str(requirement.specifier)), f"{requirement} is not one version: {REMEDY}"
        assert requirement.url is None
        assert hashes, f"{requirement} has no hash: {REMEDY}"
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", digest) for digest in hashes), requirement


def test_a_dependency_that_is_added_or_raised_is_noticed() -> None:
    locked = entries(
        "one==1.5 \\\n    --hash=sha256:00\ntwo==2.0 ; python_full_version >= '3.12' \\\n    --hash=sha256:00\n"
    )
    assert missing(["one>=1"], locked) == []
    assert missing(["One", "three"], locked) == [f"three is asked for, and nothing is locked: {REMEDY}"]
    assert missing(["one>=1.6"], locked) == [f"one>=1.6 is asked for, and 1.5 is locked: {REMEDY}"]
    assert missing(["two>=2"], locked) == [f"two>=2 is asked for, and nothing is locked: {REMEDY}"]
    assert missing(["two>=2; python_version >= '3.13'"], locked) == []


@pytest.mark.parametrize(("inner", "outer"), [("build", "dev"), ("runtime", "dev"), ("dev", "oracle")])
def test_tools_are_added_to_the_same_versions(inner: str, outer: str) -> None:
    for environment in environments():
        assert versions(lock(inner), environment).items() <= versions(lock(outer), environment).items()


def test_no_script_installs_what_is_not_locked() -> None:
    """Every `pip install` of ci/ takes a lock, or what is made here. ci/peers, which builds a rival, is not locked."""
    for path in sorted((ROOT / "ci").iterdir()):
        if not path.is_file() or path.name == "peers":
            continue
        lines = path.read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
        for line in lines:
            if re.search(r"\bpip\b.* (install|wheel) ", line) and not line.lstrip().startswith(("#", "pip()", "fail")):
                alone = "--no-deps" in line and ("--no-build-isolation" in line or line.endswith("/*.whl"))
                assert "--require-hashes" in line or alone, f"{path.name}: {line.strip()}"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What ci/install needs of the project, in a folder of its own."""
    folder = tmp_path / "checkout"
    shutil.copytree(ROOT / "ci", folder / "ci")
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def test_a_package_of_another_hash_is_not_installed(checkout: Path, tmp_path: Path) -> None:
    ((requirement, _),) = lock("build")
    version = str(requirement.specifier).removeprefix("==")
    index, about = tmp_path / "index", f"setuptools-{version}.dist-info"
    index.mkdir()
    with zipfile.ZipFile(index / f"setuptools-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr("setuptools/__init__.py", "")
        wheel.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: setuptools\nVersion: {version}\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")
    done = subprocess.run(
        [checkout / "ci/install"], capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHON": sys.executable, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index)},
    )  # fmt: skip
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(
        "ci/install: a file from the package index is not the one of ci/locks/build.txt: it was changed"
    )
    assert not list(checkout.glob(".venv/installed-*"))


def listing(*names: str, yanked: str = "") -> object:
    return json.loads(
        json.dumps({"files": [{"filename": n, "hashes": {"sha256": n}, "yanked": n == yanked} for n in names]})
    )


def test_the_newest_wheel_of_each_kind_is_locked_and_an_older_one_for_older_systems() -> None:
    new = "numpy-2.4.0-cp311-cp311-manylinux_2_27_x86_64.manylinux_2_28_x86_64.whl"
    old = "numpy-2.2.0-cp311-cp311-manylinux_2_17_x86_64.manylinux2014_x86_64.whl"
    older = "numpy-2.1.0-cp311-cp311-manylinux_2_17_x86_64.manylinux2014_x86_64.whl"
    musl = "numpy-2.4.0-cp311-cp311-musllinux_1_2_x86_64.whl"
    bad = "numpy-2.5.0-cp311-cp311-manylinux_2_17_x86_64.whl"
    ignored = ("numpy-2.5.0rc1-cp311-cp311-manylinux_2_17_x86_64.whl", "numpy-2.5.0.tar.gz",
               "numpy-2.5.0-cp311-cp311-win_amd64.whl", "numpy-2.5.0-cp311-cp311-macosx_14_0_arm64.whl")  # fmt: skip
    assert set(chosen(wheels(listing(new, old, older, musl, bad, *ignored, yanked=bad)))) == {new, old, musl}
