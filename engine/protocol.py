"""Defines the messages between the controller and the engine on a device. Standard library only.

The controller writes one RunRequest as JSON. The engine answers with JSON lines, one event a line:

    {"v": 1, "event": "settling", "waited_s": ..., "reasons": [...]}   now and then before the engine starts
    {"v": 1, "event": "started",  "facts": DeviceFacts, "request_sha256": ...}
    {"v": 1, "event": "loaded",   "load": Load}
    {"v": 1, "event": "sample",   "sample": Sample}        once for each timed repetition of a prompt, warm-ups included
    {"v": 1, "event": "finished", "totals": Totals}
    {"v": 1, "event": "failed",   "kind": ..., "message": ...}   instead of "finished"

Every message is checked on arrival: an unknown key, a missing key, a wrong type or an unknown version is a
ProtocolError that names the place. Units stand in the names.

A field that is added has a default, and VERSION stays. A pinned baseline is measured with the engine of its day: with
a higher version, or a new field that must be there, it could not be measured any more. VERSION rises only if a field
changes its meaning or goes.

History of VERSION: 1 first; since then Sample.recall, RunRequest.passages, Totals.passage_nats, Load.variant,
Load.phases_s, RunRequest.lanes, Load.lanes, Load.storage, the reader "auto", RunRequest.memory_limit_bytes,
RunRequest.settle, the event "settling", the fields of DeviceFacts from core_kinds on, RunRequest.timeline_steps,
Sample.timeline, Sample.layers and Watched.resident were added, which may be missing.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import field
from typing import Any, Dict, Optional, Tuple, Union

from engine.codec import MOST_S, decode, loads, one_of, require, same_keys, shown, to_json
from engine.dataclass import dataclass
from engine.errors import ProtocolError
from engine.sizes import size_of
from engine.spans import MOST_TIMELINE_STEPS, Timeline

VERSION = 1
READERS = ("pread", "direct", "mmap")
MOST_LANES = 2
PAGE_CACHES = ("cold", "warm")
BACKENDS = ("auto", "native", "numpy")
LIMIT_METHODS = ("cgroup-v2", "cgroup-v1", "rlimit-data", "none")  # see engine.device.limits
MOST_CHARACTERS = 4096  # of one fact about a device
MOST_SERIES_POINTS = 200


@dataclass(frozen=True)
class ExpertBudget:
    """Limits the memory of the expert buffer: bytes, or a number of the container's largest expert records."""

    bytes: Optional[int] = None
    experts: Optional[int] = None

    def __post_init__(self) -> None:
        require((self.bytes is None) != (self.experts is None), "expert_budget: give bytes or experts, not both")
        require((self.bytes or self.experts or 0) > 0, "expert_budget must be positive")

    def __str__(self) -> str:
        return f"{self.experts}-experts" if self.bytes is None else str(self.bytes)

    @classmethod
    def parse(cls, text: str) -> ExpertBudget:
        """Returns the budget of `8-experts`, `16777216`, `64MiB` or `64MB`. Raises ProtocolError."""
        word = text.strip().lower().replace(" ", "").replace("_", "")
        if word.endswith(("-experts", "-expert", "experts", "expert")):
            digits = word.split("e", 1)[0].rstrip("-")
            if digits.isascii() and digits.isdigit():
                return cls(experts=int(digits))
        size = size_of(word)
        if size is None:
            raise ProtocolError(f"expert budget {text!r} is not a size: write bytes (67108864, 64MiB) or 8-experts")
        return cls(bytes=size)


@dataclass(frozen=True)
class Sampling:
    """Says how tokens are chosen: greedy at temperature 0, else seeded nucleus sampling (Holtzman et al., 2020)."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        require(0 <= self.temperature <= 100, "sampling.temperature must be between 0 and 100")
        require(0 < self.top_p <= 1, "sampling.top_p must be above 0 and at most 1")
        require(0 <= self.seed < 1 << 63, "sampling.seed must be between 0 and 2**63 - 1")


@dataclass(frozen=True)
class Passage:
    """Holds text of which a part is to be predicted, in token ids.

    A model with an encoder reads the prompt there; else prompt and continuation are one sequence.
    """

    prompt: Tuple[int, ...]
    continuation: Tuple[int, ...]

    def __post_init__(self) -> None:
        for name, tokens in (("prompt", self.prompt), ("continuation", self.continuation)):
            require(bool(tokens), f"passage: the {name} is empty")
            valid = all(0 <= token < 1 << 31 for token in tokens)
            require(valid, f"passage: the {name} has a token id outside 0 .. 2**31 - 1")


@dataclass(frozen=True)
class Settle:
    """Says what a device's state should be before the engine starts there, and how long to wait for it."""

    max_wait_s: float = 0.0
    temperature_c: Optional[float] = None  # at most
    max_load: Optional[float] = None  # other tasks that want a processor, on average
    max_memory_pressure: Optional[float] = None  # share of time in which a task waits for memory
    governor: Optional[str] = None  # waited for by nobody: it does not come by itself

    def __post_init__(self) -> None:
        require(0 <= self.max_wait_s <= 86400, "settle.max_wait_s must be between 0 and 86400")


