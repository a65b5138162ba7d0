"""Reads the matrix: what is measured, with what and under which conditions. MANUAL.md has every key.

Everything is checked here that needs no device and no container: types, ranges, names, unknown keys. What needs the
inventory or the containers is checked in harness/sweep/plan.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from engine.files import read_bounded
from engine.protocol import BACKENDS, MOST_LANES, PAGE_CACHES, READERS, Sampling, Settle
from engine.spans import MOST_TIMELINE_STEPS
from harness.errors import UsageError
from harness.tables import DEFAULT_BUDGET, Table, cause, distinct, read_toml

TIMELINE_STEPS = 4  # by default: of a model with 8 layers a record grows by 5 kB
_MAX_TEXT_BYTES = 64 << 20
_MAX_TOKEN_CHARACTERS = 32  # a longer token than any text has on average: what is beyond needs no tokenising


@dataclass(frozen=True)
class ContainerFile:
    """Names a container on the controller, which is deployed to every device that measures it."""

    name: str
    path: Path
    profile: Path | None = None  # activation profile, for strategies with a path predictor
    trace: Path | None = None  # of a text's routing, for estimates


@dataclass(frozen=True)
class Workload:
    """Holds prompts, as texts (for each container's own tokenizer) or as token ids, and how to generate."""

    name: str
    texts: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]
    max_new_tokens: int
    sampling: Sampling
    stop_at_eos: bool


@dataclass(frozen=True)
class Accuracy:
    """Holds the held-out text that every run predicts after all that is timed, to see what lossy ones lose."""

    text: str
    tokens: int  # of the text, at most
    context: int  # tokens of a window


@dataclass(frozen=True)
class Wanted:
    """Says which state of a device is wanted before each run, and how long to wait for it."""

    max_wait_s: float = 120.0
    temperature_margin_c: float = 10.0  # over the device's first reading in the sweep
    max_load: float | None = None  # other tasks that want a processor; None: recorded, and not waited for
    max_memory_pressure: float = 0.2  # share of time in which tasks wait for memory
    governor: str | None = None  # None: any, so that it stays the same

    def settle(self, baseline_c: float | None) -> Settle:
        """Returns what the device waits for; `baseline_c` is the first reading, None before there is one."""
        return Settle(
            max_wait_s=self.max_wait_s,
            temperature_c=None if baseline_c is None else baseline_c + self.temperature_margin_c,
            max_load=self.max_load,
            max_memory_pressure=self.max_memory_pressure,
            governor=self.governor,
        )


@dataclass(frozen=True)
class Matrix:
    """Says what a sweep measures; `toml` is its text, `folder` where its relative paths start."""

    name: str
    toml: str
    folder: Path
    baseline: str
    devices: tuple[str, ...]  # names, "tag:NAME" or "all"
    containers: tuple[ContainerFile, ...]
    workloads: tuple[Workload, ...]
    strategies: tuple[str, ...]
    expert_budgets: tuple[str, ...]  # each an ExpertBudget or "default"
    device_expert_budgets: dict[str, tuple[str, ...]] = field(default_factory=dict)  # instead of expert_budgets
    page_caches: tuple[str, ...] = ("cold",)
    reader: str = "auto"
    lanes: int = 0  # what suits each storage
    backend: str = "auto"
    threads: int = 0  # what suits each device
    warmups: int = 1
    repetitions: int = 3
    blocks: int = 3
    deadline_s: float = 1800.0
    seed: int = 0
    timeline_steps: int = TIMELINE_STEPS  # of each run, after all that is timed
    accuracy: Accuracy | None = None
    memory_limit_bytes: int | None = None  # of each engine process; a device of the inventory may have another
    conditions: Wanted = field(default_factory=Wanted)


def read_matrix(path: Path) -> Matrix:
    """Returns the matrix of a file. Raises UsageError, which names file, key and what is known."""
    text = read_toml(path, "matrix")
    return parse_matrix(text, source=str(path), folder=path.resolve().parent)


