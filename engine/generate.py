"""Loading, prefill and decode, measured. The only place where the clock is chosen that all others are handed."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Callable, Dict, Iterator, List, Optional, Tuple

import numpy as np

from engine import meters
from engine.container import Container, ExpertKey, Record
from engine.errors import DeadlineError, RequestError
from engine.experts.buffer import ExpertBuffer
from engine.experts.eviction import policy_named
from engine.experts.governor import PreloadGovernor
from engine.experts.predictors import OraclePredictor, Predictor, predictor_named
from engine.experts.profile import PathProfile
from engine.experts.relief import CacheAwareRouting, LowBitMisses, Relief
from engine.experts.slabs import DequantisedSlabs, PackedSlabs, Slabs
from engine.experts.store import ExpertStore
from engine.experts.supply import Counters, ExpertSupply
from engine.kernels import Kernels, make_kernels
from engine.models import load_model
from engine.models.interface import Model, Observer, check_tokens
from engine.protocol import ExpertBudget, Load, Passage, RunRequest, Sample, Sampling, Steps, Totals
from engine.sampling import Sampler, log_probabilities
from engine.strategies import Strategy, strategy_named

Emit = Callable[..., None]  # emit(event, **content), see engine.protocol


class Engine:
    """A model with its supply of experts, ready to generate.

    Raises EngineError when it is made, and then holds nothing open; else it must be closed.
    """

    def __init__(
        self,
        container: Container,
        strategy: Strategy,
        *,
        expert_budget: Optional[ExpertBudget] = None,
        profile: Optional[PathProfile] = None,
        reader: str = "pread",
        keep_cached: bool = True,
        emulated_read_bytes_per_s: Optional[float] = None,
        backend: str = "auto",
        threads: int = 1,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.container, self.strategy = container, strategy
        self.clock = clock
        self.notes: List[str] = []
        records = _records(container, strategy)
        layers = container.moe_layers
        if profile is not None and (profile.layers, profile.experts) != (layers, container.experts_per_layer):
            raise RequestError(
                f"the profile is of a model with {profile.layers} MoE layers of {profile.experts} experts, the "
                f"container has {layers} of {container.experts_per_layer}; make one with `edgemoe-farm model profile`"
            )
        if profile is None and strategy.needs_profile:
            raise RequestError(f"strategy {strategy.name} needs a profile: make one with `edgemoe-farm model profile`")
        slabs = _slabs(strategy, container, records)
        largest_bytes = max(slabs.bytes(record) for record in records.values())
        self.budget_bytes = _budget_bytes(strategy, expert_budget, largest_bytes)
        # Experts that stand dequantised in memory are numpy's: native kernels are faster on packed ones.
        kernels, self.warnings = (Kernels(), []) if strategy.form == "dequantised" else make_kernels(backend, threads)
        self._kernels = kernels
        self.model = load_model(container, self._kernels)
        first_layer = self.model.first_layer
        policy = policy_named(
            strategy.eviction or "lru", layers, first_layer, {} if profile is None else profile.frequency()
        )
        buffer = ExpertBuffer(self.budget_bytes, largest_bytes, policy)
        self._note_small_budget((layers - first_layer) * self.model.config.top_k * largest_bytes)
        self._predictor = _predictor(strategy, profile, self.model)
        store = ExpertStore(
            container, reader=reader, keep_cached=keep_cached, bytes_per_s=emulated_read_bytes_per_s,
            clock=clock, sleep=sleep,
        )  # fmt: skip
        self._store = store
        self.supply = ExpertSupply(
            store,
            buffer,
            records,
            slabs,
            layers=layers,
            keep=strategy.residency in ("all", "buffer"),
            threaded=strategy.threaded,
            predictor=self._predictor,
            depth=self.model.config.top_k if strategy.prefetch_depth is None else strategy.prefetch_depth,
            clock=clock,
            governor=PreloadGovernor() if strategy.adaptive else None,
            relief=_relief(strategy, container),
            whole_layers=strategy.residency == "stream",
            first_layer=first_layer,
        )
        if strategy.residency == "all":
            try:
                self.supply.load(list(records))
            except BaseException:
                self.close()
                raise

    def generate(
        self,
        prompt: Tuple[int, ...],
        max_new_tokens: int,
        sampling: Sampling,
        *,
        stop_at_eos: bool = False,
        deadline: Optional[float] = None,
    ) -> Tuple[Tuple[int, ...], Steps]:
        """Generated tokens and what each of them cost. `deadline` is a time of this engine's clock (DeadlineError)."""
        if isinstance(self._predictor, OraclePredictor):
            self._predictor.learn(())
            rehearsal = _Rehearsal(self.model.first_layer)
            self._generate(prompt, max_new_tokens, sampling, stop_at_eos, deadline, rehearsal.observe)
            self._predictor.learn(rehearsal.routing)
            self.supply.take_recall()
        return self._generate(prompt, max_new_tokens, sampling, stop_at_eos, deadline)

    def _generate(
        self,
        prompt: Tuple[int, ...],
        max_new_tokens: int,
        sampling: Sampling,
        stop_at_eos: bool,
        deadline: Optional[float],
        observe: Optional[Observer] = None,
    ) -> Tuple[Tuple[int, ...], Steps]:
        state = self.model.start(len(prompt), max_new_tokens)
        sampler = Sampler(sampling)
        tokens: List[int] = []
        times: List[float] = []
        counters: List[Counters] = []
        self.supply.take_counters()
        while len(tokens) < max_new_tokens:
            start = self.clock()
            if tokens:
                self.supply.begin(tokens[-1])
                logits = self.model.forward(np.array(tokens[-1:]), state, self.supply, observe=observe)  # (1, vocab)
            else:
                logits = self.model.prefill(np.array(prompt), state, self.supply, observe=observe)
            token = sampler.choose(logits[0])
            end = self.clock()
            times.append(end - start)
            if tokens:
                self.supply.decoded(end - start)
            counters.append(self.supply.take_counters())
            tokens.append(token)
            if stop_at_eos and token in self.model.config.eos_ids:
                break
            if deadline is not None and end > deadline:
                raise DeadlineError(f"stopped at its deadline, {len(tokens)} of {max_new_tokens} tokens into a prompt")
        return tuple(tokens), Steps(tuple(times), *(tuple(column) for column in zip(*counters)))

    def predict(self, passage: Passage, *, deadline: Optional[float] = None) -> Iterator[np.ndarray]:
        """The logits (vocab,) from which each token of the continuation is predicted, one pass each as in decoding.

        Raises RequestError for a token id that the model does not have, StorageError, DeadlineError.
        """
        check_tokens(np.array(passage.continuation), self.model.config.vocab_size)
        if isinstance(self._predictor, OraclePredictor):
            self._predictor.learn(())  # the last prompt's routing is none of this text's
        state = self.model.start(len(passage.prompt), len(passage.continuation))
        yield self.model.prefill(np.array(passage.prompt), state, self.supply)[0]
        for token in passage.continuation[:-1]:
            if deadline is not None and self.clock() > deadline:
                raise DeadlineError("stopped at its deadline, while predicting a passage after all that is timed")
            self.supply.begin(token)
            yield self.model.forward(np.array([token]), state, self.supply)[0]

    def nats(self, passage: Passage, *, deadline: Optional[float] = None) -> float:
        """-ln of the probability of the continuation, in float64 from the logits on. Raises as `predict`."""
        rows = zip(self.predict(passage, deadline=deadline), passage.continuation)
        return -sum(float(log_probabilities(row.astype(np.float64))[token]) for row, token in rows)

    def close(self) -> None:
        self.supply.close()
        self._store.close()
        self._kernels.close()

    @property
    def backend(self) -> str:
        """That computes: numpy, or native."""
        return self._kernels.backend

    @property
    def reader(self) -> str:
        """The one that engaged."""
        return self._store.reader

    def load_report(self, load_s: float, resident_fraction: Optional[float]) -> Load:
        return Load(
            load_s=load_s,
            non_expert_bytes=self.model.weight_bytes,
            expert_bytes=self.supply.resident_bytes(),
            expert_budget_bytes=self.budget_bytes,
            container_bytes=self.container.file_bytes,
            container_experts=len(self.container.primary),
            page_cache_resident_fraction=resident_fraction,
            strategy=self.strategy.parts(),
            reader=self.reader,
            backend=self.backend,
            variant=self._kernels.variant,
            warnings=tuple(self.warnings + self._store.warnings),
            notes=tuple(self.notes),
        )

    def _note_small_budget(self, bytes_per_token: int) -> None:
        if (
            self.strategy.residency == "buffer"
            and self.budget_bytes is not None
            and self.budget_bytes < bytes_per_token
        ):
            self.notes.append(
                f"the expert budget of {self.budget_bytes} bytes is under the {bytes_per_token} that one token "
                "activates: an expert is evicted before its next use unless the policy foresees it"
            )


