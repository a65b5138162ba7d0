"""Boards on paper: what files and commands of a Raspberry Pi, a Jetson, a phone and a laptop say, as text beside this.

# a comment              /path -> target     a link
/path = content          /path !             a file that is there and fails when it is read
/path                    $ command = answer
| several lines          \\0 is a NUL
"""

from __future__ import annotations

from pathlib import Path

from engine.device.sources import SilentError, Sources

HERE = Path(__file__).parent
NAMES = tuple(sorted(path.stem for path in HERE.glob("*.txt")))


class Board:
    """A board's files below `root`, and its commands; a test may change both."""

    def __init__(self, name: str, root: Path) -> None:
        self.root = root
        self.commands: dict[str, str | None] = {}  # None: it hangs
        self.asked: list[str] = []
        lines: list[str] = []
        head = ""
        for line in [*(HERE / f"{name}.txt").read_text(encoding="utf-8").splitlines(), ""]:
            if line.startswith("|"):
                lines.append(line[2:])
                continue
            if lines:
                self._store(head, "".join(f"{text}\n" for text in lines))
                lines = []
            if " -> " in line:
                path, target = line.split(" -> ")
                self._place(path).symlink_to(target)
            elif line.endswith(" !"):
                self._place(line[:-2]).mkdir()  # which opens, and cannot be read
            elif " = " in line or line.endswith(" ="):
                head, _, content = (line + " ").partition(" = ")
                self._store(head, content.rstrip().replace("\\0", "\0") + "\n" * bool(content.strip()))
            else:
                head = line

    def write(self, path: str, content: str) -> None:
        target = self.root / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(content, encoding="utf-8")

    def fail(self, path: str) -> None:
        target = self.root / path.lstrip("/")
        target.unlink()
        target.mkdir()

    def sources(self, **environment: str) -> Sources:
        return Sources(str(self.root), self._run, environment)

    def _run(self, arguments: list[str], deadline_s: float) -> str:
        command = " ".join(arguments)
        self.asked.append(command)
        if not any(known.split()[0] == arguments[0] for known in self.commands):
            raise FileNotFoundError(arguments[0])
        answer = self.commands.get(command)
        if answer is None:
            raise SilentError(f"{arguments[0]} did not answer within {deadline_s:g} s")
        return answer

    def _store(self, head: str, content: str) -> None:
        if head.startswith("$ "):
            self.commands[head[2:]] = content
        else:
            self.write(head, content)

    def _place(self, path: str) -> Path:
        target = self.root / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        return target
