"""A command gets past any login shell as it is, and only its own output comes back."""

from __future__ import annotations

import itertools
import shutil
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.errors import RemoteCommandError
from harness.transport.login import MOST_BEFORE_BYTES, Between, command_line, new_mark, refusal

SHELLS = ("sh", "dash", "bash", "tcsh", "fish")
WORDS = (
    "a\nb", "a\n\n", "\n", "!x", "!!", "it's", 'a "b"', "\\", "\\\\n", "\\'", "%", "=", "$HOME `id` $(id)", "*", "~",
    "", " ", "-n", "\t", "ü€", "{a,b}", "^a^b", "#", "%s%n", "\\c", "\\012", "a;b|c&d>e<f", "\x01\x7f",
)  # fmt: skip


def between(pieces: list[bytes], mark: str) -> bytes:
    out = bytearray()
    stream = Between("pi", mark, out.extend)
    for piece in pieces:
        stream.feed(piece)
    stream.finish()
    return bytes(out)


@pytest.mark.parametrize("shell", SHELLS)
def test_a_login_shell_hands_every_word_on_as_it_is(shell: str) -> None:
    binary = shutil.which(shell)
    if binary is None:
        pytest.skip(f"{shell} is not installed here")
    mark = new_mark()
    line = command_line(["printf", "%s|", *WORDS], mark)
    done = subprocess.run([binary, "-c", line], capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert between([done.stdout], mark).decode() == "".join(f"{word}|" for word in WORDS)
    assert between([done.stderr], mark) == b""


@pytest.mark.parametrize("shell", ["sh", "tcsh", "fish"])
@pytest.mark.parametrize("status", [0, 1, 9, 127, 137])
def test_the_exit_status_is_that_of_the_command(shell: str, status: int) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed here")
    line = command_line(["sh", "-c", f"echo out; echo err >&2; exit {status}"], mark := new_mark())
    done = subprocess.run([shell, "-c", line], capture_output=True, timeout=60, check=False)
    assert done.returncode == status
    assert (between([done.stdout], mark), between([done.stderr], mark)) == (b"out\n", b"err\n")


@given(st.lists(st.text(st.characters(exclude_characters="\0"), max_size=9), max_size=5))
def test_a_line_holds_nothing_that_a_login_shell_may_take_for_more(words: list[str]) -> None:
    line = command_line(words, new_mark())
    assert line.isascii() and line.isprintable()
    assert "!" not in line and "\\\\" not in line and "\\'" not in line


@given(st.binary(max_size=60), st.binary(max_size=60), st.binary(max_size=60), st.lists(st.integers(0, 240)))
def test_what_stands_between_the_marks_is_passed_on_in_any_pieces(
    before: bytes, inside: bytes, after: bytes, cuts: list[int]
) -> None:
    mark = "0123456789abcdef"
    whole = before + b"begin-" + mark.encode() + inside + b"end-" + mark.encode() + after
    places = [0, *sorted(cuts), len(whole)]
    assert between([whole[a:b] for a, b in itertools.pairwise(places)], mark) == inside
    cut_off = before + b"begin-" + mark.encode() + inside
    assert between([cut_off], mark) == inside, "a command that was killed has no end"


def test_a_mark_in_the_line_is_none_in_the_output() -> None:
    """A wrapper or `set -x` may print the line itself."""
    line = command_line(["true"], mark := new_mark())
    assert f"begin-{mark}" not in line
    assert f"end-{mark}" not in line


def test_a_shell_that_prints_without_end_is_broken_off() -> None:
    stream = Between("pi", new_mark(), lambda piece: pytest.fail("nothing began"))
    with pytest.raises(RemoteCommandError, match="pi: the login shell there printed more than"):
        for _ in range(MOST_BEFORE_BYTES // 1000 + 2):
            stream.feed(b"y\n" * 500)
    assert len(stream.before) < 1000


def test_a_shell_that_runs_nothing_is_named_with_what_it_says() -> None:
    stream = Between("pi", new_mark(), lambda piece: None)
    stream.feed(b"\nThis account is currently not available.\x1b[2J\n")
    stream.finish()
    told = str(refusal("pi", 1, stream))
    assert (
        "pi: the login shell there, or a ForceCommand, only answers `This account is currently not available." in told
    )
    assert "exit status 1" in told
    assert "\x1b" not in told
