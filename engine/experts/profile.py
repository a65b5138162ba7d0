"""The activation profile of a model: which experts tokens activate, and which follow on which (paper, section 3.2).

For each MoE layer, three tables of counts: of every expert (`marginal`), of every expert after the set of experts
that the previous MoE layer activated (`one`), and after the sets of the two previous MoE layers (`two`). The previous
layers of the first two MoE layers are the last ones of the token before, as in the authors' code. With top-k routing
a set is the sorted tuple of its k experts. A fourth table counts every expert by the token itself (`by_token`), which
is known before its first layer runs. Layers of an encoder are not counted: it takes all tokens of a prompt together.

The file is JSON: {"schema": "edgemoe-profile", "version": 2, ...}. History of VERSION: 1 first; 2 adds by_token, and a
file without it is refused: making it again is one command.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Sequence, Tuple

from engine.errors import ContainerError
from engine.files import replacing

SCHEMA = "edgemoe-profile"
VERSION = 2
MAX_FILE_BYTES = 256 << 20

ExpertSet = Tuple[int, ...]  # sorted
Path = Tuple[ExpertSet, ...]  # of the one or two previous MoE layers, the older first
Counts = Dict[int, int]


@dataclass(frozen=True)
class PathProfile:
    layers: int
    experts: int
    tokens: int
    marginal: Tuple[Counts, ...]  # by layer
    one: Tuple[Dict[Path, Counts], ...]
    two: Tuple[Dict[Path, Counts], ...]
    by_token: Tuple[Dict[int, Counts], ...] = ()  # by layer, then token id; empty where tokens were not counted

    def frequency(self) -> Dict[Tuple[int, int], float]:
        """(layer, expert) -> share of tokens that activate it."""
        return {
            (layer, expert): count / max(1, self.tokens)
            for layer, counts in enumerate(self.marginal)
            for expert, count in counts.items()
        }

    def ranking(self, layer: int, previous: Sequence[ExpertSet]) -> List[int]:
        """Experts of `layer` by descending probability after `previous` (older first); backs off where unseen."""
        tables = [self.marginal[layer]]
        if previous:
            tables.insert(0, self.one[layer].get((previous[-1],), {}))
        if len(previous) > 1:
            tables.insert(0, self.two[layer].get((previous[-2], previous[-1]), {}))
        return _ranked(tables)

    def ranking_of_token(self, layer: int, token: Optional[int]) -> List[int]:
        """Experts of `layer` by descending probability for a token id; backs off to all tokens where it is unseen."""
        counts = self.by_token[layer].get(token, {}) if self.by_token and token is not None else {}
        return _ranked([counts, self.marginal[layer]])

    def save(self, path: str) -> None:
        """Atomically."""
        content = {
            "schema": SCHEMA,
            "version": VERSION,
            "layers": self.layers,
            "experts": self.experts,
            "tokens": self.tokens,
            "marginal": [_counts_to_json(c) for c in self.marginal],
            "one": [_paths_to_json(t) for t in self.one],
            "two": [_paths_to_json(t) for t in self.two],
            "by_token": [{str(k): _counts_to_json(t[k]) for k in sorted(t)} for t in self.by_token],
        }
        try:
            with replacing(path) as file:
                file.write(json.dumps(content, separators=(",", ":")).encode() + b"\n")
        except OSError as error:
            raise ContainerError(f"{path}: the profile cannot be written: {error.strerror}") from None

    @classmethod
    def load(cls, path: str) -> PathProfile:
        """Raises ContainerError, naming the file, for anything but a sound profile."""
        try:
            if os.path.getsize(path) > MAX_FILE_BYTES:
                raise ContainerError(f"{path}: larger than a profile can be")
            with open(path, "rb") as file:
                content = json.loads(file.read(MAX_FILE_BYTES))
            return cls._parse(content)
        except OSError as error:
            raise ContainerError(f"{path}: cannot be opened: {error.strerror}") from None
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise ContainerError(
                f"{path}: not a sound profile ({type(error).__name__}: {str(error)[:120]}); make it again with "
                "`edgemoe-farm model profile`"
            ) from None

    @classmethod
    def _parse(cls, content: Any) -> PathProfile:
        if content["schema"] != SCHEMA or content["version"] != VERSION:
            raise ValueError(f"schema {content['schema']!r} version {content['version']!r}, not {SCHEMA} {VERSION}")
        layers, experts = int(content["layers"]), int(content["experts"])
        profile = cls(
            layers,
            experts,
            int(content["tokens"]),
            tuple(_counts_from_json(c, experts) for c in content["marginal"]),
            tuple(_paths_from_json(t, experts) for t in content["one"]),
            tuple(_paths_from_json(t, experts) for t in content["two"]),
            tuple({int(k): _counts_from_json(c, experts) for k, c in t.items()} for t in content["by_token"]),
        )
        if not len(profile.marginal) == len(profile.one) == len(profile.two) == layers:
            raise ValueError("a table for each layer is expected")
        if len(profile.by_token) not in (0, layers):
            raise ValueError("by_token: a table for each layer, or none, is expected")
        return profile


class PathCounter:
    """Counts activation paths while a model runs, one sequence after another."""

    def __init__(self, layers: int, experts: int, first_layer: int = 0) -> None:
        """Of `layers` MoE layers those before `first_layer` are an encoder's."""
        self.layers, self.experts, self.first_layer = layers, experts, first_layer
        self.tokens = 0
        self._marginal: List[Counts] = [{} for _ in range(layers)]
        self._one: List[Dict[Path, Counts]] = [{} for _ in range(layers)]
        self._two: List[Dict[Path, Counts]] = [{} for _ in range(layers)]
        self._by_token: List[Dict[int, Counts]] = [{} for _ in range(layers)]
        self._occurrences: Dict[int, int] = {}  # of token ids

    def observe(self, routing: Sequence[Sequence[ExpertSet]], tokens: Sequence[int] = ()) -> None:
        """One sequence: routing[token][i] is the set of experts that it activated in MoE layer `first_layer` + i.

        `tokens`: their ids, if they are to be counted by id too.
        """
        flat = [tuple(sorted(chosen)) for token in routing for chosen in token]
        self.tokens += len(routing)
        for i, chosen in enumerate(flat):
            layer = self.first_layer + i % (self.layers - self.first_layer)
            tables = [self._marginal[layer]]
            if i >= 1:
                tables.append(self._one[layer].setdefault((flat[i - 1],), {}))
            if i >= 2:
                tables.append(self._two[layer].setdefault((flat[i - 2], flat[i - 1]), {}))
            for counts in tables:
                for expert in chosen:
                    counts[expert] = counts.get(expert, 0) + 1
        for token, by_layer in zip(tokens, routing):
            self._occurrences[token] = self._occurrences.get(token, 0) + 1
            for layer, chosen in enumerate(by_layer, self.first_layer):
                counts = self._by_token[layer].setdefault(token, {})
                for expert in chosen:
                    counts[expert] = counts.get(expert, 0) + 1

    def finish(self, least: int = 2) -> PathProfile:
        """Paths of two layers, and token ids, seen fewer than `least` times are left to the back-off: too little."""
        two = tuple({p: c for p, c in table.items() if max(c.values()) >= least} for table in self._two)
        seen = tuple({t: c for t, c in table.items() if self._occurrences[t] >= least} for table in self._by_token)
        by_token = seen if self._occurrences else ()
        return PathProfile(
            self.layers, self.experts, self.tokens, tuple(self._marginal), tuple(self._one), two, by_token
        )


