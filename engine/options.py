"""The options of a generation, once: `python3 -m engine generate` and `edgemoe-farm model generate` have the same."""

from __future__ import annotations

import argparse
from typing import Any, Mapping, NamedTuple, Optional, Tuple

from engine.protocol import BACKENDS, MOST_LANES, PAGE_CACHES, READERS, ExpertBudget, RunRequest, Sampling


class Option(NamedTuple):
    """An option as a command line shows it; `name` is without its dashes."""

    name: str
    help: str  # a sentence
    default: Any = None  # False: a flag
    kind: Any = str  # type of the value
    choices: Tuple[str, ...] = ()
    least: Optional[int] = None
    most: Optional[int] = None
    metavar: Optional[str] = None

    @property
    def key(self) -> str:
        """Returns the name under which a parser hands the value over."""
        return self.name.replace("-", "_")


GENERATION = (
    Option("max-new", "Tokens to generate.", 32, int, least=1, metavar="N"),
    Option("strategy", "One of those that `strategies` lists.", "full-load"),
    Option("expert-budget", "Size of the expert buffer, such as 64MiB or 10-experts.", kind=ExpertBudget),
    Option("profile", "Activation profile, for strategies that predict.", metavar="FILE"),
    Option("seed", "Seed of the sampling.", 0, int, least=0),
    Option("temperature", "Temperature of the sampling; 0 is greedy.", 0.0, float),
    Option("top-p", "Sample from the likeliest tokens only, which have this share together.", 1.0, float),
    Option("stop-at-eos", "Stop at the model's end-of-sequence token.", False, bool),
    Option("reader", "How experts are read; auto: as a probe of cold storage finds fastest.", "auto",
           choices=("auto", *READERS)),
    Option("lanes", "Threads that read; 0: as many as the probe finds best.", 0, int, least=0, most=MOST_LANES),
    Option("page-cache", "cold: emptied before, and reading experts leaves nothing in it.", "warm",
           choices=PAGE_CACHES),
    Option("emulated-read-bytes-per-s", "Slow expert reads down to this rate: emulation.", kind=float, metavar="RATE"),
    Option("backend", "Kernels; auto: native where they run.", "auto", choices=BACKENDS),
    Option("threads", "Threads of the arithmetic; 0: what suits the cores.", 0, int, least=0),
)  # fmt: skip


def add_generation_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of a generation to the engine's own command line."""
    for option in GENERATION:
        text, flag = option.help[0].lower() + option.help[1:].rstrip("."), f"--{option.name}"
        if option.default is False:
            parser.add_argument(flag, action="store_true", help=text)
            continue
        bounded = None if option.most is None else range(option.most + 1)
        shown = "" if option.default is None else " (default %(default)s)"
        parser.add_argument(
            flag, type=option.kind if option.kind in (int, float) else str, default=option.default,
            choices=option.choices or bounded, metavar=option.metavar, help=text + shown,
        )  # fmt: skip


def generation_request(run_id: str, container: str, prompt: Tuple[int, ...], options: Mapping[str, Any]) -> RunRequest:
    """Returns the request that the values of the options, by their keys, ask for. Raises RequestError."""
    budget, profile = options["expert_budget"], options["profile"]
    as_named = ("strategy", "stop_at_eos", "reader", "lanes", "page_cache", "emulated_read_bytes_per_s", "threads")
    return RunRequest(
        run_id=run_id,
        container=container,
        prompts=(prompt,),
        max_new_tokens=options["max_new"],
        expert_budget=ExpertBudget.parse(budget) if isinstance(budget, str) else budget,
        profile=None if profile is None else str(profile),
        sampling=Sampling(options["temperature"], options["top_p"], options["seed"]),
        backend=options["backend"],
        **{name: options[name] for name in as_named},
    )