def run(request: RunRequest, emit: Emit, *, clock: Callable[[], float] = time.perf_counter) -> None:
    """Does what a request asks and emits `loaded`, `sample`... and `finished`. Raises EngineError."""
    start = clock()
    deadline = start + request.deadline_s
    strategy = strategy_named(request.strategy)
    container = Container.open(request.container)
    profile = PathProfile.load(request.profile) if request.profile is not None else None
    cold = request.page_cache == "cold"
    if cold:
        meters.evict_from_page_cache(container.path)
    else:
        meters.read_into_page_cache(container.path)
    resident_fraction = meters.page_cache_resident_fraction(container.path)
    load_start = clock()
    engine = Engine(
        container, strategy, expert_budget=request.expert_budget, profile=profile, reader=request.reader,
        keep_cached=not cold, emulated_read_bytes_per_s=request.emulated_read_bytes_per_s,
        backend=request.backend, threads=request.threads, clock=clock,
    )  # fmt: skip
    try:
        if cold:
            meters.evict_from_page_cache(container.path)  # the non-experts, which are in ordinary memory now
        emit("loaded", load=engine.load_report(clock() - load_start, resident_fraction))
        for repetition in range(-request.warmups, request.repetitions):
            for index, prompt in enumerate(request.prompts):
                faults = meters.major_faults()
                tokens, steps = engine.generate(
                    prompt, request.max_new_tokens, request.sampling,
                    stop_at_eos=request.stop_at_eos, deadline=deadline,
                )  # fmt: skip
                faults_after = meters.major_faults()
                sample = Sample(
                    prompt=index,
                    repetition=repetition if repetition >= 0 else repetition + request.warmups,
                    warmup=repetition < 0,
                    tokens=tokens,
                    steps=steps,
                    major_faults=None if faults is None or faults_after is None else faults_after - faults,
                    peak_resident_bytes=meters.peak_resident_bytes(),
                    recall=engine.supply.take_recall(),
                )
                emit("sample", sample=sample)
        totals = Totals(
            wall_s=clock() - start,
            peak_resident_bytes=meters.peak_resident_bytes(),
            major_faults=meters.major_faults(),
            storage_read_bytes=meters.storage_read_bytes(),
            page_cache_resident_fraction=meters.page_cache_resident_fraction(container.path),
        )
        nats = tuple(max(0.0, engine.nats(passage, deadline=deadline)) for passage in request.passages)
    finally:
        engine.close()
    emit("finished", totals=replace(totals, passage_nats=nats))


