"""The pages that say where things are name what is there."""

from __future__ import annotations

import io
import re
import zipfile
from pathlib import Path

import pytest

from harness.device.deploy import ENGINE_SOURCE, EngineBundle

ROOT = Path(__file__).parent.parent
PACKAGES = sorted(
    path.parent.relative_to(ROOT)
    for package in ("engine", "harness", "device_inventory", "reports")
    for path in (ROOT / package).rglob("__init__.py")
    if "migrations" not in path.parts
)


def named(page: Path) -> set[str]:
    return set(re.findall(r"`([\w/.]+)`", page.read_text(encoding="utf-8")))


@pytest.mark.parametrize("package", PACKAGES, ids=str)
def test_a_package_has_a_short_page_that_names_all_its_files(package: Path) -> None:
    page = ROOT / package / "README.md"
    assert len(page.read_text(encoding="utf-8").splitlines()) <= 12
    names = named(page)
    there = {path.name for path in page.parent.glob("*.py")} - {"__init__.py"}
    if package == Path("harness/cli"):  # one file a command: the page states the rule
        there &= {"__main__.py", "options.py", "showing.py", "bar.py"}
    assert there <= names, f"{page} does not name {', '.join(sorted(there - names))}"
    for name in names:
        if name.endswith((".py", "/", ".toml", ".c", ".h")) and name != "group_command.py":
            places = (ROOT / name, page.parent / name)
            assert any(place.exists() for place in places), f"{page}: there is no {name}"


def test_pages_are_not_sent_to_devices() -> None:
    with zipfile.ZipFile(io.BytesIO(EngineBundle.of(ENGINE_SOURCE).content)) as sent:
        assert "engine/generate.py" in sent.namelist()
        assert not [name for name in sent.namelist() if name.endswith(".md")]


def test_the_architecture_names_files_that_exist() -> None:
    paths = {name for name in named(ROOT / "ARCHITECTURE.md") if "/" in name}
    assert len(paths) > 30
    for path in paths:
        assert (ROOT / path).exists(), f"ARCHITECTURE.md: there is no {path}"


def test_the_architecture_names_types_where_they_are() -> None:
    rows = re.findall(r"^\| (`[A-Z].*?`) \| `(.*?\.py)` \|", (ROOT / "ARCHITECTURE.md").read_text("utf-8"), re.M)
    assert len(rows) > 10
    for names, path in rows:
        source = (ROOT / path).read_text(encoding="utf-8")
        for name in re.findall(r"`(\w+)`", names):
            assert f"class {name}" in source, f"ARCHITECTURE.md: {path} has no {name}"


@pytest.mark.parametrize("folder", ["ci", "tests"])
def test_the_pages_of_scripts_and_tests_name_them(folder: str) -> None:
    names = named_anything(ROOT / folder / "README.md")
    there = {path.name for path in (ROOT / folder).iterdir() if path.name not in ("README.md", "__pycache__")}
    if folder == "tests":
        there -= {"conftest.py", "test_decisions.py"}
    assert there <= {name.rstrip("/") for name in names}, sorted(there - names)


def named_anything(page: Path) -> set[str]:
    return set(re.findall(r"`([\w./-]+)`", page.read_text(encoding="utf-8")))
