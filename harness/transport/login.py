"""Gets a command past the login shell of a device, whichever that is, and its output apart from what that prints.

A server hands every command line to the user's login shell, or to a ForceCommand. Each has its own quoting, and each
may print before and after. So a line here has only what all read alike: words in single quotes, without
quote, backslash, exclamation mark or line break. One `sh` decodes them, and puts marks around what the command writes.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence

from harness.errors import RemoteCommandError
from reports.text import harmless

MOST_BEFORE_BYTES = 1 << 20  # that a login shell may print before the command begins, and after it ended
_SHOWN_BYTES = 400
_BEGIN, _END = b"begin-", b"end-"  # each with the mark; apart in the command line, which a wrapper may print
# $1: the mark; the rest: the command, each word behind "=", or behind "%" and in the escapes of printf.
_SCRIPT = (
    "m=$1; shift; for a do shift; "
    'case $a in %*) a=$(printf "%b." "${a#?}"); a=${a%.};; *) a=${a#?};; esac; set -- "$@" "$a"; done; '
    'printf "%s%s" begin- "$m"; printf "%s%s" begin- "$m" >&2; "$@"; s=$?; '
    'printf "%s%s" end- "$m"; printf "%s%s" end- "$m" >&2; exit "$s"'
)


def new_mark() -> str:
    """Returns a mark that no output has by chance."""
    return secrets.token_hex(8)


def command_line(arguments: Sequence[str], mark: str) -> str:
    """Returns a line that every login shell reads alike."""
    words = ["sh", "-c", _SCRIPT, "sh", mark, *(_coded(argument) for argument in arguments)]
    return " ".join(f"'{word}'" for word in words)


def _coded(argument: str) -> str:
    """Returns a word of printable ASCII without quotes and what a shell may take for more."""
    if argument.isascii() and argument.isprintable() and not set(argument) & set("'\\!"):
        return f"={argument}"
    try:
        content = argument.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        content = argument.encode("utf-8", "surrogatepass")
    plain = b"".join(
        bytes([byte]) if 32 <= byte < 127 and byte not in b"'\\!" else b"\\0%03o" % byte for byte in content
    )
    return f"%{plain.decode()}"


class Between:
    """Passes on what stands between the marks of one stream."""

    def __init__(self, name: str, mark: str, take: Callable[[bytes], None]) -> None:
        self._name = name
        self._begin, self._end = _BEGIN + mark.encode(), _END + mark.encode()
        self._take = take
        self._held = bytearray()  # what may be the beginning of a mark
        self.before = bytearray()  # the beginning of what came before it
        self._before_bytes = self._after_bytes = 0
        self.began = self.ended = False

    def feed(self, piece: bytes) -> None:
        """Takes the next bytes. Raises RemoteCommandError where no command begins, and what `take` raises."""
        if self.ended:
            self._after_bytes += len(piece)
            self._check(self._after_bytes, "after a command ended")
            return
        self._held += piece
        if not self.began:
            before, found, after = bytes(self._held).partition(self._begin)
            self.began = bool(found)
            passed = len(before) if found else max(0, len(self._held) - len(self._begin) + 1)
            self.before += before[: min(passed, _SHOWN_BYTES - len(self.before))]
            self._before_bytes += passed
            self._check(self._before_bytes, "before a command began")
            self._held = bytearray(after) if found else self._held[passed:]
            if not found:
                return
        inside, found, _ = bytes(self._held).partition(self._end)
        if found:
            self.ended = True
            self._held.clear()
        else:
            keep = _overlap(self._held, self._end)
            inside = bytes(self._held[: len(self._held) - keep])
            del self._held[: len(inside)]
        if inside:
            self._take(inside)

    def _check(self, size: int, when: str) -> None:
        if size > MOST_BEFORE_BYTES:
            raise RemoteCommandError(
                f"{self._name}: the login shell there printed more than {MOST_BEFORE_BYTES} bytes {when}: "
                "let it print nothing when it is not interactive"
            )

    def finish(self) -> None:
        """Passes on what was held back: the stream has ended, without the mark where the command was killed."""
        held = bytes(self._held)
        self._held.clear()
        if not self.began:
            self.before += held[: _SHOWN_BYTES - len(self.before)]
        elif held and not self.ended:
            self._take(held)


def _overlap(content: bytes | bytearray, mark: bytes) -> int:
    """Returns how many bytes at the end of `content` may be the beginning of `mark`."""
    return next((n for n in range(min(len(mark) - 1, len(content)), 0, -1) if content.endswith(mark[:n])), 0)


def refusal(name: str, status: int, *streams: Between) -> RemoteCommandError:
    """Returns what to say where the login shell answered and the command never began."""
    lines = [line for s in streams for line in bytes(s.before).decode("utf-8", "replace").splitlines() if line.strip()]
    said = f"only answers `{harmless(lines[0].strip(), limit=200)}`" if lines else "says nothing"
    return RemoteCommandError(
        f"{name}: the login shell there, or a ForceCommand, {said} (exit status {status}) and runs no command: let "
        "this user have a shell that runs `sh -c`, see `getent passwd` and sshd_config there"
    )