def check_records(container: Container, strategy: Strategy) -> None:
    """Raises RequestError where the container lacks the precisions that the strategy works with."""
    _records(container, strategy)
    _relief(strategy, container)


def _records(container: Container, strategy: Strategy) -> Dict[ExpertKey, Record]:
    """The record of each expert that the strategy works with."""
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
    if strategy.relief == "cache-aware":
        return CacheAwareRouting()
    if strategy.relief is None:
        return None
    smallest = dict(container.primary)
    for record in container.records:
        if record.bytes < smallest[record.layer, record.expert].bytes:
            smallest[record.layer, record.expert] = record
    if smallest == container.primary:
        raise RequestError(
            f"{container.path}: strategy {strategy.name} needs experts in a second, lower precision; import it with "
            "another `--precision`, such as int2, after the first"
        )
    return LowBitMisses(smallest)


def _slabs(strategy: Strategy, container: Container, records: Dict[ExpertKey, Record]) -> Slabs:
    if strategy.form == "packed":
        return PackedSlabs(container.layouts)
    return DequantisedSlabs(container.layouts, container.records if strategy.relief else records.values())


def _budget_bytes(strategy: Strategy, asked: Optional[ExpertBudget], largest_bytes: int) -> Optional[int]:
    """None: unlimited. A budget for a strategy without a buffer is a mistake, and so an error."""
    if not strategy.has_budget:
        if asked is not None:
            raise RequestError(f"strategy {strategy.name} has no expert buffer: leave its expert budget out")
        return None
    budget = asked or strategy.default_budget
    if budget is None:
        raise RequestError(f"strategy {strategy.name} needs an expert budget, such as 10-experts or 64MiB")
    return budget.bytes if budget.bytes is not None else (budget.experts or 0) * largest_bytes


def _predictor(strategy: Strategy, profile: Optional[PathProfile], model: Model) -> Optional[Predictor]:
    if strategy.predictor == "oracle":
        return OraclePredictor()  # which learns from a rehearsal of each prompt
    return None if strategy.predictor is None else predictor_named(strategy.predictor, profile, model.preview_router)


class _Rehearsal:
    """Writes down what the routers of the decoder choose for the last token of each forward pass."""

    def __init__(self, first_layer: int) -> None:
        self._first_layer = first_layer
        self.routing: List[Dict[int, Tuple[int, ...]]] = []

    def observe(self, layer: int, chosen: np.ndarray) -> None:
        if layer < self._first_layer:
            return
        if layer == self._first_layer:
            self.routing.append({})
        self.routing[-1][layer] = tuple(sorted(chosen[-1].tolist()))
