"""MANUAL.md is complete: its tables have the keys, commands, metrics and exit codes that the code knows."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import click
import pytest

from device_inventory.inventory import _KEYS
from harness.cli import main
from harness.night import config
from harness.sweep import matrix
from reports.judging.judgement import ACCURACY, GATED
from reports.metrics import METRICS

ROOT = Path(__file__).parent.parent
MANUAL = (ROOT / "MANUAL.md").read_text(encoding="utf-8")
PAGES = {
    name: (ROOT / name).read_text(encoding="utf-8")
    for name in ("README.md", "MANUAL.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "DECISIONS.md")
}


def rows(heading: str, nth: int = 0) -> dict[str, list[str]]:
    """Returns the cells after the first of each row of the nth table below a heading, by the text of the first."""
    section = re.split(r"^#{2,3} ", MANUAL.split(f"# {heading}\n", 1)[1], maxsplit=1, flags=re.M)[0]
    table = re.findall(r"(?:^\|.*\n)+", section, re.M)[nth]
    lines = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table.splitlines()[2:]]
    assert len({line[0] for line in lines}) == len(lines), f"{heading}: a row stands there twice"
    return {line[0].strip("`"): line[1:] for line in lines}


def keys_read(function: Callable[..., object] | ModuleType, table: str) -> set[str]:
    """Returns the keys that code asks `table` for: the texts that it gives to that table's methods."""
    tree = ast.parse(inspect.getsource(function))
    found = {
        node.args[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args
        and isinstance(node.func.value, ast.Name) and node.func.value.id == table
        and isinstance(node.args[0], ast.Constant)
    }  # fmt: skip
    return {str(key) for key in found}


@pytest.mark.parametrize(
    ("nth", "function", "table"),
    [
        (0, matrix.parse_matrix, "top"),
        (1, matrix._container, "table"),
        (2, matrix._workload, "table"),
        (3, matrix._accuracy, "table"),
        (4, matrix._wanted, "table"),
    ],
)
def test_the_keys_of_the_matrix_are_all_there(nth: int, function: Callable[..., object], table: str) -> None:
    known = keys_read(function, table) | ({"device_expert_budgets"} if nth == 0 else set())
    assert len(known) > 2
    assert set(rows("The matrix", nth)) == known


def test_the_keys_of_the_inventory_are_all_there() -> None:
    assert set(rows("The inventory")) == set(_KEYS)


def test_the_keys_of_the_nightly_configuration_are_all_there() -> None:
    known = keys_read(config.read_nightly, "top") - {"thresholds", "accuracy", "confirmation", "retention", "webhook"}
    for table in ("confirmation", "retention", "webhook"):
        known |= {f"{table}.{key}" for key in keys_read(config.read_nightly, table)}
    known |= {f"{'accuracy' if name == ACCURACY else 'thresholds'}.{name}" for name in GATED}
    assert set(rows("The nightly configuration")) == known
    for name, share in GATED.items():
        place = f"{'accuracy' if name == ACCURACY else 'thresholds'}.{name}"
        assert rows("The nightly configuration")[place][1] == f"{share:g}"


def test_the_metrics_are_those_of_the_reports() -> None:
    shown = rows("Metrics")
    assert list(shown) == list(METRICS)
    for name, (definition, unit) in shown.items():
        metric = METRICS[name]
        assert definition == metric.definition
        assert unit == f"{metric.unit or 'none'}, {metric.better} is better"


def commands(group: click.Group = main, prefix: str = "") -> Iterator[tuple[str, click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if not isinstance(command, click.Group) or command.invoke_without_command:
            yield f"{prefix}{name}", command
        if isinstance(command, click.Group):
            yield from commands(command, f"{prefix}{name} ")


@pytest.mark.parametrize(("name", "command"), list(commands()), ids=lambda v: v if isinstance(v, str) else "")
def test_every_command_and_option_has_help(name: str, command: click.Command) -> None:
    assert command.help, f"{name} says nothing of itself"
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{name} {parameter.opts[0]} says nothing of itself"


def test_the_commands_are_those_of_the_command_line() -> None:
    shown = {name: text for name, (text,) in rows("Commands").items()}
    assert shown == {name: command.get_short_help_str(200).rstrip(".") for name, command in commands()}


@pytest.mark.parametrize(("arguments", "nth"), [(["--help"], 0), (["nightly", "--help"], 1)])
def test_the_exit_codes_are_those_of_the_help(arguments: list[str], nth: int) -> None:
    help_text = subprocess.run(
        [sys.executable, "-c", f"from harness.cli import main; main({arguments})"],
        capture_output=True, text=True, check=True, timeout=60,
    ).stdout  # fmt: skip
    shown = rows("Exit codes", nth)
    assert len(shown) == (6, 7)[nth]
    for code, (meaning,) in shown.items():
        lines = [line for line in help_text.splitlines() if line.split()[:1] == [code]]
        assert any(meaning[:30] in line for line in lines), code


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], re.M | re.S)


def command_lines() -> list[str]:
    found = [
        line.split("  #")[0].strip()
        for page in ("README.md", "MANUAL.md")
        for block in blocks(page, "sh")
        for line in block.splitlines()
    ]
    return sorted({line for line in found if line.startswith("edgemoe-farm ")})


@pytest.mark.parametrize("line", command_lines())
def test_a_command_line_of_the_pages_is_understood(line: str) -> None:
    """Parses it as click does, options, choices and all, and runs nothing."""
    words, command, context = shlex.split(line)[1:], main, click.Context(main)
    while isinstance(command, click.Group) and words and words[0] in command.list_commands(context):
        found = command.get_command(context, words.pop(0))
        assert found is not None
        command, context = found, click.Context(found, parent=context)  # type: ignore[assignment]
    assert command is not main, line
    command.make_context(command.name, words, parent=context.parent)


def anchors(page: str) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", PAGES[page], flags=re.M | re.S), re.M)
    named = set(re.findall(r'<a id="([\w-]+)">', PAGES[page]))
    return named | {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        assert (ROOT / path).exists(), f"{page} links to {path}, which is not there"
        if anchor:
            assert anchor in anchors(path or page), f"{page} links to #{anchor} of {path or page}, which is not there"