@dataclass(frozen=True)
class RunRequest:
    """Asks for one engine process: container, strategy, workload, and the conditions of the measurement."""

    run_id: str
    container: str  # path on the device
    strategy: str
    prompts: Tuple[Tuple[int, ...], ...]  # token ids; each prompt is generated from `repetitions` times
    max_new_tokens: int
    expert_budget: Optional[ExpertBudget] = None  # None: the strategy's default
    profile: Optional[str] = None  # path on the device; needed by strategies with a path predictor
    sampling: Sampling = field(default_factory=Sampling)
    stop_at_eos: bool = False
    warmups: int = 0
    repetitions: int = 1
    reader: str = "auto"  # one of READERS, or what a probe of the storage finds fastest, see engine.storage
    lanes: int = 0  # threads that read, 1 or 2; 0: what the probe finds, and one for a reader that is said
    page_cache: str = "cold"
    emulated_read_bytes_per_s: Optional[float] = None  # the engine's own rate limit on expert reads
    threads: int = 0  # of the arithmetic; 0: as many as suit the device, see engine.device.cores
    backend: str = "auto"
    deadline_s: float = 3600.0
    passages: Tuple[Passage, ...] = ()  # predicted after all that is timed: what a lossy strategy loses
    memory_limit_bytes: Optional[int] = None  # under which the engine's process is started, see engine.device.limits
    settle: Optional[Settle] = None  # None: the engine starts at once, and nothing is asked of the device's state
    timeline_steps: int = 0  # of a timeline, for which the last prompt is begun once more after all that is timed

    def __post_init__(self) -> None:
        require(bool(self.run_id), "run_id is empty")
        require(bool(self.container), "container is empty")
        require(bool(self.prompts), "prompts is empty")
        for i, prompt in enumerate(self.prompts):
            require(bool(prompt), f"prompts[{i}] is empty: a prompt needs at least one token")
            require(all(0 <= t < 1 << 31 for t in prompt), f"prompts[{i}] has a token id outside 0 .. 2**31 - 1")
        require(1 <= self.max_new_tokens <= 1 << 20, "max_new_tokens must be between 1 and 1048576")
        require(0 <= self.warmups <= 1000, "warmups must be between 0 and 1000")
        require(1 <= self.repetitions <= 10000, "repetitions must be between 1 and 10000")
        require(0 <= self.threads <= 1024, "threads must be between 0 and 1024")
        require(0 < self.deadline_s <= 30 * 86400, "deadline_s must be above 0 and at most 30 days")
        one_of(self.reader, ("auto", *READERS), "reader")
        require(0 <= self.lanes <= MOST_LANES, f"lanes must be between 0 and {MOST_LANES}")
        one_of(self.page_cache, PAGE_CACHES, "page_cache")
        one_of(self.backend, BACKENDS, "backend")
        rate = self.emulated_read_bytes_per_s
        require(rate is None or 1e3 <= rate <= 1e12, "emulated_read_bytes_per_s must be between 1e3 and 1e12")
        limit = self.memory_limit_bytes
        require(limit is None or 1 << 20 <= limit < 1 << 62, "memory_limit_bytes must be at least 1048576")
        within = 0 <= self.timeline_steps <= MOST_TIMELINE_STEPS
        require(within, f"timeline_steps must be between 0 and {MOST_TIMELINE_STEPS}")

    @property
    def timeline_tokens(self) -> int:
        """Returns the tokens of the timeline: its steps, and as many before them for the prefill to wear off."""
        return min(self.max_new_tokens, 2 * self.timeline_steps + 1) if self.timeline_steps else 0


@dataclass(frozen=True)
class CoreKind:
    """Describes cores of one kind: a big.LITTLE processor has two or three, the fastest first."""

    cores: int
    name: Optional[str]  # such as Cortex-A76
    highest_hz: Optional[float]


