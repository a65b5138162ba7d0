"""Rules of the project as a whole."""

from __future__ import annotations

import ast
import importlib.metadata
import subprocess
import sys
import tomllib
from pathlib import Path

import grimp
import pytest

from harness.sweep.matrix import parse_matrix
from tests.command_line import COMMAND

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PACKAGES = ("engine", "harness", "device_inventory", "reports")


def imports(path: Path) -> set[str]:
    """The packages that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def test_the_engine_needs_python_and_numpy_and_nothing_else() -> None:
    deployed = [path for path in sources("engine") if "offline" not in path.parts]
    assert len(deployed) > 15
    for path in deployed:
        foreign = imports(path) - set(sys.stdlib_module_names) - {"numpy", "engine"}
        assert not foreign, f"{path}: {foreign}"
        offline = "engine.offline" in path.read_text(encoding="utf-8").replace("`engine.offline`", "")
        assert not offline, f"{path} knows engine.offline, which is not deployed"


@pytest.mark.parametrize(
    ("package", "home"),
    [
        ("fabric", "harness/transport/ssh.py"),
        ("paramiko", "harness/transport"),
        ("pandas", "reports"),
        ("jinja2", "reports"),
        ("sqlalchemy", "reports"),
        ("asyncssh", "harness/demo"),
        ("click", "harness/cli"),
    ],
)
def test_a_library_is_used_in_one_place(package: str, home: str) -> None:
    users = [path for path in sources(*PACKAGES) if package in imports(path)]
    assert users
    for path in users:
        assert path.is_relative_to(ROOT / home), f"{path} imports {package}: only {home} may"


def test_the_import_names_are_ours() -> None:
    """PyPI has unrelated projects that install `harness` and `reports`."""
    distributions = importlib.metadata.packages_distributions()
    for package in PACKAGES:
        assert set(distributions.get(package, [])) <= {"edgemoe-farm"}, package
        assert Path(__import__(package).__file__ or "").is_relative_to(ROOT)


def test_the_matrix_of_the_readme_is_one() -> None:
    text = README.split("```toml\n")[1].split("```")[0]
    matrix = parse_matrix(text, source="README.md", folder=ROOT)
    assert matrix.baseline in matrix.strategies
    assert tomllib.loads(text)["devices"] == ["pi5"]
    assert "pi5" in (ROOT / "device_inventory/example.toml").read_text(encoding="utf-8")


def test_the_quickstart_of_the_readme_runs(tmp_path: Path) -> None:
    """Every command of it that needs no device, as it stands there."""
    block = README.split("## On your own devices")[1].split("```sh\n")[1].split("```")[0]
    lines = [line.split(" #")[0].strip() for line in block.splitlines()]
    without_device = [line for line in lines if line.startswith("edgemoe-farm model") or line.endswith("--plan")]
    assert len(without_device) == 3
    (tmp_path / "harness").symlink_to(ROOT / "harness")
    (tmp_path / "matrix.toml").write_text(README.split("```toml\n")[1].split("```")[0], encoding="utf-8")
    (tmp_path / "devices.toml").write_bytes((ROOT / "device_inventory/example.toml").read_bytes())
    for line in without_device:
        arguments = [*COMMAND, *line.split()[1:]]
        result = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False)
        assert result.returncode == 0, f"{line}: {result.stderr}"
    assert (tmp_path / "mix16.profile.json").stat().st_size > 10_000


def test_scripts_are_executable() -> None:
    scripts = [*(p for p in (ROOT / "ci").iterdir() if p.is_file() and not p.suffix), ROOT / ".ci/run"]
    assert len(scripts) >= 5
    for script in scripts:
        assert script.stat().st_mode & 0o111, script
        assert script.read_text(encoding="utf-8").startswith("#!"), script


def test_test_functions_say_what_they_return() -> None:
    for path in sources("tests"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                assert node.returns is not None, f"{path}:{node.lineno}: write `-> None`"


# --- who may know whom ------------------------------------------------------------------------------------------------

WIRE = {f"engine.{module}" for module in ("protocol", "spans", "sizes", "codec", "errors")}  # what crosses to a device
REPORTS = {f"reports.{wing}" for wing in ("errors", "files", "judging", "metrics", "nights", "pages", "records",
                                          "results", "text", "units")}  # fmt: skip
INVENTORY = {"device_inventory", "device_inventory.inventory"}
# A package or wing -> all that it may import of the other packages; pyproject.toml has the order within each.
MAY_IMPORT: dict[str, set[str]] = {
    "engine": set(),
    "device_inventory": set(),
    "reports": WIRE,
    "harness": WIRE | {"engine.files", "reports.pages"},  # its loose files
    "harness.agent": set(),  # runs on devices
    "harness.cli": WIRE | INVENTORY | REPORTS | {
        "engine.container", "engine.experts", "engine.files", "engine.models", "engine.offline", "engine.options",
        "engine.quantize", "engine.selftest", "engine.storage", "engine.strategies", "reports.charts",
    },
    "harness.demo": INVENTORY | {
        "engine.container", "engine.offline", "engine.quantize", "engine.selftest",
        "reports.metrics", "reports.records",
    },
    "harness.device": WIRE | INVENTORY | {"reports.errors", "reports.files", "reports.records", "reports.text"},
    "harness.doctor": WIRE | INVENTORY | {"reports.errors", "reports.records", "reports.results", "reports.text"},
    "harness.night": WIRE | INVENTORY | REPORTS,
    "harness.scripted": WIRE | INVENTORY,
    "harness.sweep": WIRE | INVENTORY | {
        "engine.container", "engine.experts", "engine.files", "engine.models", "engine.offline", "engine.strategies",
        "reports.errors", "reports.files", "reports.metrics", "reports.records", "reports.results", "reports.text",
    },
    "harness.transport": INVENTORY | {"reports.files", "reports.text"},
}  # fmt: skip


def test_a_package_imports_of_the_others_what_it_may_and_nothing_else() -> None:
    graph = grimp.build_graph(*PACKAGES)
    assert graph.modules >= set(MAY_IMPORT)
    for module in sorted(graph.modules):
        home = ".".join(module.split(".")[:2])
        allowed = MAY_IMPORT.get(home) if home in MAY_IMPORT else MAY_IMPORT[module.split(".")[0]]
        for target in graph.find_modules_directly_imported_by(module):
            if target.split(".")[0] != module.split(".")[0]:
                assert ".".join(target.split(".")[:2]) in allowed, f"{module} imports {target}: see MAY_IMPORT"
