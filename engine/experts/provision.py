"""Turns a row of the table of strategies, for one container, into a supply of experts."""

from __future__ import annotations

from typing import Callable, Dict, Optional

from engine.container import Container, ExpertKey, Record
from engine.dataclass import dataclass
from engine.errors import RequestError
from engine.experts.buffer import ExpertBuffer
from engine.experts.eviction import PolicyInputs, policy_named
from engine.experts.governor import PreloadGovernor
from engine.experts.loader import Loader
from engine.experts.predictors import Predictor
from engine.experts.profile import PathProfile
from engine.experts.relief import RELIEFS, Relief
from engine.experts.slabs import DequantisedSlabs, PackedSlabs, Slabs
from engine.experts.supply import ExpertSupply
from engine.protocol import ExpertBudget
from engine.strategies import Strategy


@dataclass(frozen=True)
class Provision:
    """Holds what a strategy makes of a container: which records, in which form, within how many bytes."""

    container: Container
    strategy: Strategy
    records: Dict[ExpertKey, Record]
    slabs: Slabs
    largest_bytes: int  # of a slab
    budget_bytes: Optional[int]  # None: unlimited

    @classmethod
    def of(cls, container: Container, strategy: Strategy, expert_budget: Optional[ExpertBudget] = None) -> Provision:
        """Returns the provision; without `expert_budget` with the strategy's default. Raises RequestError."""
        records = _records(container, strategy)
        slabs = _slabs(strategy, container, records)
        largest_bytes = max(slabs.bytes(record) for record in records.values())
        return cls(
            container, strategy, records, slabs, largest_bytes, _budget_bytes(strategy, expert_budget, largest_bytes)
        )

    def check_profile(self, profile: Optional[PathProfile]) -> None:
        """Raises RequestError for a profile of another model, or if a profile is needed and there is none."""
        layers, experts = self.container.moe_layers, self.container.experts_per_layer
        if profile is not None and (profile.layers, profile.experts) != (layers, experts):
            raise RequestError(
                f"the profile is of a model with {profile.layers} MoE layers of {profile.experts} experts, the "
                f"container has {layers} of {experts}; make one with `edgemoe-farm model profile`"
            )
        if profile is None and self.strategy.needs_profile:
            raise RequestError(
                f"strategy {self.strategy.name} needs a profile: make one with `edgemoe-farm model profile`"
            )

    def supply(
        self,
        make_loader: Callable[[ExpertBuffer], Loader],
        predictor: Optional[Predictor],
        *,
        profile: Optional[PathProfile],
        first_layer: int,
        top_k: int,
        clock: Callable[[], float],
    ) -> ExpertSupply:
        """Returns a supply with an empty buffer.

        `make_loader` is given that buffer; `first_layer` is the decoder's first MoE layer.
        """
        strategy, layers = self.strategy, self.container.moe_layers
        frequency = None if profile is None else profile.frequency()
        policy = policy_named(strategy.eviction or "lru", PolicyInputs(layers, first_layer, frequency))
        buffer = ExpertBuffer(self.budget_bytes, self.largest_bytes, policy)
        return ExpertSupply(
            make_loader(buffer),
            buffer,
            self.records,
            self.slabs,
            layers=layers,
            keep=strategy.residency in ("all", "buffer"),
            predictor=predictor,
            depth=top_k if strategy.prefetch_depth is None else strategy.prefetch_depth,
            clock=clock,
            governor=PreloadGovernor() if strategy.adaptive else None,
            relief=_relief(strategy, self.container),
            whole_layers=strategy.residency == "stream",
            first_layer=first_layer,
        )


def check_records(container: Container, strategy: Strategy) -> None:
    """Raises RequestError if the container lacks the precisions that the strategy works with."""
    _records(container, strategy)
    _relief(strategy, container)


def _records(container: Container, strategy: Strategy) -> Dict[ExpertKey, Record]:
    """Returns the record of each expert that the strategy works with."""
    if strategy.precision == "stored":
        return container.primary
    records: Dict[ExpertKey, Record] = {}
    for record in container.records:
        if container.formats[record.format].precision == strategy.precision:
            records.setdefault((record.layer, record.expert), record)
    if len(records) < len(container.primary):
        raise RequestError(
            f"{container.path}: strategy {strategy.name} needs every expert in {strategy.precision}, and has "
            f"{len(records)} of {len(container.primary)}; import it with `--precision {strategy.precision}`, after the "
            "precision that the others shall use"
        )
    return records


def _relief(strategy: Strategy, container: Container) -> Optional[Relief]:
    if strategy.relief is None:
        return None
    try:
        return RELIEFS[strategy.relief](container)
    except RequestError as error:
        raise RequestError(f"{container.path}: strategy {strategy.name}: {error}") from None


def _slabs(strategy: Strategy, container: Container, records: Dict[ExpertKey, Record]) -> Slabs:
    if strategy.form == "packed":
        return PackedSlabs(container.layouts)
    return DequantisedSlabs(container.layouts, container.records if strategy.relief else records.values())


def _budget_bytes(strategy: Strategy, asked: Optional[ExpertBudget], largest_bytes: int) -> Optional[int]:
    """Returns the budget; None is unlimited. A budget for a strategy without a buffer is an error."""
    if not strategy.has_budget:
        if asked is not None:
            raise RequestError(f"strategy {strategy.name} has no expert buffer: leave its expert budget out")
        return None
    budget = asked or strategy.default_budget
    if budget is None:
        raise RequestError(f"strategy {strategy.name} needs an expert budget, such as 10-experts or 64MiB")
    return budget.bytes if budget.bytes is not None else (budget.experts or 0) * largest_bytes