@dataclass(frozen=True)
class DeviceFacts:
    """Holds what the device says of itself. None if it does not say: unknown is never fine."""

    hostname: str
    machine: str  # uname -m
    kernel: str
    os: Optional[str]
    model: Optional[str]  # of the board, from the device tree or DMI
    cpu: Optional[str]
    cores: int
    memory_bytes: Optional[int]
    page_bytes: int
    boot_id: Optional[str]
    python: str
    numpy: str
    blas: Optional[str]
    engine: str  # version of the engine that answered
    core_kinds: Tuple[CoreKind, ...] = ()
    board: Optional[str] = None  # raspberry-pi, jetson, android: whose own sources were asked; None: any Linux
    power_mode: Optional[str] = None  # such as nvpmodel's MAXN
    storage: Optional[str] = (
        None  # under the engine: sd-card, emmc, nvme, ufs, usb, sata, virtual, loop, memory, network
    )
    storage_model: Optional[str] = None
    read_ahead_bytes: Optional[int] = None  # of that storage
    swap_bytes: Optional[int] = None
    memory_limit_method: Optional[str] = None  # by which a memory limit would be enforced, see engine.device.limits
    now: Optional[Watched] = None  # what its sensors say, where that was asked for: a run has its Conditions

    def __post_init__(self) -> None:
        for fact in dataclasses.fields(self):
            value = getattr(self, fact.name)
            short = not isinstance(value, str) or len(value) <= MOST_CHARACTERS
            require(short, f"facts: {fact.name} is longer than {MOST_CHARACTERS} characters")


@dataclass(frozen=True)
class ArithmeticTimes:
    """Holds what `python3 -m engine arithmetic CONTAINER` measured: one token at a time, without waiting."""

    layer_s: float  # a MoE layer but for its experts, and whatever layers without experts stand before it
    head_s: float  # all that comes after the last layer's experts
    expert_s: Dict[str, float]  # one expert on one token, by the label of its format
    non_expert_bytes: int  # resident
    base_bytes: Optional[int]  # resident before the model was loaded: the interpreter and numpy
    backend: str
    variant: Optional[str]

    def __post_init__(self) -> None:
        times = (self.layer_s, self.head_s, *self.expert_s.values())
        require(all(0 < seconds < 1e6 for seconds in times), "arithmetic: a time is not positive")


@dataclass(frozen=True)
class ReadingRate:
    """Holds the rate of one way of reading experts, cold, in blocks of a record's size at random places."""

    reader: str
    lanes: int
    bytes_per_s: float  # the median of its turns
    least_bytes_per_s: float
    most_bytes_per_s: float

    def __post_init__(self) -> None:
        one_of(self.reader, READERS, "storage: reader")
        require(1 <= self.lanes <= MOST_LANES, f"storage: lanes must be 1 to {MOST_LANES}")
        ordered = 0 < self.least_bytes_per_s <= self.bytes_per_s <= self.most_bytes_per_s < 1e15
        require(ordered, "storage: a rate is not positive, or not between the least and the most")


@dataclass(frozen=True)
class StorageRates:
    """Says which way of reading experts was chosen, and from which rates; see engine.storage."""

    reader: str
    lanes: int
    why: str
    block_bytes: int = 0  # that were read at once
    rates: Tuple[ReadingRate, ...] = ()  # empty where nothing was measured
    direct_refused: Optional[str] = None  # what the storage said to O_DIRECT
    age_s: float = 0.0  # since it was measured: a probe is kept beside the container

    @property
    def bytes_per_s(self) -> Optional[float]:
        """Returns the rate of the chosen way; None if nothing was measured."""
        chosen = [rate for rate in self.rates if (rate.reader, rate.lanes) == (self.reader, self.lanes)]
        return chosen[0].bytes_per_s if chosen else None