def _ranked(tables: Sequence[Counts]) -> List[int]:
    """By the first table, what is not in it by the next; ties by number."""
    ranked: Dict[int, None] = {}
    for counts in tables:
        for expert in sorted(counts, key=lambda e: (-counts[e], e)):
            ranked.setdefault(expert)
    return list(ranked)


def _counts_to_json(counts: Counts) -> List[List[int]]:
    return [[expert, counts[expert]] for expert in sorted(counts, key=lambda e: (-counts[e], e))]


def _counts_from_json(pairs: Any, experts: int) -> Counts:
    counts = {int(expert): int(count) for expert, count in pairs}
    if any(not 0 <= e < experts or c < 0 for e, c in counts.items()):
        raise ValueError(f"an expert outside 0 .. {experts - 1} or a negative count")
    return counts


def _paths_to_json(table: Dict[Path, Counts]) -> Dict[str, List[List[int]]]:
    """Keys read 3.7/0.12: experts 3 and 7, then 0 and 12."""
    return {"/".join(".".join(map(str, s)) for s in path): _counts_to_json(table[path]) for path in sorted(table)}


def _paths_from_json(table: Any, experts: int) -> Dict[Path, Counts]:
    return {
        tuple(tuple(int(e) for e in s.split(".")) for s in key.split("/")): _counts_from_json(pairs, experts)
        for key, pairs in table.items()
    }
