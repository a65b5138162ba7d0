"""Plans: lays out every cell of a matrix on the devices of an inventory, in the order of measuring."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from device_inventory.inventory import Device, Inventory
from engine.codec import to_json
from engine.protocol import ExpertBudget, Passage, RunRequest, Sampling
from engine.sizes import size_of
from engine.strategies import STRATEGIES, Strategy
from harness.errors import UsageError
from harness.sweep.matrix import ContainerFile, Matrix, Workload
from harness.tables import DEFAULT_BUDGET
from reports.records import Cell

SCRIPTED = "scripted device: nothing was measured"
Tokenise = Callable[[Path, str], tuple[int, ...]]  # (container, text) -> token ids


@dataclass(frozen=True)
class Measurement:
    """Describes an engine process to be: a cell in a block, with all that its request needs but paths there."""

    cell: Cell
    block: int
    container: ContainerFile
    prompts: tuple[tuple[int, ...], ...]
    workload: Workload
    passages: tuple[Passage, ...]  # to be predicted after all that is timed
    engine_sha256: str = ""  # of the engine that measures it; empty: the one that the farm has

    @property
    def key(self) -> tuple[str, int]:
        return self.cell.key, self.block


@dataclass(frozen=True)
class Plan:
    """Holds what is measured, device by device; the measurements of one device stand in their order."""

    matrix: Matrix
    devices: tuple[Device, ...]
    measurements: tuple[Measurement, ...]

    def of_device(self, name: str) -> tuple[Measurement, ...]:
        return tuple(self._by_device.get(name, ()))

    @cached_property
    def _by_device(self) -> dict[str, list[Measurement]]:
        """Returns measurements by device: hundreds of devices ask, each for its own."""
        found: dict[str, list[Measurement]] = {}
        for measurement in self.measurements:
            found.setdefault(measurement.cell.device, []).append(measurement)
        return found

    def without(self, done: Iterable[tuple[str, int]]) -> Plan:
        """Returns what is left when `done`, pairs of cell key and block, needs no more."""
        gone = set(done)
        left = tuple(m for m in self.measurements if m.key not in gone)
        return self._of(left)

    def in_turns(self, planned: Sequence[tuple[str, int]], engines: Sequence[str]) -> Plan:
        """Returns some of its cells, in the order and blocks of `planned`, each by the engine that stands beside it.

        Only what is timed: an older engine need not know the rest. Raises UsageError for a cell of another plan.
        """
        by_key = {m.cell.key: m for m in self.measurements}
        for key, _ in planned:
            if key not in by_key:
                raise UsageError(
                    f"{key} is not in the matrix {self.matrix.name} any more: restore it, or the inventory"
                )
        return self._of(
            tuple(
                replace(by_key[key], block=block, passages=(), engine_sha256=engine)
                for (key, block), engine in zip(planned, engines, strict=True)
            )
        )

    def _of(self, measurements: tuple[Measurement, ...]) -> Plan:
        still = {m.cell.device for m in measurements}
        return Plan(self.matrix, tuple(d for d in self.devices if d.name in still), measurements)


def make_plan(
    matrix: Matrix,
    inventory: Inventory,
    *,
    strategies: Mapping[str, Strategy] = STRATEGIES,
    container_sha256: Mapping[str, str],
    tokenise: Tokenise,
    passages: Mapping[str, tuple[Passage, ...]] | None = None,
) -> Plan:
    """Returns every cell of `matrix`; hashes and passages are by the container's name. Raises UsageError.

    Drift favours nobody: the rounds (blocks) are interleaved, and within a block the strategies of one container and
    workload follow one another, in an order that is shuffled by the matrix's seed and rotates from block to block.
    """
    devices = select_devices(matrix, inventory)
    for name in matrix.strategies:
        if name not in strategies:
            raise UsageError(f"matrix {matrix.name}: unknown strategy {name!r} (known: {', '.join(strategies)})")
        for container in matrix.containers:
            if strategies[name].needs_profile and container.profile is None:
                raise UsageError(
                    f"matrix {matrix.name}: strategy {name} needs a profile for container {container.name}: "
                    "add profile = ..., made by `edgemoe-farm model profile`"
                )
    for device in devices:
        memory_limit_bytes(matrix, device)
    for device_name in matrix.device_expert_budgets:
        if device_name not in {d.name for d in devices}:
            raise UsageError(
                f"matrix {matrix.name}: device_expert_budgets: {device_name!r} is not among the matrix's devices "
                f"({', '.join(d.name for d in devices)})"
            )
    prompts = {(c.name, w.name): _prompts(c, w, tokenise) for c in matrix.containers for w in matrix.workloads}
    workload_hashes = {
        (c.name, w.name): workload_sha256(prompts[c.name, w.name], w.sampling)
        for c in matrix.containers
        for w in matrix.workloads
    }
    measurements = [
        Measurement(
            Cell(
                device=device.name,
                container=container.name,
                container_sha256=container_sha256[container.name],
                strategy=strategy,
                expert_budget=budget,
                workload=workload.name,
                workload_sha256=workload_hashes[container.name, workload.name],
                page_cache=page_cache,
            ),
            block,
            container,
            prompts[container.name, workload.name],
            workload,
            (passages or {}).get(container.name, ()),
        )
        for device in devices
        for block in range(matrix.blocks)
        for container in matrix.containers
        for workload in matrix.workloads
        for page_cache in matrix.page_caches
        for strategy, budget in _arms(matrix, device, strategies, f"{container.name}/{workload.name}", block)
    ]
    return Plan(matrix, devices, tuple(measurements))


def select_devices(matrix: Matrix, inventory: Inventory) -> tuple[Device, ...]:
    """Returns the devices that the matrix names, by name, `tag:NAME` or `all`, in the inventory's order."""
    chosen: set[str] = set()
    tags = sorted({tag for device in inventory.devices.values() for tag in device.tags})
    for selector in matrix.devices:
        if selector == "all":
            chosen.update(inventory.devices)
        elif selector.startswith("tag:"):
            tagged = [d.name for d in inventory.devices.values() if selector[4:] in d.tags]
            if not tagged:
                known = ", ".join(tags) or "none"
                raise UsageError(f"matrix {matrix.name}: no device has the tag {selector[4:]!r} (known tags: {known})")
            chosen.update(tagged)
        elif selector in inventory.devices:
            chosen.add(selector)
        else:
            known = ", ".join(inventory.devices)
            raise UsageError(f"matrix {matrix.name}: unknown device {selector!r} (known: {known}, tag:NAME, all)")
    if not chosen:
        raise UsageError(f"matrix {matrix.name}: the inventory has no devices: declare one")
    return tuple(d for d in inventory.devices.values() if d.name in chosen)