@dataclass(frozen=True)
class Load:
    """Says what happened before the first token, and what engaged: asking for it is no proof."""

    load_s: float  # opening, reading the non-experts and, where the strategy says so, experts
    non_expert_bytes: int  # resident
    expert_bytes: int  # resident when loading ended
    expert_budget_bytes: Optional[int]  # None: unlimited
    container_bytes: int
    container_experts: int
    page_cache_resident_fraction: Optional[float]  # of the container, measured with mincore, before the load
    strategy: Dict[str, str]  # the parts that engaged
    reader: str  # the method that engaged
    backend: str
    variant: Optional[str] = None  # of the backend: which native library; None for numpy
    threads: Optional[int] = None  # of the arithmetic; None: not recorded, by engines up to 0.1
    lanes: Optional[int] = None  # threads that read; None: not recorded, and one
    storage: Optional[StorageRates] = None  # how reader and lanes were chosen, where they were left to the engine
    warnings: Tuple[str, ...] = ()  # something is not as asked for: the numbers are suspect
    notes: Tuple[str, ...] = ()  # what one should know of the configuration; makes no number suspect
    phases_s: Dict[str, float] = field(default_factory=dict)  # of load_s: kernels, non_experts, experts


@dataclass(frozen=True)
class Steps:
    """Holds one entry per step, in columns of equal length. Step 0 is the prefill, which yields the first token.

    `stall_s` is the part of `time_s` in which the arithmetic waited for an expert. When the router answers, an
    expert is a hit (resident), late (a preload of it was under way) or a miss. `wasted_bytes` were preloaded and
    then evicted or broken off unused; they count in the step in which that became known.
    """

    time_s: Tuple[float, ...]
    stall_s: Tuple[float, ...]
    hits: Tuple[int, ...]
    late: Tuple[int, ...]
    misses: Tuple[int, ...]
    read_bytes: Tuple[int, ...]
    prefetched_bytes: Tuple[int, ...]
    wasted_bytes: Tuple[int, ...]

    def __post_init__(self) -> None:
        lengths = {len(getattr(self, f.name)) for f in dataclasses.fields(self)}
        require(len(lengths) == 1, "steps: the columns differ in length")
        require(all(0 <= t < MOST_S for t in self.time_s + self.stall_s), "steps: a time is negative or absurd")
        counts = (self.hits, self.late, self.misses, self.read_bytes, self.prefetched_bytes, self.wasted_bytes)
        require(all(n >= 0 for column in counts for n in column), "steps: a count is negative")


@dataclass(frozen=True)
class Recall:
    """Counts how good a predictor was while decoding, over the (token, MoE layer) pairs that it predicted."""

    first: int  # activated experts that it had ranked first
    first_two: int
    first_k: int  # k: experts that a token activates in a layer
    activated: int  # of how many


@dataclass(frozen=True)
class LayerCounts:
    """Counts hits, late ones and misses of all decode steps by MoE layer; see Steps. An encoder's are zero."""

    hits: Tuple[int, ...]
    late: Tuple[int, ...]
    misses: Tuple[int, ...]

    def __post_init__(self) -> None:
        columns = (self.hits, self.late, self.misses)
        require(len(set(map(len, columns))) == 1, "layers: the columns differ in length")
        require(all(n >= 0 for column in columns for n in column), "layers: a count is negative")


@dataclass(frozen=True)
class Sample:
    """Holds one repetition of one prompt, raw, as the device saw it.

    With `warmup` it is not timed: it came before all that is, or after it, for a timeline, and then is cut short.
    """

    prompt: int  # index into RunRequest.prompts
    repetition: int
    warmup: bool
    tokens: Tuple[int, ...]  # generated
    steps: Steps
    major_faults: Optional[int]
    peak_resident_bytes: Optional[int]  # of the process so far
    recall: Optional[Recall] = None  # None: nothing was predicted
    layers: Optional[LayerCounts] = None  # None: not recorded, by engines up to 0.1
    timeline: Optional[Timeline] = None  # None: none was asked of this repetition

    def __post_init__(self) -> None:
        require(len(self.tokens) == len(self.steps.time_s), "sample: one step a generated token is expected")
        for name in ("hits", "late", "misses") if self.layers is not None else ():
            same = sum(getattr(self.layers, name)) == sum(getattr(self.steps, name)[1:])
            require(same, f"sample: {name} by layer and by step do not add up to the same")
        require(self.timeline is None or self.warmup, "sample: a timeline of what was timed")


@dataclass(frozen=True)
class Totals:
    """Holds figures of the whole process, taken when all that is timed has ended."""

    wall_s: float
    peak_resident_bytes: Optional[int]
    major_faults: Optional[int]
    storage_read_bytes: Optional[int]  # by the kernel's account (/proc/self/io): what really came from storage
    page_cache_resident_fraction: Optional[float]  # of the container, when the run ended
    passage_nats: Tuple[float, ...] = ()  # of each of RunRequest.passages: -ln of its continuation's probability
    emulated_read_bytes_per_s: Optional[float] = None  # of emulated storage while it was busy; None: real

    def __post_init__(self) -> None:
        require(0 <= self.wall_s < MOST_S, "totals: wall_s is negative or absurd")
        valid = all(0 <= nats < 1e12 for nats in self.passage_nats)
        require(valid, "totals: passage_nats has a negative or absurd entry")
        rate = self.emulated_read_bytes_per_s
        require(rate is None or 0 < rate < 1e15, "totals: emulated_read_bytes_per_s is not positive or absurd")


