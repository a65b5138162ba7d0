"""The pages of a results database by path, as they are now: what `serve` answers. Nothing here writes, or names a file.

A page is kept until its sweep has another record, or for KEPT_S: what it says of other sweeps may change, too.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from urllib.parse import quote, unquote

from reports.errors import ReportError, SelectionError, UnknownSweepError
from reports.pages import KINDS, PageKind, page
from reports.pages.layout import self_contained
from reports.records import Sweep
from reports.results.controllers import Controller
from reports.results.database import LATEST, ResultsDatabase
from reports.results.history import Recorded
from reports.text import marked

REFRESH_S = 10  # of a page while its sweep is measured
MOST_SWEEPS = 200  # that are listed, the latest
KEPT_S, MOST_KEPT = 60.0, 16  # pages
_MOST_CHARACTERS = 100  # of an id


@dataclass(frozen=True)
class Answer:
    status: int  # of HTTP
    body: bytes
    content_type: str = "text/html; charset=utf-8"
    refresh_s: int | None = None

    @classmethod
    def text(cls, status: int, text: str) -> Answer:
        return cls(status, f"{marked(text)}\n".encode(), "text/plain; charset=utf-8")

    @cached_property
    def tag(self) -> str:
        """Of the content: the same bytes have the same one."""
        return f'"{hashlib.sha256(self.body).hexdigest()[:32]}"'


@dataclass(frozen=True)
class Entry:
    """A sweep in the list."""

    sweep: Sweep
    path: str
    recorded: Recorded
    state: str  # running, stale, complete or incomplete

    @property
    def is_running(self) -> bool:
        return self.state == "running"


class Site:
    """Safe to share between threads. `is_at_work` says whether a controller lives."""

    def __init__(
        self,
        database: ResultsDatabase,
        is_at_work: Callable[[Controller], bool],
        *,
        page: Callable[[ResultsDatabase, Sequence[str], PageKind], str] = page,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._database, self._is_at_work, self._page, self._clock = database, is_at_work, page, clock
        self._rendering = threading.Lock()  # one page at a time, and none twice
        self._kept: OrderedDict[tuple[str, PageKind], tuple[Recorded, float, Answer]] = OrderedDict()

    def answer(self, path: str, *, still: bool = False) -> Answer:
        """`path` as the browser sent it, without what follows a question mark; `still`: no refreshing."""
        try:
            found = self._found(path)
        except (UnknownSweepError, SelectionError) as error:
            return Answer.text(404, str(error))
        except ReportError as error:
            return Answer.text(503, str(error))
        if found is None:
            return Answer.text(404, "there is no such page: the sweeps are listed at /")
        answer, is_running = found
        return Answer(200, answer.body, refresh_s=REFRESH_S) if is_running and not still else answer

    def _found(self, path: str) -> tuple[Answer, bool] | None:
        """A page, and whether it is about to change."""
        controllers = {c.sweep_id: c for c in self._database.controllers()}
        if path == "/":
            return self._index(controllers)
        first, _, name = path.removeprefix("/").partition("/")
        name, *kinds = (unquote(part, errors="replace") for part in name.split("/"))
        kind = next((known for known in KINDS if [known] == kinds), None) if kinds else "auto"
        if kind is None:
            return None
        if first != "sweep" or not (0 < len(name) <= _MOST_CHARACTERS and name.isprintable()):
            return None
        sweep = self._database.sweep(name)
        controller = controllers.get(sweep.id)
        is_running = controller is not None and self._is_at_work(controller)
        return self._sweep(sweep, kind), is_running or name == LATEST

    def _index(self, controllers: Mapping[str, Controller]) -> tuple[Answer, bool]:
        recorded = self._database.recorded()
        sweeps = self._database.sweeps(last=MOST_SWEEPS + 1)
        entries = [
            self._entry(sweep, recorded.get(sweep.id, Recorded(0, 0, "")), controllers.get(sweep.id))
            for sweep in sweeps[: -MOST_SWEEPS - 1 : -1]
        ]
        html = self_contained(
            "index.html.j2", entries=entries, are_older=len(sweeps) > MOST_SWEEPS, refresh_s=REFRESH_S
        )
        return Answer(200, html.encode()), any(entry.is_running for entry in entries)

    def _entry(self, sweep: Sweep, recorded: Recorded, controller: Controller | None) -> Entry:
        if controller is not None:
            state = "running" if self._is_at_work(controller) else "stale"
        else:
            state = "complete" if recorded.cells >= len(sweep.planned) else "incomplete"
        return Entry(sweep, f"/sweep/{quote(sweep.id, safe='')}", recorded, state)

    def _sweep(self, sweep: Sweep, kind: PageKind) -> Answer:
        recorded = self._database.recorded(sweep.id).get(sweep.id, Recorded(0, 0, ""))
        with self._rendering:
            kept = self._kept.pop((sweep.id, kind), None)
            if kept is None or kept[0] != recorded or self._clock() - kept[1] > KEPT_S:
                kept = recorded, self._clock(), Answer(200, self._page(self._database, [sweep.id], kind).encode())
            self._kept[sweep.id, kind] = kept
            if len(self._kept) > MOST_KEPT:
                self._kept.popitem(last=False)
        return kept[2]
