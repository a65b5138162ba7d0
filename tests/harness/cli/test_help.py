"""What help says: every command has it, and no summary is cut in a terminal of 80 columns."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import click
import pytest

from harness.cli import main
from tests.command_line import farm


def commands(command: click.Command, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Yields every command with the words that call it."""
    yield words, command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            assert found is not None, name
            yield from commands(found, (*words, name))


COMMANDS = dict(commands(main))
GROUPS = [words for words, command in COMMANDS.items() if isinstance(command, click.Group)]


def test_there_are_the_groups_that_one_expects() -> None:
    assert len(COMMANDS) > 40
    assert {" ".join(words) for words in GROUPS} == {"", "ack", "baseline", "bench", "devices", "model", "results"}


@pytest.mark.parametrize("words", GROUPS, ids=" ".join)
def test_no_summary_is_cut_in_80_columns(words: tuple[str, ...]) -> None:
    listed = farm(*words, "--help").stdout.split("\nCommands:\n")[1].split("\n\n")[0].splitlines()
    assert len(listed) == sum(other[:-1] == words for other in COMMANDS if other)
    assert all(len(line) <= 80 and not line.endswith("...") for line in listed), listed


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_has_help_whose_summary_is_a_sentence(words: tuple[str, ...]) -> None:
    first, *_ = (COMMANDS[words].help or "").splitlines()
    assert first[:1].isupper()
    assert first.endswith(".")


def test_generating_has_the_same_options_here_and_in_the_engine() -> None:
    asked = [sys.executable, "-m", "engine", "generate", "--help"]
    of_engine = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    ours = farm("model", "generate", "--help").stdout
    options = [word for line in of_engine.split("options:")[1].splitlines() for word in line.split()[:1]]
    flags = {word.rstrip(",") for word in options if word.startswith("--")}
    assert len(flags) == 15
    assert all(flag in ours for flag in flags)