@dataclass(frozen=True)
class Course:
    """Holds a reading before a run, one after it, and the extremes in between. None if there was none."""

    before: Optional[float] = None
    after: Optional[float] = None
    lowest: Optional[float] = None
    highest: Optional[float] = None


@dataclass(frozen=True)
class Series:
    """Holds a quantity over time, thinned out: of neighbouring readings the larger is kept."""

    time_s: Tuple[float, ...]  # since the device was first read, just before the run
    values: Tuple[int, ...]

    def __post_init__(self) -> None:
        require(len(self.time_s) == len(self.values) <= MOST_SERIES_POINTS, "series: too long, or of unequal columns")
        valid = all(0 <= t < MOST_S for t in self.time_s) and all(value >= 0 for value in self.values)
        require(valid, "series: a time or a value is negative or absurd")


@dataclass(frozen=True)
class Watched:
    """Holds what a process of its own (engine/device/watch.py) saw of a device beside an engine's run.

    A field is None where the device has no such sensor, and then `absent` names it, or where the sensor did not answer,
    and then `unknown` does.
    """

    readings: int = 0
    period_s: float = 0.0  # between two of them
    watched_s: float = 0.0  # from the first to the last
    cpu_s: float = 0.0  # processor time that the watching itself took
    waited_s: float = 0.0  # for the device to settle, before the run
    unsettled: Tuple[str, ...] = ()  # what still did not hold when the wait ended, in words
    temperature_c: Course = field(default_factory=Course)
    frequency_hz: Course = field(default_factory=Course)
    governor: Optional[str] = None  # before
    governor_after: Optional[str] = None
    throttled: Optional[bool] = None  # at any time of the run
    under_voltage: Optional[bool] = None  # the same
    throttle_causes: Tuple[str, ...] = ()
    load: Course = field(default_factory=Course)
    memory_pressure: Course = field(default_factory=Course)
    memory_available_bytes: Course = field(default_factory=Course)
    power: Optional[str] = None  # before: mains or battery
    power_after: Optional[str] = None
    battery: Course = field(default_factory=Course)  # share of its charge
    power_w: Course = field(default_factory=Course)
    energy_j: Optional[float] = None  # over watched_s
    energy_sensor: Optional[str] = None
    absent: Tuple[str, ...] = ()
    unknown: Tuple[str, ...] = ()  # "temperature: why"
    resident: Optional[Series] = None  # bytes of the engine's process; None: nobody looked

    def __post_init__(self) -> None:
        times = (self.period_s, self.watched_s, self.cpu_s, self.waited_s, self.energy_j or 0.0)
        require(self.readings >= 0 and all(t >= 0 for t in times), "watched: a count, a time or an energy is negative")


def encode_event(event: str, **content: Any) -> str:
    """Returns one line, without the newline."""
    return json.dumps({"v": VERSION, "event": event, **to_json(content)}, allow_nan=False, separators=(",", ":"))


def decode_event(line: Union[str, bytes]) -> Tuple[str, Dict[str, Any]]:
    """Returns the event of one line and its decoded content: facts, load, sample, totals as their types."""
    message = loads(line)
    version = message.pop("v", None)
    if version != VERSION:
        raise ProtocolError(f"protocol version {shown(version)} where {VERSION} is spoken: deploy the engine again")
    event = message.pop("event", None)
    if not isinstance(event, str) or event not in _CONTENT:
        raise ProtocolError(f"unknown event {shown(event)}")
    types = _CONTENT[event]
    same_keys(message, set(types), set(types), event)
    return event, {key: decode(types[key], message[key], f"{event}.{key}") for key in types}


_CONTENT: Dict[str, Dict[str, Any]] = {
    "settling": {"waited_s": float, "reasons": Tuple[str, ...]},
    "started": {"facts": DeviceFacts, "request_sha256": str},
    "loaded": {"load": Load},
    "sample": {"sample": Sample},
    "finished": {"totals": Totals},
    "failed": {"kind": str, "message": str},
}
