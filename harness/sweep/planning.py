"""From a matrix and an inventory to a plan, and from a sweep to what it still lacks."""

from __future__ import annotations

import secrets
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path

from device_inventory import Inventory
from engine.container import Container
from engine.experts.provision import check_records
from engine.models import model_config
from engine.offline.accuracy.passages import cut
from engine.offline.tokenizer import Tokenizer
from engine.protocol import Passage
from engine.strategies import STRATEGIES
from harness.device.deploy import HashCache, cache_folder
from harness.errors import UsageError
from harness.sweep.matrix import Accuracy, Matrix, parse_matrix
from harness.sweep.plan import Plan, make_plan
from harness.version import farm_version
from reports.records import RunStatus, Sweep
from reports.results.database import ResultsDatabase


def plan_matrix(matrix: Matrix, inventory: Inventory) -> Plan:
    """Hashes the containers, tokenises the prompts and lays out the cells. Raises UsageError, EngineError."""
    for container in matrix.containers:
        opened = Container.open(str(container.path))
        for name in matrix.strategies:
            if name in STRATEGIES:  # else the plan says what is known
                check_records(opened, STRATEGIES[name])
    cache = HashCache(cache_folder())
    tokenizer = lru_cache(Tokenizer.from_container)
    for container in matrix.containers:
        for what, path in (("profile", container.profile), ("trace", container.trace)):
            if path is not None and not path.is_file():
                raise UsageError(f"matrix {matrix.name}: no {what} {path}: `edgemoe-farm model {what}` makes one")
    return make_plan(
        matrix,
        inventory,
        container_sha256={c.name: cache.sha256(c.path) for c in matrix.containers},
        tokenise=lambda path, text: tokenizer(str(path)).encode(text),
        passages={c.name: _passages(matrix.accuracy, c.path) for c in matrix.containers if matrix.accuracy},
    )


def _passages(accuracy: Accuracy, container: Path) -> tuple[Passage, ...]:
    tokens = Tokenizer.from_container(str(container)).encode(accuracy.text)[: accuracy.tokens]
    passages = cut(tokens, accuracy.context, model_config(Container.open(str(container))))
    if not passages:
        raise UsageError(f"accuracy: the text has fewer than two tokens in {container}: give a longer one")
    return tuple(passages)


def new_sweep(plan: Plan, database: ResultsDatabase, *, purpose: str = "") -> Sweep:
    """Stores what is about to be measured; `purpose` is for one that is not all of its matrix."""
    now = datetime.now(UTC)
    sweep = Sweep(
        id=f"{now:%Y%m%d-%H%M%S}-{secrets.token_hex(2)}",
        name=f"{plan.matrix.name} ({purpose})" if purpose else plan.matrix.name,
        matrix_toml=plan.matrix.toml,
        baseline=plan.matrix.baseline,
        planned=tuple(m.key for m in plan.measurements),
        started_at=now.isoformat(),
        farm_version=farm_version(),
        matrix_folder=str(plan.matrix.folder),
        engines=engines if any(engines := tuple(m.engine_sha256 for m in plan.measurements)) else (),
    )
    database.add_sweep(sweep)
    return sweep


def plan_again(sweep: Sweep, inventory: Inventory, database: ResultsDatabase, *, failed_too: bool) -> Plan:
    """Returns what `sweep` still lacks. Raises UsageError where inventory or containers have changed."""
    matrix = parse_matrix(sweep.matrix_toml, source=f"matrix of sweep {sweep.id}", folder=Path(sweep.matrix_folder))
    plan = plan_matrix(matrix, inventory)
    if sweep.engines:
        plan = plan.in_turns(sweep.planned, sweep.engines)
    for key in dict.fromkeys(key for key, _ in set(sweep.planned) - {m.key for m in plan.measurements}):
        raise UsageError(
            f"sweep {sweep.id}: {key} was planned, but the inventory or a strategy has changed: restore it"
        )
    cells = {m.cell.key: m.cell for m in plan.measurements}
    for run in database.stream(sweep_id=sweep.id):
        cell = cells.get(run.cell.key, run.cell)
        for part in ("container_sha256", "workload_sha256"):
            if getattr(cell, part) != getattr(run.cell, part):
                what = f"container {cell.container}" if part.startswith("c") else f"workload {cell.workload}"
                raise UsageError(f"sweep {sweep.id}: {what} has changed since it was measured: start a new sweep")
    again = {RunStatus.UNREACHABLE, RunStatus.SKIPPED}
    if failed_too:
        again |= set(RunStatus) - {RunStatus.OK}
    surplus = {m.key for m in plan.measurements} - set(sweep.planned)  # devices that joined the inventory later
    return plan.without(surplus | database.done(sweep.id, again=again))
