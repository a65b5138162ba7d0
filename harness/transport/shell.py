"""Builds every act of a transport from POSIX commands over one primitive.

Nothing but a POSIX shell with `dd`, `df`, `wc` and one of sha256sum, shasum or python3 is assumed on the device: no
SFTP subsystem (dropbear and embedded servers often lack it), no /tmp, no bash. An upload writes through `dd seek=`, at
fixed offsets: bytes of a cut connection that still arrive late are written where they belong, so that two attempts
cannot corrupt one another.
"""

from __future__ import annotations

import hashlib
import math
import re
import shlex
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from harness.errors import DiskFullError, RemoteCommandError, RemoteTimeoutError
from harness.transport import Completed
from harness.transport.login import Between, command_line, new_mark, refusal
from reports.text import harmless

OUTPUT_LIMIT_BYTES = 16 << 20  # kept of one command's stdout, and of its stderr
GRACE_S = 10.0  # how much longer the controller waits than the device's own deadline: for the network, and the kill
SHORT_DEADLINE_S = 30.0
STALL_S = 30.0
TRANSFER_DEADLINE_S = 7 * 86400.0
HASH_BYTES_PER_S = 10e6  # of the slowest device: sets the deadline of the final check
DISK_MARGIN_BYTES = 16 << 20
BLOCK_BYTES = 1 << 16
CHUNK_BYTES = 1 << 18
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

# GNU, busybox and toybox know `timeout -k`; where it is missing or old, a watchdog does the same for the command alone.
# $1: seconds; the rest: the command.
_TIMEOUT = ("timeout", "-k", "2")
_WATCHDOG = (
    "n=$1; shift; "
    'exec 3<&0; "$@" <&3 3<&- & p=$!; '
    '(sleep "$n"; kill -9 "$p") >/dev/null 2>&1 </dev/null 3<&- & w=$!; exec 3<&-; '
    'wait "$p"; s=$?; kill "$w" 2>/dev/null; exit "$s"'
)
# $1: partial file, $2: its folder. Prints the bytes that are there and the KiB that are free. A link is no partial file
# of ours, and a folder that is one leads elsewhere.
_SURVEY = (
    'umask 077; mkdir -p -- "$2" || exit; '
    '[ ! -h "$2" ] || { echo "$2 is a link, which is not followed: remove it" >&2; exit 1; }; '
    '[ ! -h "$1" ] || rm -f -- "$1" || exit; if [ -f "$1" ]; then wc -c <"$1"; else echo 0; fi; '
    'df -Pk -- "$2" | tail -n 1 | { read -r _ _ _ free _; echo "$free"; }'
)
# $1: partial file, $2: blocks of BLOCK_BYTES to skip.
_RECEIVE = f'umask 077; [ ! -h "$1" ] || exit 1; exec dd of="$1" bs={BLOCK_BYTES} seek="$2" conv=notrunc 2>/dev/null'
# $1: partial file, $2: target, $3: sha256, $4: bytes, $5: the target's folder. Exits 9 where the content differs. File
# and names are synced: a power cut leaves all of it or nothing. Old versions of `sync` know no files, and sync all.
_FINISH = (
    '[ "$(wc -c <"$1")" -eq "$4" ] || exit 9; '
    'if command -v sha256sum >/dev/null 2>&1; then h=$(sha256sum <"$1"); '
    'elif command -v shasum >/dev/null 2>&1; then h=$(shasum -a 256 <"$1"); '
    'else h=$(python3 -c "import hashlib,sys; h=hashlib.sha256(); '
    '[h.update(b) for b in iter(lambda: sys.stdin.buffer.read(1<<20), bytes())]; print(h.hexdigest())" <"$1"); fi; '
    '[ "${h%% *}" = "$3" ] || exit 9; sync "$1" 2>/dev/null || sync; '
    '[ ! -h "$2" ] || rm -f -- "$2" || exit; [ ! -d "$2" ] || { echo "$2 is a folder: remove it" >&2; exit 1; }; '
    'mv -f -- "$1" "$2" || exit; sync "$5" "$5/.." 2>/dev/null || sync'
)


