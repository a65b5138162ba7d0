"""The comparison with llama.cpp. Run it through ci/peers, which installs what it needs.

    ci/peers agree DIR                      is it the same model? perplexity and greedy tokens
    ci/peers resident [DIR]...              tokens/s with everything in memory; without DIR, of random weights
    ci/peers limited DIR --rates 40,200     tokens/s where half of the model fits, from slow storage; needs root

DIR holds a Mixtral checkpoint with a tokenizer. What is made of it stays in build/peers and is used again.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from engine.container import Container
from engine.errors import EngineError
from engine.models.mixtral import MixtralConfig
from tests.golden.checkpoints import HELD_OUT
from tests.programs.peers.agree import agreement
from tests.programs.peers.limited import STRATEGIES, compare_limited
from tests.programs.peers.models import PAIRS, PeerModel
from tests.programs.peers.resident import compare_resident

BUILD = Path("build/peers")
PROMPT_TOKENS = 32
TEXT = HELD_OUT[1]  # the novel


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that cards are unmounted then, too
    try:
        return {"agree": _agree, "resident": _resident, "limited": _limited}[options.command](options)
    except EngineError as error:
        sys.stderr.write(f"ci/peers: {error}\n")
        return 2


def _agree(options: argparse.Namespace) -> int:
    """1 where they do not."""
    apart = 0
    for model in _models(options):
        text = model.tokens(options.text, options.tokens)
        for pair in options.pairs:
            row = agreement(model, pair, text)
            apart += not row["agree"]
            verdict = "" if row["agree"] else ": NOT the same model"
            _show(
                options, row,
                f"{model.name:12} {pair.name:15} perplexity of {row['tokens']} tokens {row['ours_perplexity']:.3f}, "
                f"theirs {row['theirs_perplexity']:.3f} ({row['difference']:+.2%}); the first {row['same_tokens']} of "
                f"{row['of_greedy_tokens']} greedy tokens are the same{verdict}",
            )  # fmt: skip
    return min(1, apart)


def _resident(options: argparse.Namespace) -> int:
    for model in _models(options):
        prompt = model.tokens(options.text, PROMPT_TOKENS)
        for threads in options.threads:
            for row in compare_resident(
                model, options.pairs, prompt, new_tokens=options.tokens, threads=threads, rounds=options.rounds,
                tries=options.tries, numpy=options.numpy, progress=_progress,
            ):  # fmt: skip
                mine, other, ratio = row["ours_tokens_per_s"], row["theirs_tokens_per_s"], row["ratio"]
                numpy = f"  over numpy {_range(row['numpy_ratio'])}" if "numpy_ratio" in row else ""
                _show(
                    options, row,
                    f"{model.name:12} {row['pair']:15} threads {threads}  ours {_range(mine)}  theirs {_range(other)}"
                    f"  ratio {_range(ratio)}  MB a token {row['ours_bytes_per_token'] / 1e6:.0f} and "
                    f"{row['theirs_bytes_per_token'] / 1e6:.0f}{numpy}",
                )  # fmt: skip
    return 0


def _limited(options: argparse.Namespace) -> int:
    for model in _models(options):
        profile, prompts = model.profile(), _prompts(model, options)
        for pair in options.pairs:
            for row in compare_limited(
                model, pair, profile, prompts, new_tokens=options.tokens, rates=options.rates,
                strategies=options.strategies, read_ahead_kib=options.read_ahead_kib, folder=options.card,
                progress=_progress,
            ):  # fmt: skip
                contenders = "".join(f"\n    {name:22} {_contender(c)}" for name, c in row["contenders"].items())
                _show(
                    options, {"prompts": "random" if options.random_tokens else "text", **row},
                    f"{model.name} {pair.name} {row['storage_bytes_per_s'] / 1e6:.0f} MB/s, limit "
                    f"{row['limit_bytes'] / 1e6:.0f} MB, read-ahead {row['read_ahead_kib']} KiB: {row['best']} over "
                    f"{row['peer']}: {_range(row['ratio'])}{contenders}",
                )  # fmt: skip
    return 0


def _models(options: argparse.Namespace) -> Iterable[PeerModel]:
    if not options.checkpoints:
        yield PeerModel.random(BUILD)
    for folder in options.checkpoints:
        yield PeerModel.of(folder, BUILD)


def _prompts(model: PeerModel, options: argparse.Namespace) -> list[tuple[int, ...]]:
    if options.random_tokens:
        random = np.random.default_rng(0)
        vocab_size = MixtralConfig.parse(Container.open(model.container("int8")).config).vocab_size
        return [tuple(random.integers(3, vocab_size, PROMPT_TOKENS).tolist()) for _ in range(options.rounds)]
    tokens = model.tokens(options.text, None)
    starts = np.linspace(0, len(tokens) - PROMPT_TOKENS, options.rounds + 1, dtype=int)[:-1]
    return [tokens[start : start + PROMPT_TOKENS] for start in starts.tolist()]


def _contender(c: dict[str, Any]) -> str:
    own = "" if c["hit_rate"] is None else f", hits {c['hit_rate']:.0%}, stall {c['stall_share']:.0%}"
    return (
        f"{_range(c['tokens_per_s'])} tokens/s, the first after {c['load_s'] + c['ttft_s']:.1f} s, "
        f"read {c['storage_read_bytes'] / 1e6:.0f} MB, most used {c['most_used_bytes'] / 1e6:.0f} MB{own}"
    )


def _range(spread: dict[str, float]) -> str:
    return f"{spread['median']:.2f} ({spread['least']:.2f}-{spread['most']:.2f})"


def _show(options: argparse.Namespace, row: dict[str, Any], line: str) -> None:
    sys.stdout.write((json.dumps(row) if options.json else line) + "\n")
    sys.stdout.flush()


def _progress(text: str) -> None:
    sys.stderr.write(f"  {text}\n")
    sys.stderr.flush()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ci/peers", description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    helps = {
        "agree": "whether both compute the same model",
        "resident": "everything in memory",
        "limited": "half of the model in memory",
    }
    for name, help_text in helps.items():
        command = commands.add_parser(name, help=help_text, allow_abbrev=False)
        command.add_argument(
            "checkpoints", nargs="*" if name == "resident" else "+", type=Path, metavar="DIR",
            help="Mixtral checkpoints",
        )  # fmt: skip
        command.add_argument(
            "--pairs", type=_list(PAIRS.__getitem__), default=list(PAIRS.values()), metavar="A,B",
            help=f"of {', '.join(PAIRS)} (default: all)",
        )  # fmt: skip
        command.add_argument("--text", type=Path, default=TEXT, help=f"prompts are taken from it (default {TEXT.name})")
        command.add_argument("--tokens", type=int, default=320 if name == "agree" else 64, metavar="N",
                             help="to predict, or to generate (default %(default)s)")  # fmt: skip
        command.add_argument("--json", action="store_true", help="a line of JSON for each row, as it is measured")
        if name != "agree":
            command.add_argument("--rounds", type=int, default=3, help="turns of each engine (default %(default)s)")
        if name == "resident":
            command.add_argument("--threads", type=_list(int), default=[1, 2], metavar="N,M", help="(default 1,2)")
            command.add_argument("--tries", type=int, default=3, help="of each while others are busy (default 3)")
            command.add_argument("--numpy", action="store_true", help="our numpy kernels too")
        if name == "limited":
            command.add_argument("--rates", type=_list(lambda mb: int(float(mb) * 1e6)), metavar="MB/S,...",
                                 default=[40_000_000, 200_000_000, 800_000_000], help="(default 40,200,800)"
                                 )  # fmt: skip
            command.add_argument("--strategies", type=_list(str), default=list(STRATEGIES), metavar="A,B",
                                 help=f"(default {','.join(STRATEGIES)})")  # fmt: skip
            command.add_argument("--read-ahead-kib", type=int, default=128, help="of the device (default %(default)s)")
            command.add_argument(
                "--card",
                type=Path,
                default=BUILD,
                metavar="FOLDER",
                help="that holds its image: /dev/shm where the disk is slower than a rate asked for",
            )
            command.add_argument("--random-tokens", action="store_true", help="prompts of random tokens, which flatter")
    return parser


def _list(kind: Any) -> Any:
    def parse(text: str) -> list[Any]:
        try:
            return [kind(word) for word in text.split(",")]
        except KeyError as error:
            raise argparse.ArgumentTypeError(f"{error} is not known") from None

    return parse


if __name__ == "__main__":
    sys.exit(main())