def workload_sha256(prompts: tuple[tuple[int, ...], ...], sampling: Sampling) -> str:
    """Returns a hash that is equal for runs whose answers must be equal on one container."""
    return hashlib.sha256(json.dumps([prompts, to_json(sampling)], sort_keys=True).encode()).hexdigest()


def make_request(
    measurement: Measurement,
    matrix: Matrix,
    device: Device,
    *,
    identity: str,
    container: str,
    profile: str | None,
    baseline_c: float | None = None,
) -> RunRequest:
    """Returns what the engine on `device` is asked; `container` and `profile` are paths there.

    `baseline_c`: the temperature with which the device began the sweep.
    """
    budget = measurement.cell.expert_budget
    workload = measurement.workload
    return RunRequest(
        run_id=identity,
        container=container,
        strategy=measurement.cell.strategy,
        prompts=measurement.prompts,
        max_new_tokens=workload.max_new_tokens,
        expert_budget=None if budget == DEFAULT_BUDGET else ExpertBudget.parse(budget),
        profile=profile,
        sampling=workload.sampling,
        stop_at_eos=workload.stop_at_eos,
        warmups=matrix.warmups,
        repetitions=matrix.repetitions,
        reader=matrix.reader,
        lanes=matrix.lanes,
        page_cache=measurement.cell.page_cache,
        emulated_read_bytes_per_s=device.emulated_read_bytes_per_s,
        threads=matrix.threads,
        backend=matrix.backend,
        deadline_s=matrix.deadline_s,
        passages=measurement.passages,
        memory_limit_bytes=memory_limit_bytes(matrix, device),
        settle=matrix.conditions.settle(baseline_c),
        timeline_steps=0 if measurement.engine_sha256 else matrix.timeline_steps,
    )


def memory_limit_bytes(matrix: Matrix, device: Device) -> int | None:
    """Returns the limit of an engine process there, None where there is none. Raises UsageError."""
    text = device.memory_limit
    if text is None:
        return matrix.memory_limit_bytes
    limit = size_of(text)
    if text != "none" and (limit is None or limit < 1 << 20):
        raise UsageError(f"device {device.name}: memory_limit {text!r} must be at least 1 MiB, or none")
    return limit


def emulated_conditions(device: Device) -> tuple[str, ...]:
    """Returns what is not the device's own, in words for the record and the page."""
    if device.scripted is not None:
        return (SCRIPTED,)
    rate = device.emulated_read_bytes_per_s
    return () if rate is None else (f"storage limited to {rate / 1e6:g} MB/s by the engine",)


def _arms(
    matrix: Matrix, device: Device, strategies: Mapping[str, Strategy], group: str, block: int
) -> list[tuple[str, str]]:
    """Returns (strategy, budget) in the order of this block."""
    budgets = matrix.device_expert_budgets.get(device.name, matrix.expert_budgets)
    arms = [
        (name, budget)
        for name in matrix.strategies
        for budget in (budgets if strategies[name].has_budget else (DEFAULT_BUDGET,))
    ]
    arms.sort(key=lambda arm: hashlib.sha256(f"{matrix.seed}/{device.name}/{group}/{arm}".encode()).digest())
    first = block % len(arms)
    return arms[first:] + arms[:first]


def _prompts(container: ContainerFile, workload: Workload, tokenise: Tokenise) -> tuple[tuple[int, ...], ...]:
    if workload.tokens:
        return workload.tokens
    prompts = tuple(tokenise(container.path, text) for text in workload.texts)
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise UsageError(f"workload {workload.name}: prompt {i} gives no token in container {container.name}")
    return prompts
