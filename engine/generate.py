"""Loads a model and measures prefill and decode. Only here is the clock chosen that all others are handed."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import numpy as np

from engine.container import Container
from engine.device import meters
from engine.errors import DeadlineError, NumberError
from engine.experts.loader import Loader
from engine.experts.predictors import OraclePredictor, Predictor, PredictorInputs, predictor_named
from engine.experts.profile import PathProfile
from engine.experts.provision import Provision
from engine.experts.store import ExpertStore
from engine.experts.supply import Counters, steps_of
from engine.experts.timeline import TimelineRecorder
from engine.kernels import Kernels, make_kernels
from engine.models import load_model
from engine.models.interface import Model, Observer, are_numbers, check_tokens
from engine.protocol import ExpertBudget, Load, Passage, RunRequest, Sample, Sampling, Steps, StorageRates, Totals
from engine.sampling import Sampler, log_probabilities
from engine.slowdown import slowdown
from engine.spans import Timeline
from engine.storage import choose_reading
from engine.strategies import Strategy, strategy_named

Emit = Callable[..., None]  # emit(event, **content), see engine.protocol


class Engine:
    """Generates with a model and its supply of experts.

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
        lanes: int = 1,
        keep_cached: bool = True,
        emulated_read_bytes_per_s: Optional[float] = None,
        backend: str = "auto",
        threads: int = 1,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.container, self.strategy = container, strategy
        self.clock = clock
        self.phases_s: Dict[str, float] = {}  # what loading took, by phase
        self.notes: List[str] = []
        self._timeline: Optional[Timeline] = None
        self._sleep = sleep
        self._slowdown, notes = slowdown(strategy.name)
        self.notes += notes
        provision = Provision.of(container, strategy, expert_budget)
        provision.check_profile(profile)
        self.budget_bytes = provision.budget_bytes
        begun = [clock()]
        # Experts that stand dequantised in memory are numpy's: native kernels are faster on packed ones.
        kernels, self.warnings = (
            (Kernels(threads or 1), []) if strategy.form == "dequantised" else make_kernels(backend, threads)
        )
        self._kernels = kernels
        with ExitStack() as opened:
            opened.callback(kernels.close)
            begun.append(clock())
            self.model = load_model(container, kernels)
            begun.append(clock())
            first_layer, top_k = self.model.config.first_layer, self.model.config.top_k
            self._note_small_budget((container.moe_layers - first_layer) * top_k * provision.largest_bytes)
            self._predictor = _predictor(strategy, profile, self.model)
            store = self._store = ExpertStore(
                container, reader=reader, lanes=lanes, keep_cached=keep_cached,
                bytes_per_s=emulated_read_bytes_per_s, clock=clock, sleep=sleep,
            )  # fmt: skip
            opened.callback(store.close)
            self.supply = provision.supply(
                lambda buffer: Loader(store, buffer, provision.records, provision.slabs, threaded=strategy.threaded),
                self._predictor, profile=profile, first_layer=first_layer, top_k=top_k, clock=clock,
            )  # fmt: skip
            opened.callback(self.supply.close)
            if strategy.residency == "all":
                self.supply.load(list(provision.records))
            begun.append(clock())
            self.phases_s = dict(zip(("kernels", "non_experts", "experts"), np.diff(begun).tolist()))
            self._opened = opened.pop_all()

    def generate(
        self,
        prompt: Tuple[int, ...],
        max_new_tokens: int,
        sampling: Sampling,
        *,
        stop_at_eos: bool = False,
        deadline: Optional[float] = None,
        timeline_steps: int = 0,
    ) -> Tuple[Tuple[int, ...], Steps]:
        """Returns the generated tokens and the cost of each. `deadline` is a time of its clock (DeadlineError).

        With `timeline_steps`, `take_timeline` has the last so many; to write them down takes a little of their time.
        """
        if isinstance(self._predictor, OraclePredictor):
            self._predictor.learn(())
            rehearsal = _Rehearsal(self.model.config.first_layer)
            self._generate(prompt, max_new_tokens, sampling, stop_at_eos, deadline, rehearsal.observe)
            self._predictor.learn(rehearsal.routing)
            self.supply.take_recall()
        recorder = TimelineRecorder(timeline_steps, self.clock) if timeline_steps else None
        try:
            done = self._generate(prompt, max_new_tokens, sampling, stop_at_eos, deadline, recorder=recorder)
        finally:
            self._record(None)
        if recorder is not None:
            self._timeline = recorder.timeline(self._kernels.expanding_s if self.backend == "numpy" else None)
        return done

    def take_timeline(self) -> Optional[Timeline]:
        """Returns the timeline of what was last generated; None if none was asked for."""
        timeline, self._timeline = self._timeline, None
        return timeline

    def _record(self, recorder: Optional[TimelineRecorder]) -> None:
        """Tells `recorder` from now on what happens; nobody if it is None."""
        self.supply.record(recorder)
        self._kernels.clock = None if recorder is None else recorder.clock
        if recorder is not None:
            self._kernels.expanding_s = 0.0

    def _generate(
        self,
        prompt: Tuple[int, ...],
        max_new_tokens: int,
        sampling: Sampling,
        stop_at_eos: bool,
        deadline: Optional[float],
        observe: Optional[Observer] = None,
        recorder: Optional[TimelineRecorder] = None,
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
                if recorder is not None:
                    recorder.begin_step(len(tokens), start)
                self.supply.begin(tokens[-1])
            token = sampler.choose(self._next_logits(prompt, tokens, state, observe))
            if self._slowdown:
                self._sleep(self._slowdown * (self.clock() - start))
            end = self.clock()
            times.append(end - start)
            if tokens:
                self.supply.decoded(end - start)
                if recorder is not None:
                    recorder.end_step(end)
            else:
                self.supply.take_layer_counts()  # a prompt of one token is no decode step
                self._record(recorder)
            counters.append(self.supply.take_counters())
            tokens.append(token)
            if stop_at_eos and token in self.model.config.eos_ids:
                break
            if deadline is not None and end > deadline:
                raise DeadlineError(f"stopped at its deadline, {len(tokens)} of {max_new_tokens} tokens into a prompt")
        return tuple(tokens), steps_of(times, counters)

    def predict(self, passage: Passage, *, deadline: Optional[float] = None) -> Iterator[np.ndarray]:
        """Yields the logits (vocab,) that predict each token of the continuation, one pass each as in decoding.

        Raises RequestError for a token id that the model does not have, StorageError, DeadlineError.
        """
        check_tokens(np.array(passage.continuation), self.model.config.vocab_size)
        if isinstance(self._predictor, OraclePredictor):
            self._predictor.learn(())  # the last prompt's routing is none of this text's
        state = self.model.start(len(passage.prompt), len(passage.continuation))
        yield self._next_logits(passage.prompt, (), state)
        for done, token in enumerate(passage.continuation[:-1], 1):
            if deadline is not None and self.clock() > deadline:
                raise DeadlineError("stopped at its deadline, while predicting a passage after all that is timed")
            self.supply.begin(token)
            yield self._next_logits(passage.prompt, passage.continuation[:done], state)

    def _next_logits(
        self, prompt: Sequence[int], fed: Sequence[int], state: Any, observe: Optional[Observer] = None
    ) -> np.ndarray:
        """Returns the logits (vocab,) after the last of the tokens `fed`, or after the prompt where there is none.

        Raises NumberError, which names the layer.
        """
        try:
            if fed:
                return self.model.forward(np.array(fed[-1:]), state, self.supply, observe=observe)[0]
            return self.model.prefill(np.array(prompt), state, self.supply, observe=observe)[0]
        except NumberError:
            where = self._first_without_number(tuple(prompt), tuple(fed))
            raise NumberError(
                f"{self._store.container.path}: no number from {where}: what is stored there overflows float32; run "
                "`edgemoe-farm model verify` on the container, and import the checkpoint again"
            ) from None

    def _first_without_number(self, prompt: Tuple[int, ...], fed: Tuple[int, ...]) -> str:
        """Returns the name of the first part of the model whose output is no number, by computing all of it again."""
        with np.errstate(all="ignore"):
            state = self.model.start(len(prompt), len(fed) + 1)
            stream = self.model.open(prompt, fed)
            if not are_numbers(self.model.residual(stream)):
                return "the embedding"
            for index in range(self.model.blocks):
                stream = self.model.block(index, stream, state, self.supply)
                if not are_numbers(self.model.residual(stream)):
                    return f"layer {index}"
        return "the head"

    def nats(self, passage: Passage, *, deadline: Optional[float] = None) -> float:
        """Returns -ln of the continuation's probability, in float64 from the logits on. Raises as `predict`."""
        rows = zip(self.predict(passage, deadline=deadline), passage.continuation)
        return -sum(float(log_probabilities(row.astype(np.float64))[token]) for row, token in rows)

    def close(self) -> None:
        self._opened.close()

    @property
    def backend(self) -> str:
        """Returns the backend that computes: numpy or native."""
        return self._kernels.backend

    @property
    def achieved_bytes_per_s(self) -> Optional[float]:
        """Returns the rate that emulated storage had while it was busy; None for real storage."""
        return self._store.achieved_bytes_per_s

    @property
    def reader(self) -> str:
        """Returns the reader that engaged."""
        return self._store.reader

    def load_report(
        self, load_s: float, resident_fraction: Optional[float], storage: Optional[StorageRates] = None
    ) -> Load:
        return Load(
            load_s=load_s,
            phases_s=self.phases_s,
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
            threads=self._kernels.threads,
            lanes=self._store.lanes,
            storage=storage,
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
    reader, lanes, storage = choose_reading(container, request, clock=clock)
    cold = request.page_cache == "cold"
    if cold:
        meters.evict_from_page_cache(container.path)
    else:
        if request.memory_limit_bytes is not None:
            meters.evict_from_page_cache(container.path)  # what others read in counts against no limit of ours
        meters.read_into_page_cache(container.path)
    resident_fraction = meters.page_cache_resident_fraction(container.path)
    load_start = clock()
    engine = Engine(
        container, strategy, expert_budget=request.expert_budget, profile=profile, reader=reader, lanes=lanes,
        keep_cached=not cold, emulated_read_bytes_per_s=request.emulated_read_bytes_per_s,
        backend=request.backend, threads=request.threads, clock=clock,
    )  # fmt: skip
    try:
        if cold:
            meters.evict_from_page_cache(container.path)  # the non-experts, which are in ordinary memory now
        emit("loaded", load=engine.load_report(clock() - load_start, resident_fraction, storage))
        for repetition in range(-request.warmups, request.repetitions):
            warmup = repetition < 0
            for index in range(len(request.prompts)):
                sample = _sample(
                    engine, request, index, repetition + request.warmups if warmup else repetition, warmup, deadline
                )
                emit("sample", sample=sample)
        totals = Totals(
            wall_s=clock() - start,
            peak_resident_bytes=meters.peak_resident_bytes(),
            major_faults=meters.major_faults(),
            storage_read_bytes=meters.storage_read_bytes(),
            page_cache_resident_fraction=meters.page_cache_resident_fraction(container.path),
            emulated_read_bytes_per_s=engine.achieved_bytes_per_s,
        )
        if request.timeline_steps:
            last = len(request.prompts) - 1
            emit("sample", sample=_sample(engine, request, last, request.warmups, True, deadline, timeline=True))
        nats = tuple(max(0.0, engine.nats(passage, deadline=deadline)) for passage in request.passages)
    finally:
        engine.close()
    emit("finished", totals=replace(totals, passage_nats=nats))


def _sample(
    engine: Engine,
    request: RunRequest,
    prompt: int,
    repetition: int,
    warmup: bool,
    deadline: float,
    *,
    timeline: bool = False,
) -> Sample:
    faults = meters.major_faults()
    tokens, steps = engine.generate(
        request.prompts[prompt],
        request.timeline_tokens if timeline else request.max_new_tokens,
        request.sampling,
        stop_at_eos=request.stop_at_eos,
        deadline=deadline,
        timeline_steps=request.timeline_steps if timeline else 0,
    )
    faults_after = meters.major_faults()
    return Sample(
        prompt=prompt,
        repetition=repetition,
        warmup=warmup,
        tokens=tokens,
        steps=steps,
        major_faults=None if faults is None or faults_after is None else faults_after - faults,
        peak_resident_bytes=meters.peak_resident_bytes(),
        recall=engine.supply.take_recall(),
        layers=engine.supply.take_layer_counts(),
        timeline=engine.take_timeline(),
    )


def _predictor(strategy: Strategy, profile: Optional[PathProfile], model: Model) -> Optional[Predictor]:
    if strategy.predictor == "oracle":
        return OraclePredictor()  # which learns from a rehearsal of each prompt
    if strategy.predictor is None:
        return None
    return predictor_named(strategy.predictor, PredictorInputs(profile, model.preview_router))


class _Rehearsal:
    """Records what the decoder's routers choose for the last token of each forward pass."""

    def __init__(self, first_layer: int) -> None:
        self._first_layer = first_layer
        self.routing: List[Dict[int, Tuple[int, ...]]] = []

    def observe(self, layer: int, chosen: np.ndarray) -> None:
        if layer < self._first_layer:
            return
        if layer == self._first_layer:
            self.routing.append({})
        self.routing[-1][layer] = tuple(sorted(chosen[-1].tolist()))