def parse_matrix(text: str, *, source: str, folder: Path) -> Matrix:
    """Returns the matrix of a text; `source` is its name in messages, `folder` where its relative paths start."""
    top = Table.parse(text, source)
    strategies = top.texts("strategies")
    matrix = Matrix(
        name=top.name("name"),
        toml=text,
        folder=folder,
        baseline=top.choice("baseline", strategies, strategies[0]),
        devices=top.texts("devices", ("all",)),
        containers=tuple(_container(t, folder) for t in top.tables("containers")),
        workloads=tuple(_workload(t, folder) for t in top.tables("workloads")),
        strategies=strategies,
        expert_budgets=top.budgets("expert_budgets", (DEFAULT_BUDGET,)),
        device_expert_budgets=_device_budgets(top),
        page_caches=top.choices("page_caches", PAGE_CACHES, ("cold",)),
        reader=top.choice("reader", ("auto", *READERS), "auto"),
        lanes=top.integer("lanes", 0, 0, MOST_LANES),
        backend=top.choice("backend", BACKENDS, "auto"),
        threads=top.integer("threads", 0, 0, 1024),
        warmups=top.integer("warmups", 1, 0, 1000),
        repetitions=top.integer("repetitions", 3, 1, 10000),
        blocks=top.integer("blocks", 3, 1, 10000),
        deadline_s=top.number("deadline_s", 1800.0, 1.0, 30 * 86400.0),
        seed=top.integer("seed", 0, 0, (1 << 63) - 1),
        timeline_steps=top.integer("timeline_steps", TIMELINE_STEPS, 0, MOST_TIMELINE_STEPS),
        accuracy=_accuracy(top.table("accuracy"), folder) if "accuracy" in top else None,
        memory_limit_bytes=top.size("memory_limit") if "memory_limit" in top else None,
        conditions=_wanted(top.table("conditions")),
    )
    top.finish()
    distinct([c.name for c in matrix.containers], source, "containers")
    distinct([w.name for w in matrix.workloads], source, "workloads")
    return matrix


def _container(table: Table, folder: Path) -> ContainerFile:
    profile, trace = (folder / name if name else None for name in (table.text("profile", ""), table.text("trace", "")))
    container = ContainerFile(table.name("name"), folder / table.text("path"), profile, trace)
    table.finish()
    return container


def _workload(table: Table, folder: Path) -> Workload:
    name = table.name("name")
    given = [key for key in ("prompts", "text_file", "tokens") if key in table]
    if len(given) != 1:
        raise UsageError(
            f"{table.where}: give one of prompts, text_file or tokens (given: {', '.join(given) or 'none'})"
        )
    texts: tuple[str, ...] = ()
    tokens: tuple[tuple[int, ...], ...] = ()
    if given[0] == "prompts":
        texts = table.texts("prompts", any_text=True)
    elif given[0] == "text_file":
        texts = _slices(
            folder / table.text("text_file"),
            table.integer("slices", 1, 1, 10000),
            table.integer("slice_characters", 400, 1, 1 << 20),
            table.where,
        )
    else:
        tokens = table.token_lists("tokens")
    workload = Workload(
        name=name,
        texts=texts,
        tokens=tokens,
        max_new_tokens=table.integer("max_new_tokens", 32, 1, 1 << 20),
        sampling=Sampling(
            temperature=table.number("temperature", 0.0, 0.0, 100.0),
            top_p=table.number("top_p", 1.0, 1e-9, 1.0),
            seed=table.integer("seed", 0, 0, (1 << 63) - 1),
        ),
        stop_at_eos=table.flag("stop_at_eos", False),
    )
    table.finish()
    return workload


def _accuracy(table: Table, folder: Path) -> Accuracy:
    tokens = table.integer("tokens", 256, 2, 1 << 20)
    context = table.integer("context", 128, 2, 1 << 20)
    text = _read_text(folder / table.text("text_file"), table.where)
    table.finish()
    return Accuracy(text[: tokens * _MAX_TOKEN_CHARACTERS], tokens, context)


def _wanted(table: Table) -> Wanted:
    usual = Wanted()
    wanted = Wanted(
        max_wait_s=table.number("max_wait_s", usual.max_wait_s, 0.0, 86400.0),
        temperature_margin_c=table.number("temperature_margin_c", usual.temperature_margin_c, 0.0, 100.0),
        max_load=table.number("max_load", 0.0, 0.0, 1e6) if "max_load" in table else None,
        max_memory_pressure=table.number("max_memory_pressure", usual.max_memory_pressure, 0.0, 1.0),
        governor=table.name("governor") if "governor" in table else None,
    )
    table.finish()
    return wanted


def _slices(path: Path, count: int, characters: int, where: str) -> tuple[str, ...]:
    """Returns `count` pieces of a text file, evenly spread, each from the start of a line where one is near."""
    text = _read_text(path, where)
    if len(text) < count * characters:
        raise UsageError(
            f"{where}: text_file {path} has {len(text)} characters, {count} slices of {characters} need more: "
            "lower slices or slice_characters"
        )
    spacing = (len(text) - characters) // max(1, count - 1)
    starts = []
    for i in range(count):
        start = i * spacing
        line_end = text.rfind("\n", max(0, start - 200), start)
        starts.append(line_end + 1 if line_end >= 0 else start)
    return tuple(text[start : start + characters] for start in starts)


def _read_text(path: Path, where: str) -> str:
    try:
        return read_bounded(str(path), _MAX_TEXT_BYTES).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{where}: text_file {path} cannot be read: {cause(error)}") from None


def _device_budgets(top: Table) -> dict[str, tuple[str, ...]]:
    table = top.table("device_expert_budgets")
    budgets = {device: table.budgets(device) for device in table}
    table.finish()
    return budgets