class ShellTransport(ABC):
    """Implements what SSH and local transports share."""

    def __init__(self, name: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.name = name
        self.bytes_sent = 0
        self._clock = clock
        self._knows_timeout: bool | None = None  # asked at the first command

    @abstractmethod
    def _execute(
        self,
        command_line: str,
        stdin: Iterable[bytes],
        on_stdout: Callable[[bytes], None],
        on_stderr: Callable[[bytes], None],
        *,
        wait_s: float,
        silence_s: float | None,
    ) -> int:
        """Runs a shell command line; returns its exit status, negative where a signal killed it.

        Raises UnreachableError where the link was lost, or stood still for STALL_S with input unsent, or gave no
        output for `silence_s`; TimeoutError after `wait_s`. A command may end before it has taken all its input.
        """

    @abstractmethod
    def close(self) -> None: ...

    def run(
        self,
        arguments: Sequence[str],
        *,
        deadline_s: float,
        environment: Mapping[str, str] | None = None,
        stdin: bytes = b"",
        check: bool = True,
        on_stdout: Callable[[bytes], None] | None = None,
        silence_s: float | None = None,
    ) -> Completed:
        pieces = [stdin[at : at + CHUNK_BYTES] for at in range(0, len(stdin), CHUNK_BYTES)]
        return self._run(arguments, pieces, deadline_s, environment or {}, check, on_stdout, silence_s)

    def upload(
        self,
        source: Path,
        target: str,
        *,
        sha256: str | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> int:
        total = source.stat().st_size
        digest = sha256 or _sha256(source)
        partial = f"{target}.{digest[:16]}.part"
        sent = 0
        for fresh in (False, True):
            if fresh:  # what was there did not fit the rest: begin again, once
                self._shell('exec rm -f -- "$1"', partial)
            sent += self._send_rest(source, partial, target, total, progress)
            deadline_s = SHORT_DEADLINE_S + total / HASH_BYTES_PER_S
            finished = self._shell(
                _FINISH, partial, target, digest, str(total), _folder(target), check=False, deadline_s=deadline_s
            )
            if finished.exit_status == 0:
                return sent
            if finished.exit_status != 9:
                break
        reason = _last_line(finished.stderr) or "its checksum on the device differs: was it changed while it was sent?"
        raise RemoteCommandError(f"{self.name}: {source} could not be put at {target}: {reason}")

    def _send_rest(
        self, source: Path, partial: str, target: str, total: int, progress: Callable[[int], None] | None
    ) -> int:
        present, free = self._survey(partial, target)
        blocks = min(present, total) // BLOCK_BYTES
        offset = blocks * BLOCK_BYTES
        if free < total - offset + DISK_MARGIN_BYTES:
            raise DiskFullError(
                f"{self.name}: {source.name} needs {_mb(total - offset)} (and {_mb(DISK_MARGIN_BYTES)} to spare) in "
                f"{_folder(target)}, {_mb(free)} are free: free some space or set `root` to a larger disk"
            )
        before = self.bytes_sent
        if present != total or total == 0:
            pieces = self._read_from(source, offset, progress)
            # A transfer may take hours on a slow link: what ends it is STALL_S without progress, not its length.
            receive = ["sh", "-c", _RECEIVE, "sh", partial, str(blocks)]
            done = self._run(receive, pieces, TRANSFER_DEADLINE_S, {}, False, None, None)
            if done.exit_status != 0:
                _, free = self._survey(partial, target)
                if free < DISK_MARGIN_BYTES:
                    raise DiskFullError(
                        f"{self.name}: the disk of {_folder(target)} filled up while {source.name} was sent, "
                        f"{_mb(free)} are free: free some space or set `root` to a larger disk"
                    )
                raise RemoteCommandError(f"{self.name}: writing {partial} failed with status {done.exit_status}")
        return self.bytes_sent - before

    def _read_from(self, source: Path, offset: int, progress: Callable[[int], None] | None) -> Iterator[bytes]:
        with source.open("rb") as file:
            file.seek(offset)
            while piece := file.read(CHUNK_BYTES):
                yield piece
                self.bytes_sent += len(piece)
                offset += len(piece)
                if progress is not None:
                    progress(offset)

    def _survey(self, partial: str, target: str) -> tuple[int, int]:
        """Returns the bytes that a cut upload left, and the bytes that are free."""
        answer = self._shell(_SURVEY, partial, _folder(target)).stdout.split()
        try:
            present, free_kib = (int(word) for word in answer)
            if present < 0:
                raise ValueError
        except ValueError:
            raise RemoteCommandError(f"{self.name}: `df` gave no sensible answer for {_folder(target)}") from None
        return present, free_kib * 1024

    def _shell(
        self, script: str, *arguments: str, check: bool = True, deadline_s: float = SHORT_DEADLINE_S
    ) -> Completed:
        return self.run(["sh", "-c", script, "sh", *arguments], deadline_s=deadline_s, check=check)

    def _run(
        self,
        arguments: Sequence[str],
        stdin: Iterable[bytes],
        deadline_s: float,
        environment: Mapping[str, str],
        check: bool,
        on_stdout: Callable[[bytes], None] | None,
        silence_s: float | None,
    ) -> Completed:
        what = f"{self.name}: `{shlex.join(arguments)[:80]}`"
        if any("\0" in word for word in (*arguments, *environment.values())):
            raise RemoteCommandError(f"{what}: an argument holds a zero byte")
        if not all(_VARIABLE.fullmatch(key) for key in environment):
            raise RemoteCommandError(f"{what}: an environment variable has a name other than letters, digits and '_'")
        assignments = [f"{key}={value}" for key, value in environment.items()]
        command = ["env", *assignments, *arguments] if assignments else list(arguments)
        # `timeout` takes fractions in GNU and new busybox only: whole seconds, rounded up.
        seconds = math.ceil(deadline_s)
        stdout, stderr = _Bounded(f"{what} wrote to stdout"), _Bounded(f"{what} wrote to stderr")
        began = self._clock()
        try:
            if self._knows_timeout is None:  # once: to ask with every command would double what it takes
                status = self._marked([*_TIMEOUT, "1", "true"], (), _ignore, _ignore, seconds + GRACE_S, None)
                self._knows_timeout = status == 0
            guard = _TIMEOUT if self._knows_timeout else ("sh", "-c", _WATCHDOG, "sh")
            guarded = [*guard, str(seconds), *command]
            take = on_stdout or stdout.add
            status = self._marked(guarded, stdin, take, stderr.add, seconds + GRACE_S, silence_s)
        except TimeoutError:
            raise RemoteTimeoutError(f"{what} gave no end within {seconds} s: is the device overloaded?") from None
        # 124 is what `timeout` says, 137 or a signal what is left of a command that had to be killed.
        if self._clock() - began >= seconds and (status in (124, 137) or status < 0):
            raise RemoteTimeoutError(f"{what} did not end within {seconds} s and was killed on the device")
        if check and status != 0:
            how = f"exit status {status}" if status > 0 else "killed by a signal"
            raise RemoteCommandError(f"{what} failed ({how}): {_last_line(stderr.content) or 'it gave no reason'}")
        return Completed(status, bytes(stdout.content), bytes(stderr.content))

    def _marked(
        self,
        command: Sequence[str],
        stdin: Iterable[bytes],
        on_stdout: Callable[[bytes], None],
        on_stderr: Callable[[bytes], None],
        wait_s: float,
        silence_s: float | None,
    ) -> int:
        """Does what `_execute` does, and takes only what the command itself writes. Raises RemoteCommandError."""
        mark = new_mark()
        out, err = Between(self.name, mark, on_stdout), Between(self.name, mark, on_stderr)
        line = command_line(command, mark)
        status = self._execute(line, stdin, out.feed, err.feed, wait_s=wait_s, silence_s=silence_s)
        for stream in (out, err):
            stream.finish()
        if not out.began:
            raise refusal(self.name, status, out, err)
        return status


def _ignore(output: bytes) -> None: ...


class _Bounded:
    """Collects output up to a limit: a device may be hostile."""

    def __init__(self, what: str) -> None:
        self.content = bytearray()
        self._what = what

    def add(self, piece: bytes) -> None:
        self.content += piece
        if len(self.content) > OUTPUT_LIMIT_BYTES:
            raise RemoteCommandError(f"{self._what} more than {OUTPUT_LIMIT_BYTES} bytes: broken off")


def _folder(target: str) -> str:
    return target.rsplit("/", 1)[0] if "/" in target else "."


def _mb(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.1f} MB"


def _last_line(output: bytes | bytearray) -> str:
    lines = bytes(output[-4096:]).decode("utf-8", "replace").strip().splitlines()
    return harmless(lines[-1], limit=400) if lines else ""


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
